//! Refusals in the place of a backend: a TCP reset (RFC 9293 §3.5.2), or an ICMP error "port unreachable"
//! (RFC 792, RFC 4443), from the address that the sender asked for.

use super::checksum;
use super::icmp::is_error;
use super::packet::Packet;
use super::rewrite;
use super::verdict::Verdict;
use crate::abi::proto::{ICMP, ICMPV6, TCP};
use crate::addr::{Addr, Family};
use crate::datapath::edge::parsed::{Parsed, Part, tcp};

/// Bytes of an IP header without options or extensions, and the eight bytes of an ICMP header.
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const ICMP_HEADER: u32 = 8;
/// Largest number of words that an error quotes: an IPv4 header with all options and eight bytes more, or an
/// IPv6 header with some extensions.
const QUOTED_WORDS: u32 = 24;

const TTL: u8 = 64;

/// Turns a packet into the reset or ICMP error that refuses it. Drops the packet if it must not be answered.
#[inline(never)]
pub fn refuse(packet: &mut impl Packet, parsed: &Parsed) -> Verdict {
    // RFC 1122 §3.2.2, RFC 4443 §2.4: no error about an error, no error about a fragment that its receiver
    // cannot make sense of, and no error to an address that is not a single host's.
    if parsed.part == Part::Later
        || is_error(parsed)
        || parsed.proto == TCP && (parsed.kind & tcp::RST != 0 || parsed.part == Part::First)
        || !is_one_host(&parsed.tuple.source)
    {
        return Verdict::Drop;
    }
    let done = if parsed.proto == TCP { reset(packet, parsed) } else { unreachable(packet, parsed) };
    if done { Verdict::Reply } else { Verdict::Drop }
}

/// Returns whether a packet on the wire can have this source: not a group, loopback or the unspecified
/// address.
#[inline(always)]
fn is_one_host(addr: &Addr) -> bool {
    match addr.family() {
        Family::V4 => {
            let [first, ..] = addr.v4_octets();
            first != 0 && first != 127 && first < 224
        }
        Family::V6 => {
            let [high, low]: [u64; 2] = bytemuck::cast(addr.bytes);
            u64::from_be(high) >> 56 != 0xff && (high != 0 || u64::from_be(low) > 1)
        }
    }
}

/// Turns a TCP segment into the reset that answers it, in place. Its options and data stay, which a reset may
/// have. The checksum therefore changes only by the difference of the replaced bytes, whatever state it is
/// in.
#[inline(always)]
fn reset(packet: &mut impl Packet, parsed: &Parsed) -> bool {
    let tuple = &parsed.tuple;
    // The reset is a new packet, so its TTL or hop limit begins anew. Swapping addresses and ports changes no
    // sum.
    let Some(hops) = renew_hops(packet, parsed) else { return false };
    if !rewrite::addresses(packet, parsed.family, parsed.ip, &tuple.destination, &tuple.source, hops) {
        return false;
    }
    let Some(old) = packet.load::<16>(parsed.transport) else { return false };
    let [_, _, _, _, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags, _, _] = old;
    let header = u32::from(offset >> 4).wrapping_mul(4);
    let data = parsed.bytes.wrapping_sub(parsed.transport.wrapping_sub(parsed.ip)).wrapping_sub(header);
    let length =
        data.wrapping_add(u32::from(flags & tcp::SYN != 0)).wrapping_add(u32::from(flags & tcp::FIN != 0));
    let (sequence, acknowledges, flags) = if flags & tcp::ACK != 0 {
        ([a0, a1, a2, a3], [0; 4], tcp::RST)
    } else {
        let end = u32::from_be_bytes([q0, q1, q2, q3]).wrapping_add(length);
        ([0; 4], end.to_be_bytes(), tcp::RST | tcp::ACK)
    };
    let [s0, s1] = tuple.destination_port.bytes;
    let [d0, d1] = tuple.source_port.bytes;
    let [q0, q1, q2, q3] = sequence;
    let [a0, a1, a2, a3] = acknowledges;
    let new = [s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset & 0xf0, flags, 0, 0];
    let covered = checksum::difference::<4>(&bytemuck::cast(old), &bytemuck::cast(new));
    packet.store(parsed.transport, new)
        && packet.fix_checksum(parsed.transport.wrapping_add(16), 0, covered, false)
}

/// Sets the TTL or hop limit. Returns the difference that this makes to the sum over an IPv4 header.
#[inline(always)]
fn renew_hops(packet: &mut impl Packet, parsed: &Parsed) -> Option<u32> {
    match parsed.family {
        Family::V4 => {
            let at = parsed.ip.wrapping_add(8);
            let [hops, proto] = packet.load::<2>(at)?;
            let (old, new) = (u16::from_ne_bytes([hops, proto]), u16::from_ne_bytes([TTL, proto]));
            packet
                .store(at, new.to_ne_bytes())
                .then(|| checksum::difference(&[u32::from(old)], &[u32::from(new)]))
        }
        Family::V6 => packet.store_summed(parsed.ip.wrapping_add(7), [TTL]).then_some(0),
    }
}

