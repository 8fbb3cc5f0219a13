//! The socket edge: connect, sendmsg, recvmsg and getpeername of pods and host processes.
//!
//! The application asks for a VIP and keeps seeing it; the socket is connected to a pod. After connect() there is
//! no work per packet at all.
//!
//! What a pod's socket cannot be told is left to the packet edge, if that has the interfaces of pods: silence, and
//! whether the pod's address is in source ranges, since a socket has no address yet. So is everything of pods that have
//! opted out, and of networks inside pods, which may have Services of their own at the same addresses.

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

impl Verdict {
    /// Nothing is done if `not` holds.
    #[inline(always)]
    fn unless(self, not: bool) -> Self {
        if not { Self::Pass } else { self }
    }
}

/// connect(): of a stream socket, or of a datagram socket that will then send without an address.
///
/// That of a datagram socket does not fail for lack of endpoints where its packets are judged: no program expects that. Its datagrams are
/// refused until somebody serves. Then pods are served as packets, and the host's socket is led there by the agent (`order`).
#[inline(always)]
pub fn connect(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(proto) = protocol(socket) else { return Verdict::Pass };
    let datagrams = proto == proto::UDP;
    if datagrams {
        if order::is_asked_for(socket) {
            return order::carry_out(socket, tables);
        }
        // Its owner wants it elsewhere.
        socket.drop_order();
        datagrams::keep_former(socket, tables);
    }
    let (addr, port) = (socket.addr(), socket.port());
    let mut verdict = lead(socket, tables, proto, addr, port);
    if matches!(verdict, Verdict::Reject | Verdict::Drop) && is_answered_in_packets(socket, tables) {
        verdict = Verdict::Pass;
    }
    // The socket may have been connected through us before. When this connect() fails, it still is.
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

/// getpeername(): the VIP, if that is what the application connected to.
#[inline(always)]
pub fn peername(socket: &mut impl Socket, tables: &impl Tables) -> Verdict {
    let Some(record) = stream(socket, tables).or_else(|| socket.record()) else {
        return if is_stream(socket) { Verdict::Pass } else { order::show(socket) };
    };
    if record.is_connected() && translate_back(socket, &record) == Verdict::Translated {
        return Verdict::Translated;
    }
    // A connect() that failed has left the socket where it was before.
    if is_stream(socket) { Verdict::Pass } else { datagrams::translate_back_other(socket, tables) }
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

/// Whether `STREAMS` may hold the socket's record. UDP's stays in socket storage, where the agent looks for it and
/// where recvmsg() pays least.
#[inline(always)]
fn is_stream(socket: &impl Socket) -> bool {
    socket.protocol() != u32::from(proto::UDP)
}

/// Whether the socket is connected where a connection's record says. After a connect() that failed it is not, nor after one to
/// AF_UNSPEC, of which no hook hears.
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

/// Whether this is one of the sockets that are left alone.
#[inline(always)]
fn is_left_alone(socket: &impl Socket, tables: &impl Tables, flags: u64) -> bool {
    // Nearly every socket is in the namespace of a pod: it is not inside another one.
    let inside = flags & SANDBOXES_KNOWN != 0 && !tables.is_sandbox(socket.netns());
    (inside || flags & OPTED_OUT != 0) && socket.is_of_opt_out(tables, inside)
}

/// Whether the process is in one of the cgroups of `OPT_OUT`, by what [`Socket::cgroup`] says. (A container has a cgroup of its own below its
/// pod's.) `inside`: its socket is in a network namespace that is no pod's.
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

    /// Whether a socket that is not served now may be connected all the same, to be served when there is an endpoint: packets to the VIP are
    /// judged meanwhile.
    #[inline(always)]
    fn waits(&self, proto: u8, why: Counter) -> bool {
        proto == proto::UDP
            && matches!(why, Counter::RejectNoEndpoint | Counter::DropNoLocalEndpoint)
            && self.is_judged()
    }

    /// Whether the packets that the socket sends to a VIP meet an edge.
    #[inline(always)]
    fn is_judged(&self) -> bool {
        self.in_packets || matches!(self.client, Client::Host)
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
/// clusterIP, unless the host has that address. Other addresses may have a host of their own. For datagram sockets there is [`Caller::waits`].
#[inline(never)]
fn is_answered_in_packets(socket: &impl Socket, tables: &impl Tables) -> bool {
    let (node, addr) = (tables.node(), socket.addr());
    node.flags & HOST_IN_PACKETS != 0
        && protocol(socket) == Some(proto::TCP)
        && socket.netns() == node.host_netns
        && tables.local_address(&addr) & local_address::HOST == 0
        && tables.in_service_cidr(&addr)
}
