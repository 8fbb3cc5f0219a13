//! `sync`: the speed at which the agent programs the objects of the API server, and the cost of that.
//!
//! The API server of the tests runs in this process, the real agent in a lab node, each on a CPU of its own. The
//! programmed state is read from the pinned maps; the agent is not asked.

mod changes;
mod connections;
mod process;
mod start;
mod view;

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use proxy_tests::apiserver::{ApiServer, Streams};
use proxy_tests::lab::{Lab, LabSpec, Node};

use crate::cpu;
use crate::objects::World;
use crate::progress;
use crate::report::{Bar, Figure, Report};
use crate::stats::{median_of, percentile};
use crate::sys::Count;
use process::{CpuTime, memory};
use start::Start;
use view::View;

/// Time for which the agent is watched while idle.
const IDLE: Duration = Duration::from_secs(3);
/// Time after which the agent's work after its readiness (watches, freed memory) is done.
const SETTLE: Duration = Duration::from_millis(500);
const MIB: f64 = (1 << 20) as f64;

/// Options of `sync`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Clusters: Services x endpoints of each.
    #[arg(long, value_delimiter = ',', default_value = "100x10,1000x250,10000x10,10000x25")]
    worlds: Vec<World>,
    /// Cold starts in each world.
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// Changes of a single endpoint.
    #[arg(long, default_value_t = 500)]
    changes: usize,
    /// New Services, and moves of an endpoint, that a client waits for.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(2..=200))]
    new_services: u8,
    /// Send lists in pages, as an API server that does not stream them.
    #[arg(long)]
    paged: bool,
    /// Largest number of Services that change at once.
    #[arg(long, default_value_t = 1000)]
    burst: usize,
    /// CPU of the API server and the watching benchmark, and CPU of the agent.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1])]
    cpus: Vec<usize>,
}

/// Runs the benchmark.
///
/// # Errors
/// If the lab cannot be built, the agent does not start, or something is never programmed.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("sync", format!("{options:?}"));
    let &[server_cpu, agent_cpu] = options.cpus.as_slice() else { bail!("--cpus takes two numbers") };
    ensure!(options.starts > 0, "--starts has to be at least 1");
    for world in &options.worlds {
        // Threads that are started here, including the API server's, stay on this CPU.
        cpu::on_cpu(server_cpu, || in_world(*world, options, agent_cpu, &mut report))
            .with_context(|| format!("world {world}"))?;
    }
    report.machine.end();
    Ok(report)
}

fn in_world(world: World, options: &Options, agent_cpu: usize, report: &mut Report) -> Result<()> {
    let lab = Lab::build(LabSpec::three_nodes()?)?;
    let node = lab.node("n1");
    // The port is free: the node has a loopback of its own.
    let listener = node.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))?;
    let api = ApiServer::start_on(listener?)?;
    if options.paged {
        api.offer_streams(Streams::Refused);
    }
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig)?;
    api.apply(node.object())?;
    api.apply_all(world.objects())?;
    progress(format_args!("{world}: the API server has {} objects", api.revision()));

    let mut agent = node.agent()?.kubeconfig(&kubeconfig).quiet();
    let mut starts = Vec::new();
    for attempt in 0..options.starts {
        if attempt > 0 {
            agent.kill9()?;
            start::cleanup(node)?;
        }
        starts.push(start::start(&mut agent, node, &api, world, agent_cpu)?);
    }
    cold_starts(&starts, world, report);
    progress(format_args!("{world}: {} cold starts", starts.len()));

    thread::sleep(SETTLE);
    let pid = agent.id().context("the agent has ended")?;
    let before = CpuTime::of(node.host().cgroup())?;
    thread::sleep(IDLE);
    let idle = CpuTime::of(node.host().cgroup())?.since(before).total();
    let name = world.to_string();
    let figures = &mut report.figures;
    figures.push(
        Figure::new("idle: CPU", &name, "%", idle.as_secs_f64() / IDLE.as_secs_f64() * 100.0)
            .detail("RssAnon MiB", memory(pid, "RssAnon")? as f64 / MIB),
    );

    let view = View::open(node.pin_dir())?;
    let single = changes::single(&api, &view, world, options.changes / 2 * 2)?;
    // Both bars have to be met: the p99 is a figure of its own for its bar.
    figures.push(latency("endpoint change: p50", &name, &single, 0.5).bar(Bar::AtMost(1.0)));
    figures.push(latency("endpoint change: p99", &name, &single, 0.99).bar(Bar::AtMost(5.0)));
    counted(&api, &view, world, options.changes / 2 * 2, pid, report)?;
    let figures = &mut report.figures;
    let burst = changes::burst(&api, &view, world, options.burst.min(world.services))?;
    figures.push(
        Figure::new("burst: all in the map", &name, "ms", median_of(burst.iter().map(millis)))
            .samples(burst.len())
            .detail("Services", options.burst.min(world.services) as f64)
            .bar(Bar::AtMost(250.0)),
    );
    let new_services = usize::from(options.new_services);
    let new = changes::new_services(&api, &view, world, new_services)?;
    figures.push(latency("new Service: p50", &name, &new, 0.5));
    progress(format_args!("{world}: {} changes", single.len() + new.len()));
    connections::prepare(&lab, node, &api)?;
    let moved = connections::moved_endpoints(node, &api, new_services)?;
    figures.push(latency("write to connection: p50", &name, &moved, 0.5).bar(Bar::AtMost(5.0)));
    let appeared = connections::new_services(node, &api, new_services)?;
    figures
        .push(latency("write to connection, new Service: p50", &name, &appeared, 0.5).bar(Bar::AtMost(10.0)));
    progress(format_args!("{world}: {} changes that clients looked for", moved.len() + appeared.len()));

    restart(node, &mut agent, &api, world, agent_cpu, figures)
}

