//! What the running kernel has to have, told by its version where that decides, so that a kernel which has lost something
//! fails.

use anyhow::Result;
use proxy_tests::scenarios::kernel_version;

use super::row::Outcome;

/// Programs on devices are links, not filters.
pub(super) fn has_tcx() -> bool {
    kernel_version() >= (6, 6)
}

/// Programs can choose the error of a call that they refuse.
pub(super) fn has_set_retval() -> bool {
    kernel_version() >= (5, 18)
}

/// The kernel tells how many instructions were verified.
pub(super) fn tells_verified_instructions() -> bool {
    kernel_version() >= (5, 16)
}

/// Debian's kernels have everything as modules; others were perhaps built without.
fn has_every_module() -> bool {
    rustix::system::uname().version().to_string_lossy().contains("Debian")
}

/// What it means that something which is a module of its own cannot be had: the kernel was built without it, or, if it is
/// known to have it, a failure.
pub(super) fn lacks(what: &str, error: anyhow::Error) -> Result<Outcome> {
    if has_every_module() {
        Err(error.context(format!("this kernel has {what}")))
    } else {
        Ok(Outcome::Lacks(what.to_owned()))
    }
}
