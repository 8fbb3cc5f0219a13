//! The socket edge: connect, sendmsg, recvmsg and getpeername of pods and host processes.
//!
//! The application asks for a VIP and keeps seeing the VIP, while the kernel connects the socket to a
//! backend. After connect() there is no work per packet.
//!
//! Some decisions on sockets of pods are left to the packet edge, if it is attached to the interfaces of
//! pods: to drop a packet without an answer, which a socket call cannot do, and to compare the pod's address
//! with source ranges, because the socket has no address yet. All sockets of pods that have opted out are
//! left to the packet edge, too. The same holds for networks inside pods, which may have Services of their
//! own at the same addresses.

mod datagrams;
mod order;

pub use self::datagrams::{recvmsg, sendmsg};
use super::lookup::{self, Target};
use super::select::{Client, Selection, select};
use super::tables::{Socket, Tables};
use super::trace;
use crate::abi::frontend::flags::PROBE;
use crate::abi::{
    AffinityKey, Counter, FrontendValue, Node, SocketRecord, StreamRecord, local_address,
    node::HOST_IN_PACKETS, node::OPTED_OUT, node::PODS_IN_PACKETS, node::SANDBOXES_KNOWN, opt_out, proto,
};
use crate::addr::Addr;
use crate::be::Be16;

/// IPPROTO_MPTCP: a stream socket that also speaks TCP.
const MPTCP: u32 = 262;
/// Largest depth of a pod's cgroup below the root. The cgroups of kubelet are two to four levels deep, and
/// deeper by as much if the node itself is a container.
const CGROUP_LEVELS: i32 = 16;

/// Answer of the hook to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The call goes on with the address unchanged: the address is not ours, or the packet edge decides on
    /// what follows.
    Pass,
    /// The call goes on with the address rewritten.
    Translated,
    /// The call fails with ECONNREFUSED (EPERM on kernels that cannot return it).
    Reject,
    /// The call fails with EHOSTUNREACH (EPERM likewise): the packet would have to be dropped, and no packet
    /// edge would drop it.
    Drop,
    /// The call fails with ENOBUFS (EPERM likewise): the record could not be stored, so nothing was
    /// translated.
    Fail,
}

impl Verdict {
    /// Returns [`Verdict::Pass`] if `not` holds, and the verdict itself otherwise.
    #[inline(always)]
    fn unless(self, not: bool) -> Self {
        if not { Self::Pass } else { self }
    }
}

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

