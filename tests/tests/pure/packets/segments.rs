//! TCP segments: those that begin a flow, those that end one, and those that make it safe from eviction.

use proxy_common::abi::flow::state::{ASKED, ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, REPLIED, RESET};
use proxy_common::abi::{BackendId, Counter};
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_common::datapath::edge::tables::Tier;
use proxy_tests::packets::{NIC, Net, OVERLAY, Packet, World};

use super::{answer, counts, establish, open, passes, record, translated, world};

#[track_caller]
fn state(world: &World) -> (Tier, u32) {
    let (tier, _, flow) = record(world);
    (tier, flow.state)
}

#[test]
fn only_a_syn_begins_a_flow() {
    for net in Net::ALL {
        for flags in [ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | RST, FIN, 0] {
            for vip in [net.there(), net.ranged(), net.nobody()] {
                let world = world();
                let segment = Packet::tcp(net.client(), vip, flags, 1, 1).bytes();
                passes(|bytes| world.enter(NIC, bytes), &segment);
                assert_eq!(counts(&world), [], "{flags:#x}");
                // On the way out to a clusterIP, the segment is dropped: no host outside has that address.
                let (verdict, _) = world.leave(NIC, segment);
                let inside = vip != net.ranged();
                assert_eq!(verdict, if inside { Verdict::Drop } else { Verdict::Pass });
            }
        }
        for flags in [SYN, SYN | 0xc0, SYN | FIN, SYN | PSH] {
            let world = world();
            translated(world.enter(NIC, Packet::tcp(net.client(), net.there(), flags, 1, 0).bytes()));
        }
    }
}

#[test]
fn a_flow_is_assured_when_its_client_acknowledges_the_answer() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let (_, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        assert_eq!(state(&world), (Tier::New, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, 5000, 1001));
        assert_eq!(state(&world), (Tier::New, REPLIED));
        // Guesses of a sender that has sent the SYN in the name of another.
        for guess in [0, 1, 5000, 5001 + (1 << 17), 5001 + (1 << 20), 0x8000_0000] {
            open(&world, &Packet::tcp(client, vip, ACK, 1001, guess));
            assert_eq!(state(&world), (Tier::New, REPLIED), "{guess}");
        }
        open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        assert_eq!(state(&world), (Tier::New, REPLIED), "a SYN acknowledges nothing");
        open(&world, &Packet::tcp(client, vip, ACK, 1001, 5001));
        assert_eq!(state(&world), (Tier::Assured, REPLIED | ASSURED));
        assert_eq!(world.sim.edge.records(Tier::New), []);
        assert_eq!(world.sim.edge.entries(Tier::New), []);
        assert_eq!(world.sim.edge.entries(Tier::Assured).len(), 2);
        // The connection goes on as before.
        let (_, source) = open(&world, &Packet::tcp(client, vip, PSH | ACK, 1001, 5001));
        assert_eq!(source, own);
        answer(&world, &Packet::tcp(net.remote(1), own, PSH | ACK, 5001, 1022));
    }
}

#[test]
fn sequence_numbers_wrap() {
    for net in Net::ALL {
        for isn in [u32::MAX, u32::MAX - 1, 0, 0x7fff_ffff] {
            let (world, client, vip) = (world(), net.client(), net.there());
            let (_, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
            answer(&world, &Packet::tcp(net.remote(1), own, SYN | ACK, isn, 1001));
            open(&world, &Packet::tcp(client, vip, ACK, 1001, isn.wrapping_add(1)));
            assert_eq!(state(&world).0, Tier::Assured, "{isn:#x}");
        }
    }
}

/// A backend that refuses proves as little about the client as one that answers.
#[test]
fn a_refusal_assures_nobody() {
    for net in Net::ALL {
        let (world, client, vip) = (world(), net.client(), net.there());
        let (_, own) = open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
        answer(&world, &Packet::tcp(net.remote(1), own, RST | ACK, 0, 1001));
        for ack in [0, 1, 1001] {
            open(&world, &Packet::tcp(client, vip, ACK, 1001, ack));
            assert_eq!(state(&world).0, Tier::New);
        }
    }
}

#[test]
fn a_syn_begins_anew_when_both_sides_have_finished() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.there(), net.remote(1));
        let own = establish(&world, net, vip);
        let syn = Packet::tcp(client, vip, SYN, 9000, 0);
        open(&world, &syn);
        assert_eq!(state(&world), (Tier::Assured, REPLIED | ASSURED), "a live flow stays");
        open(&world, &Packet::tcp(client, vip, FIN | ACK, 1001, 5001));
        let half_closed = REPLIED | ASSURED | FIN_REQUEST | CLIENT_FIRST;
        assert_eq!(state(&world).1, half_closed | ASKED);
        open(&world, &syn);
        assert_eq!(state(&world).1, half_closed | ASKED, "half closed is not closed");
        answer(&world, &Packet::tcp(pod, own, FIN | ACK, 5001, 1002));
        assert_eq!(state(&world).1, half_closed | FIN_REPLY);
        // The last acknowledgement still reaches the backend.
        let (_, source) = open(&world, &Packet::tcp(client, vip, ACK, 1002, 5002));
        assert_eq!(source, own);
        world.pass(1);
        open(&world, &syn);
        assert_eq!(state(&world), (Tier::New, 0));
        assert_eq!(world.sim.edge.entries(Tier::Assured), [], "nothing of the old flow stays");
        assert_eq!(counts(&world), [(Counter::Flow, 2)]);
    }
}

