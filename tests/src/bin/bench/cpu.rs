//! Which CPU runs what: on two CPUs a figure depends on it.

use std::fs;
use std::thread;

use anyhow::{Context as _, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Keeps the calling thread, and threads that it will start, on one CPU.
///
/// # Errors
/// If there is no such CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    pin_task(None, cpu)
}

/// Keeps every thread of a process, and those that they will start, on one CPU.
///
/// # Errors
/// If there is no such CPU or process.
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
/// If there is no such CPU, or those of `work`.
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
