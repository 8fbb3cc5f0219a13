//! Packets that count as replies, and SYNs that meet an open flow: another connection may exist between the same
//! ends, or the backend may have gone.

use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::flow::state::{ASKED, ASSURED, FIN_REPLY, PROVEN, REPLIED, RESET, TAKEN};
use proxy_common::abi::{
    BackendId, BackendState, Counter, Device, Flow, FlowKey, IfIndex, Nanos, ServiceId, device,
};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::flows::{on_request, record as find};
use proxy_common::datapath::edge::parsed::Parsed;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::{EdgeTables as _, FlowCell as _, Tier};
use proxy_common::datapath::edge::work::Numbers;
use proxy_common::datapath::edge::work::Work;
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{Body, NEAR, NIC, Net, OVERLAY, POD, Packet, World};

use super::{answer, counts, establish, open, passes, record, records, seen, translated, world};

/// Sends a client's SYN with so many bytes of data to the pod of this node. Returns the source that the pod sees.
fn knock(world: &World, net: Net, seq: u32, data: usize) -> SocketAddr {
    let body = Body::Tcp { flags: SYN, seq, ack: 0, data: vec![7; data] };
    seen(&translated(world.enter(NIC, Packet::new(net.client(), net.here(), body).bytes()))).source
}

/// Returns whether a packet of the pod of this node leaves as a reply of the Service.
fn is_answer(world: &World, packet: &Packet) -> bool {
    let (verdict, bytes) = world.leave_from(POD, NIC, packet.bytes());
    if verdict == Verdict::Pass {
        assert_eq!(bytes, packet.bytes());
    } else {
        assert_eq!(verdict, Verdict::Translated);
    }
    verdict == Verdict::Translated
}

#[test]
fn only_what_answers_the_syn_is_an_answer() {
    const SEQ: u32 = u32::MAX - 2;
    for net in Net::ALL {
        for data in [0, 5] {
            let behind = SEQ.wrapping_add(1);
            let end = behind.wrapping_add(data as u32);
            let (first, last) = (SYN | ACK, RST | ACK);
            for (flags, ack, fits) in [
                (first, behind, true),
                (first, end, true),
                (last, behind, true),
                (last, end, true),
                (first, SEQ, false),
                (first, end.wrapping_add(1), false),
                (last, end.wrapping_add(1), false),
                (RST, behind, false),
                (ACK, behind, false),
                (PSH | ACK, behind, false),
                (FIN | ACK, behind, false),
                (SYN, behind, false),
            ] {
                let world = world();
                let client = knock(&world, net, SEQ, data);
                let reply = Packet::tcp(net.local(), client, flags, 0x4000_0000, ack);
                assert_eq!(is_answer(&world, &reply), fits, "{flags:#x} {ack} to {SEQ} with {data} bytes");
                let (_, _, flow) = record(&world);
                assert_eq!(flow.state & TAKEN != 0, !fits);
                assert_eq!(flow.state & REPLIED != 0, fits && flags == first);
            }
        }
    }
}

#[test]
fn until_the_client_goes_on_only_what_follows_in_sequence_is_an_answer() {
    for net in Net::ALL {
        let (world, pod) = (world(), net.local());
        let client = knock(&world, net, 1000, 0);
        let segment = |flags, seq| Packet::tcp(pod, client, flags, seq, 1001);
        assert!(is_answer(&world, &segment(SYN | ACK, 5000)));
        // The backend's SYN once more, and data of a backend that speaks first.
        for (flags, seq) in [(SYN | ACK, 5000), (PSH | ACK, 5001), (PSH | ACK, 5001 + 1460)] {
            assert!(is_answer(&world, &segment(flags, seq)), "{flags:#x} {seq}");
            assert_eq!(knock(&world, net, 1000, 0), client, "a SYN that is sent again changes nothing");
        }
        for seq in [4999, 5001 + (1 << 17), 0x8000_0000] {
            assert!(!is_answer(&world, &segment(PSH | ACK, seq)), "{seq}");
        }
        // After the client's acknowledgement, every packet of the backend is a reply.
        let ack = Packet::tcp(client, net.here(), ACK, 1001, 5001);
        translated(world.enter(NIC, ack.bytes()));
        assert!(is_answer(&world, &segment(PSH | ACK, 0x8000_0000)));
    }
}

