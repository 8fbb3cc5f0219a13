//! Answers to datagrams that this host, or a pod behind its address, has sent from the address and port of a
//! frontend.

use std::net::SocketAddr;

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::{BackendId, BackendState, FlowKind, IfIndex};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{Body, NEAR, NIC, Net, OVERLAY, POD, Packet, Trouble, World, fragments};

use super::{answer, open, passes, translated, world};

/// The host itself, as the device that a packet has entered by.
const HOST: IfIndex = IfIndex::NONE;

/// Returns a datagram of each protocol whose answers cannot be told from requests.
fn datagrams(from: SocketAddr, to: SocketAddr) -> [Packet; 3] {
    let udp = Packet::udp(from, to, b"?");
    [udp.clone(), udp.extended(), Packet::new(from, to, Body::Sctp(vec![0, 0, 0, 8, 1, 2, 3, 4]))]
}

/// Returns the number of questions that are remembered.
fn remembered(world: &World) -> usize {
    let records = world.sim.edge.records(Tier::New);
    records.into_iter().filter(|(key, _)| key.kind == FlowKind::OwnDatagram as u8).count()
}

/// The host, for itself or for a pod, sends a question from the nodePort. Only the answer of its receiver passes.
#[test]
fn who_asks_gets_the_answer() {
    for net in Net::ALL {
        let (own, asked) = (net.node_port(), net.stranger());
        for (by, device) in [(HOST, NIC), (POD, NIC), (POD, OVERLAY), (HOST, OVERLAY), (HOST, POD)] {
            // For IPv6, a pod can write the node's address itself.
            if by == POD && own.is_ipv6() {
                continue;
            }
            for question in datagrams(own, asked) {
                let world = world();
                let answer = question.between(asked, own).bytes();
                // Without a question, the answer is a request to the Service.
                let (verdict, _) = super::world().enter(device, answer.clone());
                assert_eq!(verdict, Verdict::Translated, "{question:?}");
                for _ in 0..2 {
                    passes(|bytes| world.leave_from(by, device, bytes), &question.bytes());
                    passes(|bytes| world.enter(device, bytes), &answer);
                }
                assert_eq!(remembered(&world), 1);
                let other = SocketAddr::new(asked.ip(), asked.port() + 1);
                for stranger in [other, net.client()] {
                    translated(world.enter(device, question.between(stranger, own).bytes()));
                }
                // The receiver of the question is still a client of another frontend.
                let (_, elsewhere) = world.enter(device, question.between(asked, net.there()).bytes());
                assert_ne!(elsewhere, question.between(asked, net.there()).bytes());
            }
        }
    }
}

/// A question is remembered as long as a UDP flow without a reply, and every further question renews it.
#[test]
fn a_question_is_forgotten_after_two_minutes() {
    for net in Net::ALL {
        let world = world();
        let question = Packet::udp(net.node_port(), net.stranger(), b"?");
        let answer = question.between(net.stranger(), net.node_port()).bytes();
        for _ in 0..3 {
            passes(|bytes| world.leave_from(HOST, NIC, bytes), &question.bytes());
            world.pass(119);
            passes(|bytes| world.enter(NIC, bytes), &answer);
        }
        // An answer does not renew it.
        world.pass(2);
        translated(world.enter(NIC, answer));
    }
}

/// No question is remembered if its source is not this host's own, if no frontend has its port, if it comes from
/// outside, or if it is TCP.
#[test]
fn what_is_nobodys_question_is_not_remembered() {
    for net in Net::ALL {
        let world = world();
        let (own, asked) = (net.node_port(), net.stranger());
        let beside = SocketAddr::new(own.ip(), own.port() + 1);
        for (by, packet) in [
            (HOST, Packet::udp(beside, asked, b"?")),
            (HOST, Packet::udp(SocketAddr::new(net.overlay(), own.port()), asked, b"?")),
            (POD, Packet::udp(SocketAddr::new(net.ranged().ip(), 443), asked, b"?")),
            (POD, Packet::udp(net.here(), asked, b"?")),
            (if own.is_ipv6() { POD } else { NIC }, Packet::udp(own, asked, b"?")),
            (NIC, Packet::udp(own, asked, b"?")),
            (OVERLAY, Packet::udp(own, asked, b"?")),
            (HOST, Packet::tcp(own, asked, 2, 1, 0)),
        ] {
            passes(|bytes| world.leave_from(by, NIC, bytes), &packet.bytes());
            assert_eq!(remembered(&world), 0, "{packet:?}");
        }
    }
}

