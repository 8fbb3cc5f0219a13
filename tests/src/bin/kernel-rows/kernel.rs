//! Features that the running kernel must have, decided by its version, so that a kernel which has lost a feature fails.

use anyhow::Result;
use proxy_tests::scenarios::kernel_version;

use super::row::Outcome;

/// Returns whether programs on devices are TCX links, not filters.
pub(super) fn has_tcx() -> bool {
    kernel_version() >= (6, 6)
}

/// Returns whether programs can choose the error of a call that they refuse.
pub(super) fn has_set_retval() -> bool {
    kernel_version() >= (5, 18)
}

/// Returns whether the kernel reports the number of verified instructions.
pub(super) fn tells_verified_instructions() -> bool {
    kernel_version() >= (5, 16)
}

/// Returns whether the kernel has every feature as a module. Debian's kernels do; others may be built without some.
fn has_every_module() -> bool {
    rustix::system::uname().version().to_string_lossy().contains("Debian")
}

/// Returns the outcome for a missing feature that is a module of its own: the kernel was built without it, or, if the
/// kernel is known to have it, a failure.
pub(super) fn lacks(what: &str, error: anyhow::Error) -> Result<Outcome> {
    if has_every_module() {
        Err(error.context(format!("this kernel has {what}")))
    } else {
        Ok(Outcome::Lacks(what.to_owned()))
    }
}
