//! Sources of our own: the choice of a flow's source, how long the flow keeps it, and who gets it afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::flow::state::ASSURED;
use proxy_common::abi::frontend::flags::EXTERNAL;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{
    Counter, Flow, FlowKey, FlowKind, FlowRef, FrontendKey, FrontendValue, Nanos, Origin, ServiceId,
};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::flows::snat_index;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::{EdgeTables as _, FlowCell as _, Tier};
use proxy_tests::packets::{NIC, Net, OVERLAY, Packet, Trouble, World};

use super::{answer, establish, open, record, replied, reply, seen, translated, world};

/// The source of a flow may belong to another flow by the time that the loss of its index entry is noticed.
#[test]
fn a_source_that_has_been_given_away_is_replaced() {
    for net in Net::ALL {
        let world = world();
        let request = Packet::tcp(net.client(), net.there(), SYN, 1000, 0);
        let (_, own) = open(&world, &request);
        let (_, key, flow) = record(&world);
        let (index, target) = snat_index(&key, &flow.snat, flow.snat_port);
        world.sim.edge.evict_index(&index).unwrap();
        let other = net.stranger().ip().into();
        assert!(world.sim.add_index(Tier::New, &index, &FlowRef { addr: other, ..target }));
        let (_, source) = open(&world, &request);
        assert_ne!(source, own);
        answer(&world, &reply(&request, net.remote(1), source));
    }
}

/// Returns a world in which every source port towards the usual backend is used by a live flow, in `tier`.
fn few_ports(net: Net, proto: u8, tier: Tier) -> World {
    let world = world();
    let (client, backend) = (net.stranger(), net.remote(1));
    let own = Addr::from(net.overlay());
    for port in SNAT_PORTS.map(Be16::new) {
        let key = FlowKey {
            source: client.ip().into(),
            destination: backend.ip().into(),
            source_port: port,
            destination_port: Be16::new(backend.port()),
            origin: Origin::OUTSIDE,
            proto,
            kind: FlowKind::Record as u8,
            pad: 0,
            pad_end: 0,
        };
        let flow = Flow {
            vip: net.there().ip().into(),
            vip_port: Be16::new(net.there().port()),
            client_port: port,
            snat: own,
            snat_port: port,
            check: key.check(),
            last_seen: Nanos(world.sim.clock.get()),
            ..Flow::default()
        };
        let (index, target) = snat_index(&key, &own, port);
        assert!(world.sim.add_flow(tier, &key, &flow) && world.sim.add_index(tier, &index, &target));
    }
    world
}

/// During a flood, a new flow takes the port of a flow that has proved nothing.
#[test]
fn a_source_port_is_taken_from_whoever_has_proved_nothing() {
    for net in Net::ALL {
        let world = few_ports(net, 6, Tier::New);
        let own = establish(&world, net, net.there());
        assert_eq!(world.sim.counted(Counter::RejectNoPort), 0);
        // The former owner of a port gets another one with its next packet, and takes none from an established flow.
        for number in 0..200 {
            let loser = SocketAddr::new(net.stranger().ip(), SNAT_PORTS.start + number);
            let (_, source) = open(&world, &Packet::tcp(loser, net.there(), SYN, 1, 0));
            assert_ne!(source, own);
        }
        let loser = SocketAddr::new(net.stranger().ip(), own.port());
        let (_, source) = open(&world, &Packet::tcp(loser, net.there(), SYN, 1, 0));
        assert_ne!(source, own);
        let reply = Packet::tcp(net.remote(1), own, PSH | ACK, 5001, 1001);
        assert_eq!(answer(&world, &reply), reply.between(net.there(), net.client()).bytes());
    }
}

/// An address of the node that also belongs to a Service still gives sources.
#[test]
fn frontends_of_our_own_address_are_no_sources() {
    for net in Net::ALL {
        let mut world = world();
        let own = Addr::from(net.overlay());
        for port in SNAT_PORTS.step_by(8) {
            claim(&mut world, net, FrontendKey::exact(own, Be16::new(port), UDP));
            claim(&mut world, net, FrontendKey::node_port(own.unspecified(), Be16::new(port + 4), UDP));
        }
        for number in 1..=200 {
            let source = ask(&world, net, number);
            assert_ne!(source.port() % 4, SNAT_PORTS.start % 4, "{source} is a frontend");
        }
        // Even if frontends claim every port, one is still given. A request from elsewhere to that port is still a
        // request.
        for port in SNAT_PORTS {
            claim(&mut world, net, FrontendKey::exact(own, Be16::new(port), UDP));
        }
        let source = ask(&world, net, 201);
        open(&world, &Packet::udp(net.stranger(), source, b"?"));
    }
}

fn claim(world: &mut World, net: Net, key: FrontendKey) {
    let frontend = FrontendValue::new(&key, ServiceId(net.there_id()), EXTERNAL);
    world.sim.apply(&Op::Frontend(key, Some(frontend))).unwrap();
}

fn ask(world: &World, net: Net, number: u16) -> SocketAddr {
    let request = Packet::udp(SocketAddr::new(net.client().ip(), number), net.there(), b"?");
    let (_, source) = open(world, &request);
    answer(world, &reply(&request, net.remote(1), source));
    source
}

