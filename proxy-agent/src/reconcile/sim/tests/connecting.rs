//! connect() and getpeername().

use proxy_common::abi::{BackendId, NetnsCookie, ServiceId};

use super::*;

#[test]
fn a_connection_leads_to_a_backend_and_is_remembered_whole() {
    let sim = world();
    let socket = check(&sim, socket(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    let id = backend_of(&socket);
    let record = SocketRecord {
        vip: vip(10),
        vip_port: Be16::new(80),
        backend_addr: pod(id.0),
        backend_port: Be16::new(8080),
        service: ServiceId(1),
        backend: id,
    };
    assert_eq!(record_of(&sim, &socket), Some(record));
    let mut asked = socket.clone();
    assert_eq!(peername(&mut asked, &sim), Translated);
    assert_eq!((asked.addr, asked.port), (vip(10), Be16::new(80)));
    // A socket that is connected to something else, or that was never translated.
    for other in [
        SimSocket { addr: pod(9), ..socket.clone() },
        SimSocket { port: Be16::new(1), ..socket.clone() },
        SimSocket { cookie: socket.cookie + 1, ..socket },
    ] {
        let mut asked = other.clone();
        assert_eq!(peername(&mut asked, &sim), Pass);
        assert_eq!(asked, other);
    }
}

#[test]
fn every_backend_of_the_set_is_as_likely() {
    // Pearson's statistic over 3 and over 7 cells; the bounds are the 0.9999 quantiles for 2 and 6 degrees of
    // freedom, and the simulator draws the same numbers in every run.
    for (len, bound) in [(3_u32, 18.4), (7, 27.9)] {
        let mut sim = world();
        for id in 1..=len {
            set_backend(&mut sim, BackendId(id), IN_CLUSTER | SERVING, 1);
        }
        sim.apply(&Op::Slots(30, (1..=len).map(BackendId).collect())).unwrap();
        set_service(&mut sim, |service| service.cluster = SlotRange { base: 30, len });
        let draws = 21_000;
        let mut seen = BTreeMap::new();
        for _ in 0..draws {
            let mut socket = socket(vip(10), 80, TCP);
            connect(&mut socket, &sim);
            *seen.entry(backend_of(&socket)).or_insert(0_u32) += 1;
        }
        assert_eq!(seen.len(), len as usize);
        let expected = f64::from(draws) / f64::from(len);
        let statistic: f64 =
            seen.values().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
        assert!(statistic < bound, "{statistic} for {seen:?}");
    }
}

#[test]
fn whoever_cannot_be_served_is_told_so_or_nothing() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(21), 80, TCP), ServiceId(2), POD_LOCAL);
    let table = [
        (vip(20), 80, Reject, Some(Counter::RejectNoEndpoint)),
        (vip(21), 80, Drop, Some(Counter::DropNoLocalEndpoint)),
        (vip(10), 81, Reject, Some(Counter::RejectUnusedPort)),
        (vip(99), 80, Drop, Some(Counter::DropInactiveAddress)),
        // An address that has frontends but is no active clusterIP.
        (vip(21), 81, Drop, Some(Counter::DropInactiveAddress)),
        (pod(1), 8080, Pass, None),
    ];
    for (addr, port, verdict, counted) in table {
        check(&sim, socket(addr, port, TCP), verdict, counted);
    }
    // For another protocol the port is unused. Protocols other than TCP, UDP and SCTP are ignored.
    check(&sim, socket(vip(10), 80, SCTP), Reject, Some(Counter::RejectUnusedPort));
    check(&sim, SimSocket { protocol: 1, ..socket(vip(99), 80, 1) }, Pass, None);
    check(&sim, SimSocket { protocol: 256 + u32::from(UDP), ..socket(vip(10), 80, UDP) }, Pass, None);
    // A clusterIP is active even before the ServiceCIDR is known.
    let cidr = Prefix::new(Addr::v4([10, 96, 0, 0]), 16).unwrap();
    sim.apply(&Op::ServiceCidr(cidr, false)).unwrap();
    check(&sim, socket(vip(10), 81, TCP), Reject, Some(Counter::RejectUnusedPort));
    check(&sim, socket(vip(99), 80, TCP), Pass, None);
}

