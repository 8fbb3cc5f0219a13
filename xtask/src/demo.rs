//! `demo`: builds for release and hands over to the demo of crate `tests`.

use std::ffi::OsString;

use anyhow::Result;

use crate::build;

/// Replaces this process by the demo.
///
/// # Errors
/// When a build fails or the demo cannot be started.
pub(crate) fn run(args: &[OsString]) -> Result<()> {
    build::exec_tool("demo", &[], args)
}
