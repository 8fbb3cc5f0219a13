//! `__sk_buff` as the datapath's [`Packet`]: all `unsafe` of the kernel side for packets.
//!
//! Bytes are read from the packet's linear part if they are there, otherwise by helper. They are written by helpers,
//! which keep the kernel's own record of the checksum (`CHECKSUM_COMPLETE`, `CHECKSUM_PARTIAL`) right.

use core::mem::{MaybeUninit, offset_of};
use core::ptr::addr_of;

use aya_ebpf::bindings::{
    BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_REDIRECT,
    bpf_fib_lookup as FibLookup, bpf_redir_neigh as Neighbour,
};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
};
use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family};
use proxy_common::datapath::edge::packet::{FURTHEST, Packet};
use proxy_common::datapath::edge::parsed::Parsed;
use proxy_common::datapath::edge::sctp;
use proxy_common::datapath::edge::tables::EdgeTables;
use proxy_common::datapath::edge::work::Work;

use crate::skb::{MAC_HEADER, Skb, get, opaque, read_bytes};
use crate::steps;

/// `BPF_ADJ_ROOM_MAC` of linux/bpf.h.
const ADJ_ROOM_MAC: u32 = 1;
/// `AF_INET` of linux/socket.h, as the first byte of a little-endian word.
const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
/// `BPF_FIB_LOOKUP_OUTPUT` of linux/bpf.h: asks for the route of a packet that leaves by a device.
const BPF_FIB_LOOKUP_OUTPUT: u32 = 2;
/// Results of `bpf_fib_lookup`, of linux/bpf.h.
const BPF_FIB_LKUP_RET_SUCCESS: i64 = 0;
const BPF_FIB_LKUP_RET_NO_NEIGH: i64 = 7;
const BPF_FIB_LKUP_RET_FRAG_NEEDED: i64 = 8;
/// Bits of a VLAN tag that hold the VLAN's number.
const VLAN_ID: u32 = 0xfff;

/// A question to the kernel's routes, which the helper overwrites with the answer: `struct bpf_fib_lookup` of
/// linux/bpf.h, as words.
struct Route([u64; 8]);

const _: () = assert!(size_of::<FibLookup>() == 64 && offset_of!(FibLookup, family) == 0);
const _: () = assert!(offset_of!(FibLookup, ifindex) == 8);
const _: () =
    assert!(offset_of!(FibLookup, __bindgen_anon_3) == 16 && offset_of!(FibLookup, __bindgen_anon_4) == 32);

impl Route {
    /// Makes the question for the route to `destination`, from `source` if there is one. `device` is the device that
    /// the packet enters by, or leaves by.
    #[inline(always)]
    fn new(family: Family, device: IfIndex, source: Option<&Addr>, destination: &Addr) -> Self {
        // The compiler would call a function to zero words that it knows to be zero.
        let zero = opaque(0);
        let words = |addr: &Addr| match family {
            Family::V4 => [u64::from(u32::from_ne_bytes(addr.v4_octets())), zero],
            Family::V6 => bytemuck::cast(*addr),
        };
        let [s0, s1] = source.map_or([zero; 2], words);
        let [d0, d1] = words(destination);
        let family = match family {
            Family::V4 => AF_INET,
            Family::V6 => AF_INET6,
        };
        Self([family, u64::from(device.0), s0, s1, d0, d1, zero, zero])
    }

    /// Asks the kernel. Returns the helper's result.
    #[inline(always)]
    fn look_up(&mut self, packet: &Skb, flags: u32) -> i64 {
        // SAFETY: the helper reads and writes as many bytes as the size that is passed, which is the array's.
        unsafe { bpf_fib_lookup(packet.skb.cast(), self.0.as_mut_ptr().cast(), 64, flags) }
    }

    /// Returns the device of the route.
    #[inline(always)]
    fn device(&self) -> IfIndex {
        IfIndex(self.0[1] as u32)
    }

    /// Sends the program's packet by this route, to the neighbour that the answer names: a gateway, or the destination
    /// itself. The answer also states the family of the neighbour's address.
    #[inline(always)]
    fn redirect(mut self) -> bool {
        let device = self.device();
        const LAST_OF_SOURCE: usize = 7;
        const { assert!(size_of::<Neighbour>() == 20) };
        let family = self.0[0] as u8;
        // A `struct bpf_redir_neigh` is a family with an address behind it. The family takes the place of the source's
        // last word.
        let words: &mut [u32; 16] = bytemuck::cast_mut(&mut self.0);
        words[LAST_OF_SOURCE] = u32::from(family);
        let neighbour = words[LAST_OF_SOURCE..].as_mut_ptr();
        // SAFETY: the address is behind the family in the answer, and the helper only reads both.
        let action =
            unsafe { bpf_redirect_neigh(device.0, neighbour.cast(), size_of::<Neighbour>() as i32, 0) };
        action == i64::from(TC_ACT_REDIRECT)
    }
}

