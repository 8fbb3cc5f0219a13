//! `FILTER`: mmapable array of bits, what most packets and sockets need to know: "nothing of ours has this address".
//!
//! Each VIP and each address that serves nodePorts sets the bit of its address; each ServiceCIDR sets those of its
//! blocks. The agent sets bits before it writes what they stand for, and clears stale ones only when it compares
//! everything: a bit too many costs two lookups, a bit too few would lose a connection.

use crate::addr::{Addr, Family, Prefix};

/// Elements of `FILTER`: 64 bits each.
pub const FILTER_WORDS: u32 = 4096;

/// Bits of either half: blocks first, then addresses.
const HALF: u32 = FILTER_WORDS * 32;
/// Blocks of each family.
const BLOCKS: u32 = HALF / 2;

/// One bit of `FILTER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FilterBit {
    /// Index of the element.
    pub word: u32,
    /// The bit in it.
    pub mask: u64,
}

impl FilterBit {
    #[inline(always)]
    const fn at(bit: u32) -> Self {
        Self { word: bit / 64, mask: 1 << (bit % 64) }
    }

    /// The bit of an address.
    #[inline(always)]
    pub fn of_address(addr: &Addr) -> Self {
        let [high, low]: [u64; 2] = bytemuck::cast(addr.bytes);
        Self::at(HALF + mix(high.wrapping_mul(ODD) ^ low) % HALF)
    }

    /// The bit of the block that an address lies in: an IPv4 /16, or an IPv6 /64 (which share bits by chance).
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

    /// The bits of every block that a prefix touches: one for most ServiceCIDRs, 65536 at most.
    pub fn of_prefix(prefix: Prefix) -> impl Iterator<Item = Self> {
        let (first, last) = match prefix.addr().family() {
            Family::V4 => {
                let [a, b, ..] = prefix.addr().v4_octets();
                let first = u32::from(u16::from_be_bytes([a, b]));
                let blocks = 1_u32 << 112_u8.saturating_sub(prefix.mapped_len()).min(16);
                (first, first + blocks - 1)
            }
            // Shorter than a block: any of them.
            Family::V6 if prefix.mapped_len() < 64 => (BLOCKS, HALF - 1),
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

/// 24 bits on which every bit of the input has an influence.
#[inline(always)]
const fn mix(value: u64) -> u32 {
    let folded = (value ^ (value >> 32)) & 0xffff_ffff;
    (folded.wrapping_mul(ODD) >> 40) as u32
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
            assert!(FilterBit::of_prefix(prefix).all(|bit| bit.word < FILTER_WORDS / 2));
        }
    }

    #[test]
    fn addresses_spread_over_their_half() {
        let mut bits: Vec<_> = (0..10_000_u32)
            .map(|n| FilterBit::of_address(&Addr::v4((0x0a60_0000 + n).to_be_bytes())))
            .collect();
        assert!(bits.iter().all(|bit| (FILTER_WORDS / 2..FILTER_WORDS).contains(&bit.word)));
        bits.sort();
        bits.dedup();
        // 10000 balls into 131072 bins hit 9630 of them on average.
        assert!(bits.len() > 9_500, "{} bits", bits.len());
    }
}
