//! sendmsg() with an address, and recvmsg() that reports one.

use proxy_common::abi::{BackendId, ServiceId};

use super::*;

fn flow_key(socket: &SimSocket<'_>, addr: Addr, port: u16, direction: FlowDirection) -> UdpFlowKey {
    let port = Be16::new(port);
    UdpFlowKey { cookie: socket.cookie, addr, port, direction: direction as u16, pad: 0 }
}

fn original(socket: &SimSocket<'_>) -> UdpFlowKey {
    flow_key(socket, vip(10), 80, FlowDirection::Original)
}

fn reply(socket: &SimSocket<'_>, backend: BackendId) -> UdpFlowKey {
    flow_key(socket, pod(backend.0), 8080, FlowDirection::Reply)
}

/// Sends a datagram from `from` to the VIP and returns the backend that it goes to.
#[track_caller]
pub(super) fn send(sim: &Simulator, from: &mut SimSocket<'_>) -> BackendId {
    let mut socket = from.clone();
    let before = from.record.is_some_and(|record| record.is_connected());
    assert_eq!(sendmsg(&mut socket, sim), Translated);
    from.record = socket.record;
    assert_eq!(from.record.unwrap().is_connected(), before, "a datagram does not connect");
    backend_of(&socket)
}

/// Receives a datagram from a backend and returns the source that the application sees.
pub(super) fn receive(sim: &Simulator, to: &SimSocket<'_>, backend: BackendId) -> (Addr, u16) {
    let mut socket = SimSocket { addr: pod(backend.0), port: Be16::new(8080), ..to.clone() };
    let verdict = recvmsg(&mut socket, sim);
    assert_eq!(verdict == Translated, socket.addr != pod(backend.0));
    (socket.addr, socket.port.get())
}

/// Records of sockets that send datagrams to the VIP. The first flow of a socket is in its record, every other flow
/// in `UDP_FLOWS`.
fn records() -> [Option<SocketRecord>; 4] {
    let record = SocketRecord {
        vip: vip(99),
        backend_addr: pod(99),
        vip_port: Be16::new(80),
        backend_port: Be16::new(8080),
        service: SocketRecord::DATAGRAMS,
        backend: BackendId(99),
    };
    [
        None,
        Some(record),
        Some(SocketRecord { service: SocketRecord::MORE_DATAGRAMS, ..record }),
        Some(SocketRecord { service: ServiceId(9), ..record }),
    ]
}

/// Returns a socket that has sent datagrams to another VIP.
fn busy() -> SimSocket<'static> {
    with(records()[1])
}

/// Returns a socket with this record, connected if the record says so.
fn with(record: Option<SocketRecord>) -> SimSocket<'static> {
    let connected = record.filter(SocketRecord::is_connected);
    let peer = connected.map_or((Addr::ZERO, Be16::new(0)), |to| (to.backend_addr, to.backend_port));
    SimSocket { record, peer, ..socket(vip(10), 80, UDP) }
}

pub(super) const FROM_VIP: fn() -> (Addr, u16) = || (vip(10), 80);

#[test]
fn datagrams_of_a_socket_stay_with_one_backend() {
    let sim = world();
    let mut backends = BTreeSet::new();
    for cookie in 0..30 {
        let mut socket = SimSocket { cookie, ..with(records()[cookie as usize % 4]) };
        let first = send(&sim, &mut socket);
        backends.insert(first);
        for _ in 0..20 {
            assert_eq!(send(&sim, &mut socket), first);
        }
        assert_eq!(receive(&sim, &socket, first), FROM_VIP());
    }
    assert_eq!(backends, BTreeSet::from([1, 2, 3].map(BackendId)));
    assert_eq!(counts(&sim), [(Counter::Datagram, 30 * 21)]);
}

#[test]
fn answers_come_from_the_vip_for_this_socket_only() {
    let sim = world();
    let mut socket = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut socket);
    assert_eq!(receive(&sim, &socket, id), FROM_VIP());
    // Another socket, another backend, another port of the same pod.
    assert_eq!(receive(&sim, &SimSocket { cookie: 501, ..busy() }, id), (pod(id.0), 8080));
    assert_eq!(receive(&sim, &socket, BackendId(id.0 % 3 + 1)), (pod(id.0 % 3 + 1), 8080));
    let mut other = SimSocket { addr: pod(id.0), port: Be16::new(9), ..socket };
    assert_eq!(recvmsg(&mut other, &sim), Pass);
    assert_eq!((other.addr, other.port), (pod(id.0), Be16::new(9)));
}

