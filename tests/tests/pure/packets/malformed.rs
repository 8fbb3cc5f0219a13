//! Malformed packets: truncated, with wrong lengths, or at random.

use proxy_common::abi::Counter;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{PSH, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{Body, ETHERNET, NIC, Net, OVERLAY, Packet};

use super::{counts, passes, world};

fn packets(net: Net) -> Vec<Packet> {
    let (client, vip) = (net.client(), net.there());
    let plain = [
        Packet::tcp(client, vip, SYN, 1, 0),
        Packet::udp(client, vip, b""),
        Packet::new(client, vip, Body::Sctp(Vec::new())),
    ];
    plain.into_iter().flat_map(|packet| [packet.clone(), packet.extended()]).collect()
}

fn ip_header(net: Net) -> usize {
    if net.v6 { 40 } else { 20 }
}

#[test]
fn truncated_packets_make_no_flow() {
    for net in Net::ALL {
        for packet in packets(net) {
            let whole = packet.bytes();
            for len in 0..whole.len() {
                let world = world();
                let cut = &whole[..len];
                let (verdict, after) = world.enter(NIC, cut.to_vec());
                if len < ETHERNET + ip_header(net) {
                    assert_eq!((verdict, after.as_slice()), (Verdict::Pass, cut), "{len}: no address");
                } else {
                    assert_eq!(verdict, Verdict::Drop, "{len} bytes of {packet:?}");
                    assert_eq!(counts(&world), [(Counter::DropMalformed, 1)]);
                }
                assert_eq!(world.sim.edge.records(Tier::New), []);
                passes(|bytes| world.leave(OVERLAY, bytes), cut);
            }
        }
    }
}

/// The length in the IP header counts, up to the bytes that are there.
#[test]
fn lengths_that_lie() {
    for net in Net::ALL {
        for packet in packets(net) {
            let whole = packet.bytes();
            let (at, counted) = if net.v6 {
                (ETHERNET + 4, whole.len() - ETHERNET - 40)
            } else {
                (ETHERNET + 2, whole.len() - ETHERNET)
            };
            for length in 0..counted + 40 {
                let world = world();
                let mut bytes = whole.clone();
                bytes[at..at + 2].copy_from_slice(&(length as u16).to_be_bytes());
                let (verdict, after) = world.enter(NIC, bytes);
                let wanted = if length == counted { Verdict::Translated } else { Verdict::Drop };
                assert_eq!(verdict, wanted, "{length} instead of {counted}: {packet:?}");
                assert_eq!(after.len(), whole.len());
            }
        }
    }
}

/// A train of segments is too long for the length field, which is then zero (BIG TCP).
#[test]
fn a_length_of_zero_stands_for_more_than_64_kib() {
    const LONG: usize = 200_000;
    for net in Net::ALL {
        for syn in [SYN, SYN | PSH] {
            let packet = Packet::tcp(net.client(), net.there(), syn, 1, 0);
            for packet in [packet.clone(), packet.extended()] {
                let world = world();
                let (verdict, after) = world.enter(NIC, train(&packet, LONG));
                assert_eq!(verdict, Verdict::Translated);
                assert_eq!(after, train(&packet.between(net.client(), net.remote(1)), LONG));
                let (_, _, flow) = super::record(&world);
                let counted = world.sim.edge.service_counters(flow.service);
                assert_eq!(counted.request_bytes, LONG as u64);

                let world = self::world();
                assert_eq!(world.enter(NIC, train(&packet, 65_535)).0, Verdict::Drop, "it could be told");
            }
        }
    }
}

fn train(packet: &Packet, length: usize) -> Vec<u8> {
    let at = ETHERNET + if packet.source.is_ipv6() { 4 } else { 2 };
    let mut bytes = packet.bytes();
    bytes[at..at + 2].fill(0);
    bytes.resize(ETHERNET + length, 0x5a);
    bytes
}

#[test]
fn bytes_behind_the_packet_do_not_matter() {
    for net in Net::ALL {
        for packet in packets(net) {
            let world = world();
            let mut bytes = packet.bytes();
            bytes.extend([0x5a; 30]);
            let (verdict, after) = world.enter(NIC, bytes);
            assert_eq!(verdict, Verdict::Translated);
            let routed = packet.between(net.client(), net.remote(1)).bytes();
            assert_eq!(after, [&routed[..], &[0x5a; 30]].concat());
        }
    }
}

#[test]
fn tcp_headers_of_impossible_length() {
    for net in Net::ALL {
        for words in 0..16_u8 {
            let world = world();
            let mut bytes = Packet::tcp(net.client(), net.there(), SYN, 1, 0).bytes();
            bytes[ETHERNET + ip_header(net) + 12] = words << 4;
            let verdict = world.enter(NIC, bytes).0;
            assert_eq!(verdict == Verdict::Translated, words == 5, "{words}");
        }
    }
}

#[test]
fn ip_headers_of_impossible_length_or_version() {
    let net = Net { v6: false };
    for first in 0..=255_u8 {
        let world = world();
        let mut bytes = Packet::udp(net.client(), net.there(), b"twenty bytes of data").bytes();
        bytes[ETHERNET] = first;
        let (verdict, after) = world.enter(NIC, bytes.clone());
        match (first >> 4, first & 15) {
            (4, 5) => assert_eq!(verdict, Verdict::Translated),
            (4, 0..5) => assert_eq!(verdict, Verdict::Drop),
            // The larger header takes some of the data as options.
            (4, _) => {}
            _ => assert_eq!((verdict, after), (Verdict::Pass, bytes)),
        }
    }
}

/// A chain of extension headers can have any length; more than six of them are not followed.
#[test]
fn endless_extension_headers() {
    let net = Net { v6: true };
    for kind in [0, 43, 60] {
        for count in 0..12 {
            let world = world();
            let mut chain = Vec::new();
            for left in (0..count).rev() {
                chain.extend([if left == 0 { 17 } else { kind }, 0, 1, 4, 0, 0, 0, 0]);
            }
            let udp = Packet::udp(net.client(), net.there(), b"?").bytes();
            chain.extend(&udp[ETHERNET + 40..]);
            let first = if count == 0 { 17 } else { kind };
            let packet = Packet::new(net.client(), net.there(), Body::Other(first, chain)).bytes();
            let (verdict, _) = world.enter(NIC, packet);
            if count <= 6 {
                assert_eq!(verdict, Verdict::Translated, "{count} of {kind}");
            } else {
                assert_ne!(verdict, Verdict::Translated, "{count} of {kind}");
                assert_ne!(verdict, Verdict::Pass, "{count} of {kind}");
            }
        }
    }
}

/// A packet to an address that is not of a Service is never judged, however broken it is.
#[test]
fn what_is_broken_and_not_ours_passes() {
    for net in Net::ALL {
        for destination in [net.client(), net.beside(), net.remote(2)] {
            for packet in packets(net) {
                let whole = packet.between(net.stranger(), destination).bytes();
                for len in 0..=whole.len() {
                    let world = world();
                    passes(|bytes| world.enter(NIC, bytes), &whole[..len]);
                    passes(|bytes| world.leave(NIC, bytes), &whole[..len]);
                    assert_eq!(counts(&world), []);
                }
            }
        }
    }
}
