//! Starts of the agent: on an empty node, and with the maps of an earlier agent.

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use proxy_tests::apiserver::{ApiServer, Resource};
use proxy_tests::lab::{Agent, Node, binary};

use super::process::{CpuTime, Peak, memory};
use super::view::wait_for_maps;
use crate::cpu;
use crate::objects::World;
use crate::sys::Count;

/// Time limit of every wait.
const PATIENCE: Duration = Duration::from_secs(120);
/// Interval at which `/readyz` is asked.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// Durations and costs of a start. Times count from the start of the process unless said otherwise.
pub(super) struct Start {
    pub(super) ready: Duration,
    pub(super) programmed: Duration,
    /// Time at which the API server had sent the last byte of the last list.
    pub(super) listed: Duration,
    pub(super) cpu: CpuTime,
    /// Peak of RssAnon, bytes.
    pub(super) anonymous: u64,
    /// VmHWM, bytes.
    pub(super) high_water: u64,
    /// Number of system calls, or the reason why they were not counted.
    pub(super) syscalls: Result<u64>,
}

/// Starts `agent` on CPU `own_cpu` and follows it until it is ready and the maps hold the world.
///
/// # Errors
/// With the agent's log, if it ends or takes too long.
pub(super) fn start(
    agent: &mut Agent,
    node: &Node,
    api: &ApiServer,
    world: World,
    own_cpu: usize,
) -> Result<Start> {
    let cpu_before = CpuTime::of(node.host().cgroup())?;
    let began = Instant::now();
    let deadline = began + PATIENCE;
    agent.start()?;
    let pid = agent.id().context("the agent has no process")?;
    cpu::pin_process(pid, own_cpu)?;
    let mut syscalls = Count::syscalls(pid);
    let peak = Peak::of(pid);

    let (programmed, ready) = thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let asked: &Agent = agent;
        let asking = scope.spawn(move || {
            loop {
                if matches!(asked.get("/readyz"), Ok((200, _))) {
                    return Some(Instant::now());
                }
                match stopped.recv_timeout(ASK_EVERY) {
                    Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                    _ => return None,
                }
            }
        });
        let alive = || {
            let runs = Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok();
            if runs { Ok(()) } else { bail!("the agent ended") }
        };
        let programmed = wait_for_maps(node.pin_dir(), deadline, alive)
            .and_then(|view| view.wait_for(world, deadline, alive));
        if programmed.is_err() {
            drop(stop);
        }
        let ready = asking.join().unwrap_or(None).context("/readyz never said 200");
        programmed.and_then(|programmed| Ok((programmed, ready?)))
    })
    .with_context(|| format!("the log of the agent:\n{}", agent.log()))?;

    let sent = [Resource::Services, Resource::EndpointSlices].map(|resource| api.list_sent(resource));
    let listed = sent.into_iter().flatten().max().context("no list was asked for")?;
    Ok(Start {
        ready: ready - began,
        programmed: programmed - began,
        listed: listed.saturating_duration_since(began),
        cpu: CpuTime::of(node.host().cgroup())?.since(cpu_before),
        anonymous: peak.bytes(),
        high_water: memory(pid, "VmHWM")?,
        syscalls: match &mut syscalls {
            Ok(count) => count.read(),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        },
    })
}

/// Removes everything that the agent has left in the kernel.
///
/// # Errors
/// If `proxy-agent cleanup` fails.
pub(super) fn cleanup(node: &Node) -> Result<()> {
    let mut command = node.host().command(binary::proxy_agent()?);
    command.arg("cleanup").arg("--pin-dir").arg(node.pin_dir()).arg("--run-dir").arg(node.run_dir());
    command.text().map(drop)
}