/// A sender outside sends to a VIP in the name of a client that is connected to the same pod.
#[test]
fn the_ends_of_another_connection_are_avoided() {
    for net in Net::ALL {
        let (world, client) = (world(), net.client());
        assert_eq!(knock(&world, net, 77, 0), client);
        for (flags, seq, ack) in
            [(PSH | ACK, 5001, 1001), (ACK, 5022, 1023), (FIN | ACK, 5022, 1023), (RST, 5023, 0)]
        {
            assert!(!is_answer(&world, &Packet::tcp(net.local(), client, flags, seq, ack)));
        }
        // The client itself connects by the same port: it reaches the pod from a source port of ours.
        let other = knock(&world, net, 9000, 0);
        assert!(other.ip() == client.ip() && SNAT_PORTS.contains(&other.port()), "{other}");
        assert_eq!(knock(&world, net, 9000, 0), other, "and stays there");
        let (verdict, bytes) =
            world.leave_from(POD, NIC, Packet::tcp(net.local(), other, SYN | ACK, 5000, 9001).bytes());
        assert_eq!(
            (verdict, seen(&bytes).source, seen(&bytes).destination),
            (Verdict::Translated, net.here(), client)
        );
        assert!(!is_answer(&world, &Packet::tcp(net.local(), client, PSH | ACK, 5001, 1001)), "as before");
    }
}

/// Removes a backend of [`Net::spread`] from every set and slice.
fn leave_service(world: &mut World, net: Net, pod: SocketAddr) {
    let number = (1..4).find(|&number| net.remote(number) == pod).unwrap();
    let id = net.spread_id() + u32::from(number) - 1;
    let state = BackendState { flags: 0, generation: 2 };
    world.sim.apply(&Op::BackendState(BackendId(id), state)).unwrap();
    let left = (0..3).map(|n| net.spread_id() + n).filter(|&other| other != id).map(BackendId).collect();
    world.sim.apply(&Op::Slots(net.spread_id(), left)).unwrap();
    let id = if net.v6 { 105 } else { 5 };
    let service = world.sim.service(ServiceId(id)).unwrap();
    let cluster = proxy_common::abi::SlotRange { len: 2, ..service.cluster };
    world.sim.apply(&Op::Service(ServiceId(id), proxy_common::abi::Service { cluster, ..service })).unwrap();
}

/// Makes a connection to [`Net::spread`]. Returns its pod, and the source that the pod sees.
fn connect(world: &World, net: Net) -> (SocketAddr, SocketAddr) {
    let (client, vip) = (net.client(), net.spread());
    let (sent, own) = open(world, &Packet::tcp(client, vip, SYN, 1000, 0));
    let pod = seen(&sent).destination;
    answer(world, &Packet::tcp(pod, own, SYN | ACK, 5000, 1001));
    open(world, &Packet::tcp(client, vip, ACK, 1001, 5001));
    (pod, own)
}

#[test]
fn a_syn_goes_to_a_live_backend_and_the_old_flow_stays_until_that_is_proved() {
    for net in Net::ALL {
        for proved in [false, true] {
            let (mut world, client, vip) = (world(), net.client(), net.spread());
            let (old, own) = connect(&world, net);
            let goes_on = |world: &World, seq| {
                let (sent, source) = open(world, &Packet::tcp(client, vip, PSH | ACK, seq, 5001));
                assert_eq!((seen(&sent).destination, source), (old, own));
                answer(world, &Packet::tcp(old, own, ACK, 5001, seq + 22));
            };
            let syn = Packet::tcp(client, vip, SYN, 9000, 0);
            assert_eq!(seen(&open(&world, &syn).0).destination, old, "it is there");
            leave_service(&mut world, net, old);
            goes_on(&world, 1001);
            let (sent, other) = open(&world, &syn);
            let new = seen(&sent).destination;
            assert_ne!(new, old);
            let again = open(&world, &syn);
            assert_eq!((seen(&again.0).destination, again.1), (new, other), "a SYN that is sent again");
            goes_on(&world, 1023);
            answer(&world, &Packet::tcp(new, other, SYN | ACK, 0x7000_0000, 9001));
            goes_on(&world, 1045);
            assert_eq!(counts(&world), [(Counter::Flow, 2)]);
            if proved {
                for (flags, seq) in [(ACK, 9001), (PSH | ACK, 9001)] {
                    let (sent, source) = open(&world, &Packet::tcp(client, vip, flags, seq, 0x7000_0001));
                    assert_eq!((seen(&sent).destination, source), (new, other));
                }
                let all = records(&world);
                assert!(
                    matches!(all[..], [(Tier::Assured, key, _)] if key.destination == new.ip().into()),
                    "{all:?}"
                );
                assert_eq!(world.sim.edge.entries(Tier::New), []);
                assert_eq!(world.sim.edge.entries(Tier::Assured).len(), 2);
            } else {
                world.pass(3_000);
                goes_on(&world, 1067);
            }
        }
    }
}

