//! UDP datagrams of a client to a backend's own address, from a port by which the client also talks to a
//! Service that leads to the same backend.
//!
//! The backend could not tell the two conversations apart, and its replies do not show which of the two they
//! belong to. So the direct conversation gets a flow, too, beside that of the Service and with another source
//! port. (Its state has [`DIRECT`]; its VIP is the backend.) The direct flow lives on when the Service's flow
//! has gone. Without a flow of a Service between the same addresses and ports, nothing is translated or
//! remembered. So the direct conversation is the one that gets another port, even if it was there first.
//!
//! Connections (TCP, SCTP) are not handled here. A connection cannot change its port, and only a lookup of
//! each connection would tell a new one from an existing one. TCP does not need this as long as the client
//! has closed one connection before it opens the other; see [`flows::is_succeeded`].

use super::flows;
use super::packet::Packet;
use super::tables::EdgeTables;
use crate::abi::flow::state::DIRECT;
use crate::abi::{FilterBit, FlowKind, proto};
use crate::addr::Family;
use crate::be::Be16;
use crate::datapath::edge::parsed::Parsed;
use crate::datapath::edge::work::Work;
use crate::datapath::lookup;

/// Returns whether a packet that enters may be a datagram to a backend itself, or an ICMP error about a reply
/// to one. Only its addresses and protocol have been read.
#[inline(always)]
pub(super) fn may_be_one(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed) -> bool {
    lookup::may_be_backend(tables, &parsed.tuple.destination)
        && match parsed.proto {
            proto::UDP => may_be_port_of_backend(packet, tables, parsed),
            proto::ICMP | proto::ICMPV6 => true,
            // The protocol behind IPv6 extension headers is not known yet.
            0 | 43 | 44 | 60 => parsed.tuple.destination.family() == Family::V6,
            _ => false,
        }
}

/// Returns whether `FILTER` leaves open that a backend has the destination port. A later fragment has no
/// port, so it may be any.
#[inline(always)]
fn may_be_port_of_backend(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed) -> bool {
    let ip = packet.ip_offset();
    let transport = match parsed.tuple.source.family() {
        Family::V6 => ip.wrapping_add(40),
        Family::V4 => {
            let Some([first, _, _, _, _, _, f0, f1]) = packet.load_linear::<8>(ip) else { return true };
            if u16::from_be_bytes([f0, f1]) & 0x1fff != 0 {
                return true;
            }
            ip.wrapping_add(u32::from(first & 0x0f).wrapping_mul(4))
        }
    };
    let Some(bytes) = packet.load_linear::<2>(transport.wrapping_add(2)) else { return true };
    let bit = FilterBit::of_backend_port(Be16 { bytes });
    tables.filter(bit.word) & bit.mask != 0
}

/// Returns whether a datagram to a backend itself has a direct flow, or needs one because a flow has its
/// addresses and ports.
#[inline(never)]
pub(super) fn meets_flow(tables: &impl EdgeTables, parsed: &Parsed, work: &mut Work) -> bool {
    if parsed.proto != proto::UDP {
        return false;
    }
    let tuple = &parsed.tuple;
    if let Some(own) = flows::by_vip(tables, parsed.proto, tuple, work)
        && own.flow().state & DIRECT != 0
    {
        return true;
    }
    work.key = flows::key(FlowKind::Record, work.origin, parsed.proto, tuple);
    flows::record(tables, &work.key, work.now).is_some()
}
