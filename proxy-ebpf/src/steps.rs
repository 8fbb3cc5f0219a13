//! Steps of the pipeline that are global functions: the verifier looks at each of them once, and at its callers without it. A loop
//! over one of them costs the verifier a few instructions a turn instead of all ways through it.
//!
//! Kernels before 5.13 give a global function no pointer but the context, so it takes the packet's memory by itself.

#[cfg(target_arch = "bpf")]
use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use proxy_common::datapath::edge::parse::Parsed;
use proxy_common::datapath::edge::tables::Work;
use proxy_common::datapath::edge::{flows, judge};
use proxy_common::datapath::socket;
use proxy_common::datapath::tables::Tier;

use crate::maps::{DEVICES, Maps, SCRATCH};
use crate::sock::ancestor;
use crate::tc::Skb;

/// Lets a global function have the packet's memory: the compiler must not keep in registers what the function changes.
#[inline(always)]
fn lend(work: &mut Work) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: changes nothing. (It is one instruction, because the kernel refuses two lines of source at one offset.)
    unsafe {
        asm!("{0} = {0}", in(reg) core::ptr::from_mut(work), options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = work;
}

/// The part of this CPU's memory for one packet that the caller of a global function has lent to it.
#[inline(always)]
fn lent() -> Option<&'static mut Work> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: a per-CPU element, as the caller has it; nothing is read, and no reference to the whole is made.
    let work = unsafe { core::ptr::addr_of_mut!((*scratch).work) };
    // SAFETY: whoever calls has let the compiler know that this part is used elsewhere meanwhile.
    Some(unsafe { &mut *work })
}

/// The packet's headers in that memory, which nobody changes meanwhile.
#[inline(always)]
fn lent_parsed() -> Option<&'static Parsed> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: as above.
    let parsed = unsafe { core::ptr::addr_of!((*scratch).parsed) };
    // SAFETY: the caller has it borrowed to read it.
    Some(unsafe { &*parsed })
}

/// [`flows::try_source`], with the memory of this packet.
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

/// [`flows::try_tuple`], likewise.
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

/// [`judge::choose`], with the memory of this packet.
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

/// [`socket::is_of_opt_out`], of the process that calls.
#[inline(always)]
pub(crate) fn is_of_opt_out(inside: bool) -> bool {
    vipr_is_of_opt_out(u32::from(inside)) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_is_of_opt_out(inside: u32) -> u32 {
    u32::from(socket::is_of_opt_out(ancestor, &Maps, inside != 0))
}

/// The flags of a device in `DEVICES`, none if there is no such device.
#[inline(always)]
pub(crate) fn device_flags(ifindex: u32) -> u32 {
    vipr_device_flags(ifindex)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_device_flags(ifindex: u32) -> u32 {
    // SAFETY: copied at once; elements are replaced only when a device's own addresses change.
    unsafe { DEVICES.get(ifindex) }.map_or(0, |device| device.flags)
}
