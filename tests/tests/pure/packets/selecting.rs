//! Selection of a backend: source ranges, the sets of near and far clients, and datagram flows that move.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::backend::flags::{IN_CLUSTER, SERVING};
use proxy_common::abi::{BackendId, BackendState, Counter, Origin, Service, ServiceId, SlotRange};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, SYN};
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{NEAR, NIC, Net, OVERLAY, POD, Packet, World};

use super::{answer, counts, open, record, seen, translated, world};

#[test]
fn source_ranges_let_some_clients_in() {
    for net in Net::ALL {
        for (client, verdict) in [(net.client(), Verdict::Translated), (net.stranger(), Verdict::Drop)] {
            for packet in
                [Packet::tcp(client, net.ranged(), SYN, 1, 0), Packet::udp(client, net.ranged(), b"?")]
            {
                let world = world();
                assert_eq!(world.enter(NIC, packet.bytes()).0, verdict);
                let dropped = u64::from(verdict == Verdict::Drop);
                assert_eq!(world.sim.counted(Counter::DropSourceRange), dropped);
                // The ranges apply to the load-balancer address alone: nodePort and clusterIP are open.
                for vip in [net.node_port(), net.there()] {
                    translated(world.enter(NIC, Packet { destination: vip, ..packet.clone() }.bytes()));
                }
            }
        }
        // The ranges apply to pods, too.
        let world = world();
        let pod = SocketAddr::new(net.local().ip(), 41_000);
        assert_eq!(world.enter(POD, Packet::tcp(pod, net.ranged(), SYN, 1, 0).bytes()).0, Verdict::Drop);
    }
}

#[test]
fn ranges_do_not_cut_a_flow_that_exists() {
    for net in Net::ALL {
        let mut world = world();
        let [syn, ack] = [SYN, ACK].map(|flags| Packet::tcp(net.client(), net.ranged(), flags, 1000, 5001));
        open(&world, &syn);
        let id = net.there_id() + 2;
        for (service, range) in world.sim.contents().source_ranges {
            if service == ServiceId(id) {
                world.sim.apply(&Op::SourceRange(ServiceId(id), range, false)).unwrap();
            }
        }
        open(&world, &ack);
        let other = SocketAddr::new(net.client().ip(), 40_001);
        let another = Packet { source: other, ..syn };
        assert_eq!(world.enter(NIC, another.bytes()).0, Verdict::Drop);
    }
}

#[test]
fn near_and_far_clients_have_sets_of_their_own() {
    for net in Net::ALL {
        let near = [
            (POD, SocketAddr::new(net.local().ip(), 41_000), "a pod's address"),
            (NIC, net.remote(3), "the address of another node's pod"),
            (NEAR, net.stranger(), "a device from which all are near"),
        ];
        for (device, client, why) in near {
            let world = world();
            let (verdict, _) = world.enter(device, Packet::udp(client, net.policy(), b"?").bytes());
            assert_eq!(verdict, Verdict::Translated, "{why}");
        }
        for device in [NIC, OVERLAY, POD] {
            let world = world();
            let far = Packet::udp(net.client(), net.policy(), b"?").bytes();
            assert_eq!(world.enter(device, far).0, Verdict::Drop);
            assert_eq!(counts(&world), [(Counter::DropNoLocalEndpoint, 1)]);
        }
    }
}

/// Only a client outside needs a source of ours on the way to another node.
#[test]
fn the_device_tells_who_comes_from_outside() {
    for net in Net::ALL {
        let outside = Origin::OUTSIDE;
        for (device, origin) in
            [(NIC, outside), (OVERLAY, outside), (POD, Origin::pod(POD)), (NEAR, Origin::pod(NEAR))]
        {
            let world = world();
            translated(world.enter(device, Packet::udp(net.client(), net.there(), b"?").bytes()));
            assert_eq!(record(&world).1.origin, origin);
        }
    }
}

fn state_of_backend(world: &mut World, net: Net, pod: SocketAddr, flags: u32) {
    let number = (1..4).find(|number| net.remote(*number) == pod).unwrap();
    let id = net.spread_id() + u32::from(number) - 1;
    let generation = world.sim.backend(BackendId(id)).unwrap().state.generation;
    world.sim.apply(&Op::BackendState(BackendId(id), BackendState { flags, generation })).unwrap();
}

fn set_of(world: &mut World, net: Net, cluster: SlotRange) {
    let service = Service { cluster, local: SlotRange::DROP, ..Service::default() };
    world.sim.apply(&Op::Service(ServiceId(net.there_id() + 3), service)).unwrap();
}

#[test]
fn new_flows_are_spread_over_all_backends() {
    for net in Net::ALL {
        let world = world();
        let mut seen_at = BTreeSet::new();
        for port in 1..60 {
            let client = SocketAddr::new(net.client().ip(), port);
            let routed = translated(world.enter(NIC, Packet::tcp(client, net.spread(), SYN, 1, 0).bytes()));
            seen_at.insert(seen(&routed).destination);
        }
        assert_eq!(seen_at, [1, 2, 3].map(|number| net.remote(number)).into());
    }
}

