//! The device by which replies leave a node that has several: that of the client's last request, wherever the route
//! of the backend's packets leads.

use proxy_common::abi::{Counter, FlowKind, IfIndex};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{BARE, Body, NIC, Net, OVERLAY, POD, Packet, Seen, Trouble, World};

use super::{counts, passes, seen, translated, world};

/// Returns a node with two ways to every client.
fn two_ways() -> World {
    let world = world();
    world.ways.replace(vec![NIC, BARE]);
    world
}

/// Sends a reply that routing has chosen `device` for. Returns the device by which it leaves, and its form there.
#[track_caller]
fn leaves(world: &World, entered_by: IfIndex, device: IfIndex, packet: &Packet) -> (IfIndex, Seen) {
    let (verdict, bytes) = world.leave_from(entered_by, device, packet.bytes());
    match verdict {
        Verdict::Translated => (device, seen(&bytes)),
        Verdict::Elsewhere => (world.left_by.get(), seen(&bytes)),
        Verdict::Pass | Verdict::Drop | Verdict::Reply => panic!("{verdict:?}"),
    }
}

#[test]
fn answers_leave_by_the_device_of_the_last_request() {
    for net in Net::ALL {
        let (client, pod, vip) = (net.client(), net.local(), net.here());
        for (request, reply) in [
            (Packet::tcp(client, vip, SYN, 1000, 0), Packet::tcp(pod, client, SYN | ACK, 5000, 1001)),
            (Packet::udp(client, vip, b"?"), Packet::udp(pod, client, b"!")),
        ] {
            let world = two_ways();
            for asked_by in [NIC, BARE, BARE, NIC] {
                // A SYN that is repeated within moments may be forged, but the way that it came by counts.
                translated(world.enter(asked_by, request.bytes()));
                for routed in [NIC, BARE] {
                    let (device, answer) = leaves(&world, POD, routed, &reply);
                    assert_eq!((device, answer.source, answer.destination), (asked_by, vip, client));
                }
            }
        }
    }
}

#[test]
fn answers_from_other_nodes_do_so_too() {
    for net in Net::ALL {
        let (client, vip, backend) = (net.client(), net.there(), net.remote(1));
        let world = two_ways();
        let request = Packet::udp(client, vip, b"?");
        let routed = translated(world.enter(NIC, request.bytes()));
        let own = seen(&translated(world.leave(OVERLAY, routed))).source;
        let back = translated(world.enter(OVERLAY, Packet::udp(backend, own, b"!").bytes()));
        let (verdict, bytes) = world.leave_from(OVERLAY, BARE, back);
        assert_eq!((verdict, world.left_by.get(), seen(&bytes).source), (Verdict::Elsewhere, NIC, vip));
    }
}

/// If the device is down, or leads elsewhere, the kernel's route counts, as for any other packet.
#[test]
fn answers_whose_way_is_gone_leave_as_they_are_routed() {
    for net in Net::ALL {
        let (client, pod, vip) = (net.client(), net.local(), net.here());
        let world = two_ways();
        translated(world.enter(NIC, Packet::udp(client, vip, b"?").bytes()));
        let reply = Packet::udp(pod, client, b"!");
        world.ways.replace(vec![BARE]);
        assert_eq!(leaves(&world, POD, BARE, &reply).0, BARE);
        world.ways.replace(vec![NIC, BARE]);
        assert_eq!(leaves(&world, POD, BARE, &reply).0, NIC);
    }
}

/// A sender that does not know the sequence numbers of a connection cannot lead its replies to another device.
#[test]
fn what_does_not_fit_a_connection_leads_nothing_away() {
    for net in Net::ALL {
        let (client, pod, vip) = (net.client(), net.local(), net.here());
        let world = two_ways();
        translated(world.enter(NIC, Packet::tcp(client, vip, SYN, 1000, 0).bytes()));
        leaves(&world, POD, BARE, &Packet::tcp(pod, client, SYN | ACK, 5000, 1001));
        translated(world.enter(NIC, Packet::tcp(client, vip, ACK, 1001, 5001).bytes()));
        let reply = Packet::tcp(pod, client, PSH | ACK, 5001, 1001);
        for (asked_by, flags, seq, device) in [
            (BARE, PSH | ACK, 0x8000_0000, NIC),
            (BARE, RST, 1001, NIC),
            (BARE, PSH | ACK, 1001, BARE),
            (NIC, ACK, 0x9000_0000, BARE),
            // A keepalive, and a retransmission whose acknowledgement has been lost.
            (NIC, ACK, 1000, NIC),
            (BARE, PSH | ACK, 900, BARE),
        ] {
            translated(world.enter(asked_by, Packet::tcp(client, vip, flags, seq, 5001).bytes()));
            assert_eq!(leaves(&world, POD, BARE, &reply).0, device, "{seq}");
        }
    }
}

#[test]
fn errors_about_requests_go_where_answers_go() {
    for net in Net::ALL {
        let (client, pod, vip) = (net.client(), net.local(), net.here());
        let world = two_ways();
        let request = translated(world.enter(NIC, Packet::udp(client, vip, b"?").bytes()));
        let error = Packet::error(pod.ip(), Trouble::PortUnreachable, &request, 548);
        let (device, seen) = leaves(&world, POD, BARE, &error);
        assert_eq!((device, seen.source.ip(), seen.destination.ip()), (NIC, vip.ip(), client.ip()));
        assert_eq!(counts(&world), [(Counter::Flow, 1), (Counter::IcmpError, 1)]);
    }
}

/// The programs of the other device see the reply once more. It must not count as a datagram of this host, whose
/// answer would then not be a request.
#[test]
fn answers_that_leave_elsewhere_are_nothing_of_the_host() {
    for net in Net::ALL {
        let (client, vip) = (net.client(), net.node_port());
        for body in [Body::Udp { data: b"?".to_vec(), checksum: true }, Body::Sctp(vec![0; 4])] {
            let packet = |from, to| Packet::new(from, to, body.clone()).bytes();
            let world = two_ways();
            let routed = translated(world.enter(NIC, packet(client, vip)));
            let own = seen(&translated(world.leave(OVERLAY, routed))).source;
            let back = translated(world.enter(OVERLAY, packet(net.remote(1), own)));
            let (verdict, bytes) = world.leave_from(OVERLAY, BARE, back);
            assert_eq!(verdict, Verdict::Elsewhere);
            for entered_by in [IfIndex::NONE, OVERLAY, POD] {
                passes(|bytes| world.leave_from(entered_by, NIC, bytes), &bytes);
            }
            let mut records = world.sim.edge.records(Tier::New).into_iter();
            assert_eq!(records.find(|(key, _)| key.kind == FlowKind::OwnDatagram as u8), None);
        }
    }
}
