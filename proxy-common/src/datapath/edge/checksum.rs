//! Internet checksums (RFC 1071), updated by differences (RFC 1624): a checksum that was wrong on arrival
//! stays wrong.
//!
//! Sums are one's-complement sums of memory words, folded to 32 bits. A sum is folded to 16 bits when it is
//! stored into a packet. The order of bytes does not matter as long as all words are read the same way.

use crate::addr::Addr;
use crate::be::Be16;

/// Returns what the replacement of `old` by `new` adds to the sum over them.
#[inline(always)]
pub fn difference<const N: usize>(old: &[u32; N], new: &[u32; N]) -> u32 {
    let mut sum = 0_u64;
    for word in old {
        sum = sum.wrapping_add(u64::from(!*word));
    }
    for word in new {
        sum = sum.wrapping_add(u64::from(*word));
    }
    fold32(sum)
}

/// Returns the [`difference`] of two addresses. The common prefix of IPv4 addresses cancels out.
#[inline(always)]
pub fn addresses(old: &Addr, new: &Addr) -> u32 {
    difference::<4>(&bytemuck::cast(*old), &bytemuck::cast(*new))
}

/// Returns the [`difference`] of two pairs of ports, which lie next to each other in a packet.
#[inline(always)]
pub fn ports(old: (Be16, Be16), new: (Be16, Be16)) -> u32 {
    difference(&[word(old.0, old.1)], &[word(new.0, new.1)])
}

/// Returns two ports as one word, as they lie in memory.
#[inline(always)]
pub fn word(first: Be16, second: Be16) -> u32 {
    let ([a, b], [c, d]) = (first.bytes, second.bytes);
    u32::from_ne_bytes([a, b, c, d])
}

/// Returns the sum of two sums.
#[inline(always)]
pub fn add(a: u32, b: u32) -> u32 {
    fold32(u64::from(a).wrapping_add(u64::from(b)))
}

/// Returns a checksum field after the data that it covers has changed by `difference`.
#[inline(always)]
pub fn updated(field: [u8; 2], difference: u32) -> [u8; 2] {
    let sum = u64::from(!u16::from_ne_bytes(field)).wrapping_add(u64::from(difference));
    (!fold16(fold32(sum))).to_ne_bytes()
}

/// Returns the checksum field for a sum.
#[inline(always)]
pub fn field(sum: u32) -> [u8; 2] {
    (!fold16(sum)).to_ne_bytes()
}

#[inline(always)]
fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    (sum & 0xffff_ffff).wrapping_add(sum >> 32) as u32
}

/// Folds a sum to 16 bits.
#[inline(always)]
pub fn fold16(sum: u32) -> u16 {
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (sum & 0xffff).wrapping_add(sum >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the checksum of two words. The second word only serves to reach every carry.
    fn checksum(a: u16, b: u16) -> [u8; 2] {
        field(u32::from(a) + u32::from(b))
    }

    #[test]
    fn an_updated_field_is_the_one_computed_anew() {
        let edges = [0, 1, 2, 0x7fff, 0x8000, 0xfffe, 0xffff];
        for old in edges {
            for new in 0..=u16::MAX {
                for other in edges {
                    let difference = difference(&[u32::from(old)], &[u32::from(new)]);
                    let got = u16::from_ne_bytes(updated(checksum(old, other), difference));
                    let want = u16::from_ne_bytes(checksum(new, other));
                    // Zero has two forms. The form matters only for a sum over nothing but zeros.
                    let same = got == want || (got == 0 || got == 0xffff) && (want == 0 || want == 0xffff);
                    assert!(same, "{old:#x} -> {new:#x} beside {other:#x}: {got:#x}, not {want:#x}");
                }
            }
        }
    }

    #[test]
    fn what_was_wrong_stays_wrong() {
        let wrong = (u16::from_ne_bytes(checksum(0x1234, 9)) ^ 0x0100).to_ne_bytes();
        let got = updated(wrong, difference(&[0x1234], &[0x4321]));
        assert_ne!(got, checksum(0x4321, 9));
    }

    #[test]
    fn sums_do_not_overflow() {
        assert_eq!(fold16(difference(&[0; 8], &[u32::MAX; 8])), 0xffff);
        assert_eq!(add(u32::MAX, u32::MAX), u32::MAX);
    }
}
