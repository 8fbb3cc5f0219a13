//! The agent's orders: a connected UDP socket is led to where its VIP leads now, and its program notices nothing.
//!
//! A connected UDP socket keeps the address that connect() gave it. When that backend leaves, when the first one comes, or where the
//! socket is older than the agent, the agent takes a copy of the socket's descriptor, writes an [`Order`] into the socket's
//! storage, and connects the socket to [`ADDRESS`] and [`PORT`]. The hook then connects it to the order's VIP, as it was when the
//! owner asked. connect() by the owner removes the order. Whoever else connects to that address does what the agent would have done.
//!
//! Opt-outs are looked up by the cgroup of the calling process, here the agent's own, which has none. So the agent itself gives no order to
//! sockets of pods that have opted out. Sockets of networks inside pods have records only if they are older than what is known of the pod.

use super::{Caller, Verdict, holds, lead, protocol};
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
        // It stays where it is: nobody would judge its packets.
        Verdict::Reject | Verdict::Drop if !Caller::of(socket, tables.node()).is_judged() => Verdict::Reject,
        Verdict::Pass | Verdict::Reject | Verdict::Drop => {
            socket.drop_record();
            socket.rewrite(order.vip, order.vip_port);
            Verdict::Translated
        }
    }
}

/// Answers the agent's getpeername() of a socket without a record that has an order: these programs run for the socket, and will carry
/// the order out. (Of a socket with a record that is known.)
#[inline(always)]
pub(super) fn show(socket: &mut impl Socket) -> Verdict {
    if socket.order().is_none() {
        return Verdict::Pass;
    }
    socket.rewrite(ADDRESS, PORT);
    Verdict::Translated
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
            // Its owner is about to connect it elsewhere.
            Some(record) if record.is_connected() => false,
            Some(_) | None => to_vip,
        }
}
