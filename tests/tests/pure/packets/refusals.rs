//! Refusals: their form, their sender and receiver, and the packets that are dropped in silence.

use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::node::HOST_IN_PACKETS;
use proxy_common::abi::{Counter, FrontendKey, IfIndex, Service, SlotRange};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{Body, ETHERNET, NEAR, NIC, Net, OVERLAY, POD, Packet, Trouble, fragments};

use super::{counts, passes, replied, seen, world};

/// Returns an unused port of an address that a Service has.
fn unused(net: Net) -> SocketAddr {
    SocketAddr::new(net.here().ip(), 81)
}

#[test]
fn a_syn_to_nobody_is_reset() {
    for net in Net::ALL {
        for (vip, why) in
            [(net.nobody(), Counter::RejectNoEndpoint), (unused(net), Counter::RejectUnusedPort)]
        {
            for extended in [false, true] {
                let world = world();
                let syn = Packet { extended, hops: 1, ..Packet::tcp(net.client(), vip, SYN, u32::MAX, 0) };
                let told = replied(world.enter(NIC, syn.bytes()));
                assert_eq!(told.hops, 64);
                assert_eq!((told.source, told.destination), (vip, net.client()));
                // The SYN takes one sequence number, which wraps here.
                assert_eq!(told.tcp, Some((RST | ACK, 0, 0)));
                assert_eq!(counts(&world), [(why, 1)]);
            }
        }
    }
}

/// RFC 9293 §3.10.7.1: the reset carries the acknowledgement number as its own sequence number, or acknowledges all of
/// what came.
#[test]
fn a_reset_fits_the_segment() {
    for net in Net::ALL {
        for (flags, data, reset) in [
            (ACK, 0, (RST, 7000, 0)),
            (PSH | ACK, 33, (RST, 7000, 0)),
            (SYN | ACK, 0, (RST, 7000, 0)),
            (FIN | ACK, 5, (RST, 7000, 0)),
            (SYN, 100, (RST | ACK, 0, 1101)),
            (FIN, 3, (RST | ACK, 0, 1004)),
            (SYN | FIN, 0, (RST | ACK, 0, 1002)),
            (0, 9, (RST | ACK, 0, 1009)),
        ] {
            // Any segment is refused: no port of that address is used.
            let world = world();
            let body = Body::Tcp { flags, seq: 1000, ack: 7000, data: vec![1; data] };
            let segment = Packet::new(net.client(), unused(net), body);
            // A segment without a flow may belong to another host on the way in, but to nobody on the way out.
            let told = replied(world.leave(NIC, segment.bytes()));
            assert_eq!(told.tcp, Some(reset), "{flags:#x} with {data} bytes");
            assert_eq!((told.source, told.destination), (unused(net), net.client()));
        }
    }
}

#[test]
fn a_datagram_to_nobody_is_refused() {
    for net in Net::ALL {
        for vip in [net.nobody(), unused(net)] {
            for data in [&b""[..], b"x", b"nobody will read this", &[7; 1400]] {
                for extended in [false, true] {
                    let world = world();
                    let datagram = Packet { extended, ..Packet::udp(net.client(), vip, data) };
                    let bytes = datagram.bytes();
                    let told = replied(world.enter(NIC, bytes.clone()));
                    assert_eq!((told.source.ip(), told.destination.ip()), (vip.ip(), net.client().ip()));
                    assert_eq!(told.icmp, Some(Trouble::PortUnreachable.numbers(net.v6)));
                    assert_eq!(told.hops, 64);
                    // Enough for the sender to find its socket: all IP headers and the UDP header.
                    let headers =
                        if net.v6 { 40 } else { 20 } + if extended { if net.v6 { 24 } else { 8 } } else { 0 };
                    assert_eq!(told.payload, bytes[ETHERNET..][..headers + 8]);
                }
            }
        }
    }
}

#[test]
fn a_ping_of_a_cluster_ip_is_refused() {
    for net in Net::ALL {
        let world = world();
        let ping = Packet::new(net.client(), net.here(), Body::Ping).bytes();
        let told = replied(world.enter(NIC, ping.clone()));
        assert_eq!(told.source.ip(), net.here().ip());
        assert_eq!(told.icmp, Some(Trouble::PortUnreachable.numbers(net.v6)));
        assert_eq!(told.payload, ping[ETHERNET..][..told.payload.len()]);
        assert_eq!(counts(&world), [(Counter::RejectUnusedPort, 1)]);
        // The other addresses of Services have hosts of their own.
        for vip in [net.ranged(), SocketAddr::new(net.node(), 0), net.client()] {
            let ping = Packet::new(net.stranger(), vip, Body::Ping).bytes();
            passes(|bytes| world.enter(NIC, bytes), &ping);
        }
    }
}