#[test]
fn a_datagram_flow_moves_when_its_backend_does_not_serve_any_more() {
    for net in Net::ALL {
        let (mut world, vip, client) = (world(), net.spread(), net.client());
        let request = Packet::udp(client, vip, b"?");
        let (sent, own) = open(&world, &request);
        let first = seen(&sent).destination;
        answer(&world, &Packet::udp(first, own, b"!"));
        // Leaving the set is not enough: a terminating pod that serves keeps its flows.
        state_of_backend(&mut world, net, first, SERVING);
        assert_eq!(seen(&open(&world, &request).0).destination, first);
        state_of_backend(&mut world, net, first, 0);
        let left: Vec<_> = (0..3)
            .map(|n| BackendId(net.spread_id() + n))
            .filter(|id| world.sim.backend(*id).unwrap().addr != first.ip().into())
            .collect();
        world.sim.apply(&Op::Slots(60, left)).unwrap();
        set_of(&mut world, net, SlotRange { base: 60, len: 2 });
        let (sent, source) = open(&world, &request);
        let second = seen(&sent).destination;
        assert_ne!(second, first);
        assert_eq!(world.sim.counted(Counter::UdpRepick), 1);
        for _ in 0..5 {
            assert_eq!(seen(&open(&world, &request).0).destination, second);
        }
        let reply = Packet::udp(second, source, b"!");
        assert_eq!(answer(&world, &reply), reply.between(vip, client).bytes());
        // A late reply of the old backend belongs to no flow.
        let stale = Packet::udp(first, own, b"late").bytes();
        assert_eq!(world.enter(OVERLAY, stale.clone()), (Verdict::Pass, stale));
        assert_eq!((world.sim.counted(Counter::Flow), world.sim.counted(Counter::UdpRepick)), (1, 1));
    }
}

#[test]
fn a_datagram_is_refused_while_nothing_serves_and_its_flow_goes_to_whoever_does() {
    for net in Net::ALL {
        for nothing in [SlotRange::REJECT, SlotRange::DROP] {
            let (mut world, client) = (world(), net.client());
            let request = Packet::udp(client, net.spread(), b"?");
            open(&world, &request);
            for number in 1..4 {
                state_of_backend(&mut world, net, net.remote(number), 0);
            }
            set_of(&mut world, net, nothing);
            // The address of the former backend may belong to another pod by now.
            let verdict = if nothing == SlotRange::REJECT { Verdict::Reply } else { Verdict::Drop };
            for source in [client, SocketAddr::new(client.ip(), 40_001)] {
                assert_eq!(world.enter(NIC, Packet { source, ..request.clone() }.bytes()).0, verdict);
            }
            // When a backend serves again, the flow goes there.
            state_of_backend(&mut world, net, net.remote(2), SERVING | IN_CLUSTER);
            world.sim.apply(&Op::Slots(60, vec![BackendId(net.spread_id() + 1)])).unwrap();
            set_of(&mut world, net, SlotRange { base: 60, len: 1 });
            assert_eq!(seen(&open(&world, &request).0).destination, net.remote(2));
        }
    }
}

#[test]
fn a_datagram_flow_ends_with_its_service() {
    use proxy_common::abi::{FrontendKey, proto};
    for net in Net::ALL {
        let (mut world, vip) = (world(), net.spread());
        let request = Packet::udp(net.client(), vip, b"?");
        open(&world, &request);
        for number in 1..4 {
            state_of_backend(&mut world, net, net.remote(number), 0);
        }
        let port = proxy_common::be::Be16::new(vip.port());
        let gone = FrontendKey::exact(vip.ip().into(), port, proto::UDP);
        world.sim.apply(&Op::Frontend(gone, None)).unwrap();
        assert_eq!(world.enter(NIC, request.bytes()).0, Verdict::Reply);
    }
}

/// An open connection stays with its backend, even one that has left the Service; a new SYN goes to a backend that
/// serves now.
#[test]
fn a_connection_stays_with_its_backend() {
    for net in Net::ALL {
        let mut world = world();
        let (sent, own) = open(&world, &Packet::tcp(net.client(), net.spread(), SYN, 1, 0));
        let pod = seen(&sent).destination;
        state_of_backend(&mut world, net, pod, 0);
        set_of(&mut world, net, SlotRange::REJECT);
        let (sent, source) = open(&world, &Packet::tcp(net.client(), net.spread(), ACK, 2, 0));
        assert_eq!((seen(&sent).destination, source), (pod, own));
        let syn = Packet::tcp(net.client(), net.spread(), SYN, 1, 0);
        assert_eq!(world.enter(NIC, syn.bytes()).0, Verdict::Reply);
    }
}
