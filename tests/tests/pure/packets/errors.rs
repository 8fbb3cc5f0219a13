//! ICMP errors: the receiver of an error finds in it its own packet, byte for byte.

use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::Counter;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, SYN};
use proxy_tests::packets::{Body, ETHERNET, NIC, Net, OVERLAY, POD, Packet, Trouble, World, read};

use super::{answer, counts, open, passes, seen, translated, world};

/// Numbers of bytes that routers quote: as few as RFC 792 allows, and everything.
fn quotes(net: Net) -> [usize; 3] {
    if net.v6 { [48, 60, 1200] } else { [28, 40, 548] }
}

/// Returns the first packets of flows over either protocol, plain and with options or extension headers.
fn requests(net: Net, vip: SocketAddr) -> Vec<Packet> {
    let client = net.client();
    let plain =
        [Packet::tcp(client, vip, SYN, 1000, 0), Packet::udp(client, vip, b"a rather large datagram")];
    plain.into_iter().flat_map(|packet| [packet.clone(), packet.extended()]).collect()
}

fn headers(packet: &Packet) -> usize {
    match (packet.source.is_ipv6(), packet.extended) {
        (false, false) => 20,
        (false, true) => 28,
        (true, false) => 40,
        (true, true) => 40 + 24,
    }
}

/// Returns the error of `trouble` about `frame`, with at least the headers and eight bytes of `packet`.
fn error(from: IpAddr, trouble: Trouble, packet: &Packet, frame: &[u8], most: usize) -> Packet {
    Packet::error(from, trouble, frame, most.max(headers(packet) + 8))
}

/// Checks an error as its receiver sees it: its sender, and the receiver's own packet that it quotes.
#[track_caller]
fn is_about(bytes: &[u8], trouble: Trouble, from: IpAddr, to: IpAddr, sent: &[u8]) {
    let seen = seen(bytes);
    assert_eq!((seen.source.ip(), seen.destination.ip()), (from, to));
    assert_eq!(seen.icmp, Some(trouble.numbers(to.is_ipv6())));
    let sent = &sent[ETHERNET..];
    assert_eq!(seen.payload, sent[..seen.payload.len()], "the quote is not what was sent");
}

#[test]
fn about_a_request_on_its_way_to_another_node() {
    for net in Net::ALL {
        let vip = net.there();
        for (trouble, request) in each(requests(net, vip)) {
            for most in quotes(net) {
                let world = world();
                let (sent, _) = open(&world, &request);
                for (from, as_seen) in [(net.router(), net.router()), (net.remote(1).ip(), vip.ip())] {
                    let error = error(from, trouble, &request, &sent, most);
                    let routed = translated(world.enter(OVERLAY, error.bytes()));
                    let shown = seen(&routed);
                    assert_eq!(shown.destination.ip(), net.client().ip(), "on the way to the client");
                    let arrived = translated(world.leave(NIC, routed));
                    is_about(&arrived, trouble, as_seen, net.client().ip(), &request.bytes());
                }
            }
        }
    }
}

/// A flow has been begun in the name of a client that has a connection straight to the backend. Errors of routers
/// about that connection reach its ends unchanged.
#[test]
fn about_another_connection_between_the_same_ends() {
    for net in Net::ALL {
        for (vip, pod) in [(net.here(), net.local()), (net.there(), net.remote(1))] {
            let (world, client) = (world(), net.client());
            let forged = Packet::tcp(client, vip, SYN, 1000, 0);
            let own = if pod == net.local() {
                translated(world.enter(NIC, forged.bytes()));
                client
            } else {
                open(&world, &forged).1
            };
            for replied in [false, true] {
                if replied {
                    let reply = Packet::tcp(pod, own, SYN | ACK, 5000, 1001);
                    let routed = if own == client {
                        reply.bytes()
                    } else {
                        translated(world.enter(OVERLAY, reply.bytes()))
                    };
                    translated(world.leave(NIC, routed));
                }
                let true_one = Packet::tcp(client, pod, ACK, 77_000, 99_000);
                let most = quotes(net)[0];
                let towards = error(net.router(), Trouble::TooBig, &true_one, &true_one.bytes(), most);
                passes(|bytes| world.leave(NIC, bytes), &towards.bytes());
                let answer = Packet::tcp(pod, client, ACK, 990_000, 77_001);
                let back = error(net.router(), Trouble::TooBig, &answer, &answer.bytes(), most);
                passes(|bytes| world.leave(OVERLAY, bytes), &back.bytes());
            }
        }
    }
}

