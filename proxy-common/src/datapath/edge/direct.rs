//! Datagrams of a client to a backend itself, from the port by which the client also talks to a Service that leads to the same backend.
//!
//! The backend could not tell the two apart, and neither could anybody by its answers. So what is sent to the backend itself gets a
//! flow, too: beside that of the Service, by another source port, as connection tracking would give it one. Its VIP is the backend.
//! Without a flow of a Service between the same ends nothing is translated, and nothing remembered.
//!
//! TCP needs none of it as long as the client has closed one connection before it makes the other; see
//! [`flows::is_succeeded`](super::flows::is_succeeded).

use super::flows;
use super::parse::Parsed;
use super::tables::{EdgeTables, FlowCell as _, Work};
use crate::abi::{Flow, FlowKey, FlowKind, proto};
use crate::datapath::lookup;

/// Whether a packet that enters for no address of ours may be such a datagram. Only its addresses have been read: its protocol may stand
/// behind extension headers.
#[inline(always)]
pub(super) fn may_be_one(tables: &impl EdgeTables, parsed: &Parsed) -> bool {
    !matches!(parsed.proto, proto::TCP | proto::ICMP | proto::ICMPV6)
        && lookup::may_be_backend(tables, &parsed.tuple.destination)
}

/// Whether a flow is to the backend itself.
#[inline(always)]
pub(super) fn is_one(key: &FlowKey, flow: &Flow) -> bool {
    flow.vip == key.destination && flow.vip_port == key.destination_port
}

/// Whether a flow of a Service has the very ends of a datagram. The Service and the backend are then in `work`.
#[inline(never)]
pub(super) fn meets_flow(tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work) -> bool {
    if !matches!(parsed.proto, proto::UDP | proto::SCTP) {
        return false;
    }
    work.key = flows::key(FlowKind::Record, work.origin, parsed.proto, &parsed.tuple);
    let Some(place) = flows::record(tables, &work.key, work.now) else { return false };
    let flow = place.flow();
    (work.to.service, work.to.backend) = (flow.service, flow.backend);
    // It lives as long as what is beside it, which would else change its port.
    place.cell.set_last_seen(place.check, work.now);
    !is_one(&work.key, &flow)
}

/// Whether what has met a flow can have one of its own beside it. The flow of a backend that has gone will be gone soon, too.
#[inline(always)]
pub(super) fn can_begin(tables: &impl EdgeTables, work: &Work) -> bool {
    tables.backend(work.to.backend).is_some_and(|backend| backend.service == work.to.service)
}