/// Counts the agent's work for one change of an endpoint.
fn counted(
    api: &ApiServer,
    view: &View,
    world: World,
    changes: usize,
    pid: u32,
    report: &mut Report,
) -> Result<()> {
    for (what, counter) in [
        ("endpoint change: system calls", Count::syscalls(pid)),
        ("endpoint change: allocations", Count::allocations(pid)),
    ] {
        match counter {
            Ok(mut counter) => {
                let each = changes::counted(api, view, world, changes, &mut counter)?;
                report.figures.push(Figure::new(what, &world.to_string(), "", each).samples(changes));
            }
            Err(reason) => report.note(format!("No figure \"{what}\": {reason:#}.")),
        }
    }
    Ok(())
}

fn cold_starts(starts: &[Start], world: World, report: &mut Report) {
    let name = world.to_string();
    let of = |value: &dyn Fn(&Start) -> f64| median_of(starts.iter().map(value));
    let figure = |what: &str, unit, value: &dyn Fn(&Start) -> f64| {
        Figure::new(format!("cold start: {what}"), &name, unit, of(value)).samples(starts.len())
    };
    let small = world.services * world.endpoints <= 100_000;
    report.figures.extend([
        figure("ready", "s", &|start| start.ready.as_secs_f64())
            .detail("lists sent s", of(&|start| start.listed.as_secs_f64())),
        figure("programmed", "s", &|start| start.programmed.as_secs_f64()).bar(Bar::AtMost(if small {
            3.0
        } else {
            8.0
        })),
        figure("programmed, from lists sent", "s", &behind_lists)
            .detail("longest s", starts.iter().map(behind_lists).fold(0.0, f64::max))
            .bar(Bar::AtMost(1.0)),
        figure("CPU", "s", &|start| start.cpu.total().as_secs_f64())
            .detail("user s", of(&|start| start.cpu.user.as_secs_f64()))
            .detail("system s", of(&|start| start.cpu.system.as_secs_f64()))
            .bar(Bar::AtMost(2.0)),
        figure("peak RssAnon", "MiB", &|start| start.anonymous as f64 / MIB)
            .detail("VmHWM MiB", of(&|start| start.high_water as f64 / MIB))
            .bar(Bar::AtMost(if small { 60.0 } else { 120.0 })),
    ]);
    match starts.iter().map(|start| start.syscalls.as_ref()).collect::<Result<Vec<_>, _>>() {
        Ok(counts) => {
            let median = median_of(counts.iter().map(|count| **count as f64));
            report
                .figures
                .push(Figure::new("cold start: system calls", &name, "", median).samples(counts.len()));
        }
        Err(reason) => report.note(format!("System calls of starts are not counted: {reason:#}.")),
    }
}

fn behind_lists(start: &Start) -> f64 {
    start.programmed.saturating_sub(start.listed).as_secs_f64()
}

/// Kills the agent and starts it with the maps that it left.
fn restart(
    node: &Node,
    agent: &mut proxy_tests::lab::Agent,
    api: &ApiServer,
    world: World,
    agent_cpu: usize,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let before = View::open(node.pin_dir())?.ids()?;
    agent.kill9()?;
    let restarted = start::start(agent, node, api, world, agent_cpu)?;
    let after = View::open(node.pin_dir())?.ids()?;
    let changed = before.iter().filter(|(name, id)| after.get(*name) != Some(*id)).count();
    let name = world.to_string();
    figures.extend([
        Figure::new("restart: ready", &name, "s", restarted.ready.as_secs_f64())
            .detail("CPU s", restarted.cpu.total().as_secs_f64())
            .detail("peak RssAnon MiB", restarted.anonymous as f64 / MIB),
        Figure::new("restart: ids changed", &name, "", changed as f64)
            .detail("ids", before.len() as f64)
            .bar(Bar::AtMost(0.0)),
    ]);
    progress(format_args!("{world}: restarted"));
    Ok(())
}

fn latency(name: &str, world: &str, took: &[Duration], p: f64) -> Figure {
    let [at, p99, max] = [p, 0.99, 1.0].map(|p| percentile(took.iter().map(millis), p));
    Figure::new(name, world, "ms", at).samples(took.len()).detail("p99 ms", p99).detail("max ms", max)
}

fn millis(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
