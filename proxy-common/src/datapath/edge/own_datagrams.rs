//! What this host sends by datagrams from the address and port of a frontend: by a socket that is bound there, or for a pod whose source
//! the network has translated to it. The answer is nobody's request.
//!
//! The answer itself does not tell, so what leaves is remembered (in `NEW_FLOWS`, by [`FlowKind::OwnDatagram`]) for as long as a flow
//! lives that has not been assured: two minutes, of SCTP ten. A Service's own flow comes first: its client keeps it, whatever is sent
//! meanwhile, and nothing is remembered beside it.

use super::packet::Packet;
use super::parse::{Parsed, Part};
use super::tables::{EdgeTables, FlowCell as _, Tier, Work};
use super::whence::is_from_outside;
use super::{Edge, flows, timeouts};
use crate::abi::flow::state::REPLIED;
use crate::abi::{FilterBit, Flow, FlowKind, local_address, proto};
use crate::addr::Family;
use crate::be::Be16;
use crate::datapath::lookup::{self, Target};

/// Whether a packet that leaves may be a datagram from the port of a frontend. Only its addresses have been read.
#[inline(always)]
pub(super) fn may_be_one(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed) -> bool {
    if !matches!(parsed.proto, proto::UDP | proto::SCTP) {
        return false;
    }
    let ip = packet.ip_offset();
    let transport = match parsed.tuple.source.family() {
        Family::V6 => ip.wrapping_add(40),
        Family::V4 => {
            let Some([first]) = packet.load_linear::<1>(ip) else { return true };
            ip.wrapping_add(u32::from(first & 0x0f).wrapping_mul(4))
        }
    };
    let Some(bytes) = packet.load_linear::<2>(transport) else { return true };
    is_of_frontend(tables, parsed.proto, Be16 { bytes })
}

/// Whether `FILTER` leaves open that a frontend has the port.
#[inline(always)]
fn is_of_frontend(tables: &impl EdgeTables, proto: u8, port: Be16) -> bool {
    let bit = FilterBit::of_port(proto, port);
    tables.filter(bit.word) & bit.mask != 0
}

/// Whether a packet that has an address of this host, and that somebody else has sent, got it from the network. IPv4 takes in no packet
/// with such a source (a martian); by IPv6 a pod may write it itself, and would have what others send to the frontend.
#[inline(always)]
fn is_masqueraded(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed, edge: Edge) -> bool {
    edge == Edge::External && parsed.family == Family::V4 && !is_from_outside(packet, tables)
}

/// Remembers a packet that leaves, if it is a datagram of this host from the address and port of a frontend.
#[inline(never)]
pub(super) fn remember(
    packet: &impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    edge: Edge,
    work: &mut Work,
) {
    let tuple = &parsed.tuple;
    let of_host = packet.entered_by() == 0;
    if !is_of_frontend(tables, parsed.proto, tuple.source_port)
        || parsed.part == Part::Later
        || tables.local_address(&tuple.source) & local_address::HOST == 0
        || !of_host && !is_masqueraded(packet, tables, parsed, edge)
        || !matches!(
            lookup::find(tables, &tuple.source, tuple.source_port, parsed.proto),
            Target::Frontend(_) | Target::Retry
        )
    {
        return;
    }
    (work.now, work.origin) = (tables.now(), edge.origin(packet.ifindex()));
    let answer = flows::reversed(tuple);
    if let Some(place) = flows::by_vip(tables, parsed.proto, &answer, work) {
        // What the host asks now may have been answered before it asked; then a Service has got the answer, and has said nothing.
        if !of_host || place.flow().state & REPLIED != 0 {
            return;
        }
        flows::remove(tables, &work.key, &place);
    }
    work.key = flows::key(FlowKind::OwnDatagram, work.origin, parsed.proto, &answer);
    let check = work.key.check();
    match tables.flow(Tier::New, &work.key) {
        Some(cell) => cell.set_last_seen(check, work.now),
        None => {
            work.flow = Flow { check, last_seen: work.now, ..Flow::default() };
            // Without room the answer is taken for a request, as any would be.
            let _ = tables.add_flow(Tier::New, &work.key, &work.flow);
        }
    }
}

/// Whether a datagram that enters answers what has been remembered.
#[inline(never)]
pub(super) fn is_answered(tables: &impl EdgeTables, parsed: &Parsed, work: &Work) -> bool {
    if tables.local_address(&parsed.tuple.destination) & local_address::HOST == 0 {
        return false;
    }
    let key = flows::key(FlowKind::OwnDatagram, work.origin, parsed.proto, &parsed.tuple);
    let check = key.check();
    tables.flow(Tier::New, &key).is_some_and(|cell| {
        let flow = cell.get();
        flow.check == check && !timeouts::expired(&flow, parsed.proto, work.now)
    })
}
