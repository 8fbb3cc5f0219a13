//! The hooks of connect(), getpeername() and of the end of a socket.

use super::caller::{is_answered_in_packets, protocol};
use super::lead::lead;
use super::record::{drop_stream, is_stream, stream, translate_back};
use super::verdict::Verdict;
use super::{datagrams, order};
use crate::abi::{SocketRecord, StreamRecord, proto};
use crate::datapath::tables::{Socket, Tables};

/// Handles connect() of a stream socket, or of a datagram socket that will then send without an address.
///
/// connect() of a datagram socket does not fail for lack of endpoints if an edge judges the socket's packets:
/// no program expects such a failure. The socket's datagrams are refused until an endpoint serves. From then
/// on, the packet edge serves pods, and the agent leads the host's sockets to an endpoint (`order`).
#[inline(always)]
pub fn connect(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(proto) = protocol(socket) else { return Verdict::Pass };
    let datagrams = proto == proto::UDP;
    if datagrams {
        if order::is_asked_for(socket) {
            return order::carry_out(socket, tables);
        }
        // The owner connects the socket itself, so the order no longer holds.
        socket.drop_order();
        datagrams::keep_former(socket, tables);
    }
    let (addr, port) = (socket.addr(), socket.port());
    let mut verdict = lead(socket, tables, proto, addr, port);
    if matches!(verdict, Verdict::Reject | Verdict::Drop) && is_answered_in_packets(socket, tables) {
        verdict = Verdict::Pass;
    }
    // The socket may still have a record of an earlier connection. If this connect() is made to fail, the
    // connection and its record stay.
    if verdict == Verdict::Pass {
        forget(socket, tables);
    }
    verdict
}

/// Handles getpeername(): reports the VIP, if the application connected to one.
#[inline(always)]
pub fn peername(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(record) = stream(socket, tables).or_else(|| socket.record()) else {
        return if is_stream(socket) { Verdict::Pass } else { order::show(socket) };
    };
    if record.is_connected() && translate_back(socket, &record) == Verdict::Translated {
        return Verdict::Translated;
    }
    // After a failed connect() the socket is connected where it was before.
    if is_stream(socket) { Verdict::Pass } else { datagrams::translate_back_other(socket, tables) }
}

/// Handles close(): frees the socket's element of `STREAMS`. The kernel frees the socket's storage.
#[inline(always)]
pub fn release(protocol: u32, cookie: u64, tables: &impl Tables) {
    if protocol != u32::from(proto::UDP) {
        drop_stream(cookie, tables);
    }
}

/// Removes the record of a socket's earlier connection, unless the record leads to the address that the
/// socket connects to now. (The hook runs twice in one connect() while an agent attaches the programs to
/// another cgroup, above or below the previous one.)
#[inline(always)]
fn forget(socket: &mut impl Socket, tables: &impl Tables) {
    let (addr, port) = (socket.addr(), socket.port());
    let leads_here = |record: &SocketRecord| {
        record.is_connected() && record.backend_addr == addr && record.backend_port == port
    };
    if is_stream(socket) {
        let cookie = socket.cookie();
        let slot = StreamRecord::slot(cookie);
        if tables.stream(slot).is_some_and(|taken| taken.cookie == cookie && !leads_here(&taken.record)) {
            tables.free_stream(slot);
        }
    }
    let Some(record) = socket.record().filter(|record| !leads_here(record)) else { return };
    if is_stream(socket) || !datagrams::end_translation(socket, tables, &record) {
        socket.drop_record();
    }
}
