//! What this host asks from the address and port of a frontend: by a socket that is bound there, or for a pod whose source the
//! network has translated to it. The answer is nobody's request.
//!
//! A datagram tells neither, so what leaves is remembered (in `NEW_FLOWS`, by [`FlowKind::Question`]) for as long as a UDP flow
//! that nobody has answered lives. A Service's own flow comes first: its client keeps it, whatever is asked meanwhile.

use super::packet::Packet;
use super::parse::{Parsed, Part};
use super::tables::{EdgeTables, FlowCell as _, Tier, Work};
use super::{Edge, flows, is_from_outside, timeouts};
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
    if !is_of_frontend(tables, parsed.proto, tuple.source_port)
        || parsed.part == Part::Later
        || tables.local_address(&tuple.source) & local_address::HOST == 0
        || is_from_outside(packet, tables)
        || !matches!(
            lookup::find(tables, &tuple.source, tuple.source_port, parsed.proto),
            Target::Frontend(_) | Target::Retry
        )
    {
        return;
    }
    work.now = tables.now();
    work.key =
        flows::key(FlowKind::Question, edge.origin(packet.ifindex()), parsed.proto, &flows::reversed(tuple));
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
    let key = flows::key(FlowKind::Question, work.origin, parsed.proto, &parsed.tuple);
    let check = key.check();
    tables.flow(Tier::New, &key).is_some_and(|cell| {
        let flow = cell.get();
        flow.check == check && !timeouts::expired(&flow, parsed.proto, work.now)
    })
}
