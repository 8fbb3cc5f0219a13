//! Copies of other processes' sockets, held for a moment.
//!
//! A process's descriptors are links in procfs that name the socket's inode; `pidfd_getfd` (kernel 5.6) copies one. The
//! copy is the same socket, so the owner's close() does not free the port while the copy is open. The copy is therefore
//! closed as soon as possible.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags, open, readlinkat};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::namespaces::processes;

/// Calls `each` for every wanted socket, with a copy of the socket and the directory of its process. A socket that
/// `each` accepts is removed from `wanted`, which is keyed by inode. The sockets that remain in `wanted` have no
/// visible owner. Returns the number of processes that may not be examined.
///
/// `each` returns whether the copy is the socket that was meant: inode numbers are reused.
pub(super) fn visit<T>(
    proc: &Path,
    wanted: &mut BTreeMap<u32, T>,
    mut each: impl FnMut(&T, OwnedFd, &Path) -> bool,
) -> io::Result<usize> {
    let mut hidden = 0;
    for process in processes(proc)? {
        if wanted.is_empty() {
            break;
        }
        match visit_process(&process, wanted, &mut each) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => hidden += 1,
            // Any other error means that the process has ended.
            Err(_) | Ok(()) => {}
        }
    }
    Ok(hidden)
}

fn visit_process<T>(
    process: &Path,
    wanted: &mut BTreeMap<u32, T>,
    each: &mut impl FnMut(&T, OwnedFd, &Path) -> bool,
) -> io::Result<()> {
    let dir = open(process.join("fd"), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Opened when needed: few processes own a wanted socket.
    let mut pidfd = None;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A descriptor that was closed meanwhile can neither be read here nor copied below.
        let Ok(link) = readlinkat(&dir, entry.file_name(), Vec::new()) else { continue };
        let Some(inode) = link.to_str().ok().and_then(inode_of) else { continue };
        let Some(meant) = wanted.get(&inode) else { continue };
        let pidfd = match &pidfd {
            Some(pidfd) => pidfd,
            None => pidfd.insert(open_process(process)?),
        };
        match pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(copy) => {
                if each(meant, copy, process) {
                    wanted.remove(&inode);
                }
            }
            Err(rustix::io::Errno::BADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn open_process(process: &Path) -> io::Result<OwnedFd> {
    let pid = process.file_name().and_then(|name| name.to_str()?.parse().ok()).and_then(Pid::from_raw);
    Ok(pidfd_open(pid.ok_or(ErrorKind::NotFound)?, PidfdFlags::empty())?)
}

/// Returns the inode of a link of the form `socket:[1234]`.
fn inode_of(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}