#[test]
fn a_service_that_was_never_written_refuses() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(30), 80, TCP), ServiceId(9), 0);
    check(&sim, socket(vip(30), 80, TCP), Reject, Some(Counter::RejectNoEndpoint));
}

#[test]
fn a_slot_of_another_service_is_never_followed() {
    let mut sim = world();
    sim.apply(&Op::Slots(10, vec![BackendId(9); 3])).unwrap();
    check(&sim, socket(vip(10), 80, TCP), Drop, Some(Counter::DropRetry));
    let stranger = Backend { service: ServiceId(2), ..sim.backend(BackendId(1)).unwrap() };
    sim.apply(&Op::Backend(BackendId(9), stranger)).unwrap();
    check(&sim, socket(vip(10), 80, TCP), Drop, Some(Counter::DropRetry));
}

#[test]
fn an_element_of_another_key_is_never_followed() {
    let mut sim = world();
    let (key, other) = (exact(vip(10), 80, TCP), exact(vip(11), 80, TCP));
    sim.apply(&Op::Frontend(key, Some(FrontendValue::new(&other, ServiceId(1), 0)))).unwrap();
    check(&sim, socket(vip(10), 80, TCP), Drop, Some(Counter::DropRetry));
}

#[test]
fn node_ports_are_served_on_marked_addresses_only() {
    let mut sim = world();
    let any = Addr::v4([0; 4]);
    frontend(&mut sim, FrontendKey::node_port(any, Be16::new(31_080), TCP), ServiceId(1), 0);
    let (marked, unmarked, remote) =
        (Addr::v4([192, 0, 2, 10]), Addr::v4([198, 51, 100, 10]), Addr::v4([192, 0, 2, 20]));
    let socket_ = check(&sim, socket(marked, 31_080, TCP), Translated, Some(Counter::Connected));
    assert_eq!(record_of(&sim, &socket_).map(|record| record.vip), Some(marked));
    for addr in [unmarked, remote, any] {
        check(&sim, socket(addr, 31_080, TCP), Pass, None);
    }
    check(&sim, socket(marked, 31_081, TCP), Pass, None);
    check(&sim, socket(marked, 31_080, UDP), Pass, None);
    // IPv6 has its own nodePorts.
    let v6: Addr = "2001:db8:1::10".parse::<std::net::IpAddr>().unwrap().into();
    sim.apply(&Op::LocalAddress(v6, Some(HOST | NODEPORT))).unwrap();
    check(&sim, socket(v6, 31_080, TCP), Pass, None);
    frontend(&mut sim, FrontendKey::node_port(Addr::ZERO, Be16::new(31_080), TCP), ServiceId(2), 0);
    check(&sim, socket(v6, 31_080, TCP), Reject, Some(Counter::RejectNoEndpoint));

    // An exact frontend on a marked address takes precedence.
    frontend(&mut sim, exact(marked, 31_080, TCP), ServiceId(2), 0);
    check(&sim, socket(marked, 31_080, TCP), Reject, Some(Counter::RejectNoEndpoint));
}

#[test]
fn mapped_addresses_and_mptcp_meet_the_same_frontends() {
    let sim = world();
    let mapped: Addr = "::ffff:10.96.0.10".parse::<std::net::IpAddr>().unwrap().into();
    check(&sim, socket(mapped, 80, TCP), Translated, Some(Counter::Connected));
    let mptcp = SimSocket { protocol: 262, ..socket(vip(10), 80, TCP) };
    check(&sim, mptcp, Translated, Some(Counter::Connected));
    let mptcp = SimSocket { protocol: 262, ..socket(vip(10), 81, TCP) };
    check(&sim, mptcp, Reject, Some(Counter::RejectUnusedPort));
}

#[test]
fn a_socket_that_goes_elsewhere_forgets_its_record() {
    let sim = world();
    for proto in [TCP, UDP] {
        let mut socket = check(&sim, socket(vip(10), 80, proto), Translated, Some(Counter::Connected));
        (socket.addr, socket.port) = (pod(200), Be16::new(8080));
        assert_eq!(connect(&mut socket, &sim), Pass);
        assert_eq!((socket.addr, socket.port), (pod(200), Be16::new(8080)));
        assert_eq!(record_of(&sim, &socket), None);
    }
}

