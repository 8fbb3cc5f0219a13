//! Decides whether a packet is served, and how it is refused if it is not.

use super::packet::Packet;
use super::refuse;
use super::tables::EdgeTables;
use super::verdict::Verdict;
use crate::abi::device::flags::{NEAR, POD, POD_BRIDGE};
use crate::abi::frontend::flags::SOURCE_RANGES;
use crate::abi::{BackendId, Counter, IfIndex, Origin, ServiceId, local_address};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::edge::parsed::Parsed;
use crate::datapath::edge::work::{Beside, Choice, How, Refusal, Work};
use crate::datapath::lookup::{self, Target};
use crate::datapath::select::{Client, Selection, select};
use crate::datapath::trace::{self, At};

/// Chooses a backend for a new flow. Writes the destination of the flow, or the refusal, to `work`.
#[inline(always)]
pub fn choose(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work) {
    work.refusal = choice(packet, tables, parsed, work);
}

#[inline(always)]
fn choice(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work) -> Refusal {
    let (tuple, origin) = (&parsed.tuple, work.origin);
    let target = find(tables, parsed);
    let Target::Frontend(frontend) = target else {
        if matches!(target, Target::Other) && work.beside == Beside::MEETS {
            work.beside = Beside::BEGINS;
            work.to = Choice { proto: parsed.proto, service: ServiceId::NONE, backend: BackendId::NONE };
            (work.new.destination, work.new.destination_port) = (tuple.destination, tuple.destination_port);
            return Refusal::NOT;
        }
        return nobodys(target);
    };
    work.beside = Beside::NOTHING;
    work.to.service = frontend.service;
    if frontend.flags & SOURCE_RANGES != 0 && !tables.in_source_ranges(frontend.service, &tuple.source) {
        return Refusal::drop(Counter::DropSourceRange);
    }
    if tables.local_address(&tuple.source) & local_address::HOST != 0 {
        // Packets of this host never enter by a device. A flow with such a source could be mistaken for a
        // connection of the host itself to the backend.
        return Refusal::drop(Counter::DropOwnSource);
    }
    let of_pod = tables.is_pod_source(&tuple.source);
    // The source is no address of the host (see above). If it is no pod's either, an outside client may have
    // it, and the route need not be looked up.
    if (of_pod || origin != Origin::OUTSIDE) && is_elsewhere(packet, tables, parsed, origin) {
        // The packet must not go on: for a nodePort, the kernel would send its refusal to the owner of the
        // forged source address.
        return Refusal::drop(Counter::DropForeignSource);
    }
    let near = of_pod || tables.device_flags(packet.ifindex()) & NEAR != 0;
    let client = if near { Client::Near } else { Client::Far };
    match select(tables, frontend, client, tuple.source) {
        Selection::Backend(id, backend) => {
            work.to.backend = id;
            (work.new.destination, work.new.destination_port) = (backend.addr, backend.port);
            Refusal::NOT
        }
        Selection::Reject(why) => Refusal::reject(why),
        Selection::Drop(why) => Refusal::drop(why),
    }
}

/// Returns whether the source of a packet must be forged: the kernel's route to it leads to another pod's
/// interface or, for a packet from outside, to the bridge of this node's pods. A pod cannot write routes.
/// Routes by other devices prove nothing: pods may be behind bridges, and some networks route all pods by one
/// device, which may be an external one.
#[inline(never)]
pub(super) fn is_elsewhere(
    packet: &impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    origin: Origin,
) -> bool {
    let by = packet.route_to(parsed.family, &parsed.tuple.source);
    let pods = if origin == Origin::OUTSIDE { POD | POD_BRIDGE } else { POD };
    by != IfIndex::NONE && by != origin.ifindex && tables.device_flags(by) & pods != 0
}

/// Looks up the destination of a packet. A protocol without ports is looked up with port 0.
#[inline(always)]
pub(super) fn find(tables: &impl EdgeTables, parsed: &Parsed) -> Target {
    lookup::find(tables, &parsed.tuple.destination, parsed.tuple.destination_port, parsed.proto)
}

/// Returns the refusal of a packet whose destination is no frontend.
#[inline(always)]
pub(super) const fn nobodys(target: Target) -> Refusal {
    match target {
        Target::Frontend(_) | Target::Other => Refusal::PASS,
        Target::UnusedPort => Refusal::reject(Counter::RejectUnusedPort),
        Target::InactiveAddress => Refusal::drop(Counter::DropInactiveAddress),
        Target::Retry => Refusal::drop(Counter::DropRetry),
    }
}

/// Drops a packet with broken headers behind the IP header if its destination is a clusterIP, or an unused
/// address in a ServiceCIDR. Any other such packet goes on.
#[inline(never)]
pub(super) fn malformed(tables: &impl EdgeTables, destination: &Addr) -> Verdict {
    if lookup::may_be_ours(tables, destination)
        && tables.local_address(destination) & local_address::HOST == 0
        && !matches!(lookup::find(tables, destination, Be16 { bytes: [0; 2] }, 0), Target::Other)
    {
        tables.count(Counter::DropMalformed);
        return Verdict::Drop;
    }
    Verdict::Pass
}

/// Carries out the refusal of a packet that leaves the host (`EGRESS`) or enters it.
#[inline(never)]
pub(super) fn turn_away<P: Packet, T: EdgeTables, const EGRESS: bool>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed,
    refusal: Refusal,
    service: ServiceId,
) -> Verdict {
    let at = At { ifindex: packet.ifindex(), egress: EGRESS };
    match refusal.how {
        How::Not | How::Pass => Verdict::Pass,
        How::Drop => {
            trace::refused(tables, refusal.why, parsed, service, at);
            Verdict::Drop
        }
        How::Reject => {
            trace::refused(tables, refusal.why, parsed, service, at);
            refuse::refuse(packet, parsed)
        }
    }
}
