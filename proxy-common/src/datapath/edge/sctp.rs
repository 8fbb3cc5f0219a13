//! SCTP's checksum (RFC 9260 §6.8, Appendix A): CRC32c over the whole packet, updated without reading the
//! packet.
//!
//! A CRC is linear: the effect of a changed word depends on the change and on the number of bytes that
//! follow, not on their values. Moving on by one bit is a multiplication by x modulo the polynomial, so
//! moving on by `n` bytes is a multiplication by x^8n. Tables hold the products, four bits at a time: the
//! verifier follows every step of a loop on every path to it.

use super::packet::Packet;

/// Castagnoli's polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x^0.
const ONE: u32 = 1 << 31;
/// Products, for each bit k of a length in bytes: x^(8 · 2^k) times each value of each four bits of a word.
static PRODUCTS: [[[u32; 16]; 8]; 16] = products();

/// Offset of the checksum in the header.
const CHECKSUM: u32 = 8;

/// Updates the checksum of a packet of `length` bytes at `offset` for a change of its first four bytes (the
/// ports). A zero checksum is left alone: the device fills it in. Returns false if the packet cannot be
/// written.
#[inline(always)]
pub fn fix_checksum(packet: &mut impl Packet, offset: u32, change: u32, length: u32) -> bool {
    let at = offset.wrapping_add(CHECKSUM);
    let Some(field) = packet.load::<4>(at) else { return false };
    if field == [0; 4] {
        return true;
    }
    let crc = u32::from_le_bytes(field) ^ packet.sctp_moved_on(change, length);
    packet.store_summed(at, crc.to_le_bytes())
}

/// Returns the effect of a change (bytes in memory order, as a little-endian number) on the CRC `bytes` bytes
/// after the first changed byte.
#[inline(always)]
pub fn moved_on(change: u32, bytes: u32) -> u32 {
    let mut result = change;
    let mut left = bytes;
    for product in &PRODUCTS {
        let mut moved = 0;
        let mut nibbles = result;
        for table in product {
            moved ^= table.get((nibbles & 15) as usize).copied().unwrap_or(0);
            nibbles >>= 4;
        }
        // A mask of all ones or all zeros instead of a branch: each branch would double the number of paths.
        let chosen = 0_u32.wrapping_sub(left & 1);
        result = (moved & chosen) | (result & !chosen);
        left >>= 1;
    }
    result
}

/// Returns the product modulo the polynomial.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        if (a >> (31 - bit)) & 1 != 0 {
            product ^= b;
        }
        b = if b & 1 != 0 { (b >> 1) ^ POLYNOMIAL } else { b >> 1 };
        bit += 1;
    }
    product
}

#[allow(
    clippy::indexing_slicing,
    reason = "computed by the compiler, which would refuse an index out of range"
)]
const fn products() -> [[[u32; 16]; 8]; 16] {
    // First x^8, then the square of the previous power.
    let mut power = ONE >> 8;
    let mut products = [[[0; 16]; 8]; 16];
    let mut k = 0;
    while k < 16 {
        let mut place = 0;
        while place < 8 {
            let mut value = 0;
            while value < 16 {
                products[k][place][value] = multiply(power, (value as u32) << (4 * place));
                value += 1;
            }
            place += 1;
        }
        power = multiply(power, power);
        k += 1;
    }
    products
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1));
            }
        }
        !crc
    }

    #[test]
    fn the_reference_is_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_change_of_ports_is_made_up_for_whatever_follows() {
        for length in (12..600).chain([1_480, 9_000, 65_515]) {
            let mut bytes: Vec<u8> = (0..length).map(|n: u32| (n * 31 + 7) as u8).collect();
            let before = crc32c(&bytes);
            let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            bytes[..4].copy_from_slice(&[0x1f, 0x90, 0xc3, 0x51]);
            let new = u32::from_le_bytes([0x1f, 0x90, 0xc3, 0x51]);
            assert_eq!(before ^ moved_on(old ^ new, length), crc32c(&bytes), "{length} bytes");
        }
    }
}
