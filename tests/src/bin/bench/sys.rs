//! The benchmarks' only `unsafe`: counting events of a process (perf_event_open(2)), which no library wraps.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Counters of events in the threads of a process.
#[derive(Debug)]
pub(crate) struct Count(Vec<File>);

impl Count {
    /// Starts to count system calls, also of threads that are started later.
    ///
    /// # Errors
    /// If the kernel has no such tracepoint (CONFIG_FTRACE_SYSCALLS) or denies access.
    pub(crate) fn syscalls(pid: u32) -> Result<Self> {
        const PERF_TYPE_TRACEPOINT: u32 = 2;
        const INHERIT: u64 = 1 << 1;
        let id = tracepoint_id().context("no tracepoint raw_syscalls:sys_enter")?;
        let kind = PERF_TYPE_TRACEPOINT;
        let attributes = Attributes { kind, config: id, flags: INHERIT, ..Attributes::default() };
        Ok(Self(open_counters(pid, &attributes).context("perf_event_open")?))
    }

    /// Starts to count allocations: calls of the C library's functions, from which Rust's default allocator gets all
    /// memory. Each call costs the process a trap. (Threads that are started later are not counted: the kernel would
    /// read the library's name again, from the memory of the process that starts them, and fail to start them.)
    ///
    /// # Errors
    /// If the kernel has no uprobes or denies access, or the C library is linked statically.
    pub(crate) fn allocations(pid: u32) -> Result<Self> {
        let functions = [
            libc::malloc as *const (),
            libc::calloc as *const (),
            libc::realloc as *const (),
            libc::posix_memalign as *const (),
        ];
        let path = "/sys/bus/event_source/devices/uprobe/type";
        let kind = fs::read_to_string(path).context("the kernel has no uprobes")?;
        let kind = kind.trim().parse().with_context(|| format!("{path} holds {kind:?}"))?;
        let mut counters = Vec::new();
        for function in functions {
            let (library, offset) = place(function.addr())?;
            let library = CString::new(library)?;
            let path = library.as_ptr().expose_provenance() as u64;
            let attributes = Attributes { kind, config1: path, config2: offset, ..Attributes::default() };
            counters.extend(open_counters(pid, &attributes).context("perf_event_open")?);
        }
        Ok(Self(counters))
    }

    /// Returns the number of events so far.
    ///
    /// # Errors
    /// With the error of read(2).
    pub(crate) fn read(&mut self) -> Result<u64> {
        let mut sum = 0;
        for counter in &mut self.0 {
            let mut count = [0; 8];
            counter.read_exact(&mut count)?;
            sum += u64::from_ne_bytes(count);
        }
        Ok(sum)
    }
}

/// Returns the file that an address of this process is mapped from, and the offset in it. Another process has the same
/// library.
fn place(address: usize) -> Result<(String, u64)> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let found = maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        let offset = hex(words.nth(1)?)?;
        let path = words.nth(2)?;
        (start..end).contains(&address).then(|| (path.to_owned(), (address - start + offset) as u64))
    });
    let (path, offset) = found.context("an allocator that is mapped from no file")?;
    ensure!(path.contains("libc"), "the allocator is in {path}, not in a C library that is shared");
    Ok((path, offset))
}

fn hex(text: &str) -> Option<usize> {
    usize::from_str_radix(text, 16).ok()
}

/// Returns the number of `raw_syscalls:sys_enter`, from a tracefs that is not mounted anywhere.
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

/// `struct perf_event_attr`, its second version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
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
    config2: u64,
}

/// Opens one counter for each thread of the process.
fn open_counters(pid: u32, attributes: &Attributes) -> Result<Vec<File>> {
    let attributes = Attributes { size: size_of::<Attributes>() as u32, ..*attributes };
    let mut counters = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let thread = name.to_str().and_then(|name| name.parse().ok()).context("a thread without a number")?;
        match open_counter(thread, &attributes) {
            Ok(counter) => counters.push(counter.into()),
            // The thread has ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(!counters.is_empty(), "process {pid} has ended");
    Ok(counters)
}

fn open_counter(thread: libc::pid_t, attributes: &Attributes) -> io::Result<OwnedFd> {
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    let (any_cpu, no_group) = (-1, -1);
    let attributes = std::ptr::from_ref(attributes);
    // SAFETY: the kernel reads `size` bytes of the attributes, and the path that they may point to; both live until the
    // call returns.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attributes, thread, any_cpu, no_group, PERF_FLAG_FD_CLOEXEC)
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn what_this_process_does_is_counted() -> Result<()> {
        let own = std::process::id();
        let mut syscalls = Count::syscalls(own)?;
        let mut allocations = Count::allocations(own)?;
        let kept: Vec<Box<u32>> = (0..1000).map(|number| black_box(Box::new(number))).collect();
        assert!(allocations.read()? >= 1000, "{kept:?}");
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert!(syscalls.read()? >= 1000);
        Ok(())
    }
}
