//! The machine and its load during a run: figures mean nothing without them.

use std::fs;

use serde::Serialize;

/// The machine and its load.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Machine {
    /// Kernel release.
    pub(crate) kernel: String,
    /// CPU model.
    pub(crate) cpu: String,
    /// CPUs online.
    pub(crate) cpus: usize,
    /// One-minute load average when the run began.
    pub(crate) load_before: f64,
    /// One-minute load average when the run ended. The benchmark itself keeps about one CPU busy.
    pub(crate) load_after: f64,
    /// Time at which the run began, in seconds since 1970.
    pub(crate) began: u64,
}

impl Machine {
    /// Reads the machine's data at the beginning of a run.
    pub(crate) fn now() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpu: model.map(|(_, name)| name.to_owned()).unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            load_before: load(),
            load_after: 0.0,
            began: since.map_or(0, |since| since.as_secs()),
        }
    }

    /// Reads the load at the end of the run.
    pub(crate) fn end(&mut self) {
        self.load_after = load();
    }
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN)
}
