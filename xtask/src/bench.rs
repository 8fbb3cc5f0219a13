//! `bench`: builds for release and hands over to the benchmarks of crate `tests`.

use std::ffi::OsString;

use anyhow::Result;

use crate::build;

/// Becomes the benchmark that `args` names.
///
/// # Errors
/// When a build fails or the benchmark cannot be started.
pub(crate) fn run(args: &[OsString]) -> Result<()> {
    build::exec_tool("bench", args)
}
