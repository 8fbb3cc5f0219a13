//! Requests and replies: each form of a packet on its way, byte for byte.

use std::net::SocketAddr;

use proxy_common::abi::{Counter, ServiceId};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, PSH, SYN};
use proxy_tests::packets::{BARE, Body, NIC, Net, OVERLAY, POD, Packet, read};

use super::{answer, counts, establish, open, seen, translated, world};

/// Returns first packets of each kind from the client to an address.
fn requests(client: SocketAddr, vip: SocketAddr) -> Vec<Packet> {
    let mut packets = vec![
        Packet::tcp(client, vip, SYN, 1000, 0),
        Packet::udp(client, vip, b"a question"),
        Packet::udp(client, vip, b"odd length?"),
        Packet::udp(client, vip, b""),
        Packet::new(client, vip, Body::Sctp(b"a chunk of some data".to_vec())),
        Packet::new(client, vip, Body::Sctp(vec![7; 1400])),
    ];
    if client.is_ipv4() {
        packets.push(Packet::new(client, vip, Body::Udp { data: b"no checksum".to_vec(), checksum: false }));
    }
    let extended: Vec<_> = packets.iter().map(|packet| packet.clone().extended()).collect();
    packets.extend(extended);
    packets
}

/// Returns a reply to a first packet.
fn reply(request: &Packet) -> Packet {
    let body = match &request.body {
        Body::Tcp { .. } => Body::Tcp { flags: SYN | ACK, seq: 5000, ack: 1001, data: Vec::new() },
        Body::Udp { checksum, .. } => Body::Udp { data: b"an answer".to_vec(), checksum: *checksum },
        Body::Sctp(_) | Body::Ping | Body::Error(..) | Body::Other(..) => request.body.clone(),
    };
    Packet { body, ..request.between(request.destination, request.source) }
}

#[test]
fn a_pod_of_this_node_sees_the_client() {
    for net in Net::ALL {
        let (client, vip, pod) = (net.client(), net.here(), net.local());
        for request in requests(client, vip) {
            let world = world();
            let bytes = translated(world.enter(NIC, request.bytes()));
            assert_eq!(bytes, request.between(client, pod).bytes());
            let (verdict, after) = world.leave(POD, bytes.clone());
            assert_eq!((verdict, after), (Verdict::Pass, bytes), "on to the pod");

            let reply = reply(&request.between(client, pod));
            let (verdict, after) = world.enter(POD, reply.bytes());
            assert_eq!((verdict, &after), (Verdict::Pass, &reply.bytes()), "from the pod");
            let bytes = translated(world.leave(NIC, after));
            assert_eq!(bytes, reply.between(vip, client).bytes());
        }
    }
}

#[test]
fn a_pod_of_another_node_sees_this_one() {
    for net in Net::ALL {
        let (client, vip, pod) = (net.client(), net.there(), net.remote(1));
        for request in requests(client, vip) {
            let world = world();
            let routed = translated(world.enter(NIC, request.bytes()));
            assert_eq!(routed, request.between(client, pod).bytes());
            let sent = translated(world.leave(OVERLAY, routed));
            let own = read(&sent).unwrap().source;
            assert_eq!(own.ip(), net.overlay());
            assert_eq!(sent, request.between(own, pod).bytes());

            let reply = reply(&request.between(own, pod));
            let routed = translated(world.enter(OVERLAY, reply.bytes()));
            assert_eq!(routed, reply.between(pod, client).bytes());
            let sent = translated(world.leave(NIC, routed));
            assert_eq!(sent, reply.between(vip, client).bytes());
            assert_eq!(counts(&world), [(Counter::Flow, 1)]);
        }
    }
}

#[test]
fn later_packets_take_the_same_way() {
    for net in Net::ALL {
        let (world, vip, pod) = (world(), net.there(), net.remote(1));
        let own = establish(&world, net, vip);
        for (seq, data) in [(1001, b"one".to_vec()), (1004, vec![7; 1400]), (2404, Vec::new())] {
            let body = Body::Tcp { flags: PSH | ACK, seq, ack: 5001, data };
            let request = Packet::new(net.client(), vip, body);
            let (sent, source) = open(&world, &request);
            assert_eq!((sent, source), (request.between(own, pod).bytes(), own));
            let reply = Packet::tcp(pod, own, PSH | ACK, 5001, seq);
            assert_eq!(answer(&world, &reply), reply.between(vip, net.client()).bytes());
        }
    }
}

/// A reply may come back through another device than the request left by.
#[test]
fn answers_are_known_by_their_tuple() {
    for net in Net::ALL {
        let (world, vip, pod) = (world(), net.there(), net.remote(1));
        let (_, own) = open(&world, &Packet::udp(net.client(), vip, b"?"));
        let reply = Packet::udp(pod, own, b"!");
        let routed = translated(world.enter(NIC, reply.bytes()));
        assert_eq!(routed, reply.between(pod, net.client()).bytes());
        for other in [net.remote(2), SocketAddr::new(pod.ip(), 81)] {
            let stray = Packet::udp(other, own, b"!").bytes();
            assert_eq!(world.enter(OVERLAY, stray.clone()), (Verdict::Pass, stray), "another sender");
        }
        let stray = Packet::udp(pod, SocketAddr::new(own.ip(), own.port() ^ 1), b"!").bytes();
        assert_eq!(world.enter(OVERLAY, stray.clone()), (Verdict::Pass, stray), "another port");
    }
}