#[test]
fn a_new_flow_that_is_refused_is_replaced_and_the_old_one_stays() {
    for net in Net::ALL {
        let (mut world, client, vip) = (world(), net.client(), net.spread());
        let (old, own) = connect(&world, net);
        leave_service(&mut world, net, old);
        for attempt in 0..3 {
            let (sent, other) = open(&world, &Packet::tcp(client, vip, SYN, 9000 + attempt, 0));
            let new = seen(&sent).destination;
            answer(&world, &Packet::tcp(new, other, RST | ACK, 0, 9001 + attempt));
        }
        let (sent, source) = open(&world, &Packet::tcp(client, vip, PSH | ACK, 1001, 5001));
        assert_eq!((seen(&sent).destination, source), (old, own));
    }
}

#[test]
fn a_backend_that_answers_no_syn_for_three_seconds_is_left() {
    for net in Net::ALL {
        for (pauses, answers, flows) in [
            (&[1, 2][..], false, 2),
            (&[1, 1][..], false, 1),
            (&[4][..], false, 2),
            (&[][..], false, 1),
            (&[1, 2][..], true, 1),
        ] {
            let (world, client, vip) = (world(), net.client(), net.there());
            let own = establish(&world, net, vip);
            world.pass(1_000);
            let syn = Packet::tcp(client, vip, SYN, 9000, 0);
            open(&world, &syn);
            for pause in pauses {
                if answers {
                    answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1001));
                }
                world.pass(*pause);
                open(&world, &syn);
            }
            assert_eq!(records(&world).len(), flows, "{pauses:?}, {answers}");
            let (_, source) = open(&world, &Packet::tcp(client, vip, PSH | ACK, 1001, 5001));
            assert_eq!(source, own, "the old one goes on");
        }
    }
}

#[test]
fn only_the_backend_prolongs_a_connection() {
    for net in Net::ALL {
        for answers in [true, false] {
            let (world, client, vip) = (world(), net.client(), net.there());
            let own = establish(&world, net, vip);
            for number in 0..4 {
                world.pass(80_000);
                translated(world.enter(NIC, Packet::tcp(client, vip, ACK, 1001, 5001).bytes()));
                answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1001 + number));
            }
            let data = Packet::tcp(client, vip, PSH | ACK, 1004, 5001);
            for _ in 0..3 {
                open(&world, &data);
                assert_eq!(record(&world).2.state, REPLIED | ASSURED | ASKED);
                if answers {
                    answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1004));
                }
                world.pass(100);
            }
            assert_eq!(world.enter(NIC, data.bytes()).0 == Verdict::Translated, answers);
        }
    }
}

/// Data, FIN and RST in the name of a client, whose sequence numbers nobody outside can know.
#[test]
fn what_does_not_fit_shortens_no_life() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let own = establish(&world, net, vip);
        for far in [1 << 22, 1 << 31, u32::MAX] {
            for flags in [PSH | ACK, FIN | ACK, FIN | PSH | ACK, RST | ACK] {
                open(&world, &Packet::tcp(client, vip, flags, 1001_u32.wrapping_add(far), 5001));
                assert_eq!(record(&world).2.state, REPLIED | ASSURED, "{flags:#x} {far:#x}");
            }
        }
        world.pass(86_000);
        assert_eq!(open(&world, &Packet::tcp(client, vip, PSH | ACK, 1001, 5001)).1, own);
    }
}

