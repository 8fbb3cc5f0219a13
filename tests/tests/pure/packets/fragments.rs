//! Fragments: the later ones have no ports and follow their first one.

use std::net::{IpAddr, SocketAddr};

use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::frontend::flags::EXTERNAL;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{Counter, FrontendKey, FrontendValue, ServiceId};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::Verdict;
use proxy_tests::packets::{Body, NIC, Net, OVERLAY, POD, Packet, fragments};

use super::{counts, passes, seen, world};

const FIRST: usize = 1024;

fn large() -> Vec<u8> {
    (0..2000_u16).map(|n| n as u8).collect()
}

/// Returns the two fragments of a translated packet, to compare with.
fn both(packet: &Packet, id: u16) -> [Vec<u8>; 2] {
    fragments(&packet.bytes(), FIRST, id)
}

#[test]
fn all_fragments_go_where_the_first_one_goes() {
    for net in Net::ALL {
        let world = world();
        let (client, vip, pod) = (net.client(), net.there(), net.remote(1));
        let request = Packet::udp(client, vip, &large());
        let mut own = None;
        for (id, repeated) in [(7, false), (7, true), (8, false)] {
            let wanted = both(&request.between(client, pod), id);
            let mut routed = Vec::new();
            for (fragment, wanted) in both(&request, id).into_iter().zip(wanted) {
                let (verdict, bytes) = world.enter(NIC, fragment);
                assert_eq!((verdict, &bytes), (Verdict::Translated, &wanted), "repeated: {repeated}");
                routed.push(bytes);
            }
            let sent: Vec<_> = routed.into_iter().map(|bytes| world.leave(OVERLAY, bytes)).collect();
            // Only the first fragment has the port.
            let source = sent_from(&sent[0].1, net);
            assert_eq!(*own.get_or_insert(source), source);
            let wanted = both(&request.between(source, pod), id);
            for ((verdict, bytes), wanted) in sent.into_iter().zip(wanted) {
                assert_eq!((verdict, bytes), (Verdict::Translated, wanted));
            }
        }
        let own = own.unwrap();
        let reply = Packet::udp(pod, own, &large());
        let wanted = both(&reply.between(vip, client), 9);
        for (fragment, wanted) in both(&reply, 9).into_iter().zip(wanted) {
            let (verdict, routed) = world.enter(OVERLAY, fragment);
            assert_eq!(verdict, Verdict::Translated);
            assert_eq!(world.leave(NIC, routed), (Verdict::Translated, wanted));
        }
        assert_eq!(counts(&world), [(Counter::Flow, 1)]);
    }
}

fn sent_from(first: &[u8], net: Net) -> SocketAddr {
    let header = if net.v6 { 14 + 40 + 8 } else { 14 + 20 };
    let port = u16::from_be_bytes([first[header], first[header + 1]]);
    SocketAddr::new(seen(first).source.ip(), port)
}

#[test]
fn fragments_of_answers_from_this_node() {
    for net in Net::ALL {
        let world = world();
        let (client, vip, pod) = (net.client(), net.here(), net.local());
        world.enter(NIC, Packet::udp(client, vip, b"?").bytes());
        let reply = Packet::udp(pod, client, &large());
        let wanted = both(&reply.between(vip, client), 9);
        for (fragment, wanted) in both(&reply, 9).into_iter().zip(wanted) {
            passes(|bytes| world.enter(POD, bytes), &fragment);
            assert_eq!(world.leave(NIC, fragment), (Verdict::Translated, wanted));
        }
    }
}

#[test]
fn what_comes_before_its_first_fragment_is_dropped() {
    for net in Net::ALL {
        for vip in [net.there(), net.ranged()] {
            let world = world();
            let [first, later] = both(&Packet::udp(net.client(), vip, &large()), 7);
            assert_eq!(world.enter(NIC, later.clone()).0, Verdict::Drop);
            assert_eq!(world.enter(NIC, first).0, Verdict::Translated);
            assert_eq!(world.enter(NIC, later).0, Verdict::Translated);
            assert_eq!(counts(&world), [(Counter::Flow, 1), (Counter::DropFragment, 1)]);
        }
    }
}

