//! Answers to each kind of client: the datapath's own code, run on copies of the maps.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_common::abi::device::flags::NEAR;
use proxy_common::abi::frontend::flags::SOURCE_RANGES;
use proxy_common::abi::{
    AffinityKey, Counter, Event, IfIndex, Nanos, NetnsCookie, ServiceId, Trace, local_address, opt_out, proto,
};
use proxy_common::addr::{Addr, Family};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::EdgeTables as _;
use proxy_common::datapath::edge::{self, Role};
use proxy_common::datapath::lookup::Target;
use proxy_common::datapath::socket;
use proxy_common::datapath::tables::Tables as _;
use serde::Serialize;

use super::question::Question;
use crate::reconcile::sim::frame::Frame;
use crate::reconcile::sim::{SimSocket, Simulator};

/// Kind of client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Client {
    /// A process of this host, at its socket.
    Host,
    /// A pod of this node, at its socket.
    Pod,
    /// A pod of this node, by the packets that its socket sends untranslated: the socket is not seen, or leaves the
    /// decision to the packets.
    PodPackets,
    /// A machine outside, or a pod of another node, by its packets.
    Outside,
    /// A machine outside or a pod of another node, through a device that counts as near (detect-local by interface).
    NearDevice,
}

impl Client {
    /// Returns the kind in words.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Host => "process of this host",
            Self::Pod => "pod of this node",
            Self::PodPackets => "pod of this node, in packets",
            Self::Outside => "client outside",
            Self::NearDevice => "through a near device",
        }
    }
}

/// Answer to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// One of the backends answers.
    Served,
    /// Connection refused.
    Refused,
    /// Operation not permitted.
    Denied,
    /// No answer at all.
    Dropped,
    /// The socket goes on untranslated, and its packets are judged.
    LeftToPackets,
    /// The connection goes where it would go without Vipr.
    NotOurs,
}

impl Verdict {
    /// Returns the answer as the client sees it.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Refused => "refused",
            Self::Denied => "denied (EHOSTUNREACH; EPERM before Linux 5.18)",
            Self::Dropped => "dropped silently",
            Self::LeftToPackets => "left to its packets",
            Self::NotOurs => "not touched",
        }
    }
}

/// Answer to a kind of client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Answer {
    /// Kind of client.
    pub(crate) client: Client,
    /// The answer.
    pub(crate) verdict: Verdict,
    /// Reason, as a counter of `proxy-agent status`; none where nothing is counted.
    pub(crate) counter: Option<&'static str>,
    /// Reason in words.
    pub(crate) reason: &'static str,
    /// Backends that the client may get, in order: one at random, unless one is remembered.
    pub(crate) backends: Vec<SocketAddr>,
    /// Backend that session affinity remembers for the client. (Unknown for a pod's socket, which is remembered by its
    /// network namespace and not by its address.)
    pub(crate) remembered: Option<SocketAddr>,
}

/// Number of backends that are looked for one by one, at most.
const BACKENDS_MAX: usize = 4096;
/// Number of connections of one kind of client, at most.
const CONNECTIONS: u32 = BACKENDS_MAX as u32 + 1;
/// A network namespace that does not exist, in place of a pod's.
const SOME_NETNS: NetnsCookie = NetnsCookie(u64::MAX);
/// Addresses for documentation (RFC 5737, RFC 3849), for a client outside without a given address.
const SOMEBODY: [Addr; 2] = [Addr::v4([203, 0, 113, 77]), documentation_v6()];

const fn documentation_v6() -> Addr {
    let mut bytes = [0; 16];
    (bytes[0], bytes[1], bytes[2], bytes[3], bytes[15]) = (0x20, 0x01, 0x0d, 0xb8, 77);
    Addr { bytes }
}

/// Returns the answers to every kind of client that `question` may be about. `among` is the number of backends of the
/// Service port. `maps` holds what the agent has written, and also `AFFINITY` and `NEW_AFFINITY` of the client,
/// `DEVICES` and the clock.
pub(crate) fn answers(maps: &Simulator, question: &Question, target: Target, among: usize) -> Vec<Answer> {
    let remembered = (maps.clients.borrow().clone(), maps.new_clients.borrow().clone());
    let mut answers = Vec::new();
    for client in clients(maps, question, target) {
        let ask = |random: u32, index: u32| {
            maps.fixed_random.set(Some(random));
            outcome(maps, question, client, client as u32 * CONNECTIONS + index)
        };
        maps.clients.replace(remembered.0.clone());
        maps.new_clients.replace(remembered.1.clone());
        let hits = maps.counted(Counter::AffinityHit);
        let first = ask(0, 0);
        let is_remembered = maps.counted(Counter::AffinityHit) > hits;
        let mut backends = BTreeSet::new();
        // This many random numbers, evenly spread, reach each slot of a set that is no larger.
        let tries = u32::try_from(among.clamp(1, BACKENDS_MAX)).unwrap_or(1);
        for index in 0..tries {
            maps.clients.borrow_mut().clear();
            maps.new_clients.borrow_mut().clear();
            let random = (u64::from(index) << 32).div_ceil(tries.into());
            backends.extend(ask(u32::try_from(random).unwrap_or(u32::MAX), index + 1).backend);
        }
        answers.push(Answer {
            client,
            verdict: first.verdict,
            counter: first.why.map(Counter::name),
            reason: match first.why {
                Some(Counter::LeftToPackets) if has_opted_out(maps, question) => OPTED_OUT,
                why => why.map_or("", reason),
            },
            backends: backends.into_iter().collect(),
            remembered: first.backend.filter(|_| is_remembered),
        });
    }
    answers
}

