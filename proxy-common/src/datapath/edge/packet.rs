//! A packet as the pipeline sees it: bytes by value, and the few operations that only the kernel can do.
//!
//! Offsets count from the first byte the program sees (the MAC header, where there is one). Every load and store is
//! checked on its own: no reference into packet memory ever exists.

use super::parse::Parsed;
use super::tables::{EdgeTables, Work};
use crate::addr::{Addr, Family};

/// Nothing is loaded from behind this offset: no header that matters lies there, and the verifier wants a bound.
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
    fn ifindex(&self) -> u32;
    /// Index of the device through which the packet entered this host; 0 if it was made here.
    fn entered_by(&self) -> u32;
    /// Index of the device by which the kernel's routes lead to `addr` from here, of the packet's family; 0 if none does, or
    /// the kernel does not tell.
    fn route_to(&self, family: Family, addr: &Addr) -> u32;
    /// Whether a tag of a VLAN other than 0 stands before the IP header: such a packet is for a device above this one, or from there.
    fn is_tagged(&self) -> bool {
        false
    }
    /// Makes the packet leave by `device`, if the kernel's rules and routes lead there with the addresses `source` and `destination`.
    /// False, and nothing has changed, if they do not.
    fn leave_by(&mut self, device: u32, family: Family, source: &Addr, destination: &Addr) -> bool;
    /// `N` bytes, if they are all there and begin at [`FURTHEST`] at the latest.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// As [`Packet::load`], if that takes no call of the kernel; else `None`, too.
    #[inline(always)]
    fn load_linear<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.load(offset)
    }
    /// Replaces `N` bytes in a way that the one's-complement sum of all replaced bytes of the packet, checksum fields
    /// included, stays the same in the end. False if that failed.
    fn store<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool;
    /// Replaces `N` bytes in a way that changes the sum over the packet by their difference: of what a pseudo header covers
    /// (IPv6 addresses), until [`Packet::fix_checksum`] makes up for it, and of what nothing makes up for.
    fn store_summed<const N: usize>(&mut self, offset: u32, bytes: [u8; N]) -> bool;
    /// Adds to the checksum field at `offset`: `pseudo` for what lies in the pseudo header, `covered` for what lies in the
    /// packet. The field may still hold the sum of the pseudo header alone (the device fills it in): `covered` then does
    /// not count. With `zero_is_none` (UDP) a zero field stays zero.
    fn fix_checksum(&mut self, offset: u32, pseudo: u32, covered: u32, zero_is_none: bool) -> bool;
    /// [`super::sctp::moved_on`]. In the kernel a function that is verified once, not on each way to it.
    fn sctp_moved_on(&self, change: u32, bytes: u32) -> u32 {
        super::sctp::moved_on(change, bytes)
    }
    /// [`super::judge::choose`], likewise.
    fn choose(&self, tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work)
    where
        Self: Sized,
    {
        super::judge::choose(self, tables, parsed, work);
    }
    /// Makes room for `bytes` between the MAC and the IP header.
    fn insert_before_ip(&mut self, bytes: u32) -> bool;
    /// Cuts or extends the packet to `len` bytes.
    fn resize(&mut self, len: u32) -> bool;
}
