//! Datagrams (UDP) of a client to a backend itself, from the port by which the client also talks to a Service that leads to the same
//! backend.
//!
//! The backend could not tell the two apart, and neither could anybody by its answers. So what is sent to the backend itself gets a
//! flow, too: beside that of the Service, by another source port. ([`DIRECT`]; its VIP is the backend.) It lives on when that of the
//! Service has gone. Without a flow of a Service between the same ends nothing is translated, and nothing remembered; so it is the
//! conversation with the backend itself that gets another port, also if it was there first.
//!
//! A connection (TCP, SCTP) cannot change its port, and one that is about to begin is not told from one that goes on without looking
//! each of them up. TCP needs none of it as long as the client has closed one connection before it makes the other; see
//! [`flows::is_succeeded`].

use super::flows;
use super::packet::Packet;
use super::parse::Parsed;
use super::tables::{EdgeTables, Work};
use crate::abi::flow::state::DIRECT;
use crate::abi::{FilterBit, FlowKind, proto};
use crate::addr::Family;
use crate::be::Be16;
use crate::datapath::lookup;

/// Values of [`Work::beside`].
pub struct Beside;

impl Beside {
    /// The packet has nothing to do with that.
    pub const NOTHING: u32 = 0;
    /// It is to a backend itself, and a flow has its ends, or had them when the one beside it began.
    pub const MEETS: u32 = 1;
    /// It begins such a flow.
    pub const BEGINS: u32 = 2;
}

/// Whether a packet that enters may be such a datagram, or an error about an answer to one. Only its addresses have been read.
#[inline(always)]
pub(super) fn may_be_one(packet: &impl Packet, tables: &impl EdgeTables, parsed: &Parsed) -> bool {
    lookup::may_be_backend(tables, &parsed.tuple.destination)
        && match parsed.proto {
            proto::UDP => may_be_port_of_backend(packet, tables, parsed),
            proto::ICMP | proto::ICMPV6 => true,
            // What is behind extension headers is not known yet.
            0 | 43 | 44 | 60 => parsed.tuple.destination.family() == Family::V6,
            _ => false,
        }
}

/// Whether `FILTER` leaves open that a backend has the destination's port. A later fragment does not tell.
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

/// Whether a datagram to a backend itself has a flow of its own, or needs one: a flow with its very ends is not its own.
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
