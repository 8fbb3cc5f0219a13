//! The agent's orders: a connected UDP socket is led to where its VIP leads now, and its program notices nothing.
//!
//! A connected UDP socket keeps the address that connect() gave it. When that backend leaves, when the first one comes, or where the
//! socket is older than the agent, the agent takes a copy of the socket's descriptor, writes an [`Order`] into the socket's
//! storage, and connects the socket to [`ADDRESS`] and [`PORT`]. The hook then connects it to the order's VIP, as it was when the
//! owner asked. Only for the agent, so the owner's opt-out and the agent's own do not matter. Whoever else connects there does
//! what the agent would have done.

use super::{Verdict, holds, lead, protocol};
use crate::abi::SocketRecord;
use crate::abi::socket::Order;
use crate::abi::socket::order::{ADDRESS, PORT};
use crate::datapath::tables::{Socket, Tables};

/// Whether connect() carries an order out.
#[inline(always)]
pub(super) fn is_asked_for(socket: &impl Socket) -> bool {
    socket.port() == PORT && socket.addr() == ADDRESS
}

/// Connects the socket to the VIP of its order: to a backend, or to the VIP itself while nobody serves.
///
/// Without an order, or when the owner has connected the socket elsewhere, nothing is done and connect() fails.
#[inline(always)]
pub(super) fn carry_out(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let (Some(order), Some(proto)) = (socket.order(), protocol(socket)) else { return Verdict::Reject };
    if !is_in_force(socket, &order) {
        return Verdict::Reject;
    }
    match lead(socket, tables, proto, order.vip, order.vip_port) {
        Verdict::Translated => Verdict::Translated,
        Verdict::Fail => Verdict::Fail,
        Verdict::Pass | Verdict::Reject | Verdict::Drop => {
            socket.drop_record();
            socket.rewrite(order.vip, order.vip_port);
            Verdict::Translated
        }
    }
}

/// Whether the socket is still connected where the agent has seen it: to the backend that its record says, or to the VIP itself.
#[inline(always)]
fn is_in_force(socket: &impl Socket, order: &Order) -> bool {
    let to_vip = order.peer == order.vip && order.peer_port == order.vip_port;
    socket.peer() == (order.peer, order.peer_port)
        && match socket.record() {
            Some(record) if holds(socket, &record) => {
                record.vip == order.vip && record.vip_port == order.vip_port
            }
            Some(SocketRecord { .. }) | None => to_vip,
        }
}
