//! Datagrams: sendmsg() and recvmsg() with addresses, and the VIP that replies are translated to.
//!
//! The datagrams of one socket to one VIP are a flow: they go to the same backend as long as that backend
//! serves. The socket's own storage holds the first flow, which no other socket can evict. `UDP_FLOWS` holds
//! the other flows.
//!
//! When a socket sends to a backend's own address, replies of that backend are no longer translated. A reply
//! does not show which of two VIPs with the same backend it is for. So the second VIP gets another backend if
//! there is one; otherwise all replies come from the VIP that was asked last.

use super::caller::{Caller, protocol, target};
use super::record::{holds, translate_back};
use super::verdict::Verdict;
use crate::abi::backend::flags::SERVING;
use crate::abi::{Backend, Counter, FlowDirection, FrontendValue, SocketRecord, UdpFlow, UdpFlowKey, socket};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::lookup;
use crate::datapath::select::{Selection, another};
use crate::datapath::tables::{Socket, Tables};
use crate::datapath::trace;

/// Handles sendmsg() with an address on a UDP socket.
#[inline(always)]
pub fn sendmsg(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(proto) = protocol(socket) else { return Verdict::Pass };
    let (vip, vip_port) = (socket.addr(), socket.port());
    let (frontend, node) = match target(socket, tables, vip, vip_port, proto) {
        Ok(found) => found,
        Err(verdict) => {
            if verdict == Verdict::Pass && lookup::may_be_backend(tables, &vip) {
                end_flow(socket, tables);
            }
            return verdict;
        }
    };
    if socket.peer() == (vip, vip_port) {
        // The socket is connected to the VIP itself, so the datagram goes on like those of send().
        return Verdict::Pass;
    }
    let record = socket.record().filter(|record| !record.is_connected() || holds(socket, record));
    let mut sent = SocketRecord { vip, vip_port, ..SocketRecord::default() };
    let known = match record {
        // A socket without a record has no flows.
        None => false,
        Some(record) if record.is_connected() && record.vip == vip && record.vip_port == vip_port => {
            // The kernel accepts datagrams only from the peer, so the datagram must go to that backend.
            let to = (record.backend_addr, record.backend_port);
            trace::called(tables, Counter::Datagram, socket, frontend.service, Some(to), false);
            socket.rewrite(record.backend_addr, record.backend_port);
            return Verdict::Translated;
        }
        Some(record) if is_first(&record, &sent) => {
            sent = SocketRecord { service: SocketRecord::DATAGRAMS, ..record };
            true
        }
        Some(_) => find_other(socket, tables, &mut sent),
    };
    let fresh = known && serves(tables, frontend, &sent);
    if !fresh {
        let caller = Caller::of(socket, node);
        match caller.select(tables, frontend) {
            Selection::Backend(id, Backend { addr, port, .. }) => {
                if known {
                    tables.count(Counter::UdpRepick);
                }
                (sent.backend_addr, sent.backend_port, sent.backend) = (addr, port, id);
                if let Some(record) = &record
                    && is_of_other_vip(socket, tables, record, &sent)
                    && let Some((id, Backend { addr, port, .. })) =
                        another(tables, frontend, caller.client, |id, backend| {
                            let other = SocketRecord {
                                backend_addr: backend.addr,
                                backend_port: backend.port,
                                backend: id,
                                ..sent
                            };
                            !is_of_other_vip(socket, tables, record, &other)
                        })
                {
                    (sent.backend_addr, sent.backend_port, sent.backend) = (addr, port, id);
                }
            }
            Selection::Reject(why) => {
                return caller.refused(tables, socket, Verdict::Reject, why, frontend.service);
            }
            Selection::Drop(why) => {
                return caller.refused(tables, socket, Verdict::Drop, why, frontend.service);
            }
        }
    }
    let kept = match record {
        None => socket.put_record(sent),
        Some(record) => record == sent || keep_beside(socket, tables, &record, &sent, fresh),
    };
    if !kept {
        tables.count(Counter::FailRecord);
        return Verdict::Fail;
    }
    let to = (sent.backend_addr, sent.backend_port);
    trace::called(tables, Counter::Datagram, socket, frontend.service, Some(to), !fresh);
    socket.rewrite(sent.backend_addr, sent.backend_port);
    Verdict::Translated
}