/// The header that the error quotes has the length 0 (BIG TCP).
#[test]
fn about_a_train_that_is_longer_than_its_header_can_tell() {
    for net in Net::ALL {
        let (vip, at) = (net.there(), if net.v6 { 4 } else { 2 });
        for request in
            requests(net, vip).into_iter().filter(|request| matches!(request.body, Body::Tcp { .. }))
        {
            let world = world();
            let (mut sent, _) = open(&world, &request);
            sent[ETHERNET + at..ETHERNET + at + 2].fill(0);
            let error = error(net.router(), Trouble::TooBig, &request, &sent, quotes(net)[0]);
            let arrived = translated(world.leave(NIC, translated(world.enter(OVERLAY, error.bytes()))));
            let mut original = request.bytes();
            original[ETHERNET + at..ETHERNET + at + 2].fill(0);
            is_about(&arrived, Trouble::TooBig, net.router(), net.client().ip(), &original);
        }
    }
}

#[test]
fn about_a_request_to_a_pod_of_this_node() {
    for net in Net::ALL {
        let vip = net.here();
        for (trouble, request) in each(requests(net, vip)) {
            for most in quotes(net) {
                let world = world();
                let routed = translated(world.enter(NIC, request.bytes()));
                for (from, as_seen) in [(net.node(), net.node()), (net.local().ip(), vip.ip())] {
                    let error = error(from, trouble, &request, &routed, most);
                    passes(|bytes| world.enter(POD, bytes), &error.bytes());
                    let arrived = translated(world.leave(NIC, error.bytes()));
                    is_about(&arrived, trouble, as_seen, net.client().ip(), &request.bytes());
                }
            }
        }
    }
}

/// Sends a reply to the client's network. Returns it as the backend sent it, and as it arrived.
fn answered(
    world: &World,
    request: &Packet,
    backend: SocketAddr,
    own: Option<SocketAddr>,
) -> (Vec<u8>, Vec<u8>) {
    let to = own.unwrap_or(request.source);
    let body = if matches!(request.body, Body::Tcp { .. }) {
        Body::Tcp { flags: SYN | ACK, seq: 5001, ack: 1001, data: vec![3; 60] }
    } else {
        Body::Udp { data: vec![4; 60], checksum: true }
    };
    let reply = Packet { body, ..request.between(backend, to) };
    let sent = reply.bytes();
    let arrived = match own {
        Some(_) => answer(world, &reply),
        None => translated(world.leave(NIC, sent.clone())),
    };
    (sent, arrived)
}

#[test]
fn about_an_answer_from_another_node() {
    for net in Net::ALL {
        let vip = net.there();
        for (trouble, request) in each(requests(net, vip)) {
            for most in quotes(net) {
                let world = world();
                let (_, own) = open(&world, &request);
                let (sent, arrived) = answered(&world, &request, net.remote(1), Some(own));
                for from in [net.router(), net.client().ip()] {
                    let error = error(from, trouble, &request, &arrived, most);
                    let routed = translated(world.enter(NIC, error.bytes()));
                    assert_eq!(seen(&routed).destination.ip(), net.remote(1).ip());
                    let back = translated(world.leave(OVERLAY, routed));
                    // Any sender is accepted: the error comes from an address of ours, which lets it through.
                    is_about(&back, trouble, own.ip(), net.remote(1).ip(), &sent);
                }
            }
        }
    }
}

#[test]
fn about_an_answer_from_a_pod_of_this_node() {
    for net in Net::ALL {
        let (vip, pod) = (net.here(), net.local());
        for (trouble, request) in each(requests(net, vip)) {
            for most in quotes(net) {
                let world = world();
                translated(world.enter(NIC, request.bytes()));
                let (sent, arrived) = answered(&world, &request, pod, None);
                let from = net.router();
                let error = error(from, trouble, &request, &arrived, most);
                let routed = translated(world.enter(NIC, error.bytes()));
                is_about(&routed, trouble, from, pod.ip(), &sent);
                passes(|bytes| world.leave(POD, bytes), &routed);
            }
        }
    }
}

#[test]
fn about_a_pods_request_to_itself() {
    for net in Net::ALL {
        let (vip, pod) = (net.here(), net.local());
        let client = SocketAddr::new(pod.ip(), 41_000);
        let request = Packet::udp(client, vip, b"to myself");
        for (trouble, _) in each(vec![request.clone()]) {
            let world = world();
            let routed = translated(world.enter(POD, request.bytes()));
            let sent = translated(world.leave(POD, routed));
            let error = error(pod.ip(), trouble, &request, &sent, 548);
            let routed = translated(world.enter(POD, error.bytes()));
            let arrived = translated(world.leave(POD, routed));
            is_about(&arrived, trouble, vip.ip(), pod.ip(), &request.bytes());
        }
    }
}

