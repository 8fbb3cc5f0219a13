//! The socket edge: connect, sendmsg, recvmsg and getpeername of pods and host processes.
//!
//! The application asks for a VIP and keeps seeing it; the socket is connected to a pod. After connect() there is
//! no work per packet at all.
//!
//! What a pod's socket cannot be told is left to the packet edge, if that has the interfaces of pods: silence, and
//! whether the pod's address is in source ranges, since a socket has no address yet. So is everything of pods that have
//! opted out.

use super::lookup::{self, Target};
use super::select::{Client, Selection, select};
use super::tables::{Socket, Tables};
use super::trace;
use crate::abi::frontend::flags::PROBE;
use crate::abi::{
    AffinityKey, Backend, Counter, FlowDirection, FrontendValue, Node, SocketRecord, StreamRecord, UdpFlow,
    UdpFlowKey, backend::flags::SERVING, local_address, node::HOST_IN_PACKETS, node::OPTED_OUT,
    node::PODS_IN_PACKETS, proto,
};
use crate::addr::Addr;
use crate::be::Be16;

/// IPPROTO_MPTCP: a stream socket that speaks TCP with anyone.
const MPTCP: u32 = 262;
/// How deep below the root the cgroup of a pod may lie. Those of kubelet are two to four levels deep, and deeper by as
/// much where the node itself is a container.
const CGROUP_LEVELS: i32 = 16;

/// What the hook answers the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, address untouched: it is not ours, or what follows is the packet edge's.
    Pass,
    /// Go on, address rewritten.
    Translated,
    /// Fail with ECONNREFUSED (EPERM on kernels that cannot say it).
    Reject,
    /// Fail with EHOSTUNREACH (EPERM likewise): the packet would have been dropped, and nobody is there to do so.
    Drop,
    /// Fail with ENOBUFS (EPERM likewise): what was asked for could not be remembered, so nothing was translated.
    Fail,
}

/// connect(): of a stream socket, or of a datagram socket that will then send without an address.
#[inline(always)]
pub fn connect(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(proto) = protocol(socket) else { return Verdict::Pass };
    let mut verdict = lead(socket, tables, proto);
    if matches!(verdict, Verdict::Reject | Verdict::Drop) && is_answered_in_packets(socket, tables) {
        verdict = Verdict::Pass;
    }
    // The socket may have been connected through us before. When this connect() fails, it still is.
    if verdict == Verdict::Pass {
        forget(socket, tables);
    }
    verdict
}

/// Connects a socket of `proto` to a backend instead.
#[inline(always)]
fn lead(socket: &mut impl Socket, tables: &impl Tables, proto: u8) -> Verdict {
    let (vip, vip_port) = (socket.addr(), socket.port());
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
        Selection::Reject(why) => caller.refused(tables, socket, Verdict::Reject, why, frontend.service),
        Selection::Drop(why) => caller.refused(tables, socket, Verdict::Drop, why, frontend.service),
    }
}

/// sendmsg() with an address on a UDP socket.
///
/// Datagrams of one socket to one VIP are a flow: they go to one backend while that serves. The socket's own storage has the
/// first flow, which no other socket can evict; the others are in `UDP_FLOWS`.
#[inline(always)]
pub fn sendmsg(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(proto) = protocol(socket) else { return Verdict::Pass };
    let (vip, vip_port) = (socket.addr(), socket.port());
    let (frontend, node) = match target(socket, tables, vip, vip_port, proto) {
        Ok(found) => found,
        Err(verdict) => return verdict,
    };
    let record = socket.record();
    let mut sent = SocketRecord { vip, vip_port, ..SocketRecord::default() };
    let known = match record {
        // A socket without a record has no flows.
        None => false,
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
            }
            // Nothing serves any more: as with conntrack, the flow is left to itself.
            _ if known => {}
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

/// Whether a socket's record is that of its first flow of datagrams, to the VIP of `sent`.
#[inline(always)]
fn is_first(record: &SocketRecord, sent: &SocketRecord) -> bool {
    !record.is_connected() && record.vip == sent.vip && record.vip_port == sent.vip_port
}

/// Looks a flow of datagrams up in `UDP_FLOWS`, and writes its backend into `sent`.
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

/// Keeps a flow of datagrams of a socket that has a record, of a connection or of datagrams: what there is no room for in the
/// record goes to `UDP_FLOWS`. (`fresh`: the flow leads where it led.)
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
        // The backend before may still answer.
        put_other(socket, tables, record, FlowDirection::Reply);
    }
    let held = if first { sent } else { record };
    let more = SocketRecord { service: SocketRecord::MORE_DATAGRAMS, ..*held };
    (record.is_connected() || *record == more || socket.put_record(more))
        && (first || fresh || put_other(socket, tables, sent, FlowDirection::Original))
        && put_other(socket, tables, sent, FlowDirection::Reply)
}