/// Calls [`sctp::moved_on`]. A global function: the verifier checks it once, separately from its callers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn vipr_sctp_moved_on(change: u32, bytes: u32) -> u32 {
    sctp::moved_on(change, bytes)
}

impl Packet for Skb {
    #[inline(always)]
    fn ethertype(&self) -> u16 {
        u16::from_be(get!(self, protocol) as u16)
    }

    #[inline(always)]
    fn ip_offset(&self) -> u32 {
        self.ip_offset
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        get!(self, len)
    }

    #[inline(always)]
    fn ifindex(&self) -> IfIndex {
        IfIndex(get!(self, ifindex))
    }

    #[inline(always)]
    fn entered_by(&self) -> IfIndex {
        IfIndex(get!(self, ingress_ifindex))
    }

    #[inline(always)]
    fn route_to(&self, family: Family, addr: &Addr) -> IfIndex {
        let mut route = Route::new(family, self.ifindex(), None, addr);
        // The answer also has a route if the neighbour is not known yet (before 5.11 the device then stays as it was
        // passed) or if the packet would be too long.
        match route.look_up(self, 0) {
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                route.device()
            }
            _ => IfIndex::NONE,
        }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // A tag that only states a priority has VLAN 0. Before 6.2, `vlan_tci` keeps the number of a tag that has been
        // removed.
        get!(self, vlan_present) != 0 && get!(self, vlan_tci) & VLAN_ID != 0
    }

    #[inline(always)]
    fn leave_by(&mut self, device: IfIndex, family: Family, source: &Addr, destination: &Addr) -> bool {
        // The kernel redirects only packets with a MAC header to neighbours, and does not remove a tag.
        if self.ip_offset != MAC_HEADER || self.is_tagged() {
            return false;
        }
        let mut route = Route::new(family, device, Some(source), destination);
        // A packet that is too long for the device stays on the route that it has.
        let found = route.look_up(self, BPF_FIB_LOOKUP_OUTPUT);
        let leads = matches!(found, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH);
        leads && route.device() == device && route.redirect()
    }

    #[inline(always)]
    fn load_linear<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let offset = opaque(u64::from(offset));
        if offset > u64::from(FURTHEST) {
            return None;
        }
        let start = opaque(u64::from(get!(self, data)) + offset);
        if start + N as u64 > u64::from(get!(self, data_end)) {
            return None;
        }
        // SAFETY: the line above compares with the packet's end, as the verifier demands.
        Some(unsafe { read_bytes(start) })
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if let Some(bytes) = self.load_linear(offset) {
            return Some(bytes);
        }
        if offset > FURTHEST {
            return None;
        }
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper checks the offset; the buffer has the length that is passed.
        let done =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
        // SAFETY: the helper has written the whole buffer.
        if done == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool {
        self.store_with(offset, &bytes, 0)
    }

    #[inline(always)]
    fn store_summed<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool {
        self.store_with(offset, &bytes, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    #[inline(always)]
    fn fix_checksum(&mut self, offset: u32, pseudo: u32, covered: u32, zero_is_none: bool) -> bool {
        let zero = if zero_is_none { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        self.add_to_checksum(offset, pseudo, u64::from(BPF_F_PSEUDO_HDR) | zero)
            && self.add_to_checksum(offset, covered, zero)
    }

    #[inline(always)]
    fn sctp_moved_on(&self, change: u32, bytes: u32) -> u32 {
        vipr_sctp_moved_on(change, bytes)
    }

    #[inline(always)]
    fn choose(&self, _: &impl EdgeTables, _: &Parsed, work: &mut Work) {
        steps::choose(self.skb, work);
    }

    #[inline(always)]
    fn insert_before_ip(&mut self, bytes: u32) -> bool {
        // SAFETY: the helper checks everything.
        (unsafe { bpf_skb_adjust_room(self.skb, bytes as i32, ADJ_ROOM_MAC, 0) }) == 0
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> bool {
        // SAFETY: the helper checks everything.
        (unsafe { bpf_skb_change_tail(self.skb, len, 0) }) == 0
    }
}
