//! Sockets of a pod and of the host, which connect to clusterIPs.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Place, Proto};

use super::checks::{Answer, WAYS, held, is_served, served};
use super::objects::{HERE, THERE, cluster_ip};
use super::row::{Outcome, Row, right};
use super::world::{ANSWER, BOTH, ELSEWHERE, N1, ON_THIS_NODE, P, STICKY, U, World};

pub(super) const ROWS: &[Row] = &[
    Row { id: "k010_tcp_v4", check: |world| plain(world, Proto::Tcp, false) },
    Row { id: "k011_tcp_v6", check: |world| plain(world, Proto::Tcp, true) },
    Row { id: "k012_udp_connected_v4", check: |world| plain(world, Proto::Udp, false) },
    Row { id: "k013_udp_connected_v6", check: |world| plain(world, Proto::Udp, true) },
    Row { id: "k014_udp_unconnected_v4", check: |world| plain(world, Proto::UdpUnconnected, false) },
    Row { id: "k015_udp_unconnected_v6", check: |world| plain(world, Proto::UdpUnconnected, true) },
    Row { id: "k016_v4_by_v6_sockets", check: mapped },
    Row { id: "k017_getpeername", check: getpeername },
    Row { id: "k018_several_ports", check: several_ports },
    Row { id: "k019_spread", check: spread },
    Row { id: "k020_affinity", check: affinity },
    Row { id: "k021_packets_of_a_pod", check: packets_of_a_pod },
];

/// Returns a pod and the host, each with its own addresses.
fn clients(world: &World) -> [(Place, [&'static str; 2]); 2] {
    [(world.pod("P"), P), (world.host().clone(), N1)]
}

/// Checks connections from a pod and from the host to a pod of this node and to one of another: each endpoint sees the
/// client itself.
fn plain(world: &World, way: Proto, v6: bool) -> Result<Outcome> {
    for (place, own) in &clients(world) {
        for (service, backend) in [(ON_THIS_NODE, HERE), (ELSEWHERE, THERE)] {
            served(place, way, &cluster_ip(service.number, v6, 80), Answer::from(backend, own))?;
        }
    }
    right("pod and host, to a pod here and elsewhere")
}

/// Checks `AF_INET6` sockets with v4-mapped addresses.
fn mapped(world: &World) -> Result<Outcome> {
    let target = cluster_ip(ON_THIS_NODE.number, false, 80);
    let place = world.pod("P");
    for way in WAYS {
        let mut attempt = place.connect(&target).proto(way).v6_socket().timeout(ANSWER).one()?;
        for address in [&mut attempt.peername, &mut attempt.from].into_iter().flatten() {
            ensure!(address.is_ipv6(), "an IPv6 socket sees {address}");
            address.set_ip(address.ip().to_canonical());
        }
        is_served(&target, &attempt, way, Answer::from(HERE, &P)).with_context(|| format!("{way:?}"))?;
    }
    right("TCP and UDP")
}

/// Checks that getpeername() returns the same address again after the first bytes.
fn getpeername(world: &World) -> Result<Outcome> {
    for v6 in [false, true] {
        let target = cluster_ip(ELSEWHERE.number, v6, 80);
        for (place, _) in &clients(world) {
            for way in [Proto::Tcp, Proto::Udp] {
                let mut held = held(place, way, &target)?;
                let said = held.say("hello")?;
                ensure!(said.ok && said.text.as_deref() == Some("hello"), "{said:?}");
                let told = said.peername.context("getpeername fails")?.to_string();
                ensure!(told == target, "{} is told {told}, not {target}", place.name());
            }
        }
    }
    right("the Service's address, by TCP and UDP")
}

fn several_ports(world: &World) -> Result<Outcome> {
    let place = world.pod("P");
    for v6 in [false, true] {
        for (port, target) in [(80, 8080), (81, 8081)] {
            let answer = Answer { port: target, ..Answer::from(HERE, &P) };
            served(&place, Proto::Tcp, &cluster_ip(ON_THIS_NODE.number, v6, port), answer)?;
        }
    }
    right("80 and 81 lead to 8080 and 8081")
}

/// Returns the number of connections that reached each pod of [`BOTH`].
fn met(place: &Place, way: Proto, target: &str, times: usize) -> Result<BTreeMap<String, usize>> {
    let attempts = place.connect(target).proto(way).timeout(ANSWER).times(times).run()?;
    let mut met = BTreeMap::new();
    for attempt in &attempts {
        let server = attempt.server.clone().with_context(|| format!("not answered: {attempt:?}"))?;
        *met.entry(server).or_default() += 1;
    }
    Ok(met)
}

/// Checks that connections are spread. By chance, one of two pods gets less than a tenth of 60 connections once in 100
/// million times.
fn spread(world: &World) -> Result<Outcome> {
    let mut all = Vec::new();
    for (way, v6) in [(Proto::Tcp, false), (Proto::UdpUnconnected, true)] {
        let met = met(&world.pod("P"), way, &cluster_ip(BOTH.number, v6, 80), 60)?;
        ensure!(met.len() == 2 && met.values().all(|&count| count >= 6), "{way:?}: {met:?}");
        all.push(format!("{met:?}"));
    }
    right(all.join(", "))
}

/// Checks that a client gets one of two pods by chance, and then the same one each time. Another client may get the
/// other.
fn affinity(world: &World) -> Result<Outcome> {
    let mut all = Vec::new();
    for (place, _) in &clients(world) {
        for v6 in [false, true] {
            let met = met(place, Proto::Tcp, &cluster_ip(STICKY.number, v6, 80), 20)?;
            ensure!(met.len() == 1, "{} does not stay: {met:?}", place.name());
            all.extend(met.into_keys());
        }
    }
    right(format!("20 connections each stay with {}", all.join(", ")))
}

/// Checks a pod in no cgroup of the node: its packets are served at its interface.
fn packets_of_a_pod(world: &World) -> Result<Outcome> {
    let place = world.pod("U");
    for v6 in [false, true] {
        for (service, backend) in [(ON_THIS_NODE, HERE), (ELSEWHERE, THERE)] {
            let vip = cluster_ip(service.number, v6, 80);
            for way in [Proto::Tcp, Proto::Udp] {
                let attempt = served(&place, way, &vip, Answer::from(backend, &U))?;
                let client = attempt.peer.context("no client")?.to_string();
                ensure!(world.has_flow(&client, &vip)?, "no flow of {client} to {vip}");
            }
        }
    }
    right("TCP and UDP of either family, to a pod here and elsewhere")
}
