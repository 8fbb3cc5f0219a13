//! The way of a packet that enters through a device.

use super::finish::finish;
use super::flows::{self, Place};
use super::fragments::{remember_ports, restore_ports, stray_fragment};
use super::judge::{find, malformed, nobodys, turn_away};
use super::packet::Packet;
use super::parse::{self, Outcome};
use super::parsed::{Parsed, Part, Tuple};
use super::role::Role;
use super::tables::EdgeTables;
use super::verdict::Verdict;
use super::work::{Beside, Choice, How, Meeting, Numbers, Refusal, Scratch, Work};
use super::{direct, icmp, own_datagrams};
use crate::abi::{
    BackendId, Counter, Flow, FlowKey, IfIndex, ServiceId, backend::flags::SERVING, flow, proto,
};
use crate::datapath::lookup;
use crate::datapath::trace::{self, At};

/// Handles a packet that enters through a device.
#[inline(always)]
pub fn ingress(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    role: Role,
    scratch: &mut Scratch,
) -> Verdict {
    let Scratch { parsed, quote, work } = scratch;
    if !parse::addresses(packet, parsed) {
        return Verdict::Pass;
    }
    let ours = lookup::may_be_ours(tables, &parsed.tuple.destination);
    let to_backend = direct::may_be_one(packet, tables, parsed);
    if !ours && !to_backend || role == Role::External && packet.is_tagged() {
        return Verdict::Pass;
    }
    match parse::parse(packet, parsed) {
        Outcome::Whole => {}
        Outcome::NotIp => return Verdict::Pass,
        Outcome::Malformed => return malformed(tables, &parsed.tuple.destination),
    }
    (work.now, work.origin) = (tables.now(), role.origin(packet.ifindex()));
    work.asked_by = if role == Role::External { packet.ifindex() } else { IfIndex::NONE };
    if parsed.part == Part::Later && !restore_ports(tables, parsed, work.origin, false) {
        return stray_fragment(tables, &parsed.tuple.destination);
    }
    work.to = Choice { proto: parsed.proto, service: ServiceId::NONE, backend: BackendId::NONE };
    let beside = to_backend && direct::meets_flow(tables, parsed, work);
    work.beside = if beside { Beside::MEETS } else { Beside::NOTHING };
    if !ours && work.beside == Beside::NOTHING && !icmp::is_error(parsed) {
        return Verdict::Pass;
    }
    if parsed.part == Part::First {
        // The later fragments carry no ports, so the ports are stored for every first fragment. If they
        // cannot be stored, the later fragments are lost, as any packet may be.
        remember_ports(tables, parsed, work.origin, false);
    }
    if icmp::is_error(parsed) {
        icmp::ingress(packet, tables, parsed, quote, work)
    } else {
        entering(packet, tables, parsed, work)
    }
}