/// Connects a socket of `proto` that asks for `vip` to a backend instead.
#[inline(always)]
fn lead(socket: &mut impl Socket, tables: &impl Tables, proto: u8, vip: Addr, vip_port: Be16) -> Verdict {
    let (frontend, node) = match target(socket, tables, vip, vip_port, proto) {
        Ok(found) => found,
        Err(verdict) => return verdict,
    };
    let caller = Caller::of(socket, node);
    match caller.select(tables, frontend) {
        Selection::Backend(id, backend) => {
            let record = SocketRecord {
                vip,
                vip_port,
                backend_addr: backend.addr,
                backend_port: backend.port,
                service: frontend.service,
                backend: id,
            };
            if !remember(socket, tables, record) {
                tables.count(Counter::FailRecord);
                return Verdict::Fail;
            }
            let to = (backend.addr, backend.port);
            trace::called(tables, Counter::Connected, socket, frontend.service, Some(to), true);
            socket.rewrite(backend.addr, backend.port);
            Verdict::Translated
        }
        Selection::Reject(why) => caller
            .refused(tables, socket, Verdict::Reject, why, frontend.service)
            .unless(caller.waits(proto, why)),
        Selection::Drop(why) => caller
            .refused(tables, socket, Verdict::Drop, why, frontend.service)
            .unless(caller.waits(proto, why)),
    }
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

/// Stores the record of a socket that is being connected. Returns false on failure.
#[inline(always)]
fn remember(socket: &mut impl Socket, tables: &impl Tables, record: SocketRecord) -> bool {
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

#[inline(always)]
fn stream(socket: &impl Socket, tables: &impl Tables) -> Option<SocketRecord> {
    if !is_stream(socket) {
        return None;
    }
    let cookie = socket.cookie();
    tables.stream(StreamRecord::slot(cookie))?.of(cookie)
}

#[inline(always)]
fn drop_stream(cookie: u64, tables: &impl Tables) {
    let slot = StreamRecord::slot(cookie);
    if tables.stream(slot).is_some_and(|taken| taken.cookie == cookie) {
        tables.free_stream(slot);
    }
}

/// Returns whether `STREAMS` may hold the socket's record. Records of UDP sockets stay in socket storage,
/// where the agent looks for them and where recvmsg() pays least.
#[inline(always)]
fn is_stream(socket: &impl Socket) -> bool {
    socket.protocol() != u32::from(proto::UDP)
}

/// Returns whether the socket is connected to the backend that a connection's record names. This is not so
/// after a failed connect(), nor after a connect() to AF_UNSPEC, for which no hook is called.
#[inline(always)]
fn holds(socket: &impl Socket, record: &SocketRecord) -> bool {
    record.is_connected() && socket.peer() == (record.backend_addr, record.backend_port)
}

#[inline(always)]
fn translate_back(socket: &mut impl Socket, record: &SocketRecord) -> Verdict {
    if record.backend_addr != socket.addr() || record.backend_port != socket.port() {
        return Verdict::Pass;
    }
    socket.rewrite(record.vip, record.vip_port);
    Verdict::Translated
}

#[inline(always)]
fn protocol(socket: &impl Socket) -> Option<u8> {
    const TCP: u32 = proto::TCP as u32;
    const UDP: u32 = proto::UDP as u32;
    const SCTP: u32 = proto::SCTP as u32;
    match socket.protocol() {
        TCP | MPTCP => Some(proto::TCP),
        UDP => Some(proto::UDP),
        SCTP => Some(proto::SCTP),
        _ => None,
    }
}

/// Returns the frontend at `addr` and the facts of this node, or the verdict for an address without a
/// frontend.
#[inline(always)]
fn target(
    socket: &impl Socket,
    tables: &impl Tables,
    addr: Addr,
    port: Be16,
    proto: u8,
) -> Result<(FrontendValue, Node), Verdict> {
    let found = lookup::find(tables, &addr, port, proto);
    if let Target::Other = found {
        return Err(Verdict::Pass);
    }
    let node = tables.node();
    if node.flags & (OPTED_OUT | SANDBOXES_KNOWN) != 0
        && socket.netns() != node.host_netns
        && is_left_alone(socket, tables, node.flags)
    {
        trace::called(tables, Counter::LeftToPackets, socket, 0, None, true);
        return Err(Verdict::Pass);
    }
    match found {
        Target::Frontend(frontend) => {
            if frontend.flags & PROBE != 0 {
                tables.learn_host_netns(socket.netns());
                return Ok((frontend, tables.node()));
            }
            Ok((frontend, node))
        }
        Target::Other => Err(Verdict::Pass),
        Target::UnusedPort => {
            trace::called(tables, Counter::RejectUnusedPort, socket, 0, None, true);
            Err(Verdict::Reject)
        }
        Target::InactiveAddress => Err(Caller::of(socket, node).refused(
            tables,
            socket,
            Verdict::Drop,
            Counter::DropInactiveAddress,
            0,
        )),
        Target::Retry => {
            Err(Caller::of(socket, node).refused(tables, socket, Verdict::Drop, Counter::DropRetry, 0))
        }
    }
}

/// Returns whether the socket is one of those that are left alone.
#[inline(always)]
fn is_left_alone(socket: &impl Socket, tables: &impl Tables, flags: u64) -> bool {
    // Nearly every socket is in the network namespace of a pod itself, so `inside` is false for it.
    let inside = flags & SANDBOXES_KNOWN != 0 && !tables.is_sandbox(socket.netns());
    (inside || flags & OPTED_OUT != 0) && socket.is_of_opt_out(tables, inside)
}

/// Returns whether the process is in one of the cgroups of `OPT_OUT`, according to [`Socket::cgroup`]. (A
/// container has a cgroup of its own below its pod's.) `inside`: the socket is in a network namespace that is
/// not a pod's own.
#[inline(always)]
pub fn is_of_opt_out(cgroup: impl Fn(i32) -> u64, tables: &impl Tables, inside: bool) -> bool {
    for level in 1..=CGROUP_LEVELS {
        match cgroup(level) {
            0 => return false,
            cgroup => match tables.opted_out(cgroup) {
                opt_out::EVERYTHING => return true,
                opt_out::INSIDE if inside => return true,
                _ => {}
            },
        }
    }
    false
}

/// Owner of a socket, as far as decisions need it.
struct Caller {
    netns: u64,
    client: Client,
    /// Whether the packet edge judges the packets that this socket will send.
    in_packets: bool,
}

impl Caller {
    #[inline(always)]
    fn of(socket: &impl Socket, node: Node) -> Self {
        let netns = socket.netns();
        let client = if netns == node.host_netns { Client::Host } else { Client::Pod };
        let in_packets = client == Client::Pod && node.flags & PODS_IN_PACKETS != 0;
        Self { netns, client, in_packets }
    }

    #[inline(always)]
    fn select(&self, tables: &impl Tables, frontend: FrontendValue) -> Selection {
        select(tables, frontend, self.client, AffinityKey::netns_client(self.netns))
    }

    /// Returns whether a socket that is not served now may be connected all the same, and be served once
    /// there is an endpoint. An edge judges its packets to the VIP meanwhile.
    #[inline(always)]
    fn waits(&self, proto: u8, why: Counter) -> bool {
        proto == proto::UDP
            && matches!(why, Counter::RejectNoEndpoint | Counter::DropNoLocalEndpoint)
            && self.is_judged()
    }

    /// Returns whether the packets that the socket sends to a VIP meet the packet edge.
    #[inline(always)]
    fn is_judged(&self) -> bool {
        self.in_packets || matches!(self.client, Client::Host)
    }

    /// Counts a refusal, and returns its verdict. If a pod's packets would be dropped and the packet edge
    /// judges them, the address stays unchanged: the packet edge drops the packets, and the client gets no
    /// answer, as intended. (The packet edge does not judge all packets of the host.)
    #[inline(always)]
    fn refused(
        &self,
        tables: &impl Tables,
        socket: &impl Socket,
        verdict: Verdict,
        why: Counter,
        service: u32,
    ) -> Verdict {
        let left = verdict == Verdict::Drop && self.in_packets;
        let what = if left { Counter::LeftToPackets } else { why };
        trace::called(tables, what, socket, service, None, true);
        if left { Verdict::Pass } else { verdict }
    }
}

/// Returns whether a refused socket of the host goes on with its address unchanged, because it cannot be
/// given the reason. The packet edge answers its SYN to a clusterIP, unless the host has that address. Other
/// addresses may belong to another host. For datagram sockets see [`Caller::waits`].
#[inline(never)]
fn is_answered_in_packets(socket: &impl Socket, tables: &impl Tables) -> bool {
    let (node, addr) = (tables.node(), socket.addr());
    node.flags & HOST_IN_PACKETS != 0
        && protocol(socket) == Some(proto::TCP)
        && socket.netns() == node.host_netns
        && tables.local_address(&addr) & local_address::HOST == 0
        && tables.in_service_cidr(&addr)
}