/// Puts an ICMP error in front of the packet, and cuts off all but the packet's headers.
#[inline(always)]
fn unreachable(packet: &mut impl Packet, parsed: &Parsed) -> bool {
    let own = match parsed.family {
        Family::V4 => IPV4_HEADER.wrapping_add(ICMP_HEADER),
        Family::V6 => IPV6_HEADER.wrapping_add(ICMP_HEADER),
    };
    // Header lengths are multiples of four bytes, so the quote has whole words.
    let quote = parsed.transport.wrapping_sub(parsed.ip).wrapping_add(8);
    if quote > QUOTED_WORDS.wrapping_mul(4) {
        return false;
    }
    // The cut comes first: it also turns a packet of several segments (GSO) into a single packet. A GSO
    // packet cannot grow.
    if !packet.resize(parsed.ip.wrapping_add(quote)) || !packet.insert_before_ip(own) {
        return false;
    }
    let mut sum = 0;
    let first = parsed.ip.wrapping_add(own);
    for word in 0..QUOTED_WORDS {
        let at = word.wrapping_mul(4);
        if at >= quote {
            break;
        }
        let Some(bytes) = packet.load::<4>(first.wrapping_add(at)) else { return false };
        sum = checksum::add(sum, u32::from_ne_bytes(bytes));
    }
    match parsed.family {
        Family::V4 => unreachable_v4(packet, parsed, quote, sum),
        Family::V6 => unreachable_v6(packet, parsed, quote, sum),
    }
}

#[inline(always)]
fn unreachable_v4(packet: &mut impl Packet, parsed: &Parsed, quote: u32, sum: u32) -> bool {
    const DESTINATION_UNREACHABLE: u8 = 3;
    const PORT: u8 = 3;
    let [t0, t1] = (IPV4_HEADER.wrapping_add(ICMP_HEADER).wrapping_add(quote) as u16).to_be_bytes();
    let [s0, s1, s2, s3] = parsed.tuple.destination.v4_octets();
    let [d0, d1, d2, d3] = parsed.tuple.source.v4_octets();
    // Precedence "internetwork control", as RFC 1812 §5.3.2 wants for errors; "don't fragment" is set.
    let header = [0x45, 0xc0, t0, t1, 0, 0, 0x40, 0, TTL, ICMP, 0, 0, s0, s1, s2, s3, d0, d1, d2, d3];
    let [c0, c1] = checksum::field(checksum::difference::<5>(&[u32::MAX; 5], &bytemuck::cast(header)));
    let header = [0x45, 0xc0, t0, t1, 0, 0, 0x40, 0, TTL, ICMP, c0, c1, s0, s1, s2, s3, d0, d1, d2, d3];
    let word = u32::from_ne_bytes([DESTINATION_UNREACHABLE, PORT, 0, 0]);
    let [c0, c1] = checksum::field(checksum::add(sum, word));
    packet.store_summed(parsed.ip, header)
        && packet.store_summed(
            parsed.ip.wrapping_add(IPV4_HEADER),
            [DESTINATION_UNREACHABLE, PORT, c0, c1, 0, 0, 0, 0],
        )
}

#[inline(always)]
fn unreachable_v6(packet: &mut impl Packet, parsed: &Parsed, quote: u32, sum: u32) -> bool {
    const DESTINATION_UNREACHABLE: u8 = 1;
    const PORT: u8 = 4;
    let length = ICMP_HEADER.wrapping_add(quote) as u16;
    let [l0, l1] = length.to_be_bytes();
    let fixed: u64 = bytemuck::cast([0x60, 0, 0, 0, l0, l1, ICMPV6, TTL]);
    let [s0, s1]: [u64; 2] = bytemuck::cast(parsed.tuple.destination);
    let [d0, d1]: [u64; 2] = bytemuck::cast(parsed.tuple.source);
    let header: [u8; 40] = bytemuck::cast([fixed, s0, s1, d0, d1]);
    let pseudo = [u32::from(length).to_be(), u32::from(ICMPV6).to_be()];
    let addresses = checksum::difference::<8>(&[u32::MAX; 8], &bytemuck::cast([s0, s1, d0, d1]));
    let sum = checksum::add(sum, addresses);
    let sum = checksum::add(sum, checksum::difference(&[u32::MAX; 2], &pseudo));
    let word = u32::from_ne_bytes([DESTINATION_UNREACHABLE, PORT, 0, 0]);
    let [c0, c1] = checksum::field(checksum::add(sum, word));
    packet.store_summed(parsed.ip, header)
        && packet.store_summed(
            parsed.ip.wrapping_add(IPV6_HEADER),
            [DESTINATION_UNREACHABLE, PORT, c0, c1, 0, 0, 0, 0],
        )
}