/// Handles a packet that enters for an address of ours: a reply to our SNAT address, or a request.
#[inline(never)]
fn entering<T: EdgeTables>(
    packet: &mut impl Packet,
    tables: &T,
    parsed: &Parsed,
    work: &mut Work,
) -> Verdict {
    let now = work.now;
    let tuple = &parsed.tuple;
    if !matches!(parsed.proto, proto::TCP | proto::UDP | proto::SCTP) {
        return turn_away::<_, _, false>(
            packet,
            tables,
            parsed,
            nobodys(find(tables, parsed)),
            ServiceId::NONE,
        );
    }
    if flow::SNAT_PORTS.contains(&tuple.destination_port.get())
        && let Some(place) = flows::by_snat(tables, parsed.proto, tuple, work)
    {
        work.new = Tuple { destination: work.key.source, destination_port: work.key.source_port, ..*tuple };
        trace::translated(tables, parsed, &work.new, place.flow().service, entry(packet), false);
        return finish(packet, tables, parsed, work);
    }

    let begins = parsed.begins();
    work.numbers = Numbers::of(packet, parsed);
    let indexed = flows::find_by_vip(tables, parsed.proto, tuple, work);
    let mut place = if indexed { flows::of_vip(tables, tuple, &work.key, now) } else { None };
    work.meeting = match &mut place {
        Some(place) => meeting(tables, parsed, work, place),
        None => Meeting::REPLACES,
    };
    if work.meeting != Meeting::GOES_ON {
        if parsed.proto == proto::TCP && !begins {
            // A segment without SYN and without a flow may belong to a connection that another proxy's
            // connection tracking knows.
            return Verdict::Pass;
        }
        if place.is_none() && parsed.proto != proto::TCP && own_datagrams::is_answered(tables, parsed, work) {
            return Verdict::Pass;
        }
        packet.choose(tables, parsed, work);
        let refusal = work.refusal;
        match (refusal.how, &place) {
            (How::Not, Some(old))
                if work.beside == Beside::BEGINS && old.flow().state & flow::state::DIRECT != 0 => {}
            (How::Not, old) => {
                let moves = old.is_some() && parsed.proto == proto::UDP;
                if let Some(old) = old
                    && work.meeting == Meeting::REPLACES
                {
                    flows::give_way(tables, &work.key, old);
                }
                place = flows::create(tables, tuple, indexed, work);
                if work.beside == Beside::BEGINS
                    && let Some(place) = &place
                {
                    place.set_state(place.flow().state | flow::state::DIRECT);
                }
                tables.count(if moves { Counter::UdpRepick } else { Counter::Flow });
                tables.count_connection(work.to.service);
            }
            _ => return turn_away::<_, _, false>(packet, tables, parsed, refusal, work.to.service),
        }
    }
    let Some(place) = &place else {
        if work.beside == Beside::BEGINS {
            return Verdict::Pass;
        }
        let refusal = Refusal::drop(Counter::DropFlowTable);
        return turn_away::<_, _, false>(packet, tables, parsed, refusal, work.to.service);
    };

    forward(packet, tables, parsed, work, place)
}

/// Sends a request on to the backend of its flow.
#[inline(always)]
fn forward<T: EdgeTables>(
    packet: &mut impl Packet,
    tables: &T,
    parsed: &Parsed,
    work: &mut Work,
    place: &Place<T::Cell>,
) -> Verdict {
    let (tuple, service) = (&parsed.tuple, place.flow().service);
    tables.count_packet(service, true, parsed.bytes);
    flows::on_request(tables, place, parsed, work);
    work.new = Tuple {
        source: tuple.source,
        source_port: work.key.source_port,
        destination: work.key.destination,
        destination_port: work.key.destination_port,
    };
    trace::translated(tables, parsed, &work.new, service, entry(packet), work.meeting != Meeting::GOES_ON);
    finish(packet, tables, parsed, work)
}

/// Returns the [`Meeting`] of a packet with the flow that its tuple has.
#[inline(always)]
fn meeting<T: EdgeTables>(tables: &T, parsed: &Parsed, work: &mut Work, place: &mut Place<T::Cell>) -> u32 {
    match parsed.proto {
        proto::TCP if parsed.begins() || place.flow().state & flow::state::SUCCEEDED != 0 => {
            flows::meet(tables, parsed, parsed.begins(), work, place)
        }
        proto::UDP if !serves(tables, &work.key, &place.flow()) => Meeting::REPLACES,
        _ => Meeting::GOES_ON,
    }
}

/// Returns the trace position of a packet that enters.
#[inline(always)]
fn entry(packet: &impl Packet) -> At {
    At { ifindex: packet.ifindex(), egress: false }
}

/// Returns whether a UDP flow may keep its backend.
#[inline(always)]
fn serves(tables: &impl EdgeTables, key: &FlowKey, flow: &Flow) -> bool {
    if flow.state & flow::state::DIRECT != 0 {
        // The address may be a Service's by now.
        return !lookup::may_be_ours(tables, &flow.vip);
    }
    tables.backend(flow.backend).is_some_and(|backend| {
        backend.addr == key.destination
            && backend.port == key.destination_port
            && backend.service == flow.service
            && backend.state.flags & SERVING != 0
    })
}
