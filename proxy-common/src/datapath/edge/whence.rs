//! Where a packet that leaves has come from: outside, or the backend that it is said to be from. The device by which it has entered tells,
//! which nobody can write into a packet.

use super::flows;
use super::packet::Packet;
use super::parse::Parsed;
use super::tables::{EdgeTables, FlowCell as _};
use crate::abi::device::flags::{POD, POD_BRIDGE};
use crate::abi::flow::state::REPLIED;

/// Whether a packet that leaves has entered this host from outside. What the network stack sees entering through a device
/// without programs of ours may have come through one below it.
#[inline(always)]
pub(super) fn is_from_outside(packet: &impl Packet, tables: &impl EdgeTables) -> bool {
    let by = packet.entered_by();
    by == packet.ifindex() || is_outward(tables, by)
}

/// Whether what enters by a device comes from outside of this host: neither from one of its pods nor from itself.
#[inline(always)]
fn is_outward(tables: &impl EdgeTables, ifindex: u32) -> bool {
    ifindex != 0 && tables.device_flags(ifindex) & (POD | POD_BRIDGE) == 0
}

/// Whether a packet of the backend has entered by the device that its answers have entered by before; or by another one if it
/// can be the backend's all the same: other nodes are reached by several devices, and what is behind an interface of a pod
/// the kernel's routes tell.
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
        || by != 0 && by == packet.route_to(parsed.family, &parsed.tuple.source)
}

/// Whether a packet of the backend shows that the connection of a record has ended, and another one has begun between its ends. From
/// outside, or from a bridge that several pods share, it could be anybody's: then some quiet has to show it, too.
#[inline(never)]
pub(super) fn is_succeeded<T: EdgeTables>(
    packet: &impl Packet,
    tables: &T,
    parsed: &Parsed,
    cell: &T::Cell,
    now: u64,
) -> bool {
    let (flow, by) = (cell.get(), packet.entered_by());
    flows::is_succeeded(&flow, parsed, now)
        || flows::is_succeeded_at_backend(&flow, parsed) && (by == 0 || tables.device_flags(by) & POD != 0)
}
