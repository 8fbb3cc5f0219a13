//! Packets of an attacker: any packet between any ends, most of them the ends of others. The attacker knows
//! everything about the ends but the sequence numbers of their TCP connections.

use std::net::SocketAddr;

use fastrand::Rng;
use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{Body, Net, Packet, Trouble};

use super::node::{At, Setup, Who, backends, evil};
use super::stage::{Forged, Line, Stage};
use crate::hostile::world::socket_addr;

/// Sequence numbers far from those of all honest ends, which begin with 4 and 6.
const NUMBERS: [u32; 5] = [0, 1, 0x9000_0000, 0xb000_0001, 0xffff_ffff];
const FLAGS: [u8; 12] =
    [SYN, SYN, SYN, SYN, ACK, PSH | ACK, FIN | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | ACK];

/// Returns every VIP of a family.
pub(super) fn vips(net: Net) -> [SocketAddr; 8] {
    [
        net.here(),
        net.there(),
        net.twin(),
        net.ranged(),
        net.spread(),
        net.node_port(),
        net.policy(),
        evil(net),
    ]
}

fn one<T: Copy>(random: &mut Rng, of: &[T]) -> T {
    of[random.usize(..of.len())]
}

/// Addresses and ports that are in use.
struct Ends {
    clients: Vec<SocketAddr>,
    targets: Vec<SocketAddr>,
    pods: Vec<SocketAddr>,
    /// Our own sources, as backends on other nodes see them, and the sources of flows that have met another flow.
    sources: Vec<SocketAddr>,
    others: Vec<SocketAddr>,
}

impl Ends {
    fn of(stage: &Stage, net: Net, random: &mut Rng) -> Self {
        let mut sources = Vec::new();
        for tier in [Tier::Assured, Tier::New] {
            for (key, flow) in stage.node.sim.edge.records(tier) {
                sources.push(socket_addr(key.source, key.source_port));
                if flow.snat_port.get() != 0 {
                    sources.push(socket_addr(flow.snat, flow.snat_port));
                }
            }
        }
        let ports = [random.u16(SNAT_PORTS), 22, 80, 8080, 40_000, 40_001, 30_080, random.u16(1..)];
        let ips = [net.node(), net.overlay(), net.inactive().ip(), net.beside().ip(), net.nobody().ip()];
        let ips: Vec<_> = Who::ALL.into_iter().map(|who| who.ip(net)).chain(ips).collect();
        let others = (0..6).map(|_| SocketAddr::new(one(random, &ips), one(random, &ports))).collect();
        Self {
            clients: stage.honest().map(|line| stage.local(line)).collect(),
            targets: stage.honest().map(|line| line.target).cycle().take(8).chain(vips(net)).collect(),
            pods: stage.honest().flat_map(|line| backends(net, line.target)).collect(),
            sources,
            others,
        }
    }

    /// Returns one of them, weighted by the shares of the kinds in per cent.
    fn one(&self, random: &mut Rng, [clients, targets, pods, sources]: [u8; 4]) -> SocketAddr {
        let mut number = random.u8(..100);
        for (share, ends) in
            [(clients, &self.clients), (targets, &self.targets), (pods, &self.pods), (sources, &self.sources)]
        {
            if number < share && !ends.is_empty() {
                return one(random, ends);
            }
            number = number.saturating_sub(share);
        }
        one(random, &self.others)
    }
}

fn random_from(random: &mut Rng) -> At {
    match random.u8(..10) {
        0..=5 => Who::Attacker.at(),
        6..=7 => At::Outside,
        _ => At::Beside,
    }
}

fn segment(random: &mut Rng, source: SocketAddr, destination: SocketAddr) -> Packet {
    let flags = one(random, &FLAGS);
    let data = if flags & PSH == 0 { Vec::new() } else { b"forged".to_vec() };
    let (seq, ack) = (one(random, &NUMBERS), one(random, &NUMBERS));
    Packet::new(source, destination, Body::Tcp { flags, seq, ack, data })
}

/// Returns one forged packet.
pub(super) fn forge(stage: &Stage, net: Net, random: &mut Rng) -> Forged {
    let ends = Ends::of(stage, net, random);
    let from = random_from(random);
    let (source, destination) = match random.u8(..3) {
        // From a server's end, or from a client's end.
        0 => (ends.one(random, [0, 40, 40, 5]), ends.one(random, [60, 0, 0, 30])),
        _ => (ends.one(random, [60, 5, 10, 15]), ends.one(random, [5, 55, 20, 10])),
    };
    let plain = if random.bool() {
        Packet::udp(source, destination, b"forged")
    } else {
        segment(random, source, destination)
    };
    if random.u8(..8) > 0 {
        return Forged { from, packet: plain };
    }
    let trouble = [Trouble::PortUnreachable, Trouble::TooBig, Trouble::TimeExceeded, Trouble::Redirect];
    let teller = if random.bool() { destination } else { ends.one(random, [10, 20, 20, 20]) };
    let quote = one(random, &[28, 48, 548]).max(if net.v6 { 48 } else { 28 });
    Forged { from, packet: Packet::error(teller.ip(), one(random, &trouble), &plain.bytes(), quote) }
}

