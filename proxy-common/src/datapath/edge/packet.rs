//! A packet as the pipeline sees it: bytes by value, and the few operations that only the kernel can do.
//!
//! Offsets count from the first byte the program sees (the MAC header, where there is one). Every load and store is
//! checked on its own: no reference into packet memory ever exists.

use super::parsed::Parsed;
use super::tables::EdgeTables;
use super::work::Work;
use crate::abi::IfIndex;
use crate::addr::{Addr, Family};

/// Largest offset that bytes are loaded from. No header that matters lies behind it, and the verifier wants a
/// bound.
pub const FURTHEST: u32 = 1024;

/// One packet on one device.
pub trait Packet {
    /// EtherType in host order, VLAN tags aside.
    fn ethertype(&self) -> u16;
    /// Offset of the IP header.
    fn ip_offset(&self) -> u32;
    /// Length in bytes, from offset 0.
    fn length(&self) -> u32;
    /// Index of the device that the program runs on.
    fn ifindex(&self) -> IfIndex;
    /// Index of the device through which the packet entered this host; 0 if it was made here.
    fn entered_by(&self) -> IfIndex;
    /// Index of the device by which the kernel's routes lead from here to `addr`, an address of `family`; 0
    /// if there is no route, or if the kernel does not tell.
    fn route_to(&self, family: Family, addr: &Addr) -> IfIndex;
    /// Returns whether a tag of a VLAN other than 0 stands before the IP header: such a packet goes to a
    /// device above this one, or comes from there.
    fn is_tagged(&self) -> bool {
        false
    }
    /// Makes the packet leave by `device`, if the kernel's rules and routes lead there with the addresses
    /// `source` and `destination`. Returns false, with nothing changed, if they do not.
    fn leave_by(&mut self, device: IfIndex, family: Family, source: &Addr, destination: &Addr) -> bool;
    /// Returns `N` bytes, if all of them are in the packet and `offset` is at most [`FURTHEST`].
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// As [`Packet::load`], but returns `None` also if that would take a call of the kernel.
    #[inline(always)]
    fn load_linear<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.load(offset)
    }
    /// Replaces `N` bytes. All bytes that are replaced by this function, checksum fields included, must
    /// together leave the one's-complement sum over the packet as it was. Returns false on failure.
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool;
    /// Replaces `N` bytes, and updates the kernel's sum over the packet by their difference. This is for
    /// bytes in a pseudo header (IPv6 addresses), for which [`Packet::fix_checksum`] compensates later, and
    /// for bytes for which no checksum compensates. Returns false on failure.
    fn store_summed<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool;
    /// Adds to the checksum field at `offset`: `pseudo` for changes in the pseudo header, `covered` for
    /// changes in the packet. If the field still holds the sum of the pseudo header alone (the device
    /// completes it), `covered` does not count. With `zero_is_none` (UDP) a zero field stays zero.
    fn fix_checksum(&mut self, offset: u32, pseudo: u32, covered: u32, zero_is_none: bool) -> bool;
    /// Calls [`super::sctp::moved_on`]. In the kernel this is a function of its own, which is verified once
    /// and not on each path to it.
    fn sctp_moved_on(&self, change: u32, bytes: u32) -> u32;
    /// Calls [`super::judge::choose`], likewise.
    fn choose(&self, tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work);
    /// Makes room for `bytes` between the MAC and the IP header.
    fn insert_before_ip(&mut self, bytes: u32) -> bool;
    /// Cuts or extends the packet to `len` bytes.
    fn resize(&mut self, len: u32) -> bool;
}
