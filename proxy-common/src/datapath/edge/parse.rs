//! Parser from bytes to addresses and ports. After parsing, the address family matters only where bytes are
//! written.
//!
//! Sources: RFC 791 (IPv4), RFC 8200 (IPv6 and its extension headers), RFC 9293 (TCP), RFC 768 (UDP).

use super::packet::Packet;
use super::parsed::{Parsed, Part};
use crate::abi::proto::{ICMP, ICMPV6, SCTP, TCP, UDP};
use crate::addr::{Addr, Family};
use crate::be::Be16;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Largest number of extension headers that are read before the transport header.
const EXTENSIONS: usize = 6;

/// Result of parsing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All headers are there.
    Whole,
    /// Not IP, or so broken that there is no destination.
    NotIp,
    /// The addresses are known, but what follows is truncated or senseless.
    Malformed,
}

/// Reads the addresses and the protocol of a packet into `parsed` (for IPv6 the next header, which may be an
/// extension). This suffices to let most packets pass. All other fields of `parsed` are unspecified
/// afterwards. Returns false if the packet is not IP, or too short.
#[inline(always)]
pub fn addresses(packet: &impl Packet, parsed: &mut Parsed) -> bool {
    let family = match packet.ethertype() {
        ETHERTYPE_IPV4 => Family::V4,
        ETHERTYPE_IPV6 => Family::V6,
        _ => return false,
    };
    let ip = packet.ip_offset();
    read_addresses::<_, true>(packet, family, ip, parsed) || addresses_anywhere(packet, family, ip, parsed)
}

/// As [`addresses`], for a packet whose headers are not in its linear part. This is a function of its own,
/// because its buffers would otherwise be on the stack below every other function.
#[inline(never)]
fn addresses_anywhere(packet: &impl Packet, family: Family, ip: u32, parsed: &mut Parsed) -> bool {
    read_addresses::<_, false>(packet, family, ip, parsed)
}

#[inline(always)]
fn read_addresses<P: Packet, const LINEAR: bool>(
    packet: &P,
    family: Family,
    ip: u32,
    parsed: &mut Parsed,
) -> bool {
    match family {
        Family::V4 => {
            let Some(header) = load::<P, 20, LINEAR>(packet, ip) else { return false };
            let [_, _, _, _, _, _, _, _, _, proto, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = header;
            parsed.tuple.source = Addr::v4_in_memory(u32::from_ne_bytes([s0, s1, s2, s3]));
            parsed.tuple.destination = Addr::v4_in_memory(u32::from_ne_bytes([d0, d1, d2, d3]));
            parsed.proto = proto;
        }
        Family::V6 => {
            let Some(header) = load::<P, 40, LINEAR>(packet, ip) else { return false };
            let [_, _, _, _, _, _, next, ..] = header;
            let [_, s0, s1, d0, d1]: [u64; 5] = bytemuck::cast(header);
            parsed.tuple.source = bytemuck::cast([s0, s1]);
            parsed.tuple.destination = bytemuck::cast([d0, d1]);
            parsed.proto = next;
        }
    }
    true
}

#[inline(always)]
fn load<P: Packet, const N: usize, const LINEAR: bool>(packet: &P, offset: u32) -> Option<[u8; N]> {
    if LINEAR { packet.load_linear(offset) } else { packet.load(offset) }
}

/// Reads the rest of the headers of a packet whose [`addresses`] have been read.
#[inline(never)]
pub fn parse(packet: &impl Packet, parsed: &mut Parsed) -> Outcome {
    forget(parsed);
    match packet.ethertype() {
        ETHERTYPE_IPV4 => ipv4(packet, packet.ip_offset(), true, parsed),
        ETHERTYPE_IPV6 => ipv6(packet, packet.ip_offset(), true, parsed),
        _ => Outcome::NotIp,
    }
}

/// Resets the fields that not every packet sets. All other fields are written before they are read.
#[inline(always)]
fn forget(parsed: &mut Parsed) {
    (parsed.tuple.source_port, parsed.tuple.destination_port) = (Be16::default(), Be16::default());
    (parsed.part, parsed.id, parsed.kind) = (Part::Whole, [0; 4], 0);
}

/// Reads the headers that an ICMP error of `family` quotes at `offset`. Eight bytes of the transport header
/// are enough. Returns false if they are not there.
#[inline(never)]
pub fn quoted(packet: &impl Packet, family: Family, offset: u32, parsed: &mut Parsed) -> bool {
    if !read_addresses::<_, false>(packet, family, offset, parsed) {
        return false;
    }
    forget(parsed);
    let outcome = match family {
        Family::V4 => ipv4(packet, offset, false, parsed),
        Family::V6 => ipv6(packet, offset, false, parsed),
    };
    outcome == Outcome::Whole && parsed.part != Part::Later
}

#[inline(always)]
fn ipv4(packet: &impl Packet, ip: u32, whole: bool, parsed: &mut Parsed) -> Outcome {
    let Some(header) = packet.load::<10>(ip) else { return Outcome::NotIp };
    let [first, _, len_high, len_low, id0, id1, frag_high, frag_low, _, proto] = header;
    if first >> 4 != 4 {
        return Outcome::NotIp;
    }
    let header_len = u32::from(first & 0x0f).wrapping_mul(4);
    let told = u32::from(u16::from_be_bytes([len_high, len_low]));
    let available = packet.length().wrapping_sub(ip);
    let total = if is_too_long_to_tell(told, available, whole) { available } else { told };
    if header_len < 20 || total < header_len || whole && total > available {
        return Outcome::Malformed;
    }
    let fragment = u16::from_be_bytes([frag_high, frag_low]);
    parsed.part = match (fragment & 0x1fff, fragment & 0x2000) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    (parsed.family, parsed.ip, parsed.proto) = (Family::V4, ip, proto);
    (parsed.transport, parsed.bytes) = (ip.wrapping_add(header_len), total);
    parsed.id = [id0, id1, 0, 0];
    transport(packet, parsed, total.wrapping_sub(header_len), whole)
}

#[inline(always)]
fn ipv6(packet: &impl Packet, ip: u32, whole: bool, parsed: &mut Parsed) -> Outcome {
    let Some(header) = packet.load::<8>(ip) else { return Outcome::NotIp };
    let [first, _, _, _, len_high, len_low, next, _] = header;
    if first >> 4 != 6 {
        return Outcome::NotIp;
    }
    let told = u32::from(u16::from_be_bytes([len_high, len_low]));
    let available = packet.length().wrapping_sub(ip);
    let total = if is_too_long_to_tell(told, available, whole) { available } else { told.wrapping_add(40) };
    if whole && total > available {
        return Outcome::Malformed;
    }
    let mut offset = ip.wrapping_add(40);
    let mut proto = next;
    for _ in 0..EXTENSIONS {
        match proto {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let Some([next, units]) = packet.load::<2>(offset) else {
                    return Outcome::Malformed;
                };
                proto = next;
                offset = offset.wrapping_add(u32::from(units).wrapping_add(1).wrapping_mul(8));
            }
            FRAGMENT => {
                let Some([next, _, high, low, i0, i1, i2, i3]) = packet.load::<8>(offset) else {
                    return Outcome::Malformed;
                };
                let fragment = u16::from_be_bytes([high, low]);
                parsed.part = match (fragment >> 3, fragment & 1) {
                    (0, 0) => Part::Whole,
                    (0, _) => Part::First,
                    _ => Part::Later,
                };
                (proto, parsed.id) = (next, [i0, i1, i2, i3]);
                offset = offset.wrapping_add(8);
                if parsed.part == Part::Later {
                    break;
                }
            }
            _ => break,
        }
    }
    (parsed.family, parsed.ip, parsed.proto) = (Family::V6, ip, proto);
    (parsed.transport, parsed.bytes) = (offset, total);
    let before = offset.wrapping_sub(ip);
    if before > total {
        return Outcome::Malformed;
    }
    transport(packet, parsed, total.wrapping_sub(before), whole)
}

