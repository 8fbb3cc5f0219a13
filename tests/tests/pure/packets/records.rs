//! Records and index entries: full maps, evictions, expiry, and tuples that collide.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_common::abi::flow::SNAT_PORTS;
use proxy_common::abi::flow::state::ASSURED;
use proxy_common::abi::{Counter, Device, FlowKind, IfIndex, ServiceId, device};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::flows::{snat_index, vip_index};
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_common::datapath::edge::timeouts::closed;
use proxy_tests::packets::{NIC, Net, OVERLAY, POD, Packet, Trouble};

use super::{answer, counts, establish, open, passes, record, reply, seen, translated, world};

#[test]
fn a_flow_works_without_room_for_it() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.there());
        world.sim.edge.room[0].set(Some(0));
        let own = establish(&world, net, vip);
        assert_eq!(record(&world).0, Tier::New);
        let (_, source) = open(&world, &Packet::tcp(net.client(), vip, PSH | ACK, 1001, 5001));
        assert_eq!(source, own);
        answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1022));
        assert_eq!(world.sim.counted(Counter::FlowsFull), 1, "not with each packet");
        // As soon as there is room, the record moves, however far the connection has advanced by then.
        world.sim.edge.room[0].set(None);
        open(&world, &Packet::tcp(net.client(), vip, ACK, 1022, 5001 + (1 << 20)));
        let (tier, _, flow) = record(&world);
        assert_eq!((tier, flow.state & ASSURED), (Tier::Assured, ASSURED));
        assert_eq!(world.sim.counted(Counter::FlowsFull), 1);
    }
}

#[test]
fn a_flood_pushes_out_nothing_that_is_established() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.there());
        let own = establish(&world, net, vip);
        for port in 1..2000 {
            let client = SocketAddr::new(net.stranger().ip(), port);
            world.enter(NIC, Packet::tcp(client, vip, SYN, 1, 0).bytes());
        }
        assert_eq!(world.sim.edge.records(Tier::Assured).len(), 1);
        for (key, _) in world.sim.edge.records(Tier::New) {
            world.sim.edge.evict_flow(&key);
        }
        for (key, _) in world.sim.edge.entries(Tier::New) {
            world.sim.edge.evict_index(&key);
        }
        let (_, source) = open(&world, &Packet::tcp(net.client(), vip, ACK, 1001, 5001));
        assert_eq!(source, own);
    }
}

/// The LRU evicts index entries and records one by one.
#[test]
fn what_is_evicted_is_made_again() {
    for net in Net::ALL {
        let (vip, pod) = (net.there(), net.remote(1));
        let segment = Packet::tcp(net.client(), vip, SYN, 1000, 0);
        for request in [segment, Packet::udp(net.client(), vip, b"?")] {
            let world = world();
            let (_, own) = open(&world, &request);
            let (_, key, flow) = record(&world);
            // The index entry of the VIP: the record is found again, with its source.
            world.sim.edge.evict_index(&vip_index(&key, &flow).0).unwrap();
            assert_eq!(open(&world, &request).1, own);
            assert_eq!(record(&world).1, key);
            // A reply restores the entry, too.
            world.sim.edge.evict_index(&vip_index(&key, &flow).0).unwrap();
            answer(&world, &reply(&request, pod, own));
            assert_eq!(world.sim.edge.entries(Tier::New).len(), 2);
            // The index entry of our own address: one reply is lost, and the next request restores the entry.
            world.sim.edge.evict_index(&snat_index(&key, &flow.snat, flow.snat_port).0).unwrap();
            passes(|bytes| world.enter(OVERLAY, bytes), &reply(&request, pod, own).bytes());
            let (_, source) = open(&world, &request);
            assert_eq!(source, own);
            answer(&world, &reply(&request, pod, own));
        }
    }
}