#[test]
fn what_answers_nothing_is_told_nothing() {
    for net in Net::ALL {
        let (client, vip) = (net.client(), net.nobody());
        let world = world();
        let datagram = Packet::udp(client, vip, &[7; 2000]);
        let [first, later] = fragments(&datagram.bytes(), 1024, 7);
        assert_eq!(world.enter(NIC, first).0, Verdict::Reply);
        assert_eq!(world.enter(NIC, later).0, Verdict::Drop, "a later fragment");
        let [first, _] = fragments(&Packet::tcp(client, vip, SYN | PSH, 1, 0).bytes(), 24, 8);
        assert_eq!(world.enter(NIC, first).0, Verdict::Drop, "a part of a segment");
        let reset = Packet::tcp(client, unused(net), RST, 1, 1).bytes();
        assert_eq!(world.leave(NIC, reset).0, Verdict::Drop, "a reset");
        let other = Packet::udp(vip, net.stranger(), b"?").bytes();
        let error = Packet::error(net.router(), Trouble::PortUnreachable, &other, 200).bytes();
        let left = world.leave(NIC, error.clone());
        assert_ne!(left.0, Verdict::Reply, "an error: {left:?}");
        let entered = world.enter(NIC, error);
        assert_ne!(entered.0, Verdict::Reply, "an error: {entered:?}");
    }
}

#[test]
fn an_inactive_address_is_silent() {
    for net in Net::ALL {
        let (client, address) = (net.client(), net.inactive());
        for packet in [
            Packet::tcp(client, address, SYN, 1, 0),
            Packet::udp(client, address, b"?"),
            Packet::new(client, address, Body::Ping),
            Packet::new(client, address, Body::Other(47, vec![0; 20])),
        ] {
            for device in [NIC, OVERLAY, POD] {
                let world = world();
                assert_eq!(world.enter(device, packet.bytes()).0, Verdict::Drop);
                assert_eq!(counts(&world), [(Counter::DropInactiveAddress, 1)]);
            }
            let world = world();
            assert_eq!(world.leave(NIC, packet.bytes()).0, Verdict::Drop);
        }
        // A packet on its way to a pod is not judged.
        let world = world();
        passes(|bytes| world.leave(POD, bytes), &Packet::udp(client, address, b"?").bytes());
    }
}

/// A packet that entered by a device without the packet edge is only judged as it leaves. It is not translated,
/// because the reply would not find its way back.
#[test]
fn leaving_packets_are_judged_only() {
    for net in Net::ALL {
        let host = SocketAddr::new(net.node(), 50_000);
        let cases = [
            (net.there(), Verdict::Drop, Some(Counter::DropNoFlow)),
            (net.nobody(), Verdict::Drop, Some(Counter::DropNoFlow)),
            (net.inactive(), Verdict::Drop, Some(Counter::DropInactiveAddress)),
            (unused(net), Verdict::Reply, Some(Counter::RejectUnusedPort)),
            (net.ranged(), Verdict::Pass, None),
            (net.beside(), Verdict::Pass, None),
            (net.client(), Verdict::Pass, None),
        ];
        for (destination, verdict, count) in cases {
            for packet in [Packet::tcp(host, destination, SYN, 1, 0), Packet::udp(host, destination, b"?")] {
                let world = world();
                let (got, after) = world.leave(NIC, packet.bytes());
                assert_eq!(got, verdict, "{packet:?}");
                assert_eq!(counts(&world), count.map(|counter| (counter, 1)).into_iter().collect::<Vec<_>>());
                if verdict == Verdict::Reply {
                    let told = seen(&after);
                    assert_eq!((told.source.ip(), told.destination.ip()), (destination.ip(), host.ip()));
                }
            }
        }
    }
}