#[test]
fn answers_to_a_connected_socket_come_from_the_vip() {
    let sim = world();
    let mut socket = socket(vip(10), 80, UDP);
    connect(&mut socket, &sim);
    socket.peer = (socket.addr, socket.port);
    let id = backend_of(&socket);
    assert_eq!(receive(&sim, &socket, id), FROM_VIP());
    assert_eq!(receive(&sim, &socket, BackendId(id.0 % 3 + 1)), (pod(id.0 % 3 + 1), 8080));
}

#[test]
fn a_flow_moves_when_its_backend_stops_serving_and_hears_late_answers() {
    let gone = ["not serving", "another owner", "another address"];
    for (gone, record) in gone.into_iter().flat_map(|gone| records().map(|record| (gone, record))) {
        let mut sim = world();
        let mut socket = with(record);
        let first = send(&sim, &mut socket);
        let old = sim.backend(first).unwrap();
        // Each replacement of the old backend keeps some of its properties.
        match gone {
            "not serving" => set_backend(&mut sim, first, IN_CLUSTER, 5),
            "another owner" => {
                sim.apply(&Op::Backend(first, Backend { service: ServiceId(2), ..old })).unwrap()
            }
            _ => sim.apply(&Op::Backend(first, Backend { addr: pod(200), ..old })).unwrap(),
        }
        let rest: Vec<_> = (1..=3).map(BackendId).filter(|id| *id != first).collect();
        sim.apply(&Op::Slots(30, rest)).unwrap();
        set_service(&mut sim, |service| service.cluster = SlotRange { base: 30, len: 2 });

        let second = send(&sim, &mut socket);
        assert_ne!(second, first, "{gone}");
        assert_eq!(send(&sim, &mut socket), second);
        assert_eq!(sim.counted(Counter::UdpRepick), 1);
        assert_eq!(receive(&sim, &socket, second), FROM_VIP());
        assert_eq!(receive(&sim, &socket, first), FROM_VIP(), "an answer that was under way");
    }
}

#[test]
fn a_flow_outlives_the_set_while_its_backend_serves() {
    let mut sim = world();
    let mut socket = socket(vip(10), 80, UDP);
    let first = send(&sim, &mut socket);
    // The backend drains: in no set, still serving.
    set_backend(&mut sim, first, SERVING, 5);
    set_service(&mut sim, |service| service.cluster = SlotRange::REJECT);
    assert_eq!(send(&sim, &mut socket), first);
    assert_eq!(sim.counted(Counter::UdpRepick), 0);
}

#[test]
fn who_sends_is_refused_while_nothing_serves_and_then_reaches_whoever_does() {
    for (verdict, answer, counter) in [
        (SlotRange::REJECT, Reject, Counter::RejectNoEndpoint),
        (SlotRange::DROP, Drop, Counter::DropNoLocalEndpoint),
    ] {
        let mut sim = world();
        let mut socket = socket(vip(10), 80, UDP);
        let first = send(&sim, &mut socket);
        for id in 1..=3 {
            set_backend(&mut sim, BackendId(id), 0, 5);
        }
        set_service(&mut sim, |service| service.cluster = verdict);
        let other = SimSocket { cookie: 501, record: None, ..socket.clone() };
        for (at, from) in (1..).zip([&socket, &other]) {
            let mut refused = from.clone();
            assert_eq!(sendmsg(&mut refused, &sim), answer);
            assert_eq!((&refused, sim.counted(counter)), (from, at));
        }
        // The first backend that serves again gets the flow.
        set_backend(&mut sim, BackendId(first.0 % 3 + 1), SERVING | IN_CLUSTER, 6);
        sim.apply(&Op::Slots(30, vec![BackendId(first.0 % 3 + 1)])).unwrap();
        set_service(&mut sim, |service| service.cluster = SlotRange { base: 30, len: 1 });
        assert_eq!(send(&sim, &mut socket), BackendId(first.0 % 3 + 1));
    }
}

#[test]
fn datagrams_of_pods_are_left_to_packets() {
    let mut sim = world();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    let mut from = socket(vip(10), 80, UDP);
    send(&sim, &mut from);
    for id in 1..=3 {
        set_backend(&mut sim, BackendId(id), 0, 5);
    }
    set_service(&mut sim, |service| service.cluster = SlotRange::DROP);
    let other = SimSocket { cookie: 501, record: None, ..from.clone() };
    for (address, other) in [(vip(10), &from), (vip(10), &other), (vip(99), &other)] {
        let mut left = SimSocket { addr: address, ..other.clone() };
        let before = left.clone();
        assert_eq!(sendmsg(&mut left, &sim), Pass);
        assert_eq!(left, before);
        let mut host = SimSocket { netns: HOST_NETNS, ..before };
        assert_eq!(sendmsg(&mut host, &sim), Drop);
    }
    assert_eq!(sim.counted(Counter::LeftToPackets), 3);
}

