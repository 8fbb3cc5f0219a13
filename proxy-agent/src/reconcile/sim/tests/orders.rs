//! UDP sockets that are connected to a VIP while no backend serves, and that the agent moves.

use proxy_common::abi::socket::{Order, order};
use proxy_common::abi::{BackendId, ServiceId};

use super::*;

#[test]
fn connect_of_udp_does_not_fail_for_lack_of_endpoints() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(21), 80, UDP), ServiceId(2), POD_LOCAL | NEAR_LOCAL);
    for flags in [0, PODS_IN_PACKETS] {
        sim.apply(&Op::NodeFlags(flags)).unwrap();
        for (addr, port, verdict, counter) in [
            (vip(20), 80, Pass, Counter::RejectNoEndpoint),
            (vip(21), 80, Pass, Counter::DropNoLocalEndpoint),
            // These cases are no lack of endpoints.
            (vip(10), 81, Reject, Counter::RejectUnusedPort),
            (vip(99), 80, Drop, Counter::DropInactiveAddress),
        ] {
            let host = SimSocket { netns: HOST_NETNS, ..socket(addr, port, UDP) };
            check(&sim, host, verdict, Some(counter));
            // If nobody judges the packets of pods, the packets would leave for any host that has the address.
            let mut pod = socket(addr, port, UDP);
            let served_later = flags != 0 && verdict == Pass;
            assert_eq!(
                connect(&mut pod, &sim) == Pass,
                served_later || flags != 0 && verdict == Drop,
                "{addr}"
            );
        }
    }
}

/// Returns a socket that the agent has an order for: from `peer` to the backend of `vip`.
fn ordered(vip: Addr, peer: (Addr, u16)) -> SimSocket<'static> {
    let (peer, peer_port) = (peer.0, Be16::new(peer.1));
    let order = Order { vip, vip_port: Be16::new(80), peer, peer_port };
    SimSocket {
        order: Some(order),
        peer: (peer, peer_port),
        ..socket(order::ADDRESS, order::PORT.get(), UDP)
    }
}

#[test]
fn the_agent_leads_a_socket_to_where_its_vip_leads_now() {
    let sim = world();
    // From a backend that has left, and from the VIP itself, which was not served when the owner connected the
    // socket.
    for (peer, before) in [((pod(9), 8080), Some(record(BackendId(9)))), ((vip(10), 80), None)] {
        let mut socket = SimSocket { record: before, ..ordered(vip(10), peer) };
        assert_eq!(connect(&mut socket, &sim), Translated);
        assert_eq!(socket.record, Some(record(backend_of(&socket))));
    }
    // To the VIP itself while no backend serves, or when no Service has the VIP any more. A socket stays if its
    // packets would not be judged.
    for (to, netns, led) in [
        (vip(20), HOST_NETNS, true),
        (vip(20), POD_NETNS, false),
        (Addr::v4([192, 0, 2, 77]), HOST_NETNS, true),
        (Addr::v4([192, 0, 2, 77]), POD_NETNS, true),
    ] {
        let before = SocketRecord { vip: to, ..record(BackendId(9)) };
        let was = SimSocket { record: Some(before), netns, ..ordered(to, (pod(9), 8080)) };
        let mut socket = was.clone();
        if led {
            assert_eq!(connect(&mut socket, &sim), Translated);
            assert_eq!((socket.addr, socket.port, socket.record), (to, Be16::new(80), None));
        } else {
            assert_eq!(connect(&mut socket, &sim), Reject);
            assert_eq!(socket, was);
        }
    }
    // getpeername() shows whether the hooks run for a socket without a record.
    let mut asked = SimSocket { addr: vip(10), port: Be16::new(80), ..ordered(vip(10), (vip(10), 80)) };
    assert_eq!(peername(&mut asked, &sim), Translated);
    assert_eq!((asked.addr, asked.port), (order::ADDRESS, order::PORT));
    // Nothing happens without an order, or if the owner has meanwhile connected the socket elsewhere.
    let led = SimSocket { record: Some(record(BackendId(9))), ..ordered(vip(10), (pod(9), 8080)) };
    for moved in [
        SimSocket { order: None, ..led.clone() },
        SimSocket { peer: (pod(8), Be16::new(8080)), ..led.clone() },
        SimSocket { peer: (Addr::ZERO, Be16::new(0)), ..led.clone() },
        SimSocket { record: None, ..led.clone() },
        SimSocket { record: Some(SocketRecord { vip: vip(11), ..record(BackendId(9)) }), ..led.clone() },
        SimSocket { record: Some(record(BackendId(8))), ..ordered(vip(10), (vip(10), 80)) },
    ] {
        let mut socket = moved.clone();
        assert_eq!(connect(&mut socket, &sim), Reject, "{moved:?}");
        assert_eq!(socket, moved);
    }
    // The owner's connect() removes the order.
    let mut owners = SimSocket { addr: vip(10), port: Be16::new(80), ..led.clone() };
    connect(&mut owners, &sim);
    assert_eq!(owners.order, None);
    // Another protocol ignores the order.
    let mut stream = SimSocket { protocol: TCP.into(), ..led };
    assert_eq!(connect(&mut stream, &sim), Pass);
}

fn record(backend: BackendId) -> SocketRecord {
    SocketRecord {
        vip: vip(10),
        vip_port: Be16::new(80),
        backend_addr: pod(backend.0),
        backend_port: Be16::new(8080),
        service: ServiceId(1),
        backend,
    }
}