#[test]
fn a_reset_ends_a_flow_unless_it_goes_on() {
    for net in Net::ALL {
        for from_client in [true, false] {
            let (world, client, vip, pod) = (world(), net.client(), net.there(), net.remote(1));
            let own = establish(&world, net, vip);
            let reset = || {
                if from_client {
                    open(&world, &Packet::tcp(client, vip, RST, 1001, 0));
                } else {
                    answer(&world, &Packet::tcp(pod, own, RST, 5001, 0));
                }
                assert_eq!(state(&world), (Tier::Assured, REPLIED | ASSURED | RESET));
            };
            // A reset that its receiver ignores: the other side goes on.
            reset();
            answer(&world, &Packet::tcp(pod, own, PSH | ACK, 5001, 1001));
            assert_eq!(state(&world).1, REPLIED | ASSURED);
            world.pass(60);
            open(&world, &Packet::tcp(client, vip, ACK, 1001, 5022));
            reset();
            world.pass(1);
            open(&world, &Packet::tcp(client, vip, SYN, 9000, 0));
            assert_eq!(state(&world), (Tier::New, 0));
        }
    }
}

/// A reset that anybody could have sent in the name of the client ends nothing, neither by itself after some time,
/// nor together with a SYN behind it.
#[test]
fn a_reset_that_does_not_fit_ends_nothing() {
    for net in Net::ALL {
        let (world, client, vip, pod) = (world(), net.client(), net.there(), net.remote(1));
        let own = establish(&world, net, vip);
        let said = |world: &World, from: u32| {
            open(world, &Packet::tcp(client, vip, PSH | ACK, from, 5001));
            answer(world, &Packet::tcp(pod, own, ACK, 5001, from.wrapping_add(22)));
        };
        let blind = |from: u32| {
            for far in [1 << 16, 1 << 20, 1 << 31, u32::MAX] {
                for flags in [RST, RST | ACK, RST | FIN | ACK] {
                    open(&world, &Packet::tcp(client, vip, flags, from.wrapping_add(far), 5001));
                    assert_eq!(state(&world), (Tier::Assured, REPLIED | ASSURED), "{far:#x}");
                }
            }
        };
        // Before and after the backend has acknowledged anything. Forged data in the name of the client changes
        // nothing.
        blind(1001);
        said(&world, 1001);
        blind(1023);
        open(&world, &Packet::tcp(client, vip, PSH | ACK, 0x7000_0000, 5001));
        blind(1023);
        open(&world, &Packet::tcp(client, vip, RST, 0x7000_0000, 0));
        assert_eq!(state(&world).1, REPLIED | ASSURED);
        open(&world, &Packet::tcp(client, vip, SYN, 9000, 0));
        world.pass(3_600);
        assert_eq!(open(&world, &Packet::tcp(client, vip, ACK, 1023, 5001)).1, own);
        assert_eq!(counts(&world), [(Counter::Flow, 1)]);
        // Data that is on its way, and has not been acknowledged, may precede the RST.
        open(&world, &Packet::tcp(client, vip, RST, 1023 + 60_000, 0));
        assert_eq!(state(&world).1, REPLIED | ASSURED | RESET);
    }
}

#[test]
fn idle_flows_live_as_long_as_they_should() {
    const DAY: u64 = 86_400;
    for net in Net::ALL {
        let ways: [(&str, u64, &[u8]); 4] = [
            ("established", DAY, &[]),
            ("half closed", 3_600, &[FIN | ACK]),
            ("reset", 10, &[RST]),
            ("half open", 240, &[SYN]),
        ];
        for (name, seconds, flags) in ways {
            let (client, vip) = (net.client(), net.there());
            let segment = Packet::tcp(client, vip, PSH | ACK, 1001, 5001);
            let alive = prepared(net, flags);
            alive.pass(seconds - 1);
            translated(alive.enter(NIC, segment.bytes()));
            let dead = prepared(net, flags);
            dead.pass(seconds);
            assert_eq!(dead.enter(NIC, segment.bytes()).0, Verdict::Pass, "{net:?}, {name}");
            let routed = segment.between(client, net.remote(1)).bytes();
            assert_eq!(dead.leave(OVERLAY, routed).0, Verdict::Pass, "{net:?}, {name}");
        }
    }
}

fn prepared(net: Net, flags: &[u8]) -> World {
    let (world, client, vip) = (world(), net.client(), net.there());
    if flags == [SYN] {
        open(&world, &Packet::tcp(client, vip, SYN, 1000, 0));
    } else {
        establish(&world, net, vip);
        flags.iter().for_each(|&flags| {
            open(&world, &Packet::tcp(client, vip, flags, 1001, 5001));
        });
        if flags == [FIN | ACK] {
            let own = record(&world).2.snat_port.get();
            let own = std::net::SocketAddr::new(net.overlay(), own);
            answer(&world, &Packet::tcp(net.remote(1), own, ACK, 5001, 1002));
        }
    }
    world
}

/// A TCP connection keeps its backend to the end, even after the endpoint or the Service is gone.
#[test]
fn a_connection_outlives_its_service() {
    use proxy_agent::reconcile::store::{MapStore as _, Op};
    use proxy_common::abi::{BackendState, FrontendKey};
    for net in Net::ALL {
        let (mut world, vip, pod) = (world(), net.there(), net.remote(1));
        let own = establish(&world, net, vip);
        let gone = BackendState { flags: 0, generation: 2 };
        world.sim.apply(&Op::BackendState(BackendId(net.there_id()), gone)).unwrap();
        let port = proxy_common::be::Be16::new(vip.port());
        let key = FrontendKey::exact(vip.ip().into(), port, proxy_common::abi::proto::TCP);
        world.sim.apply(&Op::Frontend(key, None)).unwrap();
        let (_, source) = open(&world, &Packet::tcp(net.client(), vip, PSH | ACK, 1001, 5001));
        assert_eq!(source, own);
        answer(&world, &Packet::tcp(pod, own, ACK, 5001, 1022));
    }
}
