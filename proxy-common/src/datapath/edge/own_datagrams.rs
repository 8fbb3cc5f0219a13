//! Datagrams that this host sends from the address and port of a frontend: from a socket that is bound there,
//! or for a pod whose source the network has translated to it. The reply to such a datagram is not a request
//! to the frontend.
//!
//! The reply itself cannot be told from a request. So each such datagram is remembered in `NEW_FLOWS`
//! ([`FlowKind::OwnDatagram`]) for the lifetime of a flow that is not assured: two minutes, for SCTP ten. A
//! flow of a Service has precedence: its client keeps it, and no datagram is remembered beside it.

use super::packet::Packet;
use super::role::Role;
use super::tables::{EdgeTables, FlowCell as _, Tier};
use super::whence::is_from_outside;
use super::{flows, timeouts};
use crate::abi::flow::state::REPLIED;
use crate::abi::{FilterBit, Flow, FlowKind, IfIndex, local_address, proto};
use crate::addr::Family;
use crate::be::Be16;
use crate::datapath::edge::parsed::{Parsed, Part};
use crate::datapath::edge::work::Work;
use crate::datapath::lookup::{self, Target};

/// Returns whether a packet that leaves may be a datagram from the port of a frontend. Only its addresses and
/// protocol have been read.
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

/// Returns whether `FILTER` leaves open that a frontend has the port.
#[inline(always)]
fn is_of_frontend(tables: &impl EdgeTables, proto: u8, port: Be16) -> bool {
    let bit = FilterBit::of_port(proto, port);
    tables.filter(bit.word) & bit.mask != 0
}

/// Returns whether a forwarded packet got its source, an address of this host, from the network
/// (masquerading). IPv4 accepts no packet that arrives with such a source (a martian). With IPv6 a pod may
/// write the source itself, and would then receive what others send to the frontend; so IPv6 packets do not
/// count.
#[inline(always)]
fn is_masqueraded(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed, role: Role) -> bool {
    role == Role::External && parsed.family == Family::V4 && !is_from_outside(packet, tables)
}

/// Remembers a packet that leaves, if it is a datagram of this host from the address and port of a frontend.
#[inline(never)]
pub(super) fn remember(
    packet: &impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    role: Role,
    work: &mut Work,
) {
    let tuple = &parsed.tuple;
    let of_host = packet.entered_by() == IfIndex::NONE;
    if !is_of_frontend(tables, parsed.proto, tuple.source_port)
        || parsed.part == Part::Later
        || tables.local_address(&tuple.source) & local_address::HOST == 0
        || !of_host && !is_masqueraded(packet, tables, parsed, role)
        || !matches!(
            lookup::find(tables, &tuple.source, tuple.source_port, parsed.proto),
            Target::Frontend(_) | Target::Retry
        )
    {
        return;
    }
    (work.now, work.origin) = (tables.now(), role.origin(packet.ifindex()));
    let answer = flows::reversed(tuple);
    if let Some(place) = flows::by_vip(tables, parsed.proto, &answer, work) {
        // A flow without a reply may have begun with a datagram for this host, which arrived before this
        // packet left and was taken for a request. Such a flow is removed.
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
            // If the map is full, the reply is taken for a request, like any other datagram.
            let _ = tables.add_flow(Tier::New, &work.key, &work.flow);
        }
    }
}

/// Returns whether a datagram that enters is the reply to a remembered one.
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
