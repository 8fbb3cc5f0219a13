//! A network namespace for a single test.

use std::io::Write as _;
use std::process::{Command, Stdio};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `f` on a new thread in a new network namespace, which ends with the thread and its sockets. A panic of `f` is
/// passed on. Needs root.
pub(crate) fn in_new_netns<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: NEWNET gives the thread another network namespace; it touches neither memory nor descriptors.
                unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                    .expect("a new network namespace (needs root)");
                f()
            })
            .join()
    })
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs `ip -batch` in the namespace of this thread.
pub(crate) fn ip(lines: &str) {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip");
    child.stdin.take().expect("stdin").write_all(lines.as_bytes()).expect("writing to ip");
    assert!(child.wait().expect("ip").success(), "ip -batch failed on:\n{lines}");
}