/// After a forged acknowledgement in the backend's name, the client's FIN does not fit, and the flow stays half
/// closed. The next connection from the client's port lives as long as any other.
#[test]
fn a_connection_that_follows_a_half_closed_one_lives_on() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let own = establish(&world, net, vip);
        answer(&world, &Packet::tcp(net.remote(1), own, FIN | ACK, 5001, 1001));
        answer(&world, &Packet::tcp(net.remote(1), own, ACK, 0, 0x9000_0000));
        open(&world, &Packet::tcp(client, vip, FIN | ACK, 1001, 5002));
        assert_eq!(record(&world).2.state, REPLIED | ASSURED | FIN_REPLY);
        // A SYN-ACK counts only after a SYN of the client.
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 7000, 0x9000_0000));
        assert_eq!(record(&world).2.state, REPLIED | ASSURED | FIN_REPLY);
        world.pass(1);
        open(&world, &Packet::tcp(client, vip, SYN, 9000, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 7000, 9001));
        open(&world, &Packet::tcp(client, vip, ACK, 9001, 7001));
        assert_eq!(record(&world).2.state, REPLIED | ASSURED);
        world.pass(86_000);
        assert_eq!(open(&world, &Packet::tcp(client, vip, PSH | ACK, 9001, 7001)).1, own);
    }
}

/// A packet from outside in the name of a pod of this node, or of the host, begins a flow of clients outside. Packets
/// of the pod or the host itself to the same backend do not belong to that flow.
#[test]
fn what_has_not_entered_from_outside_is_no_flow_from_there() {
    const BRIDGE: IfIndex = IfIndex(9);
    for net in Net::ALL {
        for body in [
            Body::Udp { data: vec![1; 9], checksum: true },
            Packet::tcp(net.client(), net.there(), SYN, 7, 0).body,
        ] {
            let world = world();
            let bridge = Device { flags: device::flags::POD_BRIDGE, ..Device::default() };
            world.sim.edge.devices.borrow_mut().insert(BRIDGE, bridge);
            let own = SocketAddr::new(net.local().ip(), 40_001);
            let forged = Packet::new(own, net.there(), body.clone());
            let routed = translated(world.enter(NIC, forged.bytes()));
            let direct = forged.between(own, net.remote(1)).bytes();
            assert_eq!(routed, direct);
            // Before and after the forged flow has got a source of ours.
            for _ in 0..2 {
                for entered in [POD, NEAR, BRIDGE, IfIndex::NONE] {
                    let (verdict, after) = world.leave_from(entered, OVERLAY, direct.clone());
                    assert_eq!((verdict, &after), (Verdict::Pass, &direct), "entered by {entered}");
                }
                // Entered by an external device, or by a device stacked on one.
                for entered in [NIC, OVERLAY, IfIndex(77)] {
                    translated(world.leave_from(entered, OVERLAY, direct.clone()));
                }
            }
        }
    }
}

/// If the kernel's routes show that a pod of this node has the address, no packet from outside with that source
/// begins a flow.
#[test]
fn the_address_of_a_pod_of_this_node_is_not_outside() {
    const BRIDGE: IfIndex = IfIndex(9);
    for net in Net::ALL {
        let own = SocketAddr::new(net.local().ip(), 40_001);
        for (route, served) in [
            (POD, false),
            (NEAR, false),
            (BRIDGE, false),
            (NIC, true),
            (IfIndex(77), true),
            (IfIndex::NONE, true),
        ] {
            for packet in [Packet::udp(own, net.there(), b"?"), Packet::tcp(own, net.there(), SYN, 7, 0)] {
                let world = world();
                let bridge = Device { flags: device::flags::POD_BRIDGE, ..Device::default() };
                world.sim.edge.devices.borrow_mut().insert(BRIDGE, bridge);
                world.route_back.set(route);
                let verdict = world.enter(NIC, packet.bytes()).0;
                assert_eq!(verdict, if served { Verdict::Translated } else { Verdict::Drop }, "{route}");
                assert_eq!(world.sim.counted(Counter::DropForeignSource), u64::from(!served));
                assert_eq!(records(&world).len(), usize::from(served));
            }
        }
    }
}

