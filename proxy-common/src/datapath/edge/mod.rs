//! The packet edge: translates packets of clients outside this node, and of pods whose sockets the socket
//! edge does not see.
//!
//! Each client has one edge: the device that its packets enter by. [`ingress`] applies DNAT to a request when
//! it enters, and [`egress`] applies reverse NAT to the reply when it leaves by that device. Between the two,
//! the kernel and its packet filters see the addresses of the real client and of the real backend. When a
//! request of an outside client leaves for a backend on another node, [`egress`] applies SNAT to an address
//! of this node, so that the reply comes back here.
//!
//! The key of a flow includes its [`Origin`]: the pod's interface, or all external devices together. A pod
//! that forges another client's source address therefore begins a flow of its own, and no reply to that
//! client belongs to this flow.
//!
//! | packet | hook | translated to |
//! |---|---|---|
//! | client → VIP | ingress of the client's device | client → backend |
//! | client → backend on another node | egress of an external device | our address → backend |
//! | backend → our address | ingress | backend → client |
//! | backend → client | egress of the client's device | VIP → client |
//! | host, from a frontend's own address and port | egress, and the reply on ingress | not translated |
//! | pod → itself (hairpin) | egress of its own device | our address → pod, and back on ingress |
//!
//! In reading order: [`packet`] and [`tables`] are what the pipeline works on, [`parse`] reads headers,
//! [`flows`] finds and creates flows, [`rewrite`] writes headers, [`icmp`] translates ICMP errors, [`refuse`]
//! turns a rejected packet into a reset or an ICMP error.

pub mod packet;

pub mod tables;

pub mod parse;

pub mod checksum;

pub mod sctp;

pub mod timeouts;

pub mod flows;

pub mod rewrite;

pub mod icmp;

pub mod refuse;

pub mod direct;
mod fragments;
pub mod judge;
mod own_datagrams;
mod whence;

use self::direct::Beside;
use self::flows::{Choice, Meeting, Numbers, Place};
use self::fragments::{remember_ports, restore_ports, stray_fragment};
use self::judge::{How, Refusal, find, malformed, nobodys, turn_away};
use self::packet::Packet;
use self::parse::{Outcome, Parsed, Part, Tuple, tcp};
use self::tables::{EdgeTables, Scratch, Work};
use self::whence::{is_from_backend, is_from_outside, is_succeeded};
use super::lookup::{self, Target};
use super::trace::{self, At};
use crate::abi::frontend::flags::EXTERNAL;
use crate::abi::{
    Counter, Flow, FlowKey, FlowKind, Origin, backend::flags::SERVING, flow, local_address,
    node::HOST_IN_PACKETS, proto,
};
use crate::addr::{Addr, Family};

/// Kind of device that a program runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Device that leads to other machines.
    External,
    /// Host side of a pod's interface.
    Pod,
}

impl Edge {
    /// Returns the origin of the flows that a packet on a device of this kind can belong to.
    #[inline(always)]
    const fn origin(self, ifindex: u32) -> Origin {
        match self {
            Self::External => Origin::OUTSIDE,
            Self::Pod => Origin::pod(ifindex),
        }
    }
}

/// Decision on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on unchanged.
    Pass,
    /// Goes on, translated.
    Translated,
    /// Is dropped.
    Drop,
    /// Has been turned into a reset or an ICMP error: goes back where it came from.
    Reply,
    /// Goes on, translated, by another device than the one that routing chose.
    Elsewhere,
}

