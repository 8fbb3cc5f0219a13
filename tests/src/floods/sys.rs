//! sendmmsg(2): many packets by one system call. rustix sends one at a time.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// Largest number of packets of one call.
pub(super) const BATCH: usize = 64;

/// Sends as many of `packets` (at most [`BATCH`]) as the kernel takes at once by a connected socket, and returns their
/// number.
///
/// # Errors
/// With the error of sendmmsg(2) for the first of them.
pub(super) fn send_some<const N: usize>(socket: impl AsFd, packets: &[[u8; N]]) -> io::Result<usize> {
    let count = packets.len().min(BATCH);
    let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: N }; BATCH];
    // SAFETY: mmsghdr is a C struct of integers and pointers: zero is a value of it.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    for ((packet, part), message) in packets.iter().zip(&mut parts).zip(&mut messages) {
        part.iov_base = packet.as_ptr().cast_mut().cast();
        message.msg_hdr.msg_iov = part;
        message.msg_hdr.msg_iovlen = 1;
    }
    let descriptor = socket.as_fd().as_raw_fd();
    // SAFETY: `count` messages are whole; each has one part, which lies in `packets`, and the kernel only reads it.
    let sent = unsafe { libc::sendmmsg(descriptor, messages.as_mut_ptr(), count as libc::c_uint, 0) };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}
