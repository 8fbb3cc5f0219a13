//! Origins of flows: a pod can write any source address into its packets, but they come through its own interface.

use proxy_common::abi::{Counter, Flow, FlowKey, IfIndex, Origin};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{BARE, NEAR, NIC, Net, OVERLAY, POD, Packet, Trouble, World};

use super::{answer, counts, establish, open, passes, record, seen, translated, world};

/// Returns every record of an origin, in both tiers.
fn of(world: &World, origin: Origin) -> Vec<(FlowKey, Flow)> {
    [Tier::Assured, Tier::New]
        .into_iter()
        .flat_map(|tier| world.sim.edge.records(tier))
        .filter(|(key, _)| key.origin == origin)
        .collect()
}

/// Sends a packet of a pod in the name of a client: it enters by the pod's interface, and goes on to the other node
/// if its backend is there.
fn forge(world: &World, device: IfIndex, packet: &Packet) {
    let (verdict, bytes) = world.enter(device, packet.bytes());
    if verdict == Verdict::Translated && Net::ALL.iter().any(|net| seen(&bytes).destination == net.remote(1))
    {
        world.leave(OVERLAY, bytes);
    }
}

/// The client talks to a pod of this node itself, by the pod's own address; another pod sends a request to a VIP in
/// the client's name.
#[test]
fn a_forged_request_captures_no_connection_to_a_pod() {
    for net in Net::ALL {
        let (client, pod) = (net.client(), net.local());
        for (request, reply) in [
            (Packet::tcp(client, net.here(), SYN, 1, 0), Packet::tcp(pod, client, PSH | ACK, 5001, 1001)),
            (Packet::tcp(client, net.here(), SYN, 1, 0), Packet::tcp(pod, client, SYN | ACK, 5000, 2)),
            (Packet::udp(client, net.here(), b"?"), Packet::udp(pod, client, b"!")),
        ] {
            for attacker in [POD, NEAR] {
                let world = world();
                forge(&world, attacker, &request);
                passes(|bytes| world.leave(NIC, bytes), &reply.bytes());
                let error = Packet::error(pod.ip(), Trouble::PortUnreachable, &reply_to(&request, pod), 548);
                passes(|bytes| world.leave(NIC, bytes), &error.bytes());
                assert_eq!(of(&world, Origin::OUTSIDE), []);
            }
        }
    }
}

/// Returns a request as its backend receives it.
fn reply_to(request: &Packet, pod: std::net::SocketAddr) -> Vec<u8> {
    let client = seen(&request.bytes()).source;
    request.between(client, pod).bytes()
}

/// Packets that a pod sends in the name of a client outside neither find, prolong, end nor move that client's flow.
#[test]
fn nothing_forged_touches_a_clients_flow() {
    for net in Net::ALL {
        for vip in [net.here(), net.there()] {
            let world = world();
            let client = net.client();
            let pod = if vip == net.here() { net.local() } else { net.remote(1) };
            let own = if vip == net.there() {
                establish(&world, net, vip)
            } else {
                translated(world.enter(NIC, Packet::tcp(client, vip, SYN, 1000, 0).bytes()));
                translated(world.leave(NIC, Packet::tcp(pod, client, SYN | ACK, 5000, 1001).bytes()));
                translated(world.enter(NIC, Packet::tcp(client, vip, ACK, 1001, 5001).bytes()));
                client
            };
            let before = of(&world, Origin::OUTSIDE);
            world.pass(10);
            for flags in [SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK] {
                for seq in [1001, 2, 9000] {
                    forge(&world, POD, &Packet::tcp(client, vip, flags, seq, 5001));
                    // In the name of the backend, to the source that the backend sees.
                    forge(&world, POD, &Packet::tcp(pod, own, flags, 5001, seq));
                }
            }
            assert_eq!(of(&world, Origin::OUTSIDE), before);
            let next = Packet::tcp(client, vip, PSH | ACK, 1001, 5001);
            let reply = Packet::tcp(pod, own, ACK, 5001, 1022);
            if vip == net.there() {
                assert_eq!(open(&world, &next).1, own);
                answer(&world, &reply);
            } else {
                translated(world.enter(NIC, next.bytes()));
                assert_eq!(seen(&translated(world.leave(NIC, reply.bytes()))).source, vip);
            }
        }
    }
}

