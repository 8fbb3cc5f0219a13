//! Memory and CPU time of a process.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Interval at which memory is read.
const EVERY: Duration = Duration::from_millis(2);

/// Returns a field of /proc/PID/status in bytes.
///
/// # Errors
/// If the process or the field does not exist.
pub(super) fn memory(pid: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().split(' ').next());
    let kib = kib.and_then(|kib| kib.parse::<u64>().ok()).with_context(|| format!("{path}: no {field}"))?;
    Ok(kib * 1024)
}

/// Watches the anonymous memory of a process until it is dropped.
pub(super) struct Peak {
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peak {
    /// Starts to watch process `pid`.
    pub(super) fn of(pid: u32) -> Self {
        let (bytes, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, ended) = (Arc::clone(&bytes), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                seen.fetch_max(memory(pid, "RssAnon").unwrap_or(0), Ordering::Relaxed);
                thread::sleep(EVERY);
            }
        });
        Self { bytes, stop, thread: Some(thread) }
    }

    /// Returns the largest value so far, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // The thread cannot panic.
            let _ = thread.join();
        }
    }
}

/// CPU time of a cgroup.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuTime {
    pub(super) user: Duration,
    pub(super) system: Duration,
}

impl CpuTime {
    /// Reads the CPU time so far of every process that ever ran in the cgroup.
    ///
    /// # Errors
    /// If the cgroup does not exist.
    pub(super) fn of(cgroup: &Path) -> Result<Self> {
        let path = cgroup.join("cpu.stat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let [user, system] = ["user_usec", "system_usec"].map(|name| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            let micros = value.with_context(|| format!("{}: no {name}", path.display()))?;
            anyhow::Ok(Duration::from_micros(micros))
        });
        Ok(Self { user: user?, system: system? })
    }

    /// Returns the time since an earlier reading.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
        }
    }

    /// Returns the sum of user and system time.
    pub(super) fn total(self) -> Duration {
        self.user + self.system
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_this_process() -> Result<()> {
        let own = std::process::id();
        let before = memory(own, "RssAnon")?;
        let peak = Peak::of(own);
        let large = vec![1_u8; 64 << 20];
        while peak.bytes() < before + (48 << 20) {
            thread::sleep(EVERY);
        }
        assert!(large.iter().all(|byte| *byte == 1));
        assert!(memory(own, "NoSuchField").is_err());
        Ok(())
    }
}