/// The kernel gives a port to another connection as soon as the destination differs.
#[test]
fn who_has_talked_through_a_vip_can_talk_to_the_pod_itself() {
    for net in Net::ALL {
        // The old connection ends by the backend's word: a client's SYN could be forged.
        for (endings, vip, rest) in [
            (FIN, net.there(), 1),
            (RST, net.there(), 1),
            (FIN, net.here(), 1),
            (RST, net.here(), 1),
            (FIN, net.here(), 0),
            (RST, net.here(), 0),
        ] {
            let (world, client) = (world(), net.client());
            let pod = if vip == net.here() { net.local() } else { net.remote(1) };
            let leave = |bytes| match pod == net.local() {
                true => world.leave_from(POD, NIC, bytes),
                false => world.leave(NIC, bytes),
            };
            let request = |kind| {
                let routed = translated(world.enter(NIC, Packet::tcp(client, vip, kind, 1000, 5001).bytes()));
                let sent = if pod == net.local() { routed } else { translated(world.leave(OVERLAY, routed)) };
                seen(&sent).source
            };
            let own = request(SYN);
            let reply = |kind| {
                let reply = Packet::tcp(pod, own, kind, 5000, 1001).bytes();
                let routed = if own == client { reply } else { translated(world.enter(OVERLAY, reply)) };
                assert_eq!(seen(&translated(leave(routed))).source, vip);
            };
            reply(SYN | ACK);
            request(ACK);
            request(endings | ACK);
            if endings == FIN {
                reply(FIN | ACK);
                request(ACK);
                // Late segments still belong to the old connection.
                reply(ACK);
            }

            world.pass(rest);
            for kind in [SYN, ACK] {
                let direct = Packet::tcp(client, pod, kind, 9000, 0).bytes();
                passes(|bytes| world.enter(NIC, bytes), &direct);
                if pod != net.local() {
                    passes(|bytes| world.leave(OVERLAY, bytes), &direct);
                }
                let answer = Packet::tcp(pod, client, kind | ACK, 7000, 9001).bytes();
                passes(leave, &answer);
            }
            assert_eq!(world.sim.edge.records(Tier::Assured), []);
            // The VIP serves the client again.
            request(SYN);
        }
    }
}

/// A sender outside that forges the name of a backend on another node ends no connection by a reset and a SYN.
#[test]
fn a_syn_that_may_be_anybodys_ends_no_record() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.there());
        let own = establish(&world, net, vip);
        answer(&world, &Packet::tcp(net.remote(1), own, RST, 9_999, 0));
        for kind in [SYN, SYN | ACK] {
            answer(&world, &Packet::tcp(net.remote(1), own, kind, 77_777, 88_888));
        }
        assert_eq!(open(&world, &Packet::tcp(net.client(), vip, PSH | ACK, 1001, 5001)).1, own);
        answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1022));
    }
}

/// Pods of one bridge can send in each other's names, so a SYN from the bridge proves nothing either.
#[test]
fn a_syn_of_a_bridge_ends_no_record() {
    const BRIDGE: IfIndex = IfIndex(9);
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.here(), net.local());
        let bridge = Device { flags: device::flags::POD_BRIDGE, ..Device::default() };
        world.sim.edge.devices.borrow_mut().insert(BRIDGE, bridge);
        let request = |kind, seq, ack| {
            translated(world.enter(NIC, Packet::tcp(client, vip, kind, seq, ack).bytes()));
        };
        let leaves =
            |kind, seq, ack| world.leave_from(BRIDGE, NIC, Packet::tcp(pod, client, kind, seq, ack).bytes());
        request(SYN, 1000, 0);
        translated(leaves(SYN | ACK, 5000, 1001));
        request(ACK, 1001, 5001);
        translated(leaves(RST, 9_999, 0));
        translated(leaves(SYN | ACK, 77_777, 88_888));
        request(PSH | ACK, 1001, 5001);
        assert_eq!(seen(&translated(leaves(ACK, 5001, 1022))).source, vip);
    }
}

/// A reset that the backend itself contradicts ends nothing.
#[test]
fn an_answer_after_a_false_reset_is_translated() {
    for net in Net::ALL {
        let (world, vip) = (world(), net.here());
        translated(world.enter(NIC, Packet::tcp(net.client(), vip, SYN, 1000, 0).bytes()));
        for kind in [RST | ACK, SYN | ACK] {
            let reply = Packet::tcp(net.local(), net.client(), kind, 5000, 1001).bytes();
            assert_eq!(seen(&translated(world.leave(NIC, reply))).source, vip);
        }
    }
}

