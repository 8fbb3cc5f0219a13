//! System calls on sockets that no library wraps safely.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Has the kernel (4.5) pick one of the sockets that listen on an address, of which `socket` is one, by the address of the
/// client: IPv4 by the last bits of it, IPv6 by those of its /64.
///
/// # Errors
///
/// What setsockopt(2) says: EINVAL when it does not share its address.
pub fn spread_by_source(socket: BorrowedFd<'_>, sockets: u32) -> io::Result<()> {
    // The source is at 12 in an IPv4 header; in an IPv6 header it begins at 8, and its /64 ends at 16.
    const SOURCE: u32 = libc::SKF_NET_OFF.cast_unsigned() + 12;
    let instruction = |code: u32, k| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, SOURCE),
        instruction(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, sockets),
        instruction(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    let size = size_of_val(&program) as libc::socklen_t;
    // SAFETY: the kernel copies the program, whose instructions live until it has.
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

/// Cookie of the calling thread's network namespace, as BPF programs see it; `None` before kernel 5.14.
pub fn netns_cookie() -> Option<u64> {
    // Where loopback is down there is no other address.
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes as many bytes as it is told at most, which is the variable.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(cookie)
}