/// Returns some segments between the ends of one connection, in both directions. Several segments together may do
/// harm that one alone does not.
pub(super) fn salvo(stage: &Stage, net: Net, random: &mut Rng) -> Vec<Forged> {
    let lines: Vec<_> = stage.honest().filter(|line| !line.udp).collect();
    if lines.is_empty() {
        return Vec::new();
    }
    let line = one(random, &lines);
    let (client, target) = (stage.local(line), line.target);
    let records = [Tier::Assured, Tier::New].into_iter().flat_map(|tier| stage.node.sim.edge.records(tier));
    let own = records
        .filter(|(key, flow)| {
            socket_addr(key.source, flow.client_port) == client
                && socket_addr(flow.vip, flow.vip_port) == target
        })
        .map(|(_, flow)| socket_addr(flow.snat, flow.snat_port))
        .find(|own| own.port() != 0)
        .unwrap_or(client);
    let pod = one(random, &backends(net, target));
    let pairs = [(client, target), (client, target), (pod, client), (pod, own), (client, pod), (own, pod)];
    (0..random.usize(2..6))
        .map(|_| {
            let (source, destination) = one(random, &pairs);
            Forged { from: random_from(random), packet: segment(random, source, destination) }
        })
        .collect()
}

/// Returns whether two conversations would have the same tuple between the edges: a client's own port towards the
/// same pod, once by a VIP and once by the pod's own address.
pub(super) fn meet(net: Net, one: &Line, other: &Line) -> bool {
    let same = (one.who, one.port, one.udp) == (other.who, other.port, other.udp);
    let pods = backends(net, other.target);
    same && (one.target == other.target
        || (is_direct(net, one) || is_direct(net, other))
            && backends(net, one.target).iter().any(|pod| pods.contains(pod)))
}

fn is_direct(net: Net, line: &Line) -> bool {
    backends(net, line.target) == [line.target]
}

/// Returns why this packet is of a kind that docs/security.md says is not withstood.
pub(super) fn conceded(stage: &Stage, setup: Setup, forged: &Forged) -> Option<&'static str> {
    let net = setup.net;
    let Forged { from, packet } = forged;
    let (source, destination) = (packet.source, packet.destination);
    let tcp = if let Body::Tcp { flags, .. } = packet.body { Some(flags) } else { None };
    let is_udp = matches!(packet.body, Body::Udp { .. });
    for line in stage.honest() {
        if line.udp != is_udp || !line.udp && tcp.is_none() {
            continue;
        }
        let pods = backends(net, line.target);
        // "Clients outside are one origin": the first packet of a flow in the name of such a client, to another
        // address of the same pod that the client's own connection leads to.
        if from.is_past()
            && line.who.at().is_past()
            && source == stage.local(line)
            && destination != line.target
            && tcp.is_none_or(|flags| flags & (SYN | ACK | RST) == SYN)
            && backends(net, destination).iter().any(|pod| pods.contains(pod))
        {
            return Some("a flow of another client outside");
        }
        // "Who forges the backend's name": a reset shortens the life of an idle flow.
        if !setup.swift
            && tcp.is_some_and(|flags| flags & RST != 0)
            && pods.contains(&source)
            && [stage.local(line).ip(), net.node(), net.overlay()].contains(&destination.ip())
        {
            return Some("a reset in the name of the backend");
        }
    }
    None
}

/// Returns why this packet is of a kind that should be withstood and is not yet. Each kind is removed from here when
/// it is.
pub(super) fn unmended(
    stage: &Stage,
    setup: Setup,
    before: &[&Forged],
    forged: &Forged,
) -> Option<&'static str> {
    let net = setup.net;
    let Forged { from, packet } = forged;
    let source = packet.source;
    // A flow in the name of a pod of this node that has begun outside captures the pod's own packets to the same
    // backend.
    if *from != Who::Attacker.at()
        && Who::of(net, source.ip()).is_some_and(|who| matches!(who.at(), At::Pod(_)))
    {
        return Some("in the name of a pod of this node, from outside");
    }
    let lines: Vec<_> = stage.honest().filter(|line| !line.udp).collect();
    let of_client = lines.iter().any(|line| source == stage.local(line));
    let of_backend = |source| lines.iter().any(|line| backends(net, line.target).contains(&source));
    // Resets and FINs of a backend count with any sequence number: a SYN from anybody then ends the flow at once.
    if has(packet, RST | FIN) && of_backend(source) {
        return Some("the end in a backend's name, with any number");
    }
    // A forged acknowledgement in the name of a backend fixes which data, FIN or reset of the client may follow.
    let moved = before.iter().any(|forged| has(&forged.packet, ACK) && of_backend(forged.packet.source));
    (has(packet, PSH | FIN | RST) && of_client && moved).then_some("what follows a forged acknowledgement")
}

fn has(packet: &Packet, bits: u8) -> bool {
    matches!(packet.body, Body::Tcp { flags, .. } if flags & bits != 0)
}
