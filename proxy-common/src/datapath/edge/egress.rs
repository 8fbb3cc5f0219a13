//! The way of a packet that leaves through a device.

use super::finish::finish;
use super::flows::{self, Place};
use super::fragments::{remember_ports, restore_ports};
use super::judge::{find, nobodys, turn_away};
use super::packet::Packet;
use super::parse::{self, Outcome};
use super::parsed::{Parsed, Part, Tuple, tcp};
use super::role::Role;
use super::tables::EdgeTables;
use super::verdict::Verdict;
use super::whence::{is_from_backend, is_from_outside, is_succeeded};
use super::work::{How, Numbers, Refusal, Scratch, Work};
use super::{icmp, own_datagrams};
use crate::abi::frontend::flags::EXTERNAL;
use crate::abi::{
    Counter, FlowKind, IfIndex, Origin, ServiceId, local_address, node::HOST_IN_PACKETS, proto,
};
use crate::addr::{Addr, Family};
use crate::datapath::lookup::{self, Target};
use crate::datapath::trace::{self, At};

/// Handles a packet that leaves through a device.
#[inline(always)]
pub fn egress(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    role: Role,
    scratch: &mut Scratch,
) -> Verdict {
    let Scratch { parsed, quote, work } = scratch;
    if !parse::addresses(packet, parsed) {
        return Verdict::Pass;
    }
    let Tuple { source, destination, .. } = &parsed.tuple;
    let from_backend = lookup::may_be_backend(tables, source);
    let to_backend =
        (role == Role::External || source == destination) && lookup::may_be_backend(tables, destination);
    let ours = role == Role::External && lookup::may_be_ours(tables, destination);
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
        (work.now, work.origin) = (tables.now(), role.origin(packet.ifindex()));
        work.asked_by = IfIndex::NONE;
        if parsed.part == Part::Later && !restore_ports(tables, parsed, work.origin, true) {
            return Verdict::Pass;
        }
        if error {
            return if role == Role::External {
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
            return if role == Role::External { way_back(packet, parsed, work, verdict) } else { verdict };
        }
    }
    let verdict = if ours { leaving_untranslated(packet, tables, parsed) } else { Verdict::Pass };
    if verdict == Verdict::Pass && matches!(parsed.proto, proto::UDP | proto::SCTP) {
        own_datagrams::remember(packet, tables, parsed, role, work);
    }
    verdict
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
        && device != IfIndex::NONE
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
    let own = packet.entered_by() == IfIndex::NONE
        && tables.local_address(&parsed.tuple.source) & local_address::HOST != 0;
    let target = find(tables, parsed);
    let mut refusal = match target {
        // The sender is this host, so it can be told.
        Target::Frontend(_) if own && (parsed.begins() || parsed.proto == proto::UDP) => {
            Refusal::reject(Counter::DropNoFlow)
        }
        // The externalIP may belong to another host, which other machines reach through this one.
        Target::Frontend(frontend) if frontend.flags & EXTERNAL != 0 => Refusal::PASS,
        Target::Frontend(_) => Refusal::drop(Counter::DropNoFlow),
        Target::Other | Target::UnusedPort | Target::InactiveAddress | Target::Retry => nobodys(target),
    };
    if refusal.how == How::Drop && own && parsed.begins() && tables.node().flags & HOST_IN_PACKETS != 0 {
        refusal.how = How::Reject;
    }
    turn_away::<_, _, true>(packet, tables, parsed, refusal, ServiceId::NONE)
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

/// Returns the trace position of a packet that leaves.
#[inline(always)]
fn exit(packet: &impl Packet) -> At {
    At { ifindex: packet.ifindex(), egress: true }
}