#[test]
fn a_flow_ends_with_its_frontend() {
    let mut sim = world();
    let mut from = socket(vip(10), 80, UDP);
    send(&sim, &mut from);
    sim.apply(&Op::Frontend(exact(vip(10), 80, UDP), None)).unwrap();
    let mut socket = from.clone();
    assert_eq!(sendmsg(&mut socket, &sim), Reject);
    assert_eq!((socket, sim.counted(Counter::RejectUnusedPort)), (from, 1));
}

#[test]
fn addresses_that_are_no_frontends_are_answered_as_connect_answers() {
    let sim = world();
    for (addr, port, verdict) in
        [(vip(20), 80, Reject), (vip(10), 81, Reject), (vip(99), 80, Drop), (pod(1), 8080, Pass)]
    {
        let from = SimSocket { record: Some(SocketRecord::default()), ..socket(addr, port, UDP) };
        let mut socket = from.clone();
        assert_eq!(sendmsg(&mut socket, &sim), verdict);
        assert_eq!(socket, from, "a datagram elsewhere does not disconnect");
    }
}

#[test]
fn a_datagram_that_cannot_be_remembered_fails_untouched_and_the_next_one_heals() {
    for room in [0, 1] {
        let sim = world();
        sim.udp_flow_room.set(Some(room));
        let mut from = busy();
        let mut socket = from.clone();
        assert_eq!(sendmsg(&mut socket, &sim), Fail);
        assert_eq!((socket.addr, socket.port), (from.addr, from.port));
        assert_eq!(counts(&sim), [(Counter::FailRecord, 1)]);
        sim.udp_flow_room.set(None);
        from.record = socket.record;
        let id = send(&sim, &mut from);
        assert_eq!(receive(&sim, &from, id), FROM_VIP());
    }
}

#[test]
fn the_first_flow_of_a_socket_takes_no_room_that_others_have() {
    let sim = world();
    sim.udp_flow_room.set(Some(0));
    let mut from = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut from);
    assert_eq!(send(&sim, &mut from), id);
    assert_eq!(receive(&sim, &from, id), FROM_VIP());
}

#[test]
fn of_two_vips_with_one_backend_the_last_one_that_was_asked_answers() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(11), 80, UDP), ServiceId(1), 0);
    set_service(&mut sim, |service| service.cluster = SlotRange { base: 30, len: 1 });
    sim.apply(&Op::Slots(30, vec![BackendId(2)])).unwrap();
    let mut from = socket(vip(10), 80, UDP);
    for number in [10, 10, 11, 11, 10, 11, 10] {
        from.addr = vip(number);
        assert_eq!(send(&sim, &mut from), BackendId(2));
        assert_eq!(receive(&sim, &from, BackendId(2)), (vip(number), 80));
    }
    // Eviction of the entries of other VIPs leaves the first flow, which is in the record.
    from.addr = vip(11);
    send(&sim, &mut from);
    assert!(sim.evict_udp_flow(&reply(&from, BackendId(2))).is_some());
    assert_eq!(receive(&sim, &from, BackendId(2)), FROM_VIP());
}

#[test]
fn a_socket_that_is_connected_to_a_pod_has_that_peer_whatever_it_sends() {
    let sim = world();
    let mut from = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut from);
    let mut peer = SimSocket { addr: pod(id.0), port: Be16::new(8080), ..from };
    assert_eq!(peername(&mut peer, &sim), Pass);
    assert_eq!(peer.addr, pod(id.0));
    // The socket is connected after it has sent.
    assert_eq!(connect(&mut peer, &sim), Pass);
    assert_eq!(peer.record, None);
}

#[test]
fn a_socket_without_storage_sends_nothing() {
    let sim = world();
    let from = SimSocket { storage_fails: true, ..socket(vip(10), 80, UDP) };
    let mut socket = from.clone();
    assert_eq!(sendmsg(&mut socket, &sim), Fail);
    assert_eq!(socket, from);
    assert_eq!(counts(&sim), [(Counter::FailRecord, 1)]);
}

