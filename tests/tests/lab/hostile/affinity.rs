//! Session affinity under a flood of forged clients: the flood evicts only clients that have shown no more than the
//! forged ones.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use proxy_common::datapath::edge::parsed::tcp::SYN;
use proxy_tests::lab::{Place, Proto};
use proxy_tests::packets::Packet;
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::world::{HERE, Service, THERE, World, served};

/// Number of forged clients, more than either map of clients holds.
const FORGED: u32 = 100_000;
/// Number of times that each of them comes: a client that comes once is the first to be evicted.
const TIMES: u16 = 3;

/// Services with a pod on each node and session affinity. If a client were forgotten, half of these Services would
/// give it the same pod by chance.
const STICKY: [&str; 8] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"];

fn sticky() -> impl Iterator<Item = Service> {
    STICKY.into_iter().zip(41..).map(|(name, number)| HERE.named(name, number))
}

fn objects(sticky: Service) -> Vec<Value> {
    let mut objects = sticky.objects();
    objects[0]["spec"]["sessionAffinity"] = json!("ClientIP");
    for (v6, slice) in [false, true].into_iter().zip(&mut objects[1..]) {
        let endpoints = [(HERE, "n1"), (THERE, "n2")].map(|(service, node)| {
            let address = service.address(v6);
            json!({ "addresses": [address], "nodeName": node, "conditions": { "ready": true } })
        });
        slice["endpoints"] = json!(endpoints);
    }
    objects
}

/// Returns a client address that nobody has, of the family of a target.
fn nobody(number: u32, port: u16, target: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + number).into(),
        SocketAddr::V6(_) => Ipv6Addr::from((0x2001_0db8_00bd_u128 << 80) + u128::from(number)).into(),
    };
    SocketAddr::new(ip, port)
}

/// Returns the servers that answer so many connections.
fn servers(place: &Place, proto: Proto, target: SocketAddr) -> Result<BTreeSet<String>> {
    let attempts = place.connect(target).proto(proto).times(3).run()?;
    attempts
        .into_iter()
        .map(|attempt| attempt.server.clone().with_context(|| format!("{attempt:?}")))
        .collect()
}

/// Returns the servers that answer a client's connections and its datagrams, at one Service after the other. One
/// socket sends two datagrams.
fn asked(client: &Place, v6: bool) -> Result<Vec<(Proto, BTreeSet<String>)>> {
    let mut all = Vec::new();
    for service in sticky() {
        let target = service.node_port(v6)?;
        all.push((Proto::Tcp, servers(client, Proto::Tcp, target)?));
        let mut talk = client.hold(target).proto(Proto::Udp).open()?;
        let first = talk.say("who is there?")?;
        ensure!(talk.say("still?")?.ok);
        all.push((Proto::Udp, BTreeSet::from([first.server.clone().with_context(|| format!("{first:?}"))?])));
    }
    Ok(all)
}

/// The client has proved itself by a connection, and by a datagram sent after an answer.
#[test]
fn h024_a_flood_of_clients_has_nobody_forgotten() -> Result<()> {
    let world = World::start()?;
    world.write("sticky", &sticky().flat_map(objects).collect::<Vec<_>>())?;
    let client = world.client();
    for service in sticky() {
        let target = service.node_port(true)?;
        until("the Services", || Ok(served(&client, Proto::Tcp, target).ok()))?;
    }
    for v6 in [false, true] {
        let before = asked(&client, v6)?;
        ensure!(before.iter().all(|(_, servers)| servers.len() == 1), "{before:?}");
        let target = HERE.named(STICKY[0], 41).node_port(v6)?;
        let all =
            (0..FORGED).flat_map(|number| (0..TIMES).map(move |time| nobody(number, 40_000 + time, target)));
        world.forger().send_raw(all.map(|from| Packet::tcp(from, target, SYN, 1, 0)))?;
        let after = asked(&client, v6)?;
        ensure!(after == before, "{before:?} before, {after:?} after");
    }
    Ok(())
}