#[test]
fn an_entry_without_its_record_leads_nowhere() {
    for net in Net::ALL {
        let vip = net.there();
        let world = world();
        let request = Packet::udp(net.client(), vip, b"?");
        let (_, own) = open(&world, &request);
        let (_, key, _) = record(&world);
        world.sim.edge.evict_flow(&key).unwrap();
        passes(|bytes| world.enter(OVERLAY, bytes), &Packet::udp(net.remote(1), own, b"!").bytes());
        passes(|bytes| world.leave(NIC, bytes), &Packet::udp(net.remote(1), net.client(), b"!").bytes());
        let (_, source) = open(&world, &request);
        answer(&world, &Packet::udp(net.remote(1), source, b"!"));
    }
}

/// Nobody has removed the expired records, not even the agent.
#[test]
fn expired_flows_are_recycled() {
    for net in Net::ALL {
        // With three backends, the new flow may have another one than the old.
        let (world, vip, client) = (world(), net.spread(), net.client());
        for round in 0..12 {
            let syn = Packet::tcp(client, vip, SYN, 1000, 0);
            let routed = translated(world.enter(NIC, syn.bytes()));
            let pod = seen(&routed).destination;
            let sent = translated(world.leave(OVERLAY, routed));
            let own = seen(&sent).source;
            answer(&world, &Packet::tcp(pod, own, SYN | ACK, 5000, 1001));
            for (flags, seq) in [(ACK, 1001), (PSH | ACK, 1001)] {
                let (sent, source) = open(&world, &Packet::tcp(client, vip, flags, seq, 5001));
                assert_eq!((seen(&sent).destination, source), (pod, own), "round {round}");
            }
            answer(&world, &Packet::tcp(pod, own, PSH | ACK, 5001, 1022));
            let (tier, ..) = record(&world);
            assert_eq!(tier, Tier::Assured);
            assert_eq!(world.sim.edge.entries(Tier::Assured).len(), 2);
            assert_eq!(world.sim.edge.entries(Tier::New), []);
            world.pass(86_400);
            passes(|bytes| world.enter(OVERLAY, bytes), &Packet::tcp(pod, own, ACK, 1, 1).bytes());
        }
    }
}

#[test]
fn expired_datagram_flows_are_recycled() {
    for net in Net::ALL {
        let (world, vip, client) = (world(), net.spread(), net.client());
        for _ in 0..12 {
            let routed = translated(world.enter(NIC, Packet::udp(client, vip, b"?").bytes()));
            let pod = seen(&routed).destination;
            let own = seen(&translated(world.leave(OVERLAY, routed))).source;
            answer(&world, &Packet::udp(pod, own, b"!"));
            for _ in 0..5 {
                let (sent, _) = open(&world, &Packet::udp(client, vip, b"and?"));
                assert_eq!(seen(&sent).destination, pod);
            }
            assert_eq!(record(&world).0, Tier::Assured);
            world.pass(300);
        }
        assert_eq!(world.sim.counted(Counter::UdpRepick), 0);
    }
}

/// A closed flow gives up its tuple; the new flow on that tuple loses nothing.
#[test]
fn another_flow_on_the_tuple_of_a_closed_one() {
    for net in Net::ALL {
        let (world, vip, client) = (world(), net.spread(), net.client());
        for _ in 0..12 {
            let routed = translated(world.enter(NIC, Packet::tcp(client, vip, SYN, 1, 0).bytes()));
            let pod = seen(&routed).destination;
            let own = seen(&translated(world.leave(OVERLAY, routed))).source;
            answer(&world, &Packet::tcp(pod, own, SYN | ACK, 5000, 2));
            open(&world, &Packet::tcp(client, vip, ACK, 2, 5001));
            answer(&world, &Packet::tcp(pod, own, RST, 5001, 0));
            // Of each closed flow, only its source is kept.
            let kept = world.sim.edge.records(Tier::Assured);
            let sources: BTreeSet<_> = kept.iter().map(|(_, flow)| flow.snat_port.get()).collect();
            assert_eq!(sources.len(), kept.len());
            assert!(kept.iter().all(|(_, flow)| closed(flow.state)));
            assert!(sources.contains(&own.port()) && world.sim.edge.records(Tier::New).is_empty());
        }
        assert_eq!(counts(&world), [(Counter::Flow, 12)]);
    }
}