/// Returns whether a socket's record is that of its first flow of datagrams, and whether that flow is to the
/// VIP of `sent`.
#[inline(always)]
fn is_first(record: &SocketRecord, sent: &SocketRecord) -> bool {
    !record.is_connected() && record.vip == sent.vip && record.vip_port == sent.vip_port
}

/// Returns whether replies from the backend of `sent`, a flow that begins, are for another VIP that the
/// socket has sent to. A reply does not show which of two VIPs it is for.
#[inline(never)]
fn is_of_other_vip(
    socket: &impl Socket,
    tables: &impl Tables,
    record: &SocketRecord,
    sent: &SocketRecord,
) -> bool {
    let key = flow_key(socket, sent.backend_addr, sent.backend_port, FlowDirection::Reply);
    if let Some(flow) = reply(tables, &key) {
        return flow.addr != sent.vip || flow.port != sent.vip_port;
    }
    let same = record.backend_addr == sent.backend_addr && record.backend_port == sent.backend_port;
    same && !record.is_connected() && !is_first(record, sent)
}

/// Looks a flow of datagrams up in `UDP_FLOWS`, and writes its backend to `sent`. Returns whether there is
/// such a flow.
#[inline(never)]
fn find_other(socket: &impl Socket, tables: &impl Tables, sent: &mut SocketRecord) -> bool {
    let key = flow_key(socket, sent.vip, sent.vip_port, FlowDirection::Original);
    match tables.udp_flow(&key) {
        Some(flow) if flow.is_for(&key) => {
            (sent.backend_addr, sent.backend_port, sent.backend) = (flow.addr, flow.port, flow.backend);
            true
        }
        _ => false,
    }
}

/// Keeps a flow of datagrams of a socket that has a record, of a connection or of datagrams. Data that the
/// record has no room for goes to `UDP_FLOWS`. `fresh`: the flow keeps its backend.
#[inline(always)]
fn keep_beside(
    socket: &mut impl Socket,
    tables: &impl Tables,
    record: &SocketRecord,
    sent: &SocketRecord,
    fresh: bool,
) -> bool {
    let first = is_first(record, sent);
    let same = record.backend_addr == sent.backend_addr && record.backend_port == sent.backend_port;
    if first && !same {
        // The previous backend may still reply.
        put_other(socket, tables, record, FlowDirection::Reply);
    }
    let held = if first { sent } else { record };
    let more = SocketRecord { service: SocketRecord::MORE_DATAGRAMS, ..*held };
    (record.is_connected() || *record == more || socket.put_record(more))
        && (first || fresh || put_other(socket, tables, sent, FlowDirection::Original))
        && put_other(socket, tables, sent, FlowDirection::Reply)
}

/// Writes one direction of a flow of datagrams to `UDP_FLOWS`, unless it is there. (The LRU may have evicted
/// it.)
#[inline(never)]
fn put_other(
    socket: &impl Socket,
    tables: &impl Tables,
    sent: &SocketRecord,
    direction: FlowDirection,
) -> bool {
    let vip = (sent.vip, sent.vip_port);
    let backend = (sent.backend_addr, sent.backend_port);
    let ((from, from_port), (addr, port)) = match direction {
        FlowDirection::Original => (vip, backend),
        FlowDirection::Reply => (backend, vip),
    };
    let key = flow_key(socket, from, from_port, direction);
    let used = UdpFlow::clock(tables.now());
    let flow = UdpFlow { addr, port, used, backend: sent.backend, check: 0 };
    let is_there = tables.udp_flow(&key).is_some_and(|there| {
        there.is_for(&key)
            && there.age(used) < socket::REFRESHED
            && UdpFlow { used, check: 0, ..there } == flow
    });
    is_there || tables.put_udp_flow(&key, &flow.seal(&key))
}

