//! Source of a packet that leaves: outside, or the backend that the packet claims to come from. The device
//! that the packet entered by decides, because nobody can write that into a packet.

use super::flows;
use super::packet::Packet;
use super::tables::{EdgeTables, FlowCell as _};
use crate::abi::device::flags::{POD, POD_BRIDGE};
use crate::abi::flow::state::REPLIED;
use crate::abi::{IfIndex, Nanos};
use crate::datapath::edge::parsed::Parsed;

/// Returns whether a packet that leaves has entered this host from outside. If the network stack sees the
/// packet entering by a device without our programs, it may have come through a device below that one.
#[inline(always)]
pub(super) fn is_from_outside(packet: &impl Packet, tables: &impl EdgeTables) -> bool {
    let by = packet.entered_by();
    by == packet.ifindex() || is_outward(tables, by)
}

/// Returns whether packets that enter by a device come from outside this host: neither from one of its pods
/// nor from the host itself.
#[inline(always)]
fn is_outward(tables: &impl EdgeTables, ifindex: IfIndex) -> bool {
    ifindex != IfIndex::NONE && tables.device_flags(ifindex) & (POD | POD_BRIDGE) == 0
}

/// Returns whether a packet with a backend's source comes from the backend: it has entered by the device of
/// the earlier replies, or by another device that fits. Other nodes may be reached by several devices. For
/// the interface of a pod, the kernel's route to the source decides.
#[inline(never)]
pub(super) fn is_from_backend<T: EdgeTables>(
    packet: &impl Packet,
    tables: &T,
    parsed: &Parsed,
    cell: &T::Cell,
) -> bool {
    let (by, flow) = (packet.entered_by(), cell.get());
    flow.state & REPLIED == 0
        || by == flow.answered_by
        || is_outward(tables, by) && is_outward(tables, flow.answered_by)
        || by != IfIndex::NONE && by == packet.route_to(parsed.family, &parsed.tuple.source)
}

/// Returns whether a packet of the backend shows that the connection of a record has ended and another one
/// has begun between the same addresses and ports. A packet from outside, or from a bridge that several pods
/// share, could be anybody's: then the connection must have been quiet for a while, too.
#[inline(never)]
pub(super) fn is_succeeded<T: EdgeTables>(
    packet: &impl Packet,
    tables: &T,
    parsed: &Parsed,
    cell: &T::Cell,
    now: Nanos,
) -> bool {
    let (flow, by) = (cell.get(), packet.entered_by());
    flows::is_succeeded(&flow, parsed, now)
        || flows::is_succeeded_at_backend(&flow, parsed)
            && (by == IfIndex::NONE || tables.device_flags(by) & POD != 0)
}
