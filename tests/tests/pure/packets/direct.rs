//! Datagrams that one client port sends both to a Service and to the Service's backend itself.

use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::flow::state::DIRECT;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{Backend, BackendId, BackendState, Counter, FrontendKey, FrontendValue, ServiceId};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::tables::Tier;
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::packets::{Body, ETHERNET, NIC, Net, OVERLAY, POD, Packet, Trouble, World, fragments};

use super::{counts, passes, seen, translated, world};

/// Takes a packet of the client to a backend. Returns it as the backend sees it.
#[track_caller]
fn ask(world: &World, net: Net, pod: SocketAddr, request: &[u8]) -> Vec<u8> {
    let (_, routed) = world.enter(NIC, request.to_vec());
    let (_, sent) = if pod == net.local() {
        world.leave_from(NIC, POD, routed)
    } else {
        world.leave_from(NIC, OVERLAY, routed)
    };
    assert_eq!(seen(&sent).destination, pod);
    sent
}

/// Takes a reply of a backend to the client. Returns it as the client sees it.
#[track_caller]
fn answered(world: &World, net: Net, pod: SocketAddr, reply: &[u8]) -> Vec<u8> {
    let by = if pod == net.local() { POD } else { OVERLAY };
    let (_, routed) = world.enter(by, reply.to_vec());
    world.leave_from(by, NIC, routed).1
}

/// Takes a request to `to` and its reply. Returns the source that the backend sees.
#[track_caller]
fn talk(world: &World, net: Net, pod: SocketAddr, request: &Packet) -> SocketAddr {
    let source = seen(&ask(world, net, pod, &request.bytes())).source;
    let reply = request.between(pod, source);
    let heard = answered(world, net, pod, &reply.bytes());
    assert_eq!(heard, reply.between(request.destination, request.source).bytes());
    source
}

#[test]
fn who_talks_to_a_service_and_to_its_pod_by_one_port_is_answered_by_each() {
    for net in Net::ALL {
        for (vip, pod) in [(net.here(), net.local()), (net.there(), net.remote(1))] {
            for vip_first in [false, true] {
                let (world, client) = (world(), net.client());
                let [to_vip, to_pod] =
                    [vip, pod].map(|destination| Packet::udp(client, destination, b"a question"));
                if !vip_first {
                    // No flow exists between these ends, so the packets are left alone.
                    passes(|bytes| world.enter(NIC, bytes), &to_pod.bytes());
                    assert_eq!(talk(&world, net, pod, &to_pod), client);
                    assert_eq!(counts(&world), []);
                }
                let by_service = talk(&world, net, pod, &to_vip);
                let direct = talk(&world, net, pod, &to_pod);
                assert_ne!(by_service, direct);
                for _ in 0..3 {
                    assert_eq!(talk(&world, net, pod, &to_pod), direct);
                    assert_eq!(talk(&world, net, pod, &to_vip), by_service);
                }
                assert_eq!(counts(&world), [(Counter::Flow, 2)]);
                // Requests from another port, or from another client. (An association of SCTP cannot change its
                // port.)
                for other in [SocketAddr::new(client.ip(), 4_999), net.stranger()] {
                    let request = Packet::udp(other, pod, b"?");
                    passes(|bytes| world.enter(NIC, bytes), &request.bytes());
                    assert_eq!(talk(&world, net, pod, &request), other);
                }
                let heartbeat = Packet::new(client, pod, Body::Sctp(b"a chunk of some data".to_vec()));
                passes(|bytes| world.enter(NIC, bytes), &heartbeat.bytes());
            }
        }
    }
}

#[test]
fn what_is_sent_to_the_pod_keeps_its_port_while_it_goes_on() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.here(), net.local());
        talk(&world, net, pod, &Packet::udp(client, vip, b"?"));
        let request = Packet::udp(client, pod, b"?");
        let direct = talk(&world, net, pod, &request);
        // The flow of the Service ends meanwhile.
        for _ in 0..10 {
            world.pass(100);
            assert_eq!(talk(&world, net, pod, &request), direct);
        }
        world.pass(1000);
        passes(|bytes| world.enter(NIC, bytes), &request.bytes());
        assert_eq!(talk(&world, net, pod, &request), client);
    }
}

/// A flow of clients outside does not affect a pod: its packets from the same address and port belong to no flow.
#[test]
fn a_flow_of_another_origin_is_no_reason() {
    for net in Net::ALL {
        let (world, vip, pod) = (world(), net.here(), net.local());
        world.enter(NIC, Packet::udp(net.client(), vip, b"?").bytes());
        passes(|bytes| world.enter(POD, bytes), &Packet::udp(net.client(), pod, b"?").bytes());
    }
}