/// Handles a recvmsg() that reports the source of a datagram.
#[inline(always)]
pub fn recvmsg(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(record) = socket.record() else { return Verdict::Pass };
    let counts = !record.is_connected() || holds(socket, &record);
    // If two VIPs have the same backend, the reply comes from the VIP that was asked last.
    let other_first = record.service == SocketRecord::MORE_DATAGRAMS;
    if counts && !other_first && translate_back(socket, &record) == Verdict::Translated {
        return Verdict::Translated;
    }
    let verdict = translate_back_other(socket, tables);
    if other_first && verdict == Verdict::Pass { translate_back(socket, &record) } else { verdict }
}

/// Replaces a backend's address by the VIP of a flow in `UDP_FLOWS`. The flow lives as long as the socket
/// sends or receives.
#[inline(always)]
pub(super) fn translate_back_other(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let key = flow_key(socket, socket.addr(), socket.port(), FlowDirection::Reply);
    let Some(flow) = reply(tables, &key) else { return Verdict::Pass };
    let used = UdpFlow::clock(tables.now());
    if flow.age(used) >= socket::REFRESHED {
        // If the write fails, the flow only ends earlier.
        let _ = tables.put_udp_flow(&key, &UdpFlow { used, ..flow }.seal(&key));
    }
    socket.rewrite(flow.addr, flow.port);
    Verdict::Translated
}

/// Returns the flow with the VIP that replies from a backend are translated to.
#[inline(always)]
fn reply(tables: &impl Tables, key: &UdpFlowKey) -> Option<UdpFlow> {
    let flow = tables.udp_flow(key).filter(|flow| flow.is_for(key))?;
    (flow.age(UdpFlow::clock(tables.now())) < socket::FORGOTTEN).then_some(flow)
}

/// Keeps the translation of replies from a connected socket's peer, in case the connect() that begins fails:
/// the socket then stays connected to that peer.
#[inline(always)]
pub(super) fn keep_former(socket: &impl Socket, tables: &impl Tables) {
    if let Some(record) = socket.record()
        && holds(socket, &record)
    {
        // If the write fails, the application sees the backend's address.
        let _ = put_other(socket, tables, &record, FlowDirection::Reply);
    }
}

/// Ends the translation of a peer when connect() asks for the peer's own address. Returns false if the socket
/// has nothing else to translate, so that its record can go.
#[inline(always)]
pub(super) fn end_translation(socket: &mut impl Socket, tables: &impl Tables, record: &SocketRecord) -> bool {
    let key = flow_key(socket, socket.addr(), socket.port(), FlowDirection::Reply);
    if tables.udp_flow(&key).is_some() {
        tables.drop_udp_flow(&key);
    }
    holds(socket, record) && socket.put_record(SocketRecord::ALL_IN_UDP_FLOWS)
}

/// Ends the translation of a backend when a datagram is sent to the backend's own address. Other backends are
/// still translated.
#[inline(never)]
fn end_flow(socket: &mut impl Socket, tables: &impl Tables) {
    let (addr, port) = (socket.addr(), socket.port());
    // A connected socket goes on as it is: its peer's replies cannot be told apart.
    let Some(record) = socket.record().filter(|record| !record.is_connected()) else { return };
    if record.backend_addr == addr && record.backend_port == port {
        if record.service == SocketRecord::DATAGRAMS {
            socket.drop_record();
            return;
        }
        // The record exists, so the write does not fail.
        let _ = socket.put_record(SocketRecord::ALL_IN_UDP_FLOWS);
    }
    let key = flow_key(socket, addr, port, FlowDirection::Reply);
    if tables.udp_flow(&key).is_some() {
        tables.drop_udp_flow(&key);
    }
}

/// Returns whether the backend of a flow of datagrams belongs to the Service port and serves.
#[inline(always)]
fn serves(tables: &impl Tables, frontend: FrontendValue, sent: &SocketRecord) -> bool {
    tables.backend(sent.backend).is_some_and(|Backend { addr, port, service, state, .. }| {
        let same = addr == sent.backend_addr && port == sent.backend_port && service == frontend.service;
        same && state.flags & SERVING != 0
    })
}

#[inline(always)]
fn flow_key(socket: &impl Socket, addr: Addr, port: Be16, direction: FlowDirection) -> UdpFlowKey {
    UdpFlowKey { cookie: socket.cookie(), addr, port, direction: direction as u16, pad: 0 }
}
