//! `FILTER`: mmapable array of bits. They tell most packets and sockets all that they need to know: "nothing of ours
//! has this address".
//!
//! Each VIP and each address of this host sets the bit of its address. Each ServiceCIDR sets the bits of its blocks.
//! Each backend sets the bit of its address in the part for backends, and the bit of its port. Each frontend of UDP or
//! SCTP sets the bit of its port.
//!
//! The agent sets bits before it writes the entries that they stand for, and clears stale bits only when it compares
//! everything. A bit too many costs two lookups; a bit too few would lose a connection.

use crate::abi::proto::UDP;
use crate::addr::{Addr, Family, Prefix};
use crate::be::Be16;

/// Number of elements of `FILTER`, 64 bits each: [`BLOCKS`] for IPv4 and as many for IPv6, [`ADDRESSES`], [`BACKENDS`],
/// and [`PORTS`] for UDP, as many for SCTP and as many for backends.
pub const FILTER_WORDS: u32 = (2 * BLOCKS + ADDRESSES + BACKENDS + 3 * PORTS) / 64;

/// Number of bits for the blocks of each family.
const BLOCKS: u32 = 1 << 16;
/// Number of bits for VIPs and addresses of this host.
const ADDRESSES: u32 = 1 << 17;
/// Number of bits for backends: at 250 000 backends, one address in five is mistaken for a backend's.
const BACKENDS: u32 = 1 << 20;

/// Number of bits for the ports of each kind: one bit for each port.
const PORTS: u32 = 1 << 16;

/// One bit of `FILTER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FilterBit {
    /// Index of the element.
    pub word: u32,
    /// The bit in the element.
    pub mask: u64,
}

impl FilterBit {
    #[inline(always)]
    const fn at(bit: u32) -> Self {
        Self { word: bit / 64, mask: 1 << (bit % 64) }
    }

    /// Returns the bit of an address.
    #[inline(always)]
    pub fn of_address(addr: &Addr) -> Self {
        Self::at(2 * BLOCKS + hash(addr) % ADDRESSES)
    }

    /// Returns the bit of a backend's address.
    #[inline(always)]
    pub fn of_backend(addr: &Addr) -> Self {
        Self::at(2 * BLOCKS + ADDRESSES + hash(addr) % BACKENDS)
    }

    /// Returns the bit of a frontend's port: in the part for UDP, or in the part for SCTP for any other protocol.
    #[inline(always)]
    pub const fn of_port(proto: u8, port: Be16) -> Self {
        let part = 2 * BLOCKS + ADDRESSES + BACKENDS + if proto == UDP { 0 } else { PORTS };
        Self::at(part + port.get() as u32)
    }

    /// Returns the bit of a backend's port, whatever its protocol.
    #[inline(always)]
    pub const fn of_backend_port(port: Be16) -> Self {
        Self::at(2 * BLOCKS + ADDRESSES + BACKENDS + 2 * PORTS + port.get() as u32)
    }

    /// Returns the bit of the block that an address lies in: an IPv4 /16, or an IPv6 /64 (IPv6 blocks share bits by
    /// chance).
    #[inline(always)]
    pub fn of_block(addr: &Addr) -> Self {
        match addr.family() {
            Family::V4 => {
                let [a, b, ..] = addr.v4_octets();
                Self::at(u16::from_be_bytes([a, b]) as u32)
            }
            Family::V6 => {
                let [high, _]: [u64; 2] = bytemuck::cast(addr.bytes);
                Self::at(BLOCKS + mix(high) % BLOCKS)
            }
        }
    }

    /// Returns the bits of every block that a prefix touches: one for most ServiceCIDRs, 65536 at most.
    pub fn of_prefix(prefix: Prefix) -> impl Iterator<Item = Self> {
        let (first, last) = match prefix.addr().family() {
            Family::V4 => {
                let [a, b, ..] = prefix.addr().v4_octets();
                let first = u32::from(u16::from_be_bytes([a, b]));
                let blocks = 1_u32 << 112_u8.saturating_sub(prefix.mapped_len()).min(16);
                (first, first + blocks - 1)
            }
            // Such a prefix is shorter than a block, and its blocks can have any bit.
            Family::V6 if prefix.mapped_len() < 64 => (BLOCKS, 2 * BLOCKS - 1),
            Family::V6 => {
                let Self { word, mask } = Self::of_block(&prefix.addr());
                let bit = word * 64 + mask.trailing_zeros();
                (bit, bit)
            }
        };
        (first..=last).map(Self::at)
    }
}

/// 2^64 divided by the golden ratio.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
fn hash(addr: &Addr) -> u32 {
    let [high, low]: [u64; 2] = bytemuck::cast(addr.bytes);
    mix(high.wrapping_mul(ODD) ^ low)
}

/// Returns 24 bits that each depend on every bit of the input.
#[inline(always)]
const fn mix(value: u64) -> u32 {
    // One product alone would map neighbours to a lattice, which coincides with the lattice of other neighbours.
    let folded = (value ^ (value >> 32)).wrapping_mul(ODD);
    ((folded ^ (folded >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<core::net::IpAddr>().unwrap().into()
    }

    #[test]
    fn a_prefix_covers_the_blocks_of_its_addresses() {
        for (prefix, len, inside, outside, bits) in [
            ("10.96.0.0", 12, "10.111.255.255", "10.112.0.0", 16),
            ("10.96.4.0", 22, "10.96.7.1", "10.97.4.0", 1),
            ("0.0.0.0", 0, "255.255.255.255", "fd00::1", 65536),
            ("fd00:10:96::", 112, "fd00:10:96::ffff", "fd00:10:97::1", 1),
            ("fd00:10::", 32, "fd00:10:ffff::1", "10.0.0.1", 65536),
        ] {
            let prefix = Prefix::new(addr(prefix), len).unwrap();
            let has = |address| {
                let bit = FilterBit::of_block(&addr(address));
                FilterBit::of_prefix(prefix).any(|other| other == bit)
            };
            assert!(has(inside) && !has(outside), "{prefix}");
            assert_eq!(FilterBit::of_prefix(prefix).count(), bits, "{prefix}");
            assert!(FilterBit::of_prefix(prefix).all(|bit| bit.word < 2 * BLOCKS / 64));
        }
    }

    #[test]
    fn backends_do_not_hide_their_neighbours() {
        // 10 000 pods of one range set 1 % of the bits; other ranges must not meet them more often.
        let bits: std::collections::BTreeSet<_> = (0..10_000_u32)
            .map(|n| FilterBit::of_backend(&Addr::v4((0x0a80_0000 + n).to_be_bytes())))
            .collect();
        for range in [0x0a40_0000_u32, 0x0a40_0100, 0xac10_0000, 0xc0a8_0000, 0x0a81_0000] {
            let met = (0..4_096)
                .filter(|n| bits.contains(&FilterBit::of_backend(&Addr::v4((range + n).to_be_bytes()))));
            let met = met.count();
            assert!(met < 90, "{met} of 4096 addresses from {range:#x} on are taken for backends");
        }
    }

    #[test]
    fn addresses_spread_over_their_part() {
        let mut bits: Vec<_> = (0..10_000_u32)
            .map(|n| FilterBit::of_address(&Addr::v4((0x0a60_0000 + n).to_be_bytes())))
            .collect();
        assert!(bits.iter().all(|bit| (2 * BLOCKS / 64..(2 * BLOCKS + ADDRESSES) / 64).contains(&bit.word)));
        bits.sort();
        bits.dedup();
        // 10000 balls into 131072 bins hit 9630 of them on average.
        assert!(bits.len() > 9_500, "{} bits", bits.len());
    }
}
