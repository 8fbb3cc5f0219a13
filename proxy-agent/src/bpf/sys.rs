//! bpf(2) calls that aya has no safe way for.
//!
//! Each function says from which aya version on it can be deleted.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use aya::maps::{MapData, MapType};
use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_type};
use proxy_common::abi::{CgroupId, IfIndex};
use rustix::mm::{MapFlags, ProtFlags};

/// A BPF array map's values in this process's memory (`BPF_F_MMAPABLE`, kernel 5.5).
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
    stride: usize,
}

// SAFETY: the mapping is shared memory by nature and reached only through atomics.
unsafe impl Send for Mapping {}
// SAFETY: the mapping is shared memory by nature and reached only through atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the `len` elements of `value_size` bytes that `map` holds.
    ///
    /// # Errors
    ///
    /// Returns the error of mmap(2): EINVAL when the map is not mmapable, EPERM when it is read-only.
    pub(crate) fn new(map: BorrowedFd<'_>, len: u32, value_size: usize, writable: bool) -> io::Result<Self> {
        // The kernel rounds elements up to 8 bytes and the whole up to pages.
        let stride = value_size.div_ceil(8);
        let words = stride * len as usize;
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), words * 8, protection, MapFlags::SHARED, map, 0)
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, words, stride })
    }

    /// Returns word `word` of element `index`; `None` outside of the map. Writing to a mapping that was made read-only
    /// ends the process.
    pub(crate) fn word(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        let at = (index as usize).checked_mul(self.stride)?.checked_add(word)?;
        if word >= self.stride || at >= self.words {
            return None;
        }
        // SAFETY: `at` is inside of the mapping.
        let word = unsafe { self.start.add(at) };
        // SAFETY: the mapping is aligned to a page and lives as long as `self`.
        Some(unsafe { word.as_ref() })
    }

    /// Returns the number of elements.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.words / self.stride).unwrap_or(u32::MAX)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the very mapping that `new` made, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

/// The kernel's facts about a link to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLinkInfo {
    /// Id of the cgroup (its inode number); 0 when the cgroup is gone.
    pub cgroup_id: CgroupId,
    /// Attach type: `enum bpf_attach_type`.
    pub(crate) attach_type: u32,
    /// Id of the program that the link runs.
    pub(crate) program_id: u32,
}

/// The kernel's facts about a link to a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcxLinkInfo {
    /// Id of the program that the link runs.
    pub(crate) program_id: u32,
    /// Interface index; 0 when the device is gone.
    pub(crate) device: IfIndex,
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    let size = size_of::<bpf_attr>();
    // SAFETY: `attr` is a whole, initialised bpf_attr, and every caller fills what `cmd` reads.
    let result = unsafe { libc::syscall(libc::SYS_bpf, cmd as libc::c_long, std::ptr::from_mut(attr), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn zeroed_attr() -> bpf_attr {
    // SAFETY: bpf_attr is a union of C structs of integers: zero is a value of each.
    unsafe { std::mem::zeroed() }
}

/// Opens a pinned link (`BPF_OBJ_GET`, kernel 5.7). aya 0.14's `PinnedLink` gives no descriptor away; 0.15 does.
///
/// # Errors
///
/// Returns the error of bpf(2): ENOENT when there is no such pin.
pub fn open_link(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed_attr();
    // SAFETY: writes the member of the union that BPF_OBJ_GET reads.
    let get = unsafe { &mut attr.__bindgen_anon_4 };
    get.pathname = path.as_ptr() as u64;
    owned(bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?)
}

/// Makes a link run another program, in one step (`BPF_LINK_UPDATE`, kernel 5.7). In aya from 0.15 on.
///
/// # Errors
///
/// Returns the error of bpf(2): EINVAL when the program is of another type.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed_attr();
    // SAFETY: writes the member of the union that BPF_LINK_UPDATE reads.
    let update = unsafe { &mut attr.link_update };
    update.link_fd = u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?;
    update.__bindgen_anon_1.new_prog_fd = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(|_| ())
}

/// Returns the cgroup that a link is on, and its program (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
///
/// Returns the error of bpf(2).
pub fn cgroup_link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    let info = link_info(link)?;
    // SAFETY: integers of a C union. They are meaningless for a link of another kind, but no pin of ours is of another
    // kind.
    let cgroup = unsafe { info.__bindgen_anon_1.cgroup };
    let program_id = info.prog_id;
    Ok(CgroupLinkInfo { cgroup_id: CgroupId(cgroup.cgroup_id), attach_type: cgroup.attach_type, program_id })
}

/// Returns the device that a TCX link is on, and its program (`BPF_OBJ_GET_INFO_BY_FD`, kernel 6.6).
///
/// # Errors
///
/// Returns the error of bpf(2); InvalidInput when the link is of another kind.
pub(crate) fn tcx_link_info(link: BorrowedFd<'_>) -> io::Result<TcxLinkInfo> {
    let info = link_info(link)?;
    if info.type_ != bpf_link_type::BPF_LINK_TYPE_TCX as u32 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a TCX link"));
    }
    // SAFETY: the member of the union that the kernel fills for this kind of link.
    let tcx = unsafe { info.__bindgen_anon_1.tcx };
    Ok(TcxLinkInfo { program_id: info.prog_id, device: IfIndex(tcx.ifindex) })
}