/// A client that goes on after its source was given to another flow gets nothing that belongs to the other flow.
#[test]
fn a_source_that_was_given_away_is_not_taken_back() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.there());
        let (_, own) = open(&world, &Packet::tcp(net.client(), vip, SYN, 1000, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 5000, 1001));
        let (_, key, flow) = record(&world);
        let (index, target) = snat_index(&key, &flow.snat, flow.snat_port);
        let other = FlowRef { addr: net.stranger().ip().into(), ..target };
        for tier in [Tier::New, Tier::Assured] {
            world.sim.remove_index(Tier::New, &index);
            assert!(world.sim.add_index(tier, &index, &other));
            let routed =
                translated(world.enter(NIC, Packet::tcp(net.client(), vip, ACK, 1001, 5001).bytes()));
            assert_eq!((record(&world).0, world.sim.index(tier, &index)), (Tier::New, Some(other)));
            let sent = translated(world.leave(OVERLAY, routed));
            assert_ne!(seen(&sent).source, own);
            // Restores the source.
            let (snat, port) = (flow.snat, flow.snat_port);
            world.sim.flow(Tier::New, &key).unwrap().set_snat(key.check(), snat, port);
        }
        assert_eq!(world.sim.counted(Counter::FlowsFull), 0);
    }
}

/// The end that closes a connection first remembers it (TIME_WAIT): the source of a connection that its client has
/// closed is soon free for another.
#[test]
fn a_source_is_free_again_once_the_backend_has_forgotten_it() {
    use proxy_common::datapath::edge::timeouts::{closed, forgotten};
    for net in Net::ALL {
        let (client, vip, backend) = (net.client(), net.there(), net.remote(1));
        for (by_client, reset) in [(true, false), (false, false), (false, true)] {
            let world = world();
            let own = establish(&world, net, vip);
            let from_client = |flags| {
                open(&world, &Packet::tcp(client, vip, flags, 1001, 5001));
            };
            let from_backend = |flags| {
                answer(&world, &Packet::tcp(backend, own, flags, 5001, 1001));
            };
            match (by_client, reset) {
                (true, _) => (from_client(FIN | ACK), from_backend(FIN | ACK)),
                (false, false) => (from_backend(FIN | ACK), from_client(FIN | ACK)),
                (false, true) => (from_backend(RST | ACK), ()),
            };
            let (_, _, flow) = record(&world);
            assert!(closed(flow.state), "{by_client} {reset}");
            let [before, after] = [499, 500]
                .map(|milliseconds| forgotten(&flow, Nanos(flow.last_seen.0 + milliseconds * 1_000_000)));
            assert_eq!((before, after), (false, by_client || reset), "{by_client} {reset}");
        }
        assert!(!forgotten(&Flow { state: ASSURED, ..Flow::default() }, Nanos(u64::MAX)));
    }
}

/// A backend that has ended a connection remembers its source. No other client gets that source, and the client's
/// next connection by the same port has it again.
#[test]
fn a_port_of_a_client_has_one_source_with_each_backend() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.spread());
        let mut sources = BTreeMap::new();
        for number in 0..20 {
            let (seq, ack) = (1_000_000 * number, 7_000_000 * number);
            let from_client = |flags, seq| open(&world, &Packet::tcp(client, vip, flags, seq, ack + 1));
            let (sent, source) = from_client(SYN, seq);
            let backend = seen(&sent).destination;
            let from_backend =
                |flags, ack| answer(&world, &Packet::tcp(backend, source, flags, ack, seq + 1));
            from_backend(SYN | ACK, ack);
            from_client(ACK, seq + 1);
            from_backend(FIN | ACK, ack + 1);
            from_client(FIN | ACK, seq + 1);
            assert_eq!(*sources.entry(backend).or_insert(source), source);
            let kept: BTreeSet<_> =
                world.sim.edge.records(Tier::Assured).iter().map(|(_, flow)| flow.snat_port.get()).collect();
            assert_eq!(kept, sources.values().map(SocketAddr::port).collect());
            world.pass(1);
        }
        assert_eq!(sources.len(), 3);
    }
}

#[test]
fn without_a_free_source_port_the_client_is_told() {
    for net in Net::ALL {
        for (proto, request) in [
            (6, Packet::tcp(net.client(), net.there(), SYN, 1000, 0)),
            (17, Packet::udp(net.client(), net.there(), b"nobody will read this")),
        ] {
            let world = few_ports(net, proto, Tier::Assured);
            let routed = translated(world.enter(NIC, request.bytes()));
            let told = replied(world.leave(OVERLAY, routed.clone()));
            assert_eq!((told.source.ip(), told.destination.ip()), (net.there().ip(), net.client().ip()));
            if proto == 6 {
                assert_eq!((told.source, told.destination), (net.there(), net.client()));
                assert_eq!(told.tcp, Some((RST | ACK, 0, 1001)));
            } else {
                assert_eq!(told.icmp, Some(Trouble::PortUnreachable.numbers(net.v6)));
                assert_eq!(told.payload, request.bytes()[14..][..told.payload.len()]);
            }
            assert_eq!(world.sim.counted(Counter::RejectNoPort), 1);
            // Nothing of the refused flow stays, and the client is served when ports are free again.
            assert!(
                world
                    .sim
                    .edge
                    .records(Tier::New)
                    .iter()
                    .all(|(key, _)| key.source != net.client().ip().into())
            );
            world.pass(300);
            open(&world, &request);
        }
    }
}

#[test]
fn a_source_port_is_not_given_away_while_its_flow_lives() {
    for net in Net::ALL {
        let world = world();
        let mut owners = BTreeMap::new();
        for port in 1..4000_u16 {
            let client = SocketAddr::new(net.client().ip(), port);
            let (_, own) = open(&world, &Packet::udp(client, net.there(), b"?"));
            assert_eq!(owners.insert(own.port(), client), None, "port {} twice", own.port());
        }
        for (port, client) in owners {
            let reply = Packet::udp(net.remote(1), SocketAddr::new(net.overlay(), port), b"!");
            assert_eq!(answer(&world, &reply), reply.between(net.there(), client).bytes());
        }
    }
}
