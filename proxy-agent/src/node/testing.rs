//! A network namespace of a test's own.

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `f` on a new thread in a new network namespace, which goes away with the thread and its sockets. A panic
/// of `f` is passed on. Needs root.
pub(crate) fn in_new_netns<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let run = || {
        // SAFETY: NEWNET gives the thread another network namespace; it touches neither memory nor descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a new network namespace (needs root)");
        f()
    };
    std::thread::scope(|scope| scope.spawn(run).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
