//! Writes a new tuple into a packet, and updates all checksums that cover it.

use super::checksum;
use super::packet::Packet;
use super::sctp;
use crate::abi::proto::{SCTP, TCP, UDP};
use crate::addr::{Addr, Family};
use crate::be::Be16;
use crate::datapath::edge::parsed::{Parsed, Part, Tuple};

/// Returns the offset of the transport checksum, and whether a zero there means that there is no checksum
/// (RFC 768).
#[inline(always)]
pub fn checksum_field(proto: u8, transport: u32) -> Option<(u32, bool)> {
    match proto {
        TCP => Some((transport.wrapping_add(16), false)),
        UDP => Some((transport.wrapping_add(6), true)),
        _ => None,
    }
}

/// Replaces addresses and ports. Returns false if the packet cannot be written: it is then only partly
/// rewritten and must not go on.
#[inline(always)]
pub fn rewrite(packet: &mut impl Packet, parsed: &Parsed, new: &Tuple) -> bool {
    let old = &parsed.tuple;
    let pseudo = checksum::add(
        checksum::addresses(&old.source, &new.source),
        checksum::addresses(&old.destination, &new.destination),
    );
    if !addresses(packet, parsed.family, parsed.ip, &new.source, &new.destination, pseudo) {
        return false;
    }
    if parsed.part == Part::Later {
        return true;
    }
    let (old_ports, new_ports) =
        ((old.source_port, old.destination_port), (new.source_port, new.destination_port));
    let field = checksum_field(parsed.proto, parsed.transport)
        .filter(|(offset, zero_is_none)| !zero_is_none || packet.load::<2>(*offset) != Some([0; 2]));
    let mut covered = 0;
    if old_ports != new_ports {
        covered = checksum::ports(old_ports, new_ports);
        let bytes = checksum::word(new_ports.0, new_ports.1).to_ne_bytes();
        let stored = match field {
            Some(_) => packet.store(parsed.transport, bytes),
            None => packet.store_summed(parsed.transport, bytes),
        };
        if !stored {
            return false;
        }
    }
    match field {
        Some((offset, zero_is_none)) => packet.fix_checksum(offset, pseudo, covered, zero_is_none),
        None if parsed.proto == SCTP && old_ports != new_ports => {
            let change = little_endian(old_ports) ^ little_endian(new_ports);
            let length = parsed.bytes.wrapping_sub(parsed.transport.wrapping_sub(parsed.ip));
            sctp::fix_checksum(packet, parsed.transport, change, length)
        }
        None => true,
    }
}

/// Returns two ports as SCTP's checksum reads them.
#[inline(always)]
const fn little_endian((first, second): (Be16, Be16)) -> u32 {
    let ([a, b], [c, d]) = (first.bytes, second.bytes);
    u32::from_le_bytes([a, b, c, d])
}

/// Replaces the addresses of an IP header. `difference` is the [`checksum::difference`] of old and new
/// addresses.
#[inline(always)]
pub fn addresses(
    packet: &mut impl Packet,
    family: Family,
    ip: u32,
    source: &Addr,
    destination: &Addr,
    difference: u32,
) -> bool {
    match family {
        Family::V4 => {
            let at = ip.wrapping_add(10);
            let Some(field) = packet.load::<2>(at) else { return false };
            let [c0, c1] = checksum::updated(field, difference);
            let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (source.v4_octets(), destination.v4_octets());
            packet.store(at, [c0, c1, s0, s1, s2, s3, d0, d1, d2, d3])
        }
        Family::V6 => {
            let ([s0, s1], [d0, d1]): ([u64; 2], [u64; 2]) =
                (bytemuck::cast(*source), bytemuck::cast(*destination));
            packet.store_summed(ip.wrapping_add(8), bytemuck::cast::<[u64; 4], [u8; 32]>([s0, s1, d0, d1]))
        }
    }
}
