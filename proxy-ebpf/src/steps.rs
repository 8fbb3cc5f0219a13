//! Steps of the pipeline that are global functions. The verifier checks each global function once, separately from its
//! callers. A loop that calls one costs the verifier a few instructions a turn instead of all paths through the step.
//!
//! Kernels before 5.13 allow a global function no pointer except the context, so each one fetches the packet's memory
//! itself.

#[cfg(target_arch = "bpf")]
use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_get_current_ancestor_cgroup_id;
use proxy_common::abi::{CgroupId, IfIndex};
use proxy_common::datapath::edge::parsed::Parsed;
use proxy_common::datapath::edge::work::Work;
use proxy_common::datapath::edge::{flows, judge};
use proxy_common::datapath::socket;
use proxy_common::datapath::tables::Tier;

use crate::maps::{DEVICES, Maps, SCRATCH};
use crate::skb::Skb;

/// Marks the packet's memory as used by a global function: the compiler must not keep values in registers that the
/// function changes.
#[inline(always)]
fn lend(work: &mut Work) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: changes nothing. (The assembly is one instruction, because the kernel refuses two lines of source at one
    // offset.)
    unsafe {
        asm!("{0} = {0}", in(reg) core::ptr::from_mut(work), options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = work;
}

/// Returns the part of this CPU's memory for one packet that the caller of a global function has lent.
#[inline(always)]
fn lent() -> Option<&'static mut Work> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a per-CPU element, as the caller has it; nothing is read, and no reference to the whole is made.
    let work = unsafe { core::ptr::addr_of_mut!((*scratch).work) };
    // SAFETY: the caller has told the compiler (`lend`) that this part is used elsewhere meanwhile.
    Some(unsafe { &mut *work })
}

/// Returns the packet's headers in the memory for one packet. Nobody changes them meanwhile.
#[inline(always)]
fn lent_parsed() -> Option<&'static Parsed> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: as in `lent`.
    let parsed = unsafe { core::ptr::addr_of!((*scratch).parsed) };
    // SAFETY: the caller has borrowed this part for reading only.
    Some(unsafe { &*parsed })
}

/// Calls [`flows::try_source`] with the memory of this packet.
#[inline(always)]
pub(crate) fn try_source(work: &mut Work, tier: Tier, spare: bool) -> bool {
    lend(work);
    vipr_try_source(u32::from(tier == Tier::Assured), u32::from(spare)) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_try_source(assured: u32, spare: u32) -> u32 {
    let Some(work) = lent() else { return 0 };
    let tier = if assured != 0 { Tier::Assured } else { Tier::New };
    u32::from(flows::try_source(&Maps, work, tier, spare != 0))
}

/// Calls [`flows::try_tuple`] with the memory of this packet.
#[inline(always)]
pub(crate) fn try_tuple(work: &mut Work, own: bool) -> bool {
    lend(work);
    vipr_try_tuple(u32::from(own)) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_try_tuple(own: u32) -> u32 {
    let Some(work) = lent() else { return 0 };
    u32::from(flows::try_tuple(&Maps, work, own != 0))
}

/// Calls [`judge::choose`] with the memory of this packet.
#[inline(always)]
pub(crate) fn choose(skb: *mut __sk_buff, work: &mut Work) {
    lend(work);
    vipr_choose(skb);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_choose(skb: *mut __sk_buff) -> u32 {
    let (Some(parsed), Some(work)) = (lent_parsed(), lent()) else { return 0 };
    judge::choose(&Skb::lent(skb, parsed), &Maps, parsed, work);
    0
}

/// Calls [`socket::is_of_opt_out`] for the calling process.
#[inline(always)]
pub(crate) fn is_of_opt_out(inside: bool) -> bool {
    vipr_is_of_opt_out(u32::from(inside)) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_is_of_opt_out(inside: u32) -> u32 {
    u32::from(socket::is_of_opt_out(ancestor, &Maps, inside != 0))
}

/// Returns the flags of a device in `DEVICES`; none if there is no such device.
#[inline(always)]
pub(crate) fn device_flags(ifindex: IfIndex) -> u32 {
    vipr_device_flags(ifindex.0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_device_flags(ifindex: u32) -> u32 {
    // SAFETY: copied at once; elements are replaced only when a device's own addresses change.
    unsafe { DEVICES.get(ifindex) }.map_or(0, |device| device.flags)
}

/// Returns the id of the calling process's ancestor cgroup at this level below the root; 0 if the process's own cgroup
/// is higher.
#[inline(always)]
pub(crate) fn ancestor(level: i32) -> CgroupId {
    // SAFETY: a helper without preconditions (5.7).
    CgroupId(unsafe { bpf_get_current_ancestor_cgroup_id(level) })
}
