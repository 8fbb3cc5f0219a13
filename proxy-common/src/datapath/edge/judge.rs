//! Whether a packet is served, and what becomes of it if it is not.

use super::direct::Beside;
use super::packet::Packet;
use super::parse::Parsed;
use super::tables::{EdgeTables, Work};
use super::{Choice, Verdict, refuse};
use crate::abi::device::flags::{NEAR, POD, POD_BRIDGE};
use crate::abi::frontend::flags::SOURCE_RANGES;
use crate::abi::{Counter, Origin, local_address};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::lookup::{self, Target};
use crate::datapath::select::{Client, Selection, select};
use crate::datapath::trace::{self, At};

/// What becomes of a packet that is not translated. Both fields always hold something: the verifier refuses to copy
/// what was never written, such as an enum's absent payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Refusal {
    pub(super) how: How,
    pub(super) why: Counter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum How {
    /// It is translated.
    Not,
    /// It is nothing of ours.
    Pass,
    /// Nobody hears of it.
    Drop,
    /// The sender hears that nobody serves it.
    Reject,
}

impl Refusal {
    /// None. Nothing is counted.
    pub(super) const NOT: Self = Self { how: How::Not, why: Counter::Flow };
    /// The packet is nothing of ours. Nothing is counted.
    pub(super) const PASS: Self = Self { how: How::Pass, why: Counter::Flow };

    #[inline(always)]
    pub(super) const fn drop(why: Counter) -> Self {
        Self { how: How::Drop, why }
    }

    #[inline(always)]
    pub(super) const fn reject(why: Counter) -> Self {
        Self { how: How::Reject, why }
    }
}

impl Default for Refusal {
    fn default() -> Self {
        Self::NOT
    }
}

/// Chooses a backend for a new flow. In `work` is then where it goes, or why there is none.
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
            work.to = Choice { proto: parsed.proto, service: 0, backend: 0 };
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
        // What this host sends itself never comes by a device. A flow of such a packet could be taken for one of the
        // host's own connections to the backend.
        return Refusal::drop(Counter::DropOwnSource);
    }
    let of_pod = tables.is_pod_source(&tuple.source);
    // A client outside that has no address of a pod has none of this node's either.
    if (of_pod || origin != Origin::OUTSIDE) && is_elsewhere(packet, tables, parsed, origin) {
        // Passed on, a nodePort's would be refused by the kernel to whose address it has.
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

/// Whether the source of a packet cannot be where it has come from: the kernel's routes lead to it by another pod's interface
/// or, of a packet from outside, by the bridge of this node's pods. A pod cannot write routes. Other devices tell nothing: pods
/// are behind bridges, and some networks route all of them by one device, which may be an external one.
#[inline(never)]
pub(super) fn is_elsewhere(
    packet: &impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    origin: Origin,
) -> bool {
    let by = packet.route_to(parsed.family, &parsed.tuple.source);
    let pods = if origin == Origin::OUTSIDE { POD | POD_BRIDGE } else { POD };
    by != 0 && by != origin.ifindex && tables.device_flags(by) & pods != 0
}

/// Whose the destination is. What has no ports asks for port 0.
#[inline(always)]
pub(super) fn find(tables: &impl EdgeTables, parsed: &Parsed) -> Target {
    lookup::find(tables, &parsed.tuple.destination, parsed.tuple.destination_port, parsed.proto)
}

/// What is no frontend.
#[inline(always)]
pub(super) const fn nobodys(target: Target) -> Refusal {
    match target {
        Target::Frontend(_) | Target::Other => Refusal::PASS,
        Target::UnusedPort => Refusal::reject(Counter::RejectUnusedPort),
        Target::InactiveAddress => Refusal::drop(Counter::DropInactiveAddress),
        Target::Retry => Refusal::drop(Counter::DropRetry),
    }
}

/// Broken headers behind an IP header: nothing of that kind goes to a VIP; the rest is not ours to judge.
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

/// What becomes of a packet that is not translated, on its way out of the host or into it.
#[inline(never)]
pub(super) fn turn_away<P: Packet, T: EdgeTables, const EGRESS: bool>(
    packet: &mut P,
    tables: &T,
    parsed: &Parsed,
    refusal: Refusal,
    service: u32,
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
