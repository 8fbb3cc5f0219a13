//! Translates ICMP errors that quote a translated packet (RFC 792, RFC 4443). The receiver has to find the
//! packet that it sent in the quote; otherwise path MTU discovery and traceroute do not work through a VIP
//! (RFC 5508 §4).
//!
//! | error about | hook | the quote becomes |
//! |---|---|---|
//! | a request to another node | ingress, to our SNAT address | the request before SNAT |
//! | a request, on to the client | egress | the request as the client sent it |
//! | a reply, from the client's side | ingress, to the VIP | the reply as the backend sent it |
//! | a reply, on to another node | egress | the reply as that node sent it |

use super::checksum;
use super::flows;
use super::packet::Packet;
use super::parse;
use super::rewrite;
use super::tables::EdgeTables;
use super::verdict::Verdict;
use crate::abi::proto::{ICMP, ICMPV6};
use crate::abi::{Counter, FlowKind};
use crate::addr::Family;
use crate::datapath::edge::parsed::{Parsed, Part, Tuple};
use crate::datapath::edge::work::{Edit, Work};

const REDIRECT_V4: u8 = 5;
const REDIRECT_V6: u8 = 137;

/// Bytes in front of the quoted header.
const HEADER: u32 = 8;
/// Bytes of the target and destination addresses that follow the header of an IPv6 redirect.
const REDIRECT_ADDRESSES: u32 = 32;
/// Least number of bytes that an error quotes of the data behind the quoted IP header.
const QUOTED_TRANSPORT: u32 = 8;

/// Returns whether the packet is an ICMP message that quotes another packet.
#[inline(always)]
pub const fn is_error(parsed: &Parsed) -> bool {
    match parsed.proto {
        // Later fragments have no ICMP header.
        _ if matches!(parsed.part, Part::Later) => false,
        // Unreachable, source quench, redirect, time exceeded, parameter problem.
        ICMP => matches!(parsed.kind, 3 | 4 | REDIRECT_V4 | 11 | 12),
        // Everything below 128 is an error.
        ICMPV6 => parsed.kind < 128 || parsed.kind == REDIRECT_V6,
        _ => false,
    }
}

/// Handles an ICMP error that enters.
#[inline(never)]
pub fn ingress(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    outer: &Parsed,
    quote: &mut Parsed,
    work: &mut Work,
) -> Verdict {
    if !quoted(packet, outer, quote) {
        return Verdict::Pass;
    }
    if entering(tables, outer, quote, work) {
        apply(packet, tables, outer, quote, &work.edit)
    } else {
        Verdict::Pass
    }
}

/// Writes the edit of an error that enters to `work`. Returns false if the error is about no flow.
#[inline(never)]
fn entering(tables: &impl EdgeTables, outer: &Parsed, quote: &Parsed, work: &mut Work) -> bool {
    let reply = flows::reversed(&quote.tuple);
    let source = outer.tuple.source;
    if flows::by_snat(tables, quote.proto, &reply, work).is_some() {
        let key = &work.key;
        let quoted = Tuple { source: key.source, source_port: key.source_port, ..quote.tuple };
        work.edit = Edit { source, destination: key.source, quoted };
        return true;
    }
    if flows::by_vip(tables, quote.proto, &reply, work).is_none() {
        return false;
    }
    let key = &work.key;
    let quoted = Tuple {
        source: key.destination,
        source_port: key.destination_port,
        destination: quote.tuple.destination,
        destination_port: key.source_port,
    };
    work.edit = Edit { source, destination: key.destination, quoted };
    true
}

/// Handles an ICMP error that leaves, through an external device or to a pod.
#[inline(never)]
pub fn egress<P: Packet, T: EdgeTables, const EXTERNAL: bool>(
    packet: &mut P,
    tables: &T,
    outer: &Parsed,
    quote: &mut Parsed,
    work: &mut Work,
) -> Verdict {
    if !quoted(packet, outer, quote) {
        return Verdict::Pass;
    }
    // TCP has its sequence number at this offset.
    let seq = packet.load::<4>(quote.transport.wrapping_add(4)).map_or(0, u32::from_be_bytes);
    if leaving::<T, EXTERNAL>(tables, outer, quote, seq, work) {
        apply(packet, tables, outer, quote, &work.edit)
    } else {
        Verdict::Pass
    }
}

/// As [`entering`], for an error that leaves. `seq` is the quoted TCP sequence number.
#[inline(never)]
fn leaving<T: EdgeTables, const EXTERNAL: bool>(
    tables: &T,
    outer: &Parsed,
    quote: &Parsed,
    seq: u32,
    work: &mut Work,
) -> bool {
    let (now, origin) = (work.now, work.origin);
    let Tuple { source, destination, .. } = outer.tuple;
    work.key = flows::key(FlowKind::Record, origin, quote.proto, &quote.tuple);
    if let Some(place) = flows::record(tables, &work.key, now) {
        // The error is about a request: the client knows only the VIP.
        let flow = place.flow();
        if !flows::has_sent(&flow, quote.proto, seq, true) {
            return false;
        }
        let quoted = Tuple {
            source: quote.tuple.source,
            source_port: flow.client_port,
            destination: flow.vip,
            destination_port: flow.vip_port,
        };
        let source = if source == quote.tuple.destination { flow.vip } else { source };
        work.asked_by = flow.asked_by;
        (work.new.source, work.new.destination) = (source, destination);
        work.edit = Edit { source, destination, quoted };
        return true;
    }
    work.key = flows::key(FlowKind::Record, origin, quote.proto, &flows::reversed(&quote.tuple));
    let Some(place) = flows::record(tables, &work.key, now) else { return false };
    let flow = place.flow();
    if !EXTERNAL || !flows::has_snat(&flow) || !flows::has_sent(&flow, quote.proto, seq, false) {
        return false;
    }
    // The error is about a reply: the backend on another node knows only our SNAT address.
    let quoted = Tuple { destination: flow.snat, destination_port: flow.snat_port, ..quote.tuple };
    work.edit = Edit { source: flow.snat, destination, quoted };
    true
}