/// A client keeps the Service that it talks to when a question is sent to it from the nodePort meanwhile. The
/// question may come from a pod that wants to receive others' datagrams.
#[test]
fn a_flow_comes_before_a_question() {
    for net in Net::ALL {
        for by in [HOST, POD] {
            let mut world = world();
            let (own, client) = (net.node_port(), net.client());
            let request = Packet::udp(client, own, b"?");
            let (sent, source) = open(&world, &request);
            answer(&world, &Packet::udp(net.remote(1), source, b"!"));
            let claim =
                || passes(|bytes| world.leave_from(by, NIC, bytes), &Packet::udp(own, client, b"?").bytes());
            claim();
            assert_eq!(remembered(&world), 0);
            assert_eq!(open(&world, &request).0, sent);
            // After the backend has left, the client's datagrams still do not go to the process that claimed them.
            for (id, backend) in world.sim.contents().backends.iter().enumerate() {
                if backend.addr == net.remote(1).ip().into() {
                    let state = BackendState { flags: 0, ..backend.state };
                    world.sim.apply(&Op::BackendState(BackendId(id as u32), state)).unwrap();
                }
            }
            let (verdict, _) = world.enter(NIC, request.bytes());
            assert_ne!(verdict, Verdict::Pass);
        }
    }
}

/// An answer that came before its question, or that an earlier agent took for a request, has begun a flow to a
/// backend that does not reply. That flow ends when the host asks. A question of a pod ends no flow.
#[test]
fn what_was_taken_for_a_request_is_an_answer_again() {
    for net in Net::ALL {
        let (own, asked) = (net.node_port(), net.stranger());
        for (by, verdict) in [(HOST, Verdict::Pass), (POD, Verdict::Translated)] {
            let world = world();
            let early = Packet::udp(asked, own, b"!").bytes();
            translated(world.enter(NIC, early.clone()));
            passes(|bytes| world.leave_from(by, NIC, bytes), &Packet::udp(own, asked, b"?").bytes());
            assert_eq!(world.enter(NIC, early).0, verdict);
        }
    }
}

/// A pod writes the node's address into a packet to another pod. The other pod's requests do not become answers.
#[test]
fn no_pod_claims_the_requests_of_another() {
    for net in Net::ALL {
        for by in [POD, NEAR, NIC] {
            let world = world();
            let (own, victim) = (net.node_port(), net.local());
            passes(|bytes| world.leave_from(by, POD, bytes), &Packet::udp(own, victim, b"?").bytes());
            assert_eq!(remembered(&world), 0);
        }
    }
}

/// If one pod has been asked, no other pod and nobody outside can answer.
#[test]
fn an_answer_comes_from_where_the_question_went() {
    for net in Net::ALL {
        for (asked_by, other) in [(NIC, POD), (POD, NIC)] {
            let world = world();
            let question = Packet::udp(net.node_port(), net.stranger(), b"?");
            passes(|bytes| world.leave_from(HOST, asked_by, bytes), &question.bytes());
            translated(world.enter(other, question.between(net.stranger(), net.node_port()).bytes()));
        }
    }
}

/// Answers in fragments, and errors about the question.
#[test]
fn whatever_comes_back_passes() {
    for net in Net::ALL {
        let world = world();
        let question = Packet::udp(net.node_port(), net.stranger(), b"?");
        passes(|bytes| world.leave_from(HOST, NIC, bytes), &question.bytes());
        let answer = Packet::udp(net.stranger(), net.node_port(), &[7; 2000]);
        for fragment in fragments(&answer.bytes(), 1024, 7) {
            passes(|bytes| world.enter(NIC, bytes), &fragment);
        }
        for trouble in [Trouble::PortUnreachable, Trouble::TooBig] {
            let error = Packet::error(net.router(), trouble, &question.bytes(), 548);
            passes(|bytes| world.enter(NIC, bytes), &error.bytes());
        }
        // A question in fragments is remembered, too.
        let world = self::world();
        let question = Packet::udp(net.node_port(), net.stranger(), &[7; 2000]);
        for fragment in fragments(&question.bytes(), 1024, 7) {
            passes(|bytes| world.leave_from(HOST, NIC, bytes), &fragment);
        }
        passes(|bytes| world.enter(NIC, bytes), &answer.bytes());
        assert_eq!(remembered(&world), 1);
    }
}
