//! Records of sockets: the VIP that the owner asked for, and the backend.

use super::verdict::Verdict;
use crate::abi::{SocketRecord, StreamRecord, proto};
use crate::datapath::tables::{Socket, Tables};

/// Stores the record of a socket that is being connected. Returns false on failure.
#[inline(always)]
pub(super) fn remember(socket: &mut impl Socket, tables: &impl Tables, record: SocketRecord) -> bool {
    if is_stream(socket) {
        let cookie = socket.cookie();
        let slot = StreamRecord::slot(cookie);
        let free = tables.stream(slot).is_some_and(|taken| taken.cookie == 0 || taken.cookie == cookie);
        if free && tables.put_stream(slot, &StreamRecord::new(cookie, record)) {
            return true;
        }
    }
    socket.put_record(record)
}

#[inline(always)]
pub(super) fn stream(socket: &impl Socket, tables: &impl Tables) -> Option<SocketRecord> {
    if !is_stream(socket) {
        return None;
    }
    let cookie = socket.cookie();
    tables.stream(StreamRecord::slot(cookie))?.of(cookie)
}

#[inline(always)]
pub(super) fn drop_stream(cookie: u64, tables: &impl Tables) {
    let slot = StreamRecord::slot(cookie);
    if tables.stream(slot).is_some_and(|taken| taken.cookie == cookie) {
        tables.free_stream(slot);
    }
}

/// Returns whether `STREAMS` may hold the socket's record. Records of UDP sockets stay in socket storage,
/// where the agent looks for them and where recvmsg() pays least.
#[inline(always)]
pub(super) fn is_stream(socket: &impl Socket) -> bool {
    socket.protocol() != u32::from(proto::UDP)
}

/// Returns whether the socket is connected to the backend that a connection's record names. This is not so
/// after a failed connect(), nor after a connect() to AF_UNSPEC, for which no hook is called.
#[inline(always)]
pub(super) fn holds(socket: &impl Socket, record: &SocketRecord) -> bool {
    record.is_connected() && socket.peer() == (record.backend_addr, record.backend_port)
}

#[inline(always)]
pub(super) fn translate_back(socket: &mut impl Socket, record: &SocketRecord) -> Verdict {
    if record.backend_addr != socket.addr() || record.backend_port != socket.port() {
        return Verdict::Pass;
    }
    socket.rewrite(record.vip, record.vip_port);
    Verdict::Translated
}