/// Returns the ids of the programs that TCX runs on one side of a network device, in the order in which packets meet
/// them (`BPF_PROG_QUERY`, kernel 6.6). aya 0.14 opens each of them, for which the kernel wants CAP_SYS_ADMIN, and
/// fails when one of them vanishes meanwhile.
///
/// # Errors
///
/// Returns the error of bpf(2): EINVAL on kernels without TCX, ENODEV when the device is gone.
pub(crate) fn tcx_programs(device: IfIndex, ingress: bool) -> io::Result<Vec<u32>> {
    // BPF_MPROG_MAX: the kernel allows no more.
    let mut ids = [0_u32; 64];
    let side = if ingress { bpf_attach_type::BPF_TCX_INGRESS } else { bpf_attach_type::BPF_TCX_EGRESS };
    let mut attr = zeroed_attr();
    // SAFETY: writes the member of the union that BPF_PROG_QUERY reads.
    let query = unsafe { &mut attr.query };
    query.__bindgen_anon_1.target_ifindex = device.0;
    query.attach_type = side as u32;
    query.__bindgen_anon_2.count = ids.len() as u32;
    query.prog_ids = ids.as_mut_ptr() as u64;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: the member that the kernel fills for this command.
    let query = unsafe { attr.query };
    // SAFETY: two names of one integer.
    let count = unsafe { query.__bindgen_anon_2.count };
    Ok(ids.into_iter().take(count as usize).collect())
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<bpf_link_info> {
    // SAFETY: bpf_link_info is a C struct of integers: zero is a value of it.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?;
    attr.info.info_len = size_of::<bpf_link_info>() as u32;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Copies the next elements of a hash map (`BPF_MAP_LOOKUP_BATCH`, kernel 5.6), as many as fit into both slices.
/// Returns the number of elements and the position to go on from; `None` after the last element. aya 0.14 walks key by
/// key: that takes two system calls for each element, and begins anew when the key to go on from is gone.
///
/// # Errors
///
/// Returns the error of bpf(2): ENOSPC when more elements share a bucket than fit. EINVAL for a map that is no hash of
/// `K` to `V`.
pub(crate) fn lookup_batch<K: bytemuck::Pod, V: bytemuck::Pod>(
    map: &MapData,
    from: Option<u32>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, Option<u32>)> {
    let info = map.info().map_err(io::Error::other)?;
    let is_hash = matches!(info.map_type(), Ok(MapType::Hash | MapType::LruHash));
    if !is_hash || (info.key_size() as usize, info.value_size() as usize) != (size_of::<K>(), size_of::<V>())
    {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut next = 0_u32;
    let mut attr = zeroed_attr();
    // The kernel writes no more than `count` keys and values, of the sizes checked above. Any bytes are a `K` or `V`.
    // SAFETY: writes the member of the union that BPF_MAP_LOOKUP_BATCH reads.
    let batch = unsafe { &mut attr.batch };
    batch.map_fd = u32::try_from(map.fd().as_fd().as_raw_fd()).map_err(io::Error::other)?;
    batch.in_batch = from.as_ref().map_or(0, |from| std::ptr::from_ref(from) as u64);
    batch.out_batch = std::ptr::from_mut(&mut next) as u64;
    batch.count = u32::try_from(keys.len().min(values.len())).unwrap_or(u32::MAX);
    batch.keys = keys.as_mut_ptr() as u64;
    batch.values = values.as_mut_ptr() as u64;
    let last = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => false,
        // The walk is at its end; the last elements have been copied.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    // SAFETY: the member that was written above.
    let count = unsafe { attr.batch.count };
    Ok((count as usize, (!last).then_some(next)))
}

/// Waits until every BPF program that runs now has ended: an RCU grace period. Takes some milliseconds.
///
/// `membarrier(MEMBARRIER_CMD_GLOBAL)` (kernel 4.3) waits for a grace period. Where it is refused (`nohz_full`),
/// replacing a map inside of a map waits for one as well (kernel 4.20).
///
/// # Errors
///
/// Returns the error of bpf(2), when both ways fail.
pub fn grace_period() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { replace_inner_map() }
}

/// Makes a one-element array of maps and replaces its element.
fn replace_inner_map() -> io::Result<()> {
    let inner = create_array(bpf_map_type::BPF_MAP_TYPE_ARRAY, None)?;
    let outer = create_array(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, Some(inner.as_fd()))?;
    let (key, value) = (0_u32, inner.as_raw_fd());
    let mut attr = zeroed_attr();
    // SAFETY: writes the member of the union that BPF_MAP_UPDATE_ELEM reads.
    let update = unsafe { &mut attr.__bindgen_anon_2 };
    update.map_fd = u32::try_from(outer.as_raw_fd()).map_err(io::Error::other)?;
    update.key = std::ptr::from_ref(&key) as u64;
    update.__bindgen_anon_1.value = std::ptr::from_ref(&value) as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(|_| ())
}

fn create_array(map_type: bpf_map_type, inner: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    // SAFETY: writes the member of the union that BPF_MAP_CREATE reads.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = map_type as u32;
    create.key_size = 4;
    create.value_size = 4;
    create.max_entries = 1;
    if let Some(inner) = inner {
        create.inner_map_fd = u32::try_from(inner.as_raw_fd()).map_err(io::Error::other)?;
    }
    owned(bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr)?)
}

/// Takes ownership of a descriptor that bpf(2) returned.
fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    /// Needs CAP_BPF, as the whole module does.
    #[test]
    fn both_ways_to_wait_for_a_grace_period_work() {
        if rustix::process::geteuid().is_root() {
            super::grace_period().unwrap();
            super::replace_inner_map().unwrap();
        } else {
            assert!(super::replace_inner_map().is_err());
        }
    }
}