/// Handles a packet that enters through a device.
#[inline(always)]
pub fn ingress(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    edge: Edge,
    scratch: &mut Scratch,
) -> Verdict {
    let Scratch { parsed, quote, work } = scratch;
    if !parse::addresses(packet, parsed) {
        return Verdict::Pass;
    }
    let ours = lookup::may_be_ours(tables, &parsed.tuple.destination);
    let to_backend = direct::may_be_one(packet, tables, parsed);
    if !ours && !to_backend || edge == Edge::External && packet.is_tagged() {
        return Verdict::Pass;
    }
    match parse::parse(packet, parsed) {
        Outcome::Whole => {}
        Outcome::NotIp => return Verdict::Pass,
        Outcome::Malformed => return malformed(tables, &parsed.tuple.destination),
    }
    (work.now, work.origin) = (tables.now(), edge.origin(packet.ifindex()));
    work.asked_by = if edge == Edge::External { packet.ifindex() } else { 0 };
    if parsed.part == Part::Later && !restore_ports(tables, parsed, work.origin, false) {
        return stray_fragment(tables, &parsed.tuple.destination);
    }
    work.to = Choice { proto: parsed.proto, service: 0, backend: 0 };
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

/// Handles a packet that leaves through a device.
#[inline(always)]
pub fn egress(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    edge: Edge,
    scratch: &mut Scratch,
) -> Verdict {
    let Scratch { parsed, quote, work } = scratch;
    if !parse::addresses(packet, parsed) {
        return Verdict::Pass;
    }
    let Tuple { source, destination, .. } = &parsed.tuple;
    let from_backend = lookup::may_be_backend(tables, source);
    let to_backend =
        (edge == Edge::External || source == destination) && lookup::may_be_backend(tables, destination);
    let ours = edge == Edge::External && lookup::may_be_ours(tables, destination);
    // Only the quoted packet shows which flow an ICMP error belongs to. The ICMP header may follow IPv6
    // extension headers.
    let plain = matches!(parsed.proto, proto::TCP | proto::UDP | proto::SCTP);
    if plain && !from_backend && !to_backend && !ours && !own_datagrams::may_be_one(packet, tables, parsed)
        || parse::parse(packet, parsed) != Outcome::Whole
    {
        return Verdict::Pass;
    }
    let error = icmp::is_error(parsed);
    if from_backend || to_backend || error {
        (work.now, work.origin) = (tables.now(), edge.origin(packet.ifindex()));
        work.asked_by = 0;
        if parsed.part == Part::Later && !restore_ports(tables, parsed, work.origin, true) {
            return Verdict::Pass;
        }
        if error {
            return if edge == Edge::External {
                let verdict = icmp::egress::<_, _, true>(packet, tables, parsed, quote, work);
                way_back(packet, parsed, work, verdict)
            } else {
                icmp::egress::<_, _, false>(packet, tables, parsed, quote, work)
            };
        }
        if to_backend && let Some(verdict) = leaving(packet, tables, parsed, work) {
            return verdict;
        }
        if from_backend && let Some(verdict) = answering(packet, tables, parsed, work) {
            return if edge == Edge::External { way_back(packet, parsed, work, verdict) } else { verdict };
        }
    }
    let verdict = if ours { leaving_untranslated(packet, tables, parsed) } else { Verdict::Pass };
    if verdict == Verdict::Pass && matches!(parsed.proto, proto::UDP | proto::SCTP) {
        own_datagrams::remember(packet, tables, parsed, edge, work);
    }
    verdict
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
        return turn_away::<_, _, false>(packet, tables, parsed, nobodys(find(tables, parsed)), 0);
    }
    if flow::SNAT_PORTS.contains(&tuple.destination_port.get())
        && let Some(place) = flows::by_snat(tables, parsed.proto, tuple, work)
    {
        work.new = Tuple { destination: work.key.source, destination_port: work.key.source_port, ..*tuple };
        trace::translated(tables, parsed, &work.new, place.flow().service, entry(packet), false);
        return finish(packet, tables, parsed, work);
    }

    let begins = begins(parsed);
    work.numbers = Numbers::of(packet, parsed);
    let indexed = flows::find_by_vip(tables, parsed.proto, tuple, work);
    let mut place = if indexed { flows::of_vip(tables, tuple, &work.key, now) } else { None };
    work.meeting = match &mut place {
        Some(place) => match parsed.proto {
            proto::TCP if begins || place.flow().state & flow::state::SUCCEEDED != 0 => {
                flows::meet(tables, parsed, begins, work, place)
            }
            proto::UDP if !serves(tables, &work.key, &place.flow()) => Meeting::REPLACES,
            _ => Meeting::GOES_ON,
        },
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

    let service = place.flow().service;
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

/// Returns whether a packet begins a TCP connection.
#[inline(always)]
const fn begins(parsed: &Parsed) -> bool {
    parsed.proto == proto::TCP && parsed.kind & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN
}

/// Returns the trace position of a packet that enters.
#[inline(always)]
fn entry(packet: &impl Packet) -> At {
    At { ifindex: packet.ifindex(), egress: false }
}

/// Returns the trace position of a packet that leaves.
#[inline(always)]
fn exit(packet: &impl Packet) -> At {
    At { ifindex: packet.ifindex(), egress: true }
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

/// Applies SNAT to a request to another node, or of a pod to itself (hairpin). Returns `None` if the packet
/// needs no SNAT, or is no request of a flow.
#[inline(never)]
fn leaving(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    parsed: &mut Parsed,
    work: &mut Work,
) -> Option<Verdict> {
    let now = work.now;
    let tuple = &parsed.tuple;
    work.key = flows::key(FlowKind::Record, work.origin, parsed.proto, tuple);
    let place = flows::record(tables, &work.key, now)?;
    // A pod of this node, or the host, may have a connection of its own to the backend, while an outside
    // client has begun a flow with the same, forged source address.
    if work.origin == Origin::OUTSIDE && !is_from_outside(packet, tables) {
        return None;
    }
    let flow = place.flow();
    if flows::is_succeeded(&flow, parsed, now) {
        flows::remove(tables, &work.key, &place);
        return None;
    }
    if !flows::has_snat(&flow) || !flows::keeps_source(tables, &work.key, &place) {
        let own = tables.device(packet.ifindex()).map_or(Addr::ZERO, |device| match parsed.family {
            Family::V4 => device.snat_v4,
            Family::V6 => device.snat_v6,
        });
        if own == Addr::ZERO {
            let refusal = Refusal::drop(Counter::DropNoSource);
            return Some(turn_away::<_, _, true>(packet, tables, parsed, refusal, flow.service));
        }
        work.new.source = own;
        if !flows::translate_source(tables, work, &place) {
            if !give_back(packet, tables, parsed, work, &place) {
                return Some(Verdict::Drop);
            }
            // The refusal comes from the VIP, the address that the client talks to.
            let refusal = Refusal::reject(Counter::RejectNoPort);
            return Some(turn_away::<_, _, true>(packet, tables, parsed, refusal, flow.service));
        }
    }
    let flow = place.flow();
    work.new = Tuple { source: flow.snat, source_port: flow.snat_port, ..*tuple };
    trace::translated(tables, parsed, &work.new, flow.service, exit(packet), false);
    Some(finish_leaving(packet, tables, parsed, work))
}

/// Restores the packet that the client sent, and removes its flow. Returns false if the packet is only partly
/// rewritten and must not go on.
#[inline(never)]
fn give_back<T: EdgeTables>(
    packet: &mut impl Packet,
    tables: &T,
    parsed: &mut Parsed,
    work: &mut Work,
    place: &Place<T::Cell>,
) -> bool {
    let flow = place.flow();
    let (destination, destination_port, source_port) = (flow.vip, flow.vip_port, flow.client_port);
    flows::remove(tables, &work.key, place);
    work.new = Tuple { destination, destination_port, source_port, ..parsed.tuple };
    let done = finish_leaving(packet, tables, parsed, work) != Verdict::Drop;
    parsed.tuple = work.new;
    done
}

/// Applies reverse NAT to a reply to the client: the VIP becomes its source. Returns `None` if the packet is
/// not a reply of a flow.
#[inline(never)]
fn answering(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    work: &mut Work,
) -> Option<Verdict> {
    let now = work.now;
    work.key = flows::key(FlowKind::Record, work.origin, parsed.proto, &flows::reversed(&parsed.tuple));
    let place = flows::record(tables, &work.key, now)?;
    if !is_from_backend(packet, tables, parsed, &place.cell) {
        return None;
    }
    if parsed.kind & tcp::SYN != 0 && is_succeeded(packet, tables, parsed, &place.cell, now) {
        flows::remove(tables, &work.key, &place);
        return None;
    }
    work.numbers = Numbers::of(packet, parsed);
    if !flows::is_answer(&place, parsed, work.numbers) {
        return None;
    }
    flows::on_reply(&place, parsed, work, packet.entered_by());
    flows::keep_vip(tables, &work.key, &place);
    let flow = place.flow();
    tables.count_packet(flow.service, false, parsed.bytes);
    work.asked_by = flow.asked_by;
    work.new = Tuple {
        source: flow.vip,
        source_port: flow.vip_port,
        destination: parsed.tuple.destination,
        destination_port: flow.client_port,
    };
    trace::translated(tables, parsed, &work.new, flow.service, exit(packet), false);
    Some(finish_leaving(packet, tables, parsed, work))
}

/// Sends a translated packet to an outside client by the device that the client's requests enter by, if
/// routing has chosen another device. Routing has seen the backend's source address, which the client does
/// not know.
#[inline(never)]
fn way_back(packet: &mut impl Packet, parsed: &Parsed, work: &Work, verdict: Verdict) -> Verdict {
    let device = work.asked_by;
    if verdict == Verdict::Translated
        && device != 0
        && device != packet.ifindex()
        && packet.leave_by(device, parsed.family, &work.new.source, &work.new.destination)
    {
        return Verdict::Elsewhere;
    }
    verdict
}

/// Handles a packet that leaves for an address of ours without having been translated. No other machine can
/// translate it. A SYN or datagram of this host is rejected rather than dropped: either its socket could not
/// be told the reason of a refusal, or no socket of a process sent it.
#[inline(never)]
fn leaving_untranslated(packet: &mut impl Packet, tables: &impl EdgeTables, parsed: &Parsed) -> Verdict {
    // `entered_by` is 0 also for packets that a virtual machine sends by macvtap, or a pod by macvlan.
    let own =
        packet.entered_by() == 0 && tables.local_address(&parsed.tuple.source) & local_address::HOST != 0;
    let target = find(tables, parsed);
    let mut refusal = match target {
        // The sender is this host, so it can be told.
        Target::Frontend(_) if own && (begins(parsed) || parsed.proto == proto::UDP) => {
            Refusal::reject(Counter::DropNoFlow)
        }
        // The externalIP may belong to another host, which other machines reach through this one.
        Target::Frontend(frontend) if frontend.flags & EXTERNAL != 0 => Refusal::PASS,
        Target::Frontend(_) => Refusal::drop(Counter::DropNoFlow),
        Target::Other | Target::UnusedPort | Target::InactiveAddress | Target::Retry => nobodys(target),
    };
    if refusal.how == How::Drop && own && begins(parsed) && tables.node().flags & HOST_IN_PACKETS != 0 {
        refusal.how = How::Reject;
    }
    turn_away::<_, _, true>(packet, tables, parsed, refusal, 0)
}

/// As [`finish`], for a packet that leaves. Stores the ports of a first fragment for the later ones.
#[inline(always)]
fn finish_leaving(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    work: &Work,
) -> Verdict {
    if parsed.part == Part::First && !remember_ports(tables, parsed, work.origin, true) {
        tables.count(Counter::DropFragment);
        return Verdict::Drop;
    }
    finish(packet, tables, parsed, work)
}

/// Writes the new tuple in `work` into the packet.
#[inline(never)]
fn finish(packet: &mut impl Packet, tables: &impl EdgeTables, parsed: &Parsed, work: &Work) -> Verdict {
    if rewrite::rewrite(packet, parsed, &work.new) {
        Verdict::Translated
    } else {
        tables.count(Counter::DropUnwritable);
        Verdict::Drop
    }
}
