//! The agent's orders: they lead a connected UDP socket to the current backend of its VIP, without its
//! program noticing.
//!
//! A connected UDP socket keeps the address that connect() gave it. The agent gives an order when that
//! backend leaves, when the first backend comes, or if the socket is older than the agent. To do so, the
//! agent takes a copy of the socket's descriptor, writes an [`Order`] into the socket's storage, and connects
//! the socket to [`ADDRESS`] and [`PORT`]. The hook then connects the socket to the order's VIP, as it did
//! for the owner. A connect() by the owner removes the order. If another process connects the socket to that
//! address, the effect is the same as if the agent did.
//!
//! Opt-outs are looked up by the cgroup of the calling process. Here that is the agent's own cgroup, which
//! has no opt-out. So the agent itself gives no order to sockets of pods that have opted out. Sockets of
//! networks inside pods have records only if they are older than the agent's knowledge of the pod.

use super::caller::{Caller, protocol};
use super::lead::lead;
use super::record::holds;
use super::verdict::Verdict;
use crate::abi::socket::Order;
use crate::abi::socket::order::{ADDRESS, PORT};
use crate::datapath::tables::{Socket, Tables};

/// Returns whether connect() is to carry out an order.
#[inline(always)]
pub(super) fn is_asked_for(socket: &impl Socket) -> bool {
    socket.port() == PORT && socket.addr() == ADDRESS
}

/// Connects the socket to the VIP of its order: to a backend, or to the VIP itself while no backend serves.
///
/// Without an order, or if the owner has connected the socket elsewhere, nothing is done and connect() fails.
#[inline(always)]
pub(super) fn carry_out(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let (Some(order), Some(proto)) = (socket.order(), protocol(socket)) else { return Verdict::Reject };
    if !is_in_force(socket, &order) {
        return Verdict::Reject;
    }
    match lead(socket, tables, proto, order.vip, order.vip_port) {
        Verdict::Translated => Verdict::Translated,
        Verdict::Fail => Verdict::Fail,
        // The socket stays where it is: no edge would judge its packets.
        Verdict::Reject | Verdict::Drop if !Caller::of(socket, tables.node()).is_judged() => Verdict::Reject,
        Verdict::Pass | Verdict::Reject | Verdict::Drop => {
            socket.drop_record();
            socket.rewrite(order.vip, order.vip_port);
            Verdict::Translated
        }
    }
}

/// Answers the agent's getpeername() of a socket that has an order but no record. The answer shows that these
/// programs run for the socket and will carry the order out. (If a socket has a record, this is known.)
#[inline(always)]
pub(super) fn show(socket: &mut impl Socket) -> Verdict {
    if socket.order().is_none() {
        return Verdict::Pass;
    }
    socket.rewrite(ADDRESS, PORT);
    Verdict::Translated
}

/// Returns whether the socket is still connected to the peer that the agent has seen: to the backend of its
/// record, or to the VIP itself.
#[inline(always)]
fn is_in_force(socket: &impl Socket, order: &Order) -> bool {
    let to_vip = order.peer == order.vip && order.peer_port == order.vip_port;
    socket.peer() == (order.peer, order.peer_port)
        && match socket.record() {
            Some(record) if holds(socket, &record) => {
                record.vip == order.vip && record.vip_port == order.vip_port
            }
            // The owner is about to connect the socket elsewhere.
            Some(record) if record.is_connected() => false,
            Some(_) | None => to_vip,
        }
}
