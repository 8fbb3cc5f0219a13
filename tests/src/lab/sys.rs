//! The lab's only `unsafe`: changing the namespaces of a thread, and preparing a forked child before it executes.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::container::Container;

/// Moves the calling thread into a new network namespace.
pub(super) fn unshare_net() -> io::Result<()> {
    // SAFETY: only CLONE_NEWNET is given: neither the descriptor table nor memory becomes unshared, which is what
    // makes the call unsafe in general.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Into::into)
}

/// Moves the calling thread into the network namespace `net`.
pub(super) fn join_net(net: BorrowedFd<'_>) -> io::Result<()> {
    move_into_link_name_space(net, Some(LinkNameSpaceType::Network)).map_err(Into::into)
}

/// Namespaces and cgroup of a child process.
pub(super) struct Confinement {
    /// Network namespace of the child.
    pub(super) net: Arc<OwnedFd>,
    /// `cgroup.procs` of the child's cgroup, opened for writing; `None` leaves the child in the cgroup of its parent.
    pub(super) procs: Option<File>,
    /// Container of the child, which limits its file system and capabilities.
    pub(super) container: Option<Container>,
}

/// Makes `command` start its child inside `place`, and makes the child die with the thread that spawns it.
pub(super) fn confine(command: &mut Command, place: Confinement) {
    let parent = getpid();
    // SAFETY: the closure runs in the child between fork and exec. It only makes system calls on descriptors opened
    // beforehand, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || prepare_child(&place, parent)) };
}

fn prepare_child(place: &Confinement, parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(parent) {
        // The parent died before the signal was armed.
        return Err(io::Error::from(rustix::io::Errno::SRCH));
    }
    if let Some(procs) = &place.procs {
        // "0" stands for the writing process.
        (&*procs).write_all(b"0")?;
    }
    join_net(place.net.as_fd())?;
    if let Some(container) = &place.container {
        // SAFETY: only CLONE_NEWNS is given, in a process of one thread: no other thread shares anything that the call
        // would unshare.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        container.enter()?;
    }
    Ok(())
}
