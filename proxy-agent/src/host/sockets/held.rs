//! One socket while a sweep examines it.

use std::os::fd::OwnedFd;
use std::path::Path;

use netlink_packet_sock_diag::inet::SocketId;

use super::namespaces::Namespace;

/// Fate of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The socket stays: it is where it should be, or its owner has connected it elsewhere.
    Left,
    /// The socket has been led elsewhere.
    Led,
    /// The socket has to be destroyed.
    Doomed,
}

/// A copy of a socket, with its origin.
pub(super) struct Held<'a> {
    pub(super) id: &'a SocketId,
    pub(super) copy: OwnedFd,
    pub(super) namespace: &'a Namespace,
    /// Directory in procfs of a process that has the socket.
    pub(super) process: &'a Path,
}