/// Returns whether a length of zero in an IP header stands for all available bytes, because their number is
/// too large for the field. Such a packet is a train of TCP segments in one piece (BIG TCP: Linux 5.19 for
/// IPv6, at first with a jumbo payload option, 6.3 for IPv4). The header that an ICMP error quotes from such
/// a packet has a length of zero, too.
#[inline(always)]
const fn is_too_long_to_tell(told: u32, available: u32, whole: bool) -> bool {
    told == 0 && (!whole || available > u16::MAX as u32)
}

/// Reads ports, TCP flags and ICMP type. `length` is the number of bytes that the IP header leaves for the
/// transport.
#[inline(always)]
fn transport(packet: &impl Packet, parsed: &mut Parsed, length: u32, whole: bool) -> Outcome {
    if parsed.part == Part::Later {
        return Outcome::Whole;
    }
    match parsed.proto {
        TCP | UDP | SCTP => {
            let least = if whole && parsed.proto == TCP {
                20
            } else if whole && parsed.proto == SCTP {
                12
            } else {
                8
            };
            let Some([s0, s1, d0, d1]) = packet.load::<4>(parsed.transport) else {
                return Outcome::Malformed;
            };
            if length < least {
                return Outcome::Malformed;
            }
            parsed.tuple.source_port = Be16 { bytes: [s0, s1] };
            parsed.tuple.destination_port = Be16 { bytes: [d0, d1] };
            if parsed.proto == TCP && whole {
                let Some([offset, flags]) = packet.load::<2>(parsed.transport.wrapping_add(12)) else {
                    return Outcome::Malformed;
                };
                let header = u32::from(offset >> 4).wrapping_mul(4);
                if header < 20 || header > length {
                    return Outcome::Malformed;
                }
                parsed.kind = flags;
            }
        }
        ICMP | ICMPV6 => {
            let Some([kind]) = packet.load::<1>(parsed.transport) else { return Outcome::Malformed };
            if length < 8 {
                return Outcome::Malformed;
            }
            parsed.kind = kind;
        }
        _ => {}
    }
    Outcome::Whole
}
