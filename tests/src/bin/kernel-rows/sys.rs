//! System calls that the libraries lack: tun devices, packets whose headers lie outside the linear part, and the
//! verifier's log of an accepted program.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_prog_type};

/// Makes a device without link-layer headers in this thread's network namespace. It lives as long as the file. Reading
/// the file returns the packets that the device sends; writing to the file makes the device receive.
///
/// # Errors
/// Without `/dev/net/tun`, or if the name is taken.
pub(super) fn tun(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is a C struct of integers: zero is a value of it.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which is whole and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, std::ptr::from_mut(&mut request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// `struct virtio_net_hdr` of linux/virtio_net.h.
#[repr(C)]
struct VirtioNetHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// Sends a frame by a device of this thread's network namespace so that only its Ethernet header is in the linear part
/// of the kernel's packet. For a frame larger than a page, the kernel makes only the first `hdr_len` bytes linear.
///
/// # Errors
/// With the kernel's error.
pub(super) fn send_in_pieces(index: u32, frame: &[u8]) -> io::Result<()> {
    const PACKET_VNET_HDR: libc::c_int = 15;
    // SAFETY: socket(2) has no preconditions; the descriptor is checked before it is owned.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made and that nobody else has.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let on: libc::c_int = 1;
    let (value, length) = (std::ptr::from_ref(&on).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: `value` points to an int of that length.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, value, length) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    let header =
        VirtioNetHeader { flags: 0, gso_type: 0, hdr_len: 14, gso_size: 0, csum_start: 0, csum_offset: 0 };
    // SAFETY: sockaddr_ll is a C struct of integers: zero is a value of it.
    let mut to: libc::sockaddr_ll = unsafe { zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index.cast_signed();
    to.sll_protocol = u16::from_ne_bytes([frame[12], frame[13]]);
    let mut parts = [
        libc::iovec {
            iov_base: std::ptr::from_ref(&header).cast_mut().cast(),
            iov_len: size_of::<VirtioNetHeader>(),
        },
        libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() },
    ];
    // SAFETY: msghdr is a C struct of integers and pointers: zero is a value of it.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = std::ptr::from_mut(&mut to).cast();
    message.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    // SAFETY: the message is whole; the kernel only reads its parts and its address, which outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), std::ptr::from_ref(&message), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Loads a program, closes it, and returns the end of the verifier's log (`BPF_LOG_STATS`).
///
/// # Errors
/// With the error of bpf(2).
pub(super) fn verify(
    kind: bpf_prog_type,
    hook: bpf_attach_type,
    instructions: &[bpf_insn],
    license: &CStr,
) -> io::Result<String> {
    const BPF_LOG_STATS: u32 = 4;
    let mut log = vec![0_u8; 1 << 16];
    // SAFETY: bpf_attr is a union of C structs of integers: zero is a value of each.
    let mut attr: bpf_attr = unsafe { zeroed() };
    // SAFETY: the member of the union that BPF_PROG_LOAD reads.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = kind as u32;
    load.expected_attach_type = hook as u32;
    load.insns = instructions.as_ptr() as u64;
    load.insn_cnt = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    load.license = license.as_ptr() as u64;
    load.log_level = BPF_LOG_STATS;
    load.log_buf = log.as_mut_ptr() as u64;
    load.log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
    let (command, attributes) = (bpf_cmd::BPF_PROG_LOAD as libc::c_long, std::ptr::from_mut(&mut attr));
    // SAFETY: `attr` is whole, and its pointers and sizes are those of live buffers, `log` one that may be written.
    let program = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<bpf_attr>()) };
    if program < 0 {
        return Err(io::Error::last_os_error());
    }
    let program = RawFd::try_from(program).map_err(io::Error::other)?;
    // SAFETY: a descriptor that was just made and that nobody else has.
    drop(unsafe { OwnedFd::from_raw_fd(program) });
    let said = CStr::from_bytes_until_nul(&log).map_err(io::Error::other)?;
    Ok(said.to_string_lossy().into_owned())
}
