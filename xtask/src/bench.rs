//! `bench`: builds for release and hands over to the benchmarks of crate `tests`.

use std::ffi::OsString;

use anyhow::Result;

use crate::build;
use crate::build_ebpf;

/// Replaces this process by the benchmark that `args` names.
///
/// # Errors
/// When a build fails or the benchmark cannot be started.
pub(crate) fn run(args: &[OsString]) -> Result<()> {
    // Benchmarks that have BPF programs of their own.
    let object = match args.first() {
        Some(first) if first == "packet" || first == "north-south" => {
            vec![("VIPR_BENCH_OBJECT", build_ebpf::bench()?)]
        }
        _ => Vec::new(),
    };
    build::exec_tool("bench", &object, args)
}