#[test]
fn open_sockets_whose_cookies_meet_are_both_remembered() {
    let sim = world();
    let first = check(&sim, with_cookie(500, 10), Translated, Some(Counter::Connected));
    let meets = 500 + u64::from(STREAM_SLOTS);
    let second = check(&sim, with_cookie(meets, 10), Translated, Some(Counter::Connected));
    assert_eq!((first.record.is_some(), second.record.is_some()), (false, true));
    assert_eq!((seen(&sim, &first), seen(&sim, &second)), ((Translated, vip(10)), (Translated, vip(10))));
    // The end of the second socket leaves the record of the first. The end of the first socket frees its slot.
    release(TCP.into(), meets, &sim);
    assert_eq!(seen(&sim, &first), (Translated, vip(10)));
    release(UDP.into(), 500, &sim);
    assert_eq!(seen(&sim, &first), (Translated, vip(10)));
    release(TCP.into(), 500, &sim);
    assert_eq!(seen(&sim, &first).0, Pass);
    let third =
        check(&sim, with_cookie(meets + u64::from(STREAM_SLOTS), 10), Translated, Some(Counter::Connected));
    assert!(third.record.is_none());
}

fn seen(sim: &Simulator, socket: &SimSocket<'_>) -> (Verdict, Addr) {
    let mut asked = socket.clone();
    (peername(&mut asked, sim), asked.addr)
}

fn with_cookie(cookie: u64, number: u8) -> SimSocket<'static> {
    SimSocket { cookie, ..socket(vip(number), 80, TCP) }
}