/// Another pod sends in the name of a backend.
#[test]
fn answers_come_from_where_the_backend_is() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.here(), net.local());
        knock(&world, net, 1000, 0);
        let syn_ack = Packet::tcp(pod, client, SYN | ACK, 5000, 1001);
        assert!(is_answer(&world, &syn_ack));
        translated(world.enter(NIC, Packet::tcp(client, vip, ACK, 1001, 5001).bytes()));
        let before = record(&world);
        for flags in [RST | ACK, FIN | ACK, ACK, SYN | ACK] {
            let forged = Packet::tcp(pod, client, flags, 1, 0xffff_ffff).bytes();
            for entered in [NEAR, NIC, IfIndex::NONE] {
                passes(|bytes| world.leave_from(entered, NIC, bytes), &forged);
            }
        }
        assert_eq!(record(&world), before);
        // The backend's interface has been made anew, and the kernel's routes lead to the new one.
        world.route_back.set(NEAR);
        let data = Packet::tcp(pod, client, PSH | ACK, 5001, 1001);
        translated(world.leave_from(NEAR, NIC, data.bytes()));
        world.route_back.set(IfIndex::NONE);
        translated(world.leave_from(NEAR, NIC, data.bytes()));
        passes(|bytes| world.leave_from(POD, NIC, bytes), &data.bytes());

        // Other nodes may be reached by several devices.
        let (world, remote) = (self::world(), net.remote(1));
        let own = establish(&world, net, net.there());
        let routed =
            translated(world.enter(OVERLAY, Packet::tcp(remote, own, PSH | ACK, 5001, 1001).bytes()));
        passes(|bytes| world.leave_from(POD, NIC, bytes), &routed);
        for entered in [OVERLAY, NIC, IfIndex(77)] {
            translated(world.leave_from(entered, NIC, routed.clone()));
        }
    }
}

/// The kernel gives the element of a record to another flow while a packet of the first flow is in progress.
#[test]
fn nothing_is_written_into_the_element_of_another_flow() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let (_, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 5000, 1001));
        let (tier, key, flow) = record(&world);
        let place = find(&world.sim, &key, Nanos(world.sim.clock.get())).unwrap();
        let other = FlowKey { source: net.stranger().ip().into(), ..key };
        let others = Flow { check: other.check(), state: RESET, ..flow };
        world.sim.edge.recycle(tier, &key, other, others);
        let numbers = Numbers { seq: 1001, ack: 5001, data: 0 };
        let parsed = Parsed { proto: 6, kind: RST | ACK, ..Parsed::default() };
        on_request(&world.sim, &place, &parsed, &Work { key, numbers, now: Nanos(99), ..Work::default() });
        place.set_state(REPLIED);
        place.cell.set_snat(place.check, key.source, key.source_port);
        assert_eq!(records(&world), [(tier, other, others)]);
        assert_eq!(counts(&world), [(Counter::Flow, 1)]);
    }
}

/// Two packets of one flow prove it at the same time.
#[test]
fn who_is_slower_finds_the_flow_assured() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let (_, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 5000, 1001));
        let (_, key, flow) = record(&world);
        let place = find(&world.sim, &key, Nanos(world.sim.clock.get())).unwrap();
        assert!(world.sim.add_flow(Tier::Assured, &key, &flow));
        let parsed = Parsed { proto: 6, kind: ACK, ..Parsed::default() };
        let numbers = Numbers { seq: 1001, ack: 5001, data: 0 };
        on_request(&world.sim, &place, &parsed, &Work { key, numbers, now: Nanos(99), ..Work::default() });
        assert!(records(&world).iter().all(|(_, _, flow)| flow.state & PROVEN == 0));
        assert_eq!(world.sim.counted(Counter::FlowsFull), 0, "there was room");
    }
}

/// A connection that carries data now is not ended by forged ends in the names of both sides and a forged new
/// connection, by the same VIP or by another VIP with the same backend.
#[test]
fn a_busy_connection_outlives_a_forged_end_and_a_forged_beginning() {
    for net in Net::ALL {
        for ends in [&[RST][..], &[FIN | ACK][..]] {
            for vip in [net.there(), net.twin()] {
                let (world, client) = (world(), net.client());
                let own = establish(&world, net, net.there());
                for &flags in ends {
                    open(&world, &Packet::tcp(client, net.there(), flags, 1001, 5001));
                    answer(&world, &Packet::tcp(net.remote(1), own, flags, 5001, 1001));
                }
                open(&world, &Packet::tcp(client, vip, SYN, 9000, 0));
                let (_, source) = open(&world, &Packet::tcp(client, net.there(), PSH | ACK, 1001, 5001));
                assert_eq!(source, own, "{ends:?}");
                answer(&world, &Packet::tcp(net.remote(1), own, PSH | ACK, 5001, 1023));
                assert_eq!(records(&world).len(), 2);
                // Without data for a while, the end counts.
                open(&world, &Packet::tcp(client, net.there(), RST, 1023, 0));
                world.pass(1);
                let (_, source) = open(&world, &Packet::tcp(client, net.there(), SYN, 9500, 0));
                // Another flow has the source only if it replaces the old one.
                let stays = records(&world).iter().any(|(_, _, flow)| flow.state & ASSURED != 0);
                assert_ne!(source == own, stays, "{ends:?}");
            }
        }
    }
}
