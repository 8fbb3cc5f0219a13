//! The benchmarks' only `unsafe`: counting system calls (perf_event_open(2)), which no library wraps.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Counts the system calls of a process and of the threads that it starts after this.
#[derive(Debug)]
pub(crate) struct SyscallCount(File);

impl SyscallCount {
    /// Begins to count.
    ///
    /// # Errors
    /// If the kernel has no such tracepoint (CONFIG_FTRACE_SYSCALLS) or does not let us.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let id = tracepoint_id().context("no tracepoint raw_syscalls:sys_enter")?;
        let counter = open_counter(pid, id).context("perf_event_open")?;
        Ok(Self(counter.into()))
    }

    /// How many up to now.
    ///
    /// # Errors
    /// What read(2) says.
    pub(crate) fn read(&mut self) -> Result<u64> {
        let mut count = [0; 8];
        self.0.read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }
}

/// The number of `raw_syscalls:sys_enter`, from a tracefs that is mounted nowhere.
fn tracepoint_id() -> Result<u64> {
    let context = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let path = "events/raw_syscalls/sys_enter/id";
    let mut file = File::from(openat(&root, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    text.trim().parse().with_context(|| format!("{path} holds {text:?}"))
}

/// `struct perf_event_attr`, its first version.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_type: u32,
    config1: u64,
}

fn open_counter(pid: u32, tracepoint: u64) -> io::Result<OwnedFd> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    const INHERIT: u64 = 1 << 1;
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    let size = size_of::<Attributes>() as u32;
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size,
        config: tracepoint,
        flags: INHERIT,
        ..Attributes::default()
    };
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let (any_cpu, no_group) = (-1, -1);
    let attributes = std::ptr::from_ref(&attributes);
    // SAFETY: the kernel reads `size` bytes of the attributes, which live until the call returns.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attributes, pid, any_cpu, no_group, PERF_FLAG_FD_CLOEXEC)
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