/// Flows that the host begins without its sockets being seen are refused, and UDP flows while there is no endpoint.
/// If the host's sockets cannot be told the reason of a refusal (`HOST_IN_PACKETS`), a SYN to an address without a
/// Service is refused as well. Flows that others have begun, and later packets of a connection, are not refused: a
/// Service that claims the address of another host does not end the host's connections there.
#[test]
fn what_the_host_begins_is_answered() {
    for net in Net::ALL {
        let host = SocketAddr::new(net.node(), 50_000);
        for (destination, counter) in [
            (net.nobody(), Counter::DropNoFlow),
            (net.there(), Counter::DropNoFlow),
            (net.inactive(), Counter::DropInactiveAddress),
        ] {
            let syn = Packet::tcp(host, destination, SYN, 1, 0);
            let of_service = counter == Counter::DropNoFlow;
            let datagram = Packet::udp(host, destination, b"?");
            for (flags, by, packet, answered) in [
                (HOST_IN_PACKETS, IfIndex::NONE, syn.clone(), true),
                (0, IfIndex::NONE, syn.clone(), of_service),
                (HOST_IN_PACKETS, POD, syn, false),
                (HOST_IN_PACKETS, IfIndex::NONE, Packet::tcp(host, destination, ACK, 1, 7), false),
                (HOST_IN_PACKETS, IfIndex::NONE, Packet::tcp(host, destination, SYN | ACK, 1, 7), false),
                (HOST_IN_PACKETS, IfIndex::NONE, datagram.clone(), of_service),
                (0, IfIndex::NONE, datagram.clone(), of_service),
                (0, POD, datagram, false),
            ] {
                let mut world = world();
                world.sim.apply(&Op::NodeFlags(flags)).unwrap();
                let (verdict, after) = world.leave_from(by, NIC, packet.bytes());
                assert_eq!(verdict, if answered { Verdict::Reply } else { Verdict::Drop }, "{by} {packet:?}");
                assert_eq!(counts(&world), [(counter, 1)]);
                if answered {
                    let told = seen(&after);
                    assert_eq!((told.source.ip(), told.destination.ip()), (destination.ip(), host.ip()));
                }
            }
        }
        // The same without an endpoint.
        let mut world = world();
        world.sim.apply(&Op::NodeFlags(HOST_IN_PACKETS)).unwrap();
        let id = world.sim.frontend(&FrontendKey::exact(
            net.ranged().ip().into(),
            Be16::new(net.ranged().port()),
            6,
        ));
        let id = id.unwrap().service;
        let nobody = Service {
            cluster: SlotRange::REJECT,
            local: SlotRange::REJECT,
            ..world.sim.service(id).unwrap()
        };
        world.sim.apply(&Op::Service(id, nobody)).unwrap();
        for kind in [ACK, PSH | ACK] {
            passes(
                |bytes| world.leave_from(IfIndex::NONE, NIC, bytes),
                &Packet::tcp(host, net.ranged(), kind, 1, 7).bytes(),
            );
        }
        for begins in [Packet::tcp(host, net.ranged(), SYN, 1, 0), Packet::udp(host, net.ranged(), b"?")] {
            assert_eq!(world.leave_from(IfIndex::NONE, NIC, begins.bytes()).0, Verdict::Reply);
        }
    }
}

/// A packet of the host itself never enters by a device. A packet with its source address that does would join the
/// flow of one of the host's own connections to the backend.
#[test]
fn nobody_comes_with_an_address_of_this_host() {
    for net in Net::ALL {
        for own in [net.node(), net.overlay()] {
            let own = SocketAddr::new(own, 50_000);
            for vip in [net.here(), net.there(), net.node_port(), net.nobody()] {
                for packet in [Packet::tcp(own, vip, SYN, 1, 0), Packet::udp(own, vip, b"?")] {
                    for device in [NIC, OVERLAY, POD, NEAR] {
                        let world = world();
                        assert_eq!(world.enter(device, packet.bytes()).0, Verdict::Drop);
                        assert_eq!(counts(&world), [(Counter::DropOwnSource, 1)]);
                        assert_eq!(world.sim.edge.records(Tier::New), []);
                        assert_eq!(world.sim.edge.entries(Tier::New), []);
                    }
                }
            }
            // Packets to ports that are not of a Service are left to the kernel.
            let other = Packet::tcp(own, SocketAddr::new(net.node(), 22), SYN, 1, 0);
            passes(|bytes| world().enter(NIC, bytes), &other.bytes());
        }
    }
}

/// Addresses that no ICMP error may be sent to: groups, broadcast, unspecified and loopback addresses (RFC 1122
/// §3.2.2, RFC 4443 §2.4).
#[test]
fn a_group_is_not_answered() {
    for (v6, groups) in [
        (false, ["224.0.0.1", "239.1.2.3", "255.255.255.255", "0.0.0.0", "127.0.0.1"]),
        (true, ["ff02::1", "ff05::1:3", "ff0e::1", "::", "::1"]),
    ] {
        let net = Net { v6 };
        for group in groups {
            let source = SocketAddr::new(group.parse().unwrap(), 40_000);
            for packet in
                [Packet::tcp(source, net.nobody(), SYN, 1, 0), Packet::udp(source, net.nobody(), b"?")]
            {
                let world = world();
                assert_eq!(world.enter(NIC, packet.bytes()).0, Verdict::Drop, "{source}");
            }
        }
    }
}
