//! BPF_PROG_TEST_RUN with all of its options, of which aya wraps only some.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use aya_obj::generated::{bpf_attr, bpf_cmd};

/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE` of linux/bpf.h (kernel 6.14).
const CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Runs a program once on the frame `data`. Returns the program's return value and the resulting frame.
///
/// With `complete`, the skb comes with the sum over its bytes, as from a network card, and the kernel verifies the sum
/// after the run.
///
/// # Errors
/// With the error of bpf(2): EBADMSG if that sum is wrong after the run.
pub(super) fn test_run(
    program: BorrowedFd<'_>,
    data: &[u8],
    context: &[u8],
    complete: bool,
) -> io::Result<(i32, Vec<u8>)> {
    let mut out = vec![0; data.len() + 256];
    // SAFETY: bpf_attr is a union of C structs of integers: zero is a value of each.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the member of the union that BPF_PROG_TEST_RUN reads and writes.
    let test = unsafe { &mut attr.test };
    test.prog_fd = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    test.data_size_in = size(data)?;
    test.data_in = data.as_ptr() as u64;
    test.data_size_out = size(&out)?;
    test.data_out = out.as_mut_ptr() as u64;
    test.ctx_size_in = size(context)?;
    test.ctx_in = context.as_ptr() as u64;
    test.flags = if complete { CHECKSUM_COMPLETE } else { 0 };
    let (command, attributes) = (bpf_cmd::BPF_PROG_TEST_RUN as libc::c_long, std::ptr::from_mut(&mut attr));
    // SAFETY: `attr` is whole, and its pointers and sizes are those of live buffers, `out` one that may be written.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<bpf_attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the member that was written above.
    let test = unsafe { attr.test };
    out.truncate(test.data_size_out as usize);
    Ok((test.retval.cast_signed(), out))
}

fn size(bytes: &[u8]) -> io::Result<u32> {
    u32::try_from(bytes.len()).map_err(io::Error::other)
}