/// Writes one direction of a flow of datagrams into `UDP_FLOWS`, unless it is there. (The LRU may have evicted it.)
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
    let flow = UdpFlow { addr, port, pad: 0, backend: sent.backend, check: 0 }.seal(&key);
    tables.udp_flow(&key) == Some(flow) || tables.put_udp_flow(&key, &flow)
}

/// recvmsg() that reports where a datagram came from.
#[inline(always)]
pub fn recvmsg(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(record) = socket.record() else { return Verdict::Pass };
    // Of two VIPs with one backend the last one that was asked has the answer.
    let other_first = record.service == SocketRecord::MORE_DATAGRAMS;
    if !other_first && translate_back(socket, &record) == Verdict::Translated {
        return Verdict::Translated;
    }
    let key = flow_key(socket, socket.addr(), socket.port(), FlowDirection::Reply);
    match tables.udp_flow(&key) {
        Some(flow) if flow.is_for(&key) => {
            socket.rewrite(flow.addr, flow.port);
            Verdict::Translated
        }
        _ if other_first => translate_back(socket, &record),
        _ => Verdict::Pass,
    }
}

/// getpeername(): the VIP, if that is what the application connected to.
#[inline(always)]
pub fn peername(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    match stream(socket, tables).or_else(|| socket.record()) {
        Some(record) if record.is_connected() => translate_back(socket, &record),
        _ => Verdict::Pass,
    }
}

/// close(): what `STREAMS` holds for the socket goes; its storage is freed by the kernel.
#[inline(always)]
pub fn release(protocol: u32, cookie: u64, tables: &impl Tables) {
    if protocol != u32::from(proto::UDP) {
        drop_stream(cookie, tables);
    }
}

/// Notes what a connected socket asked for.
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

/// Forgets what a socket asked for before, unless it leads where the socket connects now: while an agent attaches the programs
/// to another cgroup, above the one before or below it, the hook runs twice in one connect().
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
    if socket.record().is_some_and(|record| !leads_here(&record)) {
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

/// Whether `STREAMS` may hold the socket's record. UDP's stays in socket storage, where the agent looks for it and
/// where recvmsg() pays least.
#[inline(always)]
fn is_stream(socket: &impl Socket) -> bool {
    socket.protocol() != u32::from(proto::UDP)
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

/// The frontend at `addr`, with the facts of this node, or the verdict for an address that is none.
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
    if node.flags & OPTED_OUT != 0 && socket.netns() != node.host_netns && has_opted_out(socket, tables) {
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

/// Whether the process is in one of the cgroups of `OPT_OUT`. (A container has a cgroup of its own below its pod's.)
#[inline(always)]
fn has_opted_out(socket: &impl Socket, tables: &impl Tables) -> bool {
    for level in 1..=CGROUP_LEVELS {
        match socket.cgroup(level) {
            0 => return false,
            cgroup if tables.opted_out(cgroup) => return true,
            _ => {}
        }
    }
    false
}

/// Who asks, as far as that matters.
struct Caller {
    netns: u64,
    client: Client,
    /// The packet edge judges what this socket will send.
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

    /// Counts a refusal. Where a pod's packet would be dropped, the address is left as it is if somebody drops the packets: the
    /// client then hears nothing, as it should. (Of the host's packets nobody judges all.)
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

/// Whether the host's socket, which cannot be told why it is refused, goes on as it is: the packet edge answers a SYN to a
/// clusterIP, unless the host has that address. Other addresses may have a host of their own. A datagram socket would stay connected
/// to a VIP that serves later on.
#[inline(never)]
fn is_answered_in_packets(socket: &impl Socket, tables: &impl Tables) -> bool {
    let (node, addr) = (tables.node(), socket.addr());
    node.flags & HOST_IN_PACKETS != 0
        && protocol(socket) == Some(proto::TCP)
        && socket.netns() == node.host_netns
        && tables.local_address(&addr) & local_address::HOST == 0
        && tables.in_service_cidr(&addr)
}

/// Whether the backend of a flow of datagrams belongs to the Service port and serves.
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