#[test]
fn fragments_of_others_stay_as_they_are() {
    for net in Net::ALL {
        let world = world();
        let beside = SocketAddr::new(net.beside().ip(), 80);
        let unused = SocketAddr::new(net.ranged().ip(), 9999);
        let node = SocketAddr::new(net.node(), 9999);
        for (id, destination) in (1..).zip([beside, unused, node, net.client(), net.remote(2)]) {
            let packet = Packet::udp(net.stranger(), destination, &large());
            let [first, later] = both(&packet, id);
            for device in [NIC, POD] {
                passes(|bytes| world.enter(device, bytes), &first);
                passes(|bytes| world.enter(device, bytes), &later);
                passes(|bytes| world.leave(device, bytes), &first);
                passes(|bytes| world.leave(device, bytes), &later);
            }
        }
        // Later fragments without a first one pass, too, if the destination shares no bit with a Service.
        for (id, destination) in (11..).zip([beside, node, net.client(), net.remote(2)]) {
            let [_, later] = both(&Packet::udp(net.stranger(), destination, &large()), id);
            passes(|bytes| world.enter(NIC, bytes), &later);
        }
        assert_eq!(counts(&world), []);
    }
}

/// The filter has a bit for each address of a Service, and pods' addresses may share a bit by chance. Their fragments
/// still pass.
#[test]
fn fragments_to_pods_pass_out_of_order() {
    for net in Net::ALL {
        let mut world = world();
        for number in 1..100 {
            let addr = beside(net.ranged().ip(), number).into();
            let key = FrontendKey::exact(addr, Be16::new(53), UDP);
            let value = FrontendValue::new(&key, ServiceId(net.there_id()), EXTERNAL);
            world.sim.apply(&Op::Frontend(key, Some(value))).unwrap();
        }
        let mut shared = 0;
        for pod in (0..=u16::MAX).map(|number| beside(net.remote(1).ip(), number)) {
            if world.may_be_ours(pod) {
                let packet = Packet::udp(net.stranger(), SocketAddr::new(pod, 80), &large());
                let [_, later] = both(&packet, 1);
                passes(|bytes| world.enter(NIC, bytes), &later);
                shared += 1;
            }
        }
        assert!(shared > 0, "{net:?}: no pod shares a bit with a Service");
        assert_eq!(counts(&world), []);
    }
}

fn beside(like: IpAddr, number: u16) -> IpAddr {
    match like {
        IpAddr::V4(v4) => IpAddr::from((u32::from(v4) & 0xffff_0000 | u32::from(number)).to_be_bytes()),
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) & !0xffff | u128::from(number)).to_be_bytes()),
    }
}

/// In a later fragment of a large ping, data is at the place of the ICMP type.
#[test]
fn a_fragment_of_an_echo_is_no_error() {
    for net in Net::ALL {
        let world = world();
        let request = Packet::udp(net.client(), net.there(), b"?");
        let (sent, _) = super::open(&world, &request);
        let error = Packet::error(net.router(), proxy_tests::packets::Trouble::TooBig, &sent, 548);
        // An echo whose later fragment looks like an error about that flow.
        let mut echo = Packet::new(error.source, error.destination, Body::Ping).bytes();
        let at = 14 + if net.v6 { 40 } else { 20 };
        echo.resize(at + 16, 0);
        echo.extend(&error.bytes()[at..]);
        if net.v6 {
            let length = (echo.len() - at) as u16;
            echo[18..20].copy_from_slice(&length.to_be_bytes());
        }
        let [first, later] = fragments(&echo, 16, 3);
        passes(|bytes| world.enter(OVERLAY, bytes), &first);
        passes(|bytes| world.enter(OVERLAY, bytes), &later);
        passes(|bytes| world.leave(NIC, bytes), &first);
        passes(|bytes| world.leave(NIC, bytes), &later);
    }
}

/// RFC 6946: a packet that is whole, but has a fragment header.
#[test]
fn a_fragment_that_is_everything_is_a_whole_packet() {
    let net = Net { v6: true };
    let world = world();
    let request = Packet::udp(net.client(), net.there(), &large()[..1000]);
    let (verdict, bytes) = world.enter(NIC, atomic(&request));
    assert_eq!(
        (verdict, bytes),
        (Verdict::Translated, atomic(&request.between(net.client(), net.remote(1))))
    );
}

fn atomic(packet: &Packet) -> Vec<u8> {
    let [mut first, _] = fragments(&packet.bytes(), 1008, 5);
    // Clears the flag for more fragments.
    first[14 + 40 + 3] &= !1;
    first
}

#[test]
fn the_ports_have_to_be_in_the_first_fragment() {
    for net in Net::ALL {
        let world = world();
        let segment = Packet::tcp(net.client(), net.there(), 0x02, 1, 0);
        // The first eight or sixteen bytes of a TCP header do not contain its flags, which the decision needs.
        for first in [8, 16] {
            let [first, _] = fragments(&segment.bytes(), first, 7);
            assert_eq!(world.enter(NIC, first).0, Verdict::Drop);
        }
        assert_eq!(world.sim.edge.records(proxy_common::datapath::edge::tables::Tier::New), []);
        assert_eq!(counts(&world), [(Counter::DropMalformed, 2)]);
    }
}