/// Returns whether the client is a pod whose sockets are left alone.
fn has_opted_out(maps: &Simulator, question: &Question) -> bool {
    question.cgroup.is_some_and(|cgroup| maps.opted_out(cgroup) == opt_out::EVERYTHING)
}

/// Returns the network namespace of the pod that is asked about, or one in place of a pod's.
fn netns_of_pod(maps: &Simulator, question: &Question) -> NetnsCookie {
    let sandboxes = maps.contents().sandboxes;
    let own = sandboxes.iter().find(|(_, cgroup)| Some(*cgroup) == question.cgroup);
    own.map_or(SOME_NETNS, |(netns, _)| *netns)
}

fn clients(maps: &Simulator, question: &Question, target: Target) -> Vec<Client> {
    let near_device = maps.edge.devices.borrow().values().any(|device| device.flags & NEAR != 0);
    // SCTP sockets are not seen.
    let sockets = question.proto != proto::SCTP;
    let by_address = matches!(target, Target::Frontend(frontend) if frontend.flags & SOURCE_RANGES != 0);
    let wanted = |client: &Client| match (client, question.from) {
        (Client::Host, Some(from)) => sockets && is_host(maps, &from),
        (Client::Host | Client::Pod, None) => sockets,
        (Client::Pod, Some(from)) => sockets && !is_host(maps, &from) && may_be_pod(maps, &from),
        (Client::PodPackets, Some(from)) => !is_host(maps, &from) && maps.is_pod_source(&from),
        (Client::Outside, Some(from)) => !is_host(maps, &from) && !maps.is_pod_source(&from),
        (Client::NearDevice, Some(from)) => near_device && !is_host(maps, &from),
        // Without an address, nothing can be told about packets that are judged by their source.
        (Client::PodPackets, None) => !by_address && pod_address(maps, question).is_some(),
        (Client::Outside, None) => !by_address,
        (Client::NearDevice, None) => near_device && !by_address,
    };
    [Client::Host, Client::Pod, Client::PodPackets, Client::Outside, Client::NearDevice]
        .into_iter()
        .filter(wanted)
        .collect()
}

fn is_host(maps: &Simulator, addr: &Addr) -> bool {
    addr.is_loopback() || maps.local_address(addr) & local_address::HOST != 0
}

/// Returns whether an address may be a pod's. Where the addresses of pods are not known, any address may be.
fn may_be_pod(maps: &Simulator, addr: &Addr) -> bool {
    let known = maps.contents().pod_sources.iter().any(|pods| pods.family() == addr.family());
    !known || maps.is_pod_source(addr)
}

/// Returns some address of a pod.
fn pod_address(maps: &Simulator, question: &Question) -> Option<Addr> {
    let family = question.addr.family();
    let pods = maps.contents().pod_sources.into_iter().find(|pods| pods.family() == family)?;
    let mut addr = pods.addr();
    addr.bytes[15] |= 1;
    Some(addr)
}

/// Outcome of one attempt.
struct Outcome {
    verdict: Verdict,
    why: Option<Counter>,
    backend: Option<SocketAddr>,
}