/// A pod has begun a flow in the name of a client outside. That client's own flow still gets a source of ours.
#[test]
fn a_forged_flow_leaves_the_client_its_source() {
    for net in Net::ALL {
        for request in [
            Packet::tcp(net.client(), net.there(), SYN, 1000, 0),
            Packet::udp(net.client(), net.there(), b"?"),
        ] {
            let world = world();
            forge(&world, POD, &request);
            assert_eq!(of(&world, Origin::pod(POD)).len(), 1);
            let (_, own) = open(&world, &request);
            assert_ne!(own.ip(), net.client().ip());
            assert_eq!(of(&world, Origin::OUTSIDE).len(), 1);
        }
    }
}

/// A pod fills the tuples between another pod and a backend. The other pod's flows have their own origin.
#[test]
fn a_flood_in_a_pods_name_takes_nothing_from_it() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.here());
        let victim = net.remote(7);
        for port in 1..=2000 {
            let source = std::net::SocketAddr::new(victim.ip(), port);
            forge(&world, NEAR, &Packet::udp(source, vip, b"?"));
        }
        for port in [1, 1000, 2000] {
            let source = std::net::SocketAddr::new(victim.ip(), port);
            let routed = translated(world.enter(POD, Packet::udp(source, vip, b"?").bytes()));
            // The pod keeps its own port: no other flow of its origin has it.
            assert_eq!(seen(&routed).source, source);
            let reply = Packet::udp(net.local(), source, b"!").bytes();
            assert_eq!(seen(&translated(world.leave(POD, reply))).source, vip);
        }
    }
}

/// The source that a pod has towards itself (hairpin) is valid only from that pod.
#[test]
fn only_the_pod_itself_answers_itself() {
    for net in Net::ALL {
        let (world, pod) = (world(), net.local());
        let client = std::net::SocketAddr::new(pod.ip(), 41_000);
        let routed = translated(world.enter(POD, Packet::tcp(client, net.here(), SYN, 1000, 0).bytes()));
        let back = translated(world.leave(POD, routed));
        let own = seen(&back).source;
        let reply = Packet::tcp(pod, own, SYN | ACK, 5000, 1001);
        let before = record(&world);
        for device in [NIC, OVERLAY, NEAR] {
            passes(|bytes| world.enter(device, bytes), &reply.bytes());
        }
        assert_eq!(record(&world), before);
        let reply = translated(world.enter(POD, reply.bytes()));
        assert_eq!(seen(&translated(world.leave(POD, reply))).source, net.here());
    }
}

/// Packets of one client outside may come and go by different external devices.
#[test]
fn external_devices_are_one_origin() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.here());
        translated(world.enter(NIC, Packet::tcp(client, vip, SYN, 1000, 0).bytes()));
        let reply = Packet::tcp(net.local(), client, SYN | ACK, 5000, 1001).bytes();
        assert_eq!(seen(&translated(world.leave(OVERLAY, reply))).source, vip);
        translated(world.enter(OVERLAY, Packet::tcp(client, vip, ACK, 1001, 5001).bytes()));
        assert_eq!(record(&world).0, Tier::Assured);
    }
}

/// A source that the kernel's routes place behind another pod's interface is not served, and no record is made.
#[test]
fn a_source_that_cannot_be_behind_the_interface_is_dropped() {
    for net in Net::ALL {
        for (route, foreign) in [
            (IfIndex::NONE, false),
            (POD, false),
            (NIC, false),
            (NEAR, true),
            (BARE, false),
            (IfIndex(77), false),
        ] {
            for request in [
                Packet::tcp(net.client(), net.here(), SYN, 1, 0),
                Packet::udp(net.client(), net.here(), b"?"),
            ] {
                let world = world();
                world.route_back.set(route);
                if foreign {
                    assert_eq!(world.enter(POD, request.bytes()).0, Verdict::Drop);
                    assert_eq!(counts(&world), [(Counter::DropForeignSource, 1)]);
                    assert_eq!(of(&world, Origin::pod(POD)), []);
                } else {
                    translated(world.enter(POD, request.bytes()));
                }
                // A client outside may come by any device.
                translated(world.enter(OVERLAY, request.bytes()));
                // A packet that concerns no Service is not judged here.
                let other = Packet::udp(net.client(), net.remote(1), b"?");
                passes(|bytes| world.enter(POD, bytes), &other.bytes());
            }
        }
    }
}