#[test]
fn half_of_another_sockets_record_is_no_record() {
    let sim = world();
    let mut socket = check(&sim, socket(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    let slot = StreamRecord::slot(socket.cookie);
    let whole = sim.stream(slot).unwrap();
    let torn = StreamRecord { record: SocketRecord { vip: vip(20), ..whole.record }, ..whole };
    assert!(sim.put_stream(slot, &torn));
    assert_eq!(peername(&mut socket, &sim), Pass);
}

#[test]
fn a_socket_that_is_connected_anew_shows_what_it_was_until_it_is() {
    // The kernel leaves a connected UDP socket connected when the next connect() fails, whatever the verdict of the
    // hook.
    let mut sim = world();
    frontend(&mut sim, exact(vip(30), 80, UDP), ServiceId(1), DENY_POD);
    let torn = exact(vip(31), 80, UDP);
    sim.apply(&Op::Frontend(torn, Some(FrontendValue::new(&exact(vip(32), 80, UDP), ServiceId(1), 0))))
        .unwrap();
    let connected = check(&sim, socket(vip(10), 80, UDP), Translated, Some(Counter::Connected));
    let table = [(vip(20), 80), (vip(10), 81), (vip(99), 80), (vip(30), 80), (vip(31), 80)];
    for (addr, port) in table {
        let peer = (connected.addr, connected.port);
        let mut again = SimSocket { addr, port: Be16::new(port), peer, ..connected.clone() };
        assert_ne!(connect(&mut again, &sim), Translated);
        let mut asked = SimSocket { addr: peer.0, port: peer.1, ..again };
        assert_eq!(peername(&mut asked, &sim), Translated);
        assert_eq!((asked.addr, asked.port), (vip(10), Be16::new(80)), "{addr}:{port}");
    }
}

#[test]
fn a_hook_that_runs_twice_in_one_connect_remembers_what_was_asked_for() {
    for proto in [TCP, UDP] {
        let sim = world();
        let mut connected = socket(vip(10), 80, proto);
        assert_eq!(connect(&mut connected, &sim), Translated);
        let (to, record) = (connected.addr, record_of(&sim, &connected));
        assert_eq!(connect(&mut connected, &sim), Pass);
        assert_eq!((connected.addr, record_of(&sim, &connected)), (to, record));
    }
}

#[test]
fn a_connection_that_cannot_be_remembered_fails_untouched() {
    let sim = world();
    let failing = SimSocket { storage_fails: true, ..socket(vip(10), 80, UDP) };
    check(&sim, failing, Fail, Some(Counter::FailRecord));
    check(&sim, socket(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    let other = 500 + u64::from(STREAM_SLOTS);
    let failing = SimSocket { storage_fails: true, cookie: other, ..socket(vip(10), 80, TCP) };
    check(&sim, failing, Fail, Some(Counter::FailRecord));
}

#[test]
fn clients_get_the_set_and_the_refusal_that_is_theirs() {
    let mut sim = world();
    let mut verdicts = |flags: u16| {
        frontend(&mut sim, exact(vip(10), 80, TCP), ServiceId(1), flags);
        (backends_of(&sim, &host(vip(10), 80, TCP)), backends_of(&sim, &socket(vip(10), 80, TCP)))
    };
    let (all, local, refused) =
        ([1, 2, 3].map(BackendId).to_vec(), vec![BackendId(1)], vec![BackendId::NONE]);
    assert_eq!(verdicts(0), (all.clone(), all.clone()));
    assert_eq!(verdicts(NEAR_LOCAL), (local.clone(), all.clone()));
    assert_eq!(verdicts(POD_LOCAL), (all.clone(), local.clone()));
    assert_eq!(verdicts(DENY_HOST | POD_LOCAL), (refused.clone(), local));
    assert_eq!(verdicts(DENY_POD), (all, refused));
    assert_eq!(sim.counted(Counter::DropSourceRange), 120);
}

/// Returns the backends that sixty such sockets get, with 0 for a refusal.
fn backends_of(sim: &Simulator, from: &SimSocket<'static>) -> Vec<BackendId> {
    let mut ids = BTreeSet::new();
    for _ in 0..60 {
        let mut socket = from.clone();
        let verdict = connect(&mut socket, sim);
        assert!([Translated, Drop].contains(&verdict), "{verdict:?}");
        ids.insert(if verdict == Translated { backend_of(&socket) } else { BackendId::NONE });
    }
    ids.into_iter().collect::<Vec<_>>()
}

/// Verdicts that a pod's socket cannot be given are left to its packets, once these are judged. The host's sockets
/// get their verdicts as before.
#[test]
fn silence_and_source_ranges_are_left_to_the_packets_of_pods() {
    let mut sim = world();
    frontend(&mut sim, exact(vip(21), 80, TCP), ServiceId(2), POD_LOCAL | NEAR_LOCAL);
    frontend(&mut sim, exact(vip(30), 80, TCP), ServiceId(1), DENY_POD | DENY_HOST);
    frontend(&mut sim, exact(vip(31), 80, TCP), ServiceId(1), DENY_POD);
    sim.apply(&Op::Slots(40, vec![BackendId(99)])).unwrap();
    let torn = Service { cluster: SlotRange { base: 40, len: 1 }, ..Service::default() };
    sim.apply(&Op::Service(ServiceId(3), torn)).unwrap();
    frontend(&mut sim, exact(vip(32), 80, TCP), ServiceId(3), 0);
    let other = exact(vip(34), 80, TCP);
    sim.apply(&Op::Frontend(exact(vip(33), 80, TCP), Some(FrontendValue::new(&other, ServiceId(1), 0))))
        .unwrap();
    let dropped = [
        (vip(21), Counter::DropNoLocalEndpoint),
        (vip(99), Counter::DropInactiveAddress),
        (vip(30), Counter::DropSourceRange),
        (vip(32), Counter::DropRetry),
        (vip(33), Counter::DropRetry),
    ];
    for (address, counter) in dropped {
        check(&sim, socket(address, 80, TCP), Drop, Some(counter));
    }
    check(&sim, socket(vip(31), 80, TCP), Drop, Some(Counter::DropSourceRange));

    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    for (address, counter) in dropped {
        check(&sim, socket(address, 80, TCP), Pass, Some(Counter::LeftToPackets));
        check(&sim, SimSocket { netns: HOST_NETNS, ..socket(address, 80, TCP) }, Drop, Some(counter));
    }
    check(&sim, socket(vip(31), 80, TCP), Pass, Some(Counter::LeftToPackets));
    let host = SimSocket { netns: HOST_NETNS, ..socket(vip(31), 80, TCP) };
    check(&sim, host, Translated, Some(Counter::Connected));
    // Everything else is as before.
    check(&sim, socket(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    check(&sim, socket(vip(20), 80, TCP), Reject, Some(Counter::RejectNoEndpoint));
    check(&sim, socket(vip(10), 81, TCP), Reject, Some(Counter::RejectUnusedPort));
    check(&sim, socket(pod(1), 8080, TCP), Pass, None);
}

/// If a socket cannot be given the reason of a refusal, the host's sockets pass unchanged, and the packet edge
/// answers their SYN.
#[test]
fn refusals_of_the_host_are_left_to_packets_where_the_kernel_cannot_tell() {
    let mut sim = world();
    let refused = [
        (vip(20), 80, Reject, Counter::RejectNoEndpoint),
        (vip(10), 81, Reject, Counter::RejectUnusedPort),
        (vip(99), 80, Drop, Counter::DropInactiveAddress),
    ];
    for flags in [0, HOST_IN_PACKETS] {
        sim.apply(&Op::NodeFlags(flags)).unwrap();
        for (address, port, verdict, counter) in refused {
            check(&sim, socket(address, port, TCP), verdict, Some(counter));
            let verdict = if flags != 0 { Pass } else { verdict };
            check(&sim, host(address, port, TCP), verdict, Some(counter));
        }
        check(&sim, host(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    }
    // An address that is no clusterIP may belong to a real host. Packets to an address of this host itself meet no
    // device.
    let outside = Addr::v4([198, 18, 0, 1]);
    frontend(&mut sim, exact(outside, 80, TCP), ServiceId(2), 0);
    check(&sim, host(outside, 80, TCP), Reject, Some(Counter::RejectNoEndpoint));
    sim.apply(&Op::LocalAddress(vip(20), Some(HOST))).unwrap();
    check(&sim, host(vip(20), 80, TCP), Reject, Some(Counter::RejectNoEndpoint));
}

/// Returns a socket of the host's network namespace.
fn host(address: Addr, port: u16, proto: u8) -> SimSocket<'static> {
    SimSocket { netns: HOST_NETNS, ..socket(address, port, proto) }
}

/// NodeLocal DNSCache listens at a clusterIP, which is then an address of the host, while no Service claims it.
#[test]
fn an_address_that_the_host_has_is_not_unassigned() {
    let mut sim = world();
    for of_host in [false, true] {
        for netns in [HOST_NETNS, POD_NETNS] {
            for proto in [TCP, UDP] {
                let asking = SimSocket { netns, ..socket(vip(99), 53, proto) };
                if of_host {
                    check(&sim, asking, Pass, None);
                } else {
                    check(&sim, asking, Drop, Some(Counter::DropInactiveAddress));
                }
            }
        }
        sim.apply(&Op::LocalAddress(vip(99), Some(HOST))).unwrap();
    }
    // A clusterIP of a Service stays with the Service, with all its ports, even if the host has the address.
    sim.apply(&Op::LocalAddress(vip(10), Some(HOST))).unwrap();
    check(&sim, socket(vip(10), 80, TCP), Translated, Some(Counter::Connected));
    check(&sim, socket(vip(10), 81, TCP), Reject, Some(Counter::RejectUnusedPort));
}

#[test]
fn a_socket_that_is_left_to_packets_forgets_its_record() {
    let mut sim = world();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    for proto in [TCP, UDP] {
        let mut socket = check(&sim, socket(vip(10), 80, proto), Translated, Some(Counter::Connected));
        (socket.addr, socket.port) = (vip(99), Be16::new(80));
        assert_eq!(connect(&mut socket, &sim), Pass);
        assert_eq!((socket.addr, record_of(&sim, &socket)), (vip(99), None));
    }
}

#[test]
fn the_probe_and_nothing_else_teaches_which_namespace_is_the_hosts() {
    let mut sim = world();
    sim.host_netns.set(NetnsCookie::NONE);
    check(&sim, socket(vip(10), 80, UDP), Translated, Some(Counter::Connected));
    assert_eq!(sim.host_netns.get(), NetnsCookie::NONE);
    let probe = Addr::v4([192, 0, 0, 8]);
    frontend(&mut sim, exact(probe, 7, UDP), ServiceId(1), PROBE | NEAR_LOCAL);
    let mut caller = SimSocket { netns: NetnsCookie(42), ..socket(probe, 7, UDP) };
    assert_eq!(connect(&mut caller, &sim), Translated);
    assert_eq!(sim.host_netns.get(), NetnsCookie(42));
    assert_eq!(backend_of(&caller), BackendId(1), "the caller is near already");
}