/// Returns every kind of error with every packet.
fn each(packets: Vec<Packet>) -> Vec<(Trouble, Packet)> {
    packets.iter().flat_map(|packet| Trouble::TRANSLATED.map(|trouble| (trouble, packet.clone()))).collect()
}

#[test]
fn redirects_about_flows_are_dropped() {
    for net in Net::ALL {
        let world = world();
        let request = Packet::udp(net.client(), net.there(), &[9; 64]);
        let (_, own) = open(&world, &request);
        let routed = request.between(net.client(), net.remote(1)).bytes();
        let redirect = Packet::error(net.node(), Trouble::Redirect, &routed, 200);
        assert_eq!(world.leave(NIC, redirect.bytes()).0, Verdict::Drop, "to the client");
        let sent = request.between(own, net.remote(1)).bytes();
        let redirect = Packet::error(net.router(), Trouble::Redirect, &sent, 200);
        assert_eq!(world.enter(OVERLAY, redirect.bytes()).0, Verdict::Drop, "to us");
        assert_eq!(world.sim.counted(Counter::DropRedirect), 2);
        let other = request.between(net.client(), net.remote(2)).bytes();
        let redirect = Packet::error(net.node(), Trouble::Redirect, &other, 200);
        passes(|bytes| world.leave(NIC, bytes), &redirect.bytes());
    }
}

#[test]
fn errors_about_other_packets_stay_as_they_are() {
    for net in Net::ALL {
        let world = world();
        let request = Packet::udp(net.client(), net.there(), b"?");
        let (sent, own) = open(&world, &request);
        let elsewhere = Packet::udp(own, net.remote(2), b"?").bytes();
        let unsent = Packet::udp(net.client(), net.twin(), b"?").bytes();
        for (about, why) in [(&elsewhere, "another backend"), (&unsent, "a flow that is not")] {
            let error = Packet::error(net.router(), Trouble::TooBig, about, 548).bytes();
            passes(|bytes| world.enter(OVERLAY, bytes), &error);
            passes(|bytes| world.leave(NIC, bytes), &error);
            assert!(!why.is_empty());
        }
        // An error about a flow of ours, to a host that has not sent the packet.
        let mut error = Packet::error(net.router(), Trouble::TooBig, &sent, 548);
        error.destination = SocketAddr::new(net.node(), 0);
        passes(|bytes| world.enter(OVERLAY, bytes), &error.bytes());
        assert_eq!(counts(&world), [(Counter::Flow, 1)]);
    }
}

/// Only the bytes that the packet's length covers belong to the error; bytes behind them are not in its checksum.
#[test]
fn bytes_behind_the_packet_are_left_alone() {
    for net in Net::ALL {
        for (trouble, request) in each(vec![Packet::tcp(net.client(), net.there(), SYN, 1, 0)]) {
            let world = world();
            let (sent, _) = open(&world, &request);
            let error = Packet::error(net.router(), trouble, &sent, quotes(net)[0]);
            let mut bytes = error.bytes();
            bytes.extend([0x5a; 24]);
            let (verdict, routed) = world.enter(OVERLAY, bytes);
            assert_eq!(verdict, Verdict::Translated);
            let (body, padding) = routed.split_at(routed.len() - 24);
            assert_eq!(padding, [0x5a; 24]);
            read(body).unwrap();
        }
    }
}

/// The error's own length leaves no room for the headers that it seems to quote.
#[test]
fn a_quote_ends_with_the_packet() {
    for net in Net::ALL {
        let world = world();
        let request = Packet::udp(net.client(), net.there(), b"some data");
        let (sent, _) = open(&world, &request);
        let whole = Packet::error(net.router(), Trouble::TooBig, &sent, 548).bytes();
        for cut in 1..8 {
            let short = Packet::error(net.router(), Trouble::TooBig, &sent, quotes(net)[0] - cut).bytes();
            let mut padded = short.clone();
            padded.extend(&whole[short.len()..]);
            passes(|bytes| world.enter(OVERLAY, bytes), &short);
            passes(|bytes| world.enter(OVERLAY, bytes), &padded);
        }
    }
}