#[test]
fn fragments_and_errors_belong_to_either() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.here(), net.local());
        let large: Vec<u8> = (0..2000_u16).map(|n| n as u8).collect();
        let request = Packet::udp(client, pod, &large);
        for fragment in fragments(&request.bytes(), 1024, 7) {
            passes(|bytes| world.enter(NIC, bytes), &fragment);
        }
        talk(&world, net, pod, &Packet::udp(client, vip, b"?"));
        let direct = talk(&world, net, pod, &Packet::udp(client, pod, b"?"));
        let wanted = fragments(&request.between(direct, pod).bytes(), 1024, 8);
        for (fragment, wanted) in fragments(&request.bytes(), 1024, 8).into_iter().zip(wanted) {
            assert_eq!(world.enter(NIC, fragment), (Verdict::Translated, wanted));
        }

        let asked = Packet::udp(client, pod, b"?");
        let sent = ask(&world, net, pod, &asked.bytes());
        let error = Packet::error(pod.ip(), Trouble::PortUnreachable, &sent, 548);
        is_about(&translated(world.leave_from(POD, NIC, error.bytes())), client, &asked);

        // An error about a reply: the pod knows its client by the other port.
        let answer = Packet::udp(pod, direct, b"!");
        let heard = answered(&world, net, pod, &answer.bytes());
        let error = Packet::error(net.router(), Trouble::TooBig, &heard, 548);
        is_about(&translated(world.enter(NIC, error.bytes())), pod, &answer);
        let other = Packet::udp(pod, SocketAddr::new(client.ip(), 4_999), b"!").bytes();
        let error = Packet::error(net.router(), Trouble::TooBig, &other, 548).bytes();
        passes(|bytes| world.enter(NIC, bytes), &error);
    }
}

#[track_caller]
fn is_about(error: &[u8], to: SocketAddr, sent: &Packet) {
    let (shown, sent) = (seen(error), sent.bytes());
    assert_eq!(shown.destination.ip(), to.ip());
    assert_eq!(shown.payload, sent[ETHERNET..][..shown.payload.len()], "the quote is not what was sent");
}

/// The flow of the Service stays until it expires after its backend has left; the pod may still exist.
#[test]
fn a_backend_that_has_left_its_service_is_talked_to() {
    for net in Net::ALL {
        let (mut world, client, vip, pod) = (world(), net.client(), net.here(), net.local());
        talk(&world, net, pod, &Packet::udp(client, vip, b"?"));
        let (_, flow) = world.sim.edge.records(Tier::New).remove(0);
        let backend =
            Backend { service: ServiceId(flow.service.0 + 1), ..world.sim.backend(flow.backend).unwrap() };
        world.sim.apply(&Op::Backend(flow.backend, backend)).unwrap();
        let request = Packet::udp(client, pod, b"?");
        let direct = talk(&world, net, pod, &request);
        assert_ne!(direct, client);
        let flows = world.sim.edge.records(Tier::New);
        let of_service = flows.iter().filter(|(_, flow)| flow.service != ServiceId::NONE).count();
        assert_eq!((flows.len(), of_service), (2, 1), "nothing of it is the Service's");
    }
}

/// A pod on the host's network can have the same address and port as an externalIP.
#[test]
fn a_service_at_its_backends_own_address_is_one() {
    for net in Net::ALL {
        let (mut world, client, pod) = (world(), net.client(), net.remote(1));
        let (addr, port) = (pod.ip().into(), Be16::new(pod.port()));
        let request = Packet::udp(client, pod, b"?");
        talk(&world, net, pod, &Packet::udp(client, net.there(), b"?"));
        talk(&world, net, pod, &request);
        let value =
            world.sim.frontend(&FrontendKey::exact(net.there().ip().into(), Be16::new(80), UDP)).unwrap();
        let key = FrontendKey::exact(addr, port, UDP);
        let value = FrontendValue::new(&key, value.service, value.flags);
        world.sim.apply(&Op::Frontend(key, Some(value))).unwrap();
        // The flow to the pod itself now belongs to the Service, and follows the Service's backends.
        assert_eq!(direct(&world, addr), [true]);
        world.enter(NIC, request.bytes());
        assert_eq!(direct(&world, addr), [false]);
        let state = BackendState { flags: 0, generation: 1 };
        world.sim.apply(&Op::BackendState(BackendId(net.there_id()), state)).unwrap();
        let before = world.sim.counted(Counter::UdpRepick);
        world.enter(NIC, request.bytes());
        assert!(world.sim.counted(Counter::UdpRepick) > before, "it does not stay with what has left");
    }
}

fn direct(world: &World, vip: Addr) -> Vec<bool> {
    let flows = world.sim.edge.records(Tier::New).into_iter();
    flows.filter(|(_, flow)| flow.vip == vip).map(|(_, flow)| flow.state & DIRECT != 0).collect::<Vec<_>>()
}
