//! Sockets of other processes, in our hands for a moment.
//!
//! A process' descriptors are links in procfs that name the socket's inode; `pidfd_getfd` (kernel 5.6) copies one.
//! The copy is the same socket, so while it is open the owner's close() does not free the port: it is closed at
//! once.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags, open, readlinkat};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::namespaces::processes;

/// Calls `each` with a copy of every wanted socket and the directory of its process, once, and takes it out of `wanted`, which is keyed by inode. What
/// is left has no owner that can be seen. Returns how many processes do not let us look.
///
/// `each` says whether the copy is the socket that was meant: inodes are numbers that come round again.
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
            // Otherwise it has ended.
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
    // Opened when it is needed: few processes own what is wanted.
    let mut pidfd = None;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A descriptor that was closed meanwhile cannot be read, nor copied below.
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

/// `socket:[1234]`.
fn inode_of(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}
