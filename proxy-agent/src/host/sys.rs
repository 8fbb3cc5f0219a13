//! System calls on sockets that no library wraps safely.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use proxy_common::abi::NetnsCookie;

/// Makes the kernel (4.5) pick among `sockets` sockets that listen on one address, of which `socket` is one, by the
/// client's address: by the last bits of an IPv4 address, or by the last bits of an IPv6 address's /64.
///
/// # Errors
///
/// Returns the error of setsockopt(2): EINVAL when the socket does not share its address.
pub(crate) fn spread_by_source(socket: BorrowedFd<'_>, sockets: u32) -> io::Result<()> {
    // In an IPv4 header the source is at offset 12. In an IPv6 header the source begins at 8, and its /64 ends at 16.
    const SOURCE: u32 = libc::SKF_NET_OFF.cast_unsigned() + 12;
    let instruction = |code: u32, k| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, SOURCE),
        instruction(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, sockets),
        instruction(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    let size = size_of_val(&program) as libc::socklen_t;
    // SAFETY: the kernel copies the program, and its instructions live until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            std::ptr::from_ref(&program).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns the cookie of the calling thread's network namespace, as BPF programs see it; `None` before kernel 5.14.
pub(crate) fn netns_cookie() -> Option<NetnsCookie> {
    // The unspecified address can be bound even if loopback is down and the namespace has no other address.
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as `len`, which is the size of the variable.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(NetnsCookie(cookie))
}