/// Makes one attempt of `client`; another `index` is another connection.
fn outcome(maps: &Simulator, question: &Question, client: Client, index: u32) -> Outcome {
    maps.trace.set(Trace { until: Nanos(u64::MAX), service: ServiceId::NONE, sample: 0 });
    maps.events.borrow_mut().clear();
    let verdict = match client {
        Client::Host => at_socket(maps, question, maps.host_netns.get(), index),
        Client::Pod => at_socket(maps, question, netns_of_pod(maps, question), index),
        Client::PodPackets => {
            let source = question.from.or_else(|| pod_address(maps, question));
            in_packets(maps, question, source, Role::Pod, IfIndex::NONE, index)
        }
        Client::Outside => in_packets(maps, question, question.from, Role::External, IfIndex::NONE, index),
        Client::NearDevice => {
            let device = maps.edge.devices.borrow();
            let near = device
                .iter()
                .find(|(_, device)| device.flags & NEAR != 0)
                .map_or(IfIndex::NONE, |(index, _)| *index);
            drop(device);
            in_packets(maps, question, question.from, Role::Pod, near, index)
        }
    };
    let event = maps.events.borrow().last().copied();
    let why = event.and_then(|event| Counter::ALL.get(usize::from(event.what)).copied());
    let backend = event
        .filter(|_| verdict == Verdict::Served)
        .map(|event: Event| SocketAddr::new(event.new_destination.to_ip(), event.new_destination_port.get()));
    let verdict = if why == Some(Counter::LeftToPackets) {
        Verdict::LeftToPackets
    } else if client == Client::Host && verdict == Verdict::NotOurs && why.is_some() {
        // A connection that Vipr does not touch has no event. Here the host's packet is answered, since its socket
        // could not be given the reason.
        Verdict::Refused
    } else {
        verdict
    };
    Outcome { verdict, why, backend }
}

fn at_socket(maps: &Simulator, question: &Question, netns: NetnsCookie, index: u32) -> Verdict {
    let mut socket = SimSocket {
        addr: question.addr,
        port: question.port,
        peer: (Addr::ZERO, Be16::new(0)),
        protocol: question.proto.into(),
        cookie: u64::from(index) + 1,
        netns,
        cgroups: question.cgroup.as_slice(),
        record: None,
        order: None,
        storage_fails: false,
    };
    // connect() of UDP reports nothing: a client that is not served learns it when it sends.
    let asked = if question.proto == proto::UDP {
        socket::sendmsg(&mut socket, maps)
    } else {
        socket::connect(&mut socket, maps)
    };
    match asked {
        socket::Verdict::Translated => Verdict::Served,
        socket::Verdict::Reject => Verdict::Refused,
        socket::Verdict::Drop | socket::Verdict::Fail => Verdict::Denied,
        socket::Verdict::Pass => Verdict::NotOurs,
    }
}

fn in_packets(
    maps: &Simulator,
    question: &Question,
    source: Option<Addr>,
    role: Role,
    device: IfIndex,
    index: u32,
) -> Verdict {
    let somebody = SOMEBODY[usize::from(question.addr.family() == Family::V6)];
    // Each connection has a source port of its own, so that none is taken for another.
    let port = u16::try_from(1024 + index).unwrap_or(u16::MAX);
    let mut frame = Frame::new(question.packet(source.unwrap_or(somebody), port), device);
    match maps.packet(&mut frame, role, false) {
        edge::Verdict::Translated | edge::Verdict::Elsewhere => Verdict::Served,
        edge::Verdict::Reply => Verdict::Refused,
        edge::Verdict::Drop => Verdict::Dropped,
        edge::Verdict::Pass => Verdict::NotOurs,
    }
}

const OPTED_OUT: &str = "the pod has opted out of the socket edge: its packets are judged";

/// Returns the meaning of a counter.
const fn reason(counter: Counter) -> &'static str {
    match counter {
        Counter::RejectNoEndpoint => "no endpoint anywhere can be used",
        Counter::RejectUnusedPort => "the clusterIP is in use, but not with this port and protocol",
        Counter::DropNoLocalEndpoint => {
            "the traffic policy is Local, and no endpoint on this node can be used"
        }
        Counter::DropInactiveAddress => "the address is in a ServiceCIDR, and no Service has it",
        Counter::DropSourceRange => "loadBalancerSourceRanges do not admit it",
        Counter::DropOwnSource => "packets of this host's address do not come from elsewhere",
        Counter::LeftToPackets => {
            "a socket cannot be told silence, and has no address yet: its packets are judged"
        }
        Counter::DropForeignSource => "the kernel's routes lead to its source by another interface",
        Counter::DropRetry => "the maps were being changed; ask again",
        Counter::Connected | Counter::Datagram | Counter::Flow => "",
        Counter::FailRecord
        | Counter::AffinityHit
        | Counter::AffinityStale
        | Counter::UdpRepick
        | Counter::IcmpError
        | Counter::FlowsFull
        | Counter::DropFlowTable
        | Counter::DropNoFlow
        | Counter::DropNoSource
        | Counter::RejectNoPort
        | Counter::DropFragment
        | Counter::DropMalformed
        | Counter::DropUnwritable
        | Counter::DropRedirect => "see docs/troubleshooting.md",
    }
}

/// Returns the addresses by which session affinity knows a client: at its socket, and in packets.
pub(crate) fn identities(maps: &Simulator, question: &Question) -> Vec<Addr> {
    let host = AffinityKey::netns_client(maps.host_netns.get());
    [host].into_iter().chain(question.from).collect()
}