#[test]
fn two_vips_with_one_backend_and_one_client_port() {
    for net in Net::ALL {
        let (world, client, pod) = (world(), net.client(), net.remote(1));
        let vips = [net.there(), net.twin(), net.ranged(), net.node_port()];
        let mut sources = Vec::new();
        for vip in vips {
            for request in [Packet::tcp(client, vip, SYN, 1000, 0), Packet::udp(client, vip, b"?")] {
                let routed = translated(world.enter(NIC, request.bytes()));
                let between = seen(&routed).source;
                assert_eq!(between.ip(), client.ip());
                let first = vip == vips[0];
                assert_eq!(between.port() == client.port(), first);
                assert!(first || SNAT_PORTS.contains(&between.port()));
                let own = seen(&translated(world.leave(OVERLAY, routed))).source;
                sources.push((request, vip, own));
            }
        }
        // Each reply reaches the client's own port, from the VIP that was asked.
        for (request, vip, own) in sources {
            let reply = reply(&request, pod, own);
            assert_eq!(answer(&world, &reply), reply.between(vip, client).bytes());
        }
    }
}

/// The same with a pod of this node, where nothing else changes the source, and with ICMP errors.
#[test]
fn two_vips_with_one_backend_on_this_node() {
    use proxy_agent::reconcile::store::{MapStore as _, Op};
    use proxy_common::abi::{FrontendKey, FrontendValue, proto};
    for net in Net::ALL {
        let (mut world, client, pod) = (world(), net.client(), net.local());
        let other = SocketAddr::new(net.here().ip(), 81);
        let key = FrontendKey::exact(other.ip().into(), Be16::new(other.port()), proto::UDP);
        let id = net.there_id() - 1;
        world.sim.apply(&Op::Frontend(key, Some(FrontendValue::new(&key, ServiceId(id), 0)))).unwrap();
        for vip in [net.here(), other] {
            let request = Packet::udp(client, vip, b"a question to the pod");
            let routed = translated(world.enter(NIC, request.bytes()));
            let between = seen(&routed).source;
            let reply = Packet::udp(pod, between, b"!");
            let arrived = translated(world.leave(NIC, reply.bytes()));
            assert_eq!(arrived, reply.between(vip, client).bytes());
            let error = Packet::error(net.router(), Trouble::TooBig, &arrived, 548);
            let back = translated(world.enter(NIC, error.bytes()));
            assert_eq!(seen(&back).payload, reply.bytes()[14..], "about the answer");
            let error = Packet::error(pod.ip(), Trouble::PortUnreachable, &routed, 548);
            let told = translated(world.leave(NIC, error.bytes()));
            assert_eq!(seen(&told).payload, request.bytes()[14..], "about the request");
        }
    }
}

/// An index entry belongs to one kind of flow: a pod's tuple that looks like another kind's entry finds nothing.
#[test]
fn kinds_of_entries_do_not_mix() {
    for net in Net::ALL {
        let world = world();
        let (_, own) = open(&world, &Packet::udp(net.client(), net.there(), b"?"));
        let kinds: BTreeSet<_> = world.sim.edge.entries(Tier::New).iter().map(|(key, _)| key.kind).collect();
        assert_eq!(kinds, [FlowKind::Vip as u8, FlowKind::Snat as u8].into());
        // From the backend to the client directly, like a reply to our own address.
        let direct = Packet::udp(net.remote(1), SocketAddr::new(net.client().ip(), own.port()), b"!").bytes();
        assert_eq!(world.leave(NIC, direct.clone()), (Verdict::Pass, direct));
        let at_pod = Packet::udp(net.client(), net.remote(1), b"?").bytes();
        passes(|bytes| world.leave(POD, bytes), &at_pod);
    }
}
