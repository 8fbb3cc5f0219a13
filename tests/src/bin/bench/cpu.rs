//! Assignment of threads to CPUs: on two CPUs a figure depends on it.

use std::fs;
use std::thread;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, setpriority_process};
use rustix::thread::{CpuSet, sched_setaffinity};

/// File of the session's autogroup. Autogroups share the CPUs evenly among sessions, regardless of the priorities of
/// processes; an autogroup has a priority of its own.
const AUTOGROUP: &str = "/proc/self/autogroup";
const HIGHEST: i32 = -20;

/// Priority of this process, and of those that it starts, over all ordinary ones, until this is dropped.
pub(crate) struct Priority {
    /// The priority that the session's autogroup had, if the kernel has autogroups.
    autogroup: Option<String>,
}

impl Priority {
    /// Raises the priority.
    ///
    /// # Errors
    /// Without CAP_SYS_NICE.
    pub(crate) fn raise() -> Result<Self> {
        setpriority_process(None, HIGHEST)
            .context("cannot raise the priority: benchmarks need root, see `sudo -E`")?;
        // "/autogroup-21 nice 0"
        let before = fs::read_to_string(AUTOGROUP).ok();
        let autogroup = before.and_then(|text| Some(text.trim().rsplit_once(' ')?.1.to_owned()));
        if autogroup.is_some() {
            fs::write(AUTOGROUP, HIGHEST.to_string()).context(AUTOGROUP)?;
        }
        Ok(Self { autogroup })
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.autogroup {
            // The session outlives this process; a session that stays preferred does little harm.
            let _ = fs::write(AUTOGROUP, before);
        }
    }
}

/// Keeps the calling thread, and threads that it starts later, on one CPU.
///
/// # Errors
/// If the CPU does not exist.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    pin_task(None, cpu)
}

/// Keeps every thread of a process, and threads that they start later, on one CPU.
///
/// # Errors
/// If the CPU or the process does not exist.
pub(crate) fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("no process {pid}"))? {
        let id = task?.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw);
        pin_task(id, cpu)?;
    }
    Ok(())
}

/// Runs `work` on a thread of its own on one CPU.
///
/// # Errors
/// If the CPU does not exist, and those of `work`.
pub(crate) fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pinned = || {
        pin(cpu)?;
        work()
    };
    let result = thread::scope(|scope| scope.spawn(pinned).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn pin_task(task: Option<Pid>, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(task, &set).with_context(|| format!("cannot run on CPU {cpu}; see --cpus"))
}