/// Reads the quoted headers. Returns false if they are incomplete, or if the error does not go to the sender
/// of the quoted packet.
#[inline(always)]
fn quoted(packet: &impl Packet, outer: &Parsed, quote: &mut Parsed) -> bool {
    let mut at = outer.transport.wrapping_add(HEADER);
    if outer.family == Family::V6 && outer.kind == REDIRECT_V6 {
        at = redirected(packet, at.wrapping_add(REDIRECT_ADDRESSES));
    }
    parse::quoted(packet, outer.family, at, quote)
        && quote.transport.wrapping_add(QUOTED_TRANSPORT) <= end(outer)
        && quote.tuple.source == outer.tuple.destination
}

/// Returns the offset of the end of the packet according to its IP header. No checksum covers the bytes
/// behind it.
#[inline(always)]
const fn end(parsed: &Parsed) -> u32 {
    parsed.ip.wrapping_add(parsed.bytes)
}

/// Returns the offset of the quote in an IPv6 redirect. The quote is in an option (RFC 4861 §4.6.3), which
/// may follow other options.
#[inline(always)]
fn redirected(packet: &impl Packet, options: u32) -> u32 {
    const REDIRECTED_HEADER: u8 = 4;
    let mut at = options;
    for _ in 0..3 {
        match packet.load::<2>(at) {
            Some([REDIRECTED_HEADER, _]) => break,
            Some([_, units]) => at = at.wrapping_add(u32::from(units).wrapping_mul(8)),
            None => break,
        }
    }
    at.wrapping_add(HEADER)
}

/// Drops a redirect. Rewrites the quote and the addresses of any other error.
#[inline(never)]
fn apply(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    outer: &Parsed,
    quote: &Parsed,
    edit: &Edit,
) -> Verdict {
    // On a node with a single interface, a redirect would make clients send past the node.
    let redirect = match outer.family {
        Family::V4 => REDIRECT_V4,
        Family::V6 => REDIRECT_V6,
    };
    if outer.kind == redirect {
        tables.count(Counter::DropRedirect);
        return Verdict::Drop;
    }
    if write(packet, outer, quote, edit) {
        tables.count(Counter::IcmpError);
        Verdict::Translated
    } else {
        tables.count(Counter::DropUnwritable);
        Verdict::Drop
    }
}

#[inline(always)]
fn write(packet: &mut impl Packet, outer: &Parsed, quote: &Parsed, edit: &Edit) -> bool {
    let (old, new) = (&quote.tuple, &edit.quoted);
    let inner = checksum::add(
        checksum::addresses(&old.source, &new.source),
        checksum::addresses(&old.destination, &new.destination),
    );
    let ports =
        checksum::ports((old.source_port, old.destination_port), (new.source_port, new.destination_port));
    // The checksum of a quoted IPv4 header compensates for its changed addresses. IPv6 has no header
    // checksum, so the changed addresses count in the ICMP checksum.
    let mut covered = match quote.family {
        Family::V4 => 0,
        Family::V6 => inner,
    };
    if !plain_addresses(packet, quote, new, inner) {
        return false;
    }
    covered = checksum::add(covered, ports);
    let word = checksum::word(new.source_port, new.destination_port);
    if !packet.store(quote.transport, word.to_ne_bytes()) {
        return false;
    }
    // The quote may contain only eight bytes of the transport header.
    if let Some((at, zero_is_none)) = rewrite::checksum_field(quote.proto, quote.transport)
        && let Some(field) = packet.load::<2>(at)
        && at.wrapping_add(2) <= end(outer)
        && !(zero_is_none && field == [0; 2])
    {
        let updated = match checksum::updated(field, checksum::add(inner, ports)) {
            [0, 0] if zero_is_none => [0xff; 2],
            updated => updated,
        };
        let difference = checksum::difference(&[half(field)], &[half(updated)]);
        covered = checksum::add(covered, difference);
        if !packet.store(at, updated) {
            return false;
        }
    }
    let pseudo = checksum::add(
        checksum::addresses(&outer.tuple.source, &edit.source),
        checksum::addresses(&outer.tuple.destination, &edit.destination),
    );
    if !rewrite::addresses(packet, outer.family, outer.ip, &edit.source, &edit.destination, pseudo) {
        return false;
    }
    // ICMP for IPv4 has no pseudo header.
    let pseudo = match outer.family {
        Family::V4 => 0,
        Family::V6 => pseudo,
    };
    packet.fix_checksum(outer.transport.wrapping_add(2), pseudo, covered, false)
}

/// Replaces the addresses of the quoted header, which is part of the error's payload.
#[inline(always)]
fn plain_addresses(packet: &mut impl Packet, quote: &Parsed, new: &Tuple, difference: u32) -> bool {
    match quote.family {
        Family::V4 => {
            rewrite::addresses(packet, quote.family, quote.ip, &new.source, &new.destination, difference)
        }
        Family::V6 => {
            let ([s0, s1], [d0, d1]): ([u64; 2], [u64; 2]) =
                (bytemuck::cast(new.source), bytemuck::cast(new.destination));
            packet.store(quote.ip.wrapping_add(8), bytemuck::cast::<[u64; 4], [u8; 32]>([s0, s1, d0, d1]))
        }
    }
}

/// Returns two bytes as a word of a checksum sum.
#[inline(always)]
const fn half(bytes: [u8; 2]) -> u32 {
    u16::from_ne_bytes(bytes) as u32
}
