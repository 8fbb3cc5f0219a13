//! The packet edge on the host: single packets through the pipeline, against ordered maps.
//!
//! Each packet that comes out is compared with one that was written for the purpose, byte for byte, or read with
//! every checksum verified. The functions in this file, which take packets through [`World`], are common to all of
//! these tests.

mod affinity;
mod corpus;
mod direct;
mod errors;
mod fragments;
mod malformed;
mod origins;
mod own_datagrams;
mod passing;
mod proofs;
mod records;
mod refusals;
mod segments;
mod selecting;
mod sources;
mod translating;
mod ways;

use std::net::SocketAddr;

use proxy_common::abi::Counter;
use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{Body, NIC, Net, OVERLAY, Packet, Seen, World, read};

fn world() -> World {
    World::new().unwrap()
}

/// Returns the packet after translation, and checks its checksums. Panics if the packet was not translated.
#[track_caller]
fn translated((verdict, bytes): (Verdict, Vec<u8>)) -> Vec<u8> {
    assert_eq!(verdict, Verdict::Translated, "{bytes:02x?}");
    if let Err(error) = read(&bytes) {
        panic!("{error}: {bytes:02x?}");
    }
    bytes
}

/// Returns the reply that was sent in place of a packet.
#[track_caller]
fn replied((verdict, bytes): (Verdict, Vec<u8>)) -> Seen {
    assert_eq!(verdict, Verdict::Reply, "{bytes:02x?}");
    read(&bytes).unwrap()
}

#[track_caller]
fn seen(bytes: &[u8]) -> Seen {
    read(bytes).unwrap()
}

/// Checks that a packet goes on unchanged.
#[track_caller]
fn passes(send: impl FnOnce(Vec<u8>) -> (Verdict, Vec<u8>), bytes: &[u8]) {
    let (verdict, after) = send(bytes.to_vec());
    assert_eq!((verdict, after.as_slice()), (Verdict::Pass, bytes));
}

/// Returns every counter that is not zero.
fn counts(world: &World) -> Vec<(Counter, u64)> {
    Counter::ALL
        .into_iter()
        .map(|counter| (counter, world.sim.counted(counter)))
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Sends a client's first packet to a backend on another node. Returns it as the backend sees it, and its source
/// there.
#[track_caller]
fn open(world: &World, request: &Packet) -> (Vec<u8>, SocketAddr) {
    let routed = translated(world.enter(NIC, request.bytes()));
    let sent = translated(world.leave(OVERLAY, routed));
    let source = seen(&sent).source;
    assert!(SNAT_PORTS.contains(&source.port()), "{source}");
    (sent, source)
}

/// Sends a reply from another node to the client. Returns it as the client sees it.
#[track_caller]
fn answer(world: &World, reply: &Packet) -> Vec<u8> {
    let routed = translated(world.enter(OVERLAY, reply.bytes()));
    translated(world.leave(NIC, routed))
}

/// Makes a TCP connection to `vip`, whose backend on another node has replied, and which its client has confirmed.
/// Returns the source that the backend sees.
#[track_caller]
fn establish(world: &World, net: Net, vip: SocketAddr) -> SocketAddr {
    let (client, backend) = (net.client(), net.remote(1));
    let (_, own) = open(world, &Packet::tcp(client, vip, SYN, 1000, 0));
    answer(world, &Packet::tcp(backend, own, SYN | ACK, 5000, 1001));
    open(world, &Packet::tcp(client, vip, ACK, 1001, 5001));
    own
}

/// Returns the only record, and its place.
#[track_caller]
fn record(world: &World) -> (Tier, FlowKey, Flow) {
    let all = records(world);
    assert_eq!(all.len(), 1, "{all:#?}");
    all[0]
}

fn records(world: &World) -> Vec<(Tier, FlowKey, Flow)> {
    let tiers = [Tier::Assured, Tier::New].into_iter();
    tiers
        .flat_map(|tier| world.sim.edge.records(tier).into_iter().map(move |(key, flow)| (tier, key, flow)))
        .collect()
}

fn reply(request: &Packet, from: SocketAddr, to: SocketAddr) -> Packet {
    if matches!(request.body, Body::Udp { .. }) {
        Packet::udp(from, to, b"!")
    } else {
        Packet::tcp(from, to, SYN | ACK, 5000, 1001)
    }
}
