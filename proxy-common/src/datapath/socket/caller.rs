//! The owner of a socket, and the frontend that it asks for.

use super::verdict::Verdict;
use crate::abi::frontend::flags::PROBE;
use crate::abi::{
    AffinityKey, CgroupId, Counter, FrontendValue, NetnsCookie, Node, ServiceId, local_address,
    node::HOST_IN_PACKETS, node::OPTED_OUT, node::PODS_IN_PACKETS, node::SANDBOXES_KNOWN, opt_out, proto,
};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::lookup::{self, Target};
use crate::datapath::select::{Client, Selection, select};
use crate::datapath::tables::{Socket, Tables};
use crate::datapath::trace;

/// IPPROTO_MPTCP: a stream socket that also speaks TCP.
const MPTCP: u32 = 262;

/// Largest depth of a pod's cgroup below the root. The cgroups of kubelet are two to four levels deep, and
/// deeper by as much if the node itself is a container.
const CGROUP_LEVELS: i32 = 16;

#[inline(always)]
pub(super) fn protocol(socket: &impl Socket) -> Option<u8> {
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
pub(super) fn target(
    socket: &impl Socket,
    tables: &impl Tables,
    addr: Addr,
    port: Be16,
    proto: u8,
) -> Result<(FrontendValue, Node), Verdict> {
    let found = lookup::find(tables, &addr, port, proto);
    // The verifier refuses a register that was never written, such as the absent payload of an enum.
    let frontend = if let Target::Frontend(frontend) = found {
        frontend
    } else {
        FrontendValue { service: ServiceId::NONE, flags: 0, check: 0 }
    };
    if let Target::Other = found {
        return Err(Verdict::Pass);
    }
    let node = tables.node();
    if node.flags & (OPTED_OUT | SANDBOXES_KNOWN) != 0
        && socket.netns() != node.host_netns
        && is_left_alone(socket, tables, node.flags)
    {
        trace::called(tables, Counter::LeftToPackets, socket, ServiceId::NONE, None, true);
        return Err(Verdict::Pass);
    }
    match found {
        Target::Frontend(_) => {
            if frontend.flags & PROBE != 0 {
                tables.learn_host_netns(socket.netns());
                return Ok((frontend, tables.node()));
            }
            Ok((frontend, node))
        }
        Target::Other => Err(Verdict::Pass),
        Target::UnusedPort => {
            trace::called(tables, Counter::RejectUnusedPort, socket, ServiceId::NONE, None, true);
            Err(Verdict::Reject)
        }
        Target::InactiveAddress => Err(Caller::of(socket, node).refused(
            tables,
            socket,
            Verdict::Drop,
            Counter::DropInactiveAddress,
            ServiceId::NONE,
        )),
        Target::Retry => Err(Caller::of(socket, node).refused(
            tables,
            socket,
            Verdict::Drop,
            Counter::DropRetry,
            ServiceId::NONE,
        )),
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
pub fn is_of_opt_out(cgroup: impl Fn(i32) -> CgroupId, tables: &impl Tables, inside: bool) -> bool {
    for level in 1..=CGROUP_LEVELS {
        match cgroup(level) {
            CgroupId::NONE => return false,
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
pub(super) struct Caller {
    netns: NetnsCookie,
    pub(super) client: Client,
    /// Whether the packet edge judges the packets that this socket will send.
    in_packets: bool,
}

impl Caller {
    #[inline(always)]
    pub(super) fn of(socket: &impl Socket, node: Node) -> Self {
        let netns = socket.netns();
        let client = if netns == node.host_netns { Client::Host } else { Client::Pod };
        let in_packets = client == Client::Pod && node.flags & PODS_IN_PACKETS != 0;
        Self { netns, client, in_packets }
    }

    #[inline(always)]
    pub(super) fn select(&self, tables: &impl Tables, frontend: FrontendValue) -> Selection {
        select(tables, frontend, self.client, AffinityKey::netns_client(self.netns))
    }

    /// Returns whether a socket that is not served now may be connected all the same, and be served once
    /// there is an endpoint. An edge judges its packets to the VIP meanwhile.
    #[inline(always)]
    pub(super) fn waits(&self, proto: u8, why: Counter) -> bool {
        proto == proto::UDP
            && matches!(why, Counter::RejectNoEndpoint | Counter::DropNoLocalEndpoint)
            && self.is_judged()
    }

    /// Returns whether the packets that the socket sends to a VIP meet the packet edge.
    #[inline(always)]
    pub(super) fn is_judged(&self) -> bool {
        self.in_packets || matches!(self.client, Client::Host)
    }

    /// Counts a refusal, and returns its verdict. If a pod's packets would be dropped and the packet edge
    /// judges them, the address stays unchanged: the packet edge drops the packets, and the client gets no
    /// answer, as intended. (The packet edge does not judge all packets of the host.)
    #[inline(always)]
    pub(super) fn refused(
        &self,
        tables: &impl Tables,
        socket: &impl Socket,
        verdict: Verdict,
        why: Counter,
        service: ServiceId,
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
pub(super) fn is_answered_in_packets(socket: &impl Socket, tables: &impl Tables) -> bool {
    let (node, addr) = (tables.node(), socket.addr());
    node.flags & HOST_IN_PACKETS != 0
        && protocol(socket) == Some(proto::TCP)
        && socket.netns() == node.host_netns
        && tables.local_address(&addr) & local_address::HOST == 0
        && tables.in_service_cidr(&addr)
}