/// A pod's own packets to other nodes keep their source: the network carries it.
#[test]
fn a_pod_keeps_its_address_on_the_way_to_another_node() {
    for net in Net::ALL {
        let (world, vip, pod) = (world(), net.there(), net.remote(1));
        let client = SocketAddr::new(net.local().ip(), 41_000);
        let request = Packet::tcp(client, vip, SYN, 1, 0);
        let routed = translated(world.enter(POD, request.bytes()));
        assert_eq!(routed, request.between(client, pod).bytes());
        let left = world.leave(OVERLAY, routed.clone());
        assert_eq!(left, (Verdict::Pass, routed));
        let reply = Packet::tcp(pod, client, SYN | ACK, 5, 2);
        let entered = world.enter(OVERLAY, reply.bytes());
        assert_eq!(entered, (Verdict::Pass, reply.bytes()));
        assert_eq!(translated(world.leave(POD, reply.bytes())), reply.between(vip, client).bytes());
    }
}

#[test]
fn a_pod_reaches_itself() {
    for net in Net::ALL {
        let (vip, pod) = (net.here(), net.local());
        let client = SocketAddr::new(pod.ip(), 41_000);
        for request in requests(client, vip) {
            let world = world();
            let routed = translated(world.enter(POD, request.bytes()));
            assert_eq!(routed, request.between(client, pod).bytes());
            let sent = translated(world.leave(POD, routed));
            let own = seen(&sent).source;
            assert_eq!(own.ip(), net.node());
            assert_eq!(sent, request.between(own, pod).bytes());

            let reply = reply(&request.between(own, pod));
            let routed = translated(world.enter(POD, reply.bytes()));
            assert_eq!(routed, reply.between(pod, client).bytes());
            let back = translated(world.leave(POD, routed));
            assert_eq!(back, reply.between(vip, client).bytes());
        }
    }
}

#[test]
fn a_node_port_is_served_on_the_nodes_address() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.node_port(), net.remote(1));
        let request = Packet::tcp(client, vip, SYN, 1000, 0);
        let (sent, own) = open(&world, &request);
        assert_eq!(sent, request.between(own, pod).bytes());
        let reply = Packet::tcp(pod, own, SYN | ACK, 1, 1001);
        assert_eq!(answer(&world, &reply), reply.between(vip, client).bytes());
        // The overlay's address serves no nodePort.
        let other = SocketAddr::new(net.overlay(), vip.port());
        let request = Packet::tcp(client, other, SYN, 1000, 0).bytes();
        assert_eq!(world.enter(NIC, request.clone()), (Verdict::Pass, request));
    }
}

#[test]
fn what_was_wrong_on_arrival_stays_wrong() {
    for net in Net::ALL {
        let (client, vip) = (net.client(), net.there());
        let datagram = Packet::udp(client, vip, b"will be damaged");
        for request in [Packet::tcp(client, vip, SYN, 1000, 0), datagram] {
            let world = world();
            let mut bytes = request.bytes();
            let last = bytes.len() - 1;
            bytes[last - 2] ^= 0x40;
            let (verdict, routed) = world.enter(NIC, bytes);
            assert_eq!(verdict, Verdict::Translated);
            assert!(read(&routed).is_err(), "repaired on ingress");
            let (verdict, sent) = world.leave(OVERLAY, routed);
            assert_eq!(verdict, Verdict::Translated);
            assert!(read(&sent).is_err(), "repaired on egress");
        }
    }
}

#[test]
fn without_an_address_of_our_own_nothing_leaves_for_other_nodes() {
    for net in Net::ALL {
        let world = world();
        let routed = translated(world.enter(NIC, Packet::udp(net.client(), net.there(), b"?").bytes()));
        assert_eq!(world.leave(BARE, routed).0, Verdict::Drop);
        assert_eq!(counts(&world), [(Counter::Flow, 1), (Counter::DropNoSource, 1)]);
    }
}

#[test]
fn packets_and_bytes_are_counted_for_the_service() {
    for net in Net::ALL {
        let (world, vip, pod) = (world(), net.there(), net.remote(1));
        let header = if net.v6 { 40 } else { 20 };
        let (_, own) = open(&world, &Packet::udp(net.client(), vip, b"four"));
        open(&world, &Packet::udp(net.client(), vip, b"and six"));
        answer(&world, &Packet::udp(pod, own, b"three"));
        let counted = world.sim.edge.service_counters(ServiceId(net.there_id()));
        assert_eq!(counted.connections, 1);
        assert_eq!((counted.request_packets, counted.request_bytes), (2, 2 * (header + 8) + 11));
        assert_eq!((counted.reply_packets, counted.reply_bytes), (1, header + 8 + 5));
    }
}
