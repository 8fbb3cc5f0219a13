//! Metrics `process_*`, as every component of Kubernetes has them.

use std::fmt;
use std::fs;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Registers these metrics, without a prefix.
pub(super) fn register(registry: &mut Registry) {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    registry.register_collector(Box::new(Process { started }));
}

/// Facts about this process that the kernel knows.
#[derive(Debug)]
struct Process {
    /// Start of the process, in seconds since 1970.
    started: f64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut put = |name: &str, help: &str, value: &dyn EncodeMetric| -> Result<(), fmt::Error> {
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
        };
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        put("process_cpu_seconds", "CPU time of the agent, in seconds.", &ConstCounter::new(cpu))?;
        let start = ConstGauge::new(self.started);
        put("process_start_time_seconds", "When the agent started, in seconds since 1970.", &start)?;
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            for (field, name, help) in [
                ("VmSize:", "process_virtual_memory_bytes", "Address space of the agent, in bytes."),
                (
                    "VmRSS:",
                    "process_resident_memory_bytes",
                    "Memory of the agent, mapped BPF maps included, in bytes.",
                ),
            ] {
                if let Some(bytes) = kib(&status, field) {
                    put(name, help, &ConstGauge::new(1024 * bytes))?;
                }
            }
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // The descriptor that lists the others does not count.
            let open = open.count().saturating_sub(1) as u64;
            put("process_open_fds", "Open file descriptors of the agent.", &ConstGauge::new(open))?;
        }
        // Without a limit the kernel's own limit counts, which is never reached.
        let most = getrlimit(Resource::Nofile).current.unwrap_or(i64::MAX as u64);
        put("process_max_fds", "File descriptors that the agent may have.", &ConstGauge::new(most))
    }
}

/// Returns a field of `/proc/self/status` in KiB.
fn kib(status: &str, field: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().strip_suffix(" kB")?.trim().parse().ok()
}