#[test]
fn a_socket_that_has_sent_nothing_is_not_looked_up() {
    let sim = world();
    let mut from = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut from);
    let mut server = SimSocket { addr: pod(id.0), port: Be16::new(8080), record: None, ..from };
    assert_eq!(recvmsg(&mut server, &sim), Pass);
    assert_eq!(server.addr, pod(id.0));
}

#[test]
fn either_entry_of_another_flow_may_be_evicted() {
    let sim = world();
    let mut socket = busy();
    let id = send(&sim, &mut socket);
    assert!(sim.evict_udp_flow(&reply(&socket, id)).is_some());
    assert_eq!(receive(&sim, &socket, id), (pod(id.0), 8080));
    assert_eq!(send(&sim, &mut socket), id);
    assert_eq!(receive(&sim, &socket, id), FROM_VIP(), "healed by the next send");

    assert!(sim.evict_udp_flow(&original(&socket)).is_some());
    assert_eq!(receive(&sim, &socket, id), FROM_VIP());
    let id = send(&sim, &mut socket);
    assert_eq!(receive(&sim, &socket, id), FROM_VIP());
}

#[test]
fn entries_that_are_torn_or_of_another_flow_do_not_count() {
    let tears: [fn(UdpFlow, UdpFlow) -> UdpFlow; 5] = [
        |_, stranger| stranger,
        |own, stranger| UdpFlow { addr: stranger.addr, ..own },
        |own, _| UdpFlow { port: Be16::new(1), ..own },
        |own, _| UdpFlow { backend: BackendId(own.backend.0 % 3 + 1), ..own },
        |own, _| UdpFlow { check: own.check ^ 1, ..own },
    ];
    for (at, tear) in tears.iter().enumerate() {
        // Another socket's flow, to another VIP and another backend.
        let mut sim = world();
        let mut from = busy();
        frontend(&mut sim, exact(vip(11), 80, UDP), ServiceId(1), 0);
        let id = send(&sim, &mut from);
        let (other, stranger) = (501..)
            .map(|cookie| SimSocket { cookie, addr: vip(11), ..busy() })
            .map(|mut other| {
                let id = send(&sim, &mut other);
                (other, id)
            })
            .find(|(_, stranger)| *stranger != id)
            .unwrap();
        let flow = |key: UdpFlowKey| (key, sim.udp_flow(&key).unwrap());

        let (key, own) = flow(reply(&from, id));
        let (_, theirs) = flow(reply(&other, stranger));
        assert!(sim.put_udp_flow(&key, &tear(own, theirs)));
        assert_eq!(receive(&sim, &from, id), (pod(id.0), 8080), "tear {at}");

        let (key, own) = flow(original(&from));
        let (_, theirs) = flow(flow_key(&other, vip(11), 80, FlowDirection::Original));
        assert!(sim.put_udp_flow(&key, &tear(own, theirs)));
        let again = send(&sim, &mut from);
        assert_eq!(receive(&sim, &from, again), FROM_VIP(), "tear {at}: both entries are written anew");
        let (_, healed) = flow(original(&from));
        assert_eq!((healed.addr, healed.backend), (pod(again.0), again), "tear {at}");
        assert_eq!(sim.counted(Counter::UdpRepick), 0, "tear {at}: no entry, so no repick");
    }
}

#[test]
fn a_mapped_datagram_leaves_through_one_family_and_its_answer_arrives_through_the_other() {
    // sendmsg4 sees four bytes, recvmsg6 sixteen: both are the same address here.
    let sim = world();
    let mut socket = socket(vip(10), 80, UDP);
    let id = send(&sim, &mut socket);
    let mapped: Addr = format!("::ffff:10.64.0.{id}").parse::<std::net::IpAddr>().unwrap().into();
    let mut answer = SimSocket { addr: mapped, port: Be16::new(8080), ..socket };
    assert_eq!(recvmsg(&mut answer, &sim), Translated);
    assert_eq!(answer.addr, vip(10));
}

#[test]
fn an_answer_is_the_vips_for_two_minutes_after_the_last_datagram() {
    let sim = world();
    let mut from = busy();
    let id = send(&sim, &mut from);
    for _ in 0..20 {
        sim.clock.set(sim.clock.get() + 100 * SECOND);
        assert_eq!(receive(&sim, &from, id), FROM_VIP(), "whoever listens keeps the flow");
    }
    sim.clock.set(sim.clock.get() + 130 * SECOND);
    assert_eq!(receive(&sim, &from, id), (pod(id.0), 8080));
    assert_eq!(send(&sim, &mut from), id);
    assert_eq!(receive(&sim, &from, id), FROM_VIP());
}
