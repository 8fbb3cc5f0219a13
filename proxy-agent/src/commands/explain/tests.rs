//! One world for all tests: Service 1 has the backends 10.64.0.1 (on this node) to 10.64.0.3, and 10.64.0.4, which
//! drains. Service 2 has no backend, 3 has session affinity, and 4 is Local without an endpoint here. Pods are
//! 10.64.0.0/16, the node is 192.0.2.10.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_common::abi::FrontendKey;
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::flags::{
    DENY_HOST, DENY_POD, EXTERNAL, FAR_LOCAL, NEAR_LOCAL, POD_LOCAL, SOURCE_RANGES,
};
use proxy_common::abi::local_address::{HOST, NODEPORT};
use proxy_common::abi::node::{HOST_IN_PACKETS, OPTED_OUT, PODS_IN_PACKETS, SANDBOXES_KNOWN};
use proxy_common::abi::opt_out::{EVERYTHING, INSIDE};
use proxy_common::abi::proto::{SCTP, TCP, UDP};
use proxy_common::abi::{
    Affinity, AffinityKey, AffinityValue, Backend, BackendId, BackendState, CgroupId, Device, FrontendValue,
    IfIndex, Nanos, NetnsCookie, Service, ServiceId, SlotRange, device::flags::NEAR,
};
use proxy_common::addr::Addr;
use proxy_common::addr::{Family, Prefix};
use proxy_common::be::Be16;

use super::clients::Answer;
use super::clients::Verdict;
use super::explanation::{Explanation, Owner, explain};
use super::pod::PodView;
use super::print::{client_note, words};
use super::question::Question;
use crate::commands::inspect::print_data;
use crate::observe::reasons;
use crate::observe::reasons::EndpointReasons;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::PortKey;
use crate::reconcile::model::Model;
use crate::reconcile::model::service_name;
use crate::reconcile::sim::Simulator;
use crate::reconcile::store::{Capacity, Contents, filter_words};

const HOST_NETNS: NetnsCookie = NetnsCookie(7);
/// Time since boot: one second.
const NOW: u64 = 1_000_000_000;
const CAPACITY: Capacity =
    Capacity { frontends: 64, services: 8, slots: 64, backends: 16, source_ranges: 16 };

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn prefix(text: &str) -> Prefix {
    let (ip, len) = text.split_once('/').unwrap();
    Prefix::new(addr(ip), len.parse().unwrap()).unwrap()
}

fn contents() -> Contents {
    let mut contents = Contents { node_flags: PODS_IN_PACKETS, ..Contents::default() };
    contents.backends = vec![Backend::default()];
    for (octet, flags) in [
        (1, IN_CLUSTER | IN_LOCAL | SERVING | ON_THIS_NODE),
        (2, IN_CLUSTER | SERVING),
        (3, IN_CLUSTER | SERVING),
        (4, SERVING),
    ] {
        let state = BackendState { flags, generation: 1 };
        let (addr, port) = (Addr::v4([10, 64, 0, octet]), Be16::new(8080));
        contents.backends.push(Backend { addr, port, pad: [0; 2], service: ServiceId(1), state });
    }
    let sticky = BackendState { flags: IN_CLUSTER | SERVING, generation: 9 };
    for octet in [5, 6] {
        let (addr, port) = (Addr::v4([10, 64, 0, octet]), Be16::new(53));
        contents.backends.push(Backend { addr, port, pad: [0; 2], service: ServiceId(3), state: sticky });
    }
    contents.slots = vec![
        BackendId::NONE,
        BackendId(1),
        BackendId(2),
        BackendId(3),
        BackendId(1),
        BackendId(5),
        BackendId(6),
    ];
    let none = Affinity::default();
    contents.services = vec![
        Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, affinity: none },
        Service {
            cluster: SlotRange { base: 1, len: 3 },
            local: SlotRange { base: 4, len: 1 },
            affinity: none,
        },
        Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, affinity: none },
        Service {
            cluster: SlotRange { base: 5, len: 2 },
            local: SlotRange::DROP,
            affinity: Affinity { seconds: 100, epoch: 3 },
        },
        Service { cluster: SlotRange { base: 2, len: 2 }, local: SlotRange::DROP, affinity: none },
    ];
    for (id, name, proto) in [(1, "cart", TCP), (2, "empty", TCP), (3, "sticky", UDP), (4, "near", TCP)] {
        let service = ObjectKey::new("shop", name);
        let key = PortKey { service, port_name: Arc::from("web"), proto, family: Family::V4 };
        contents.names.push((ServiceId(id), service_name(&key)));
    }
    let any = addr("0.0.0.0");
    for (key, id, flags) in [
        (exact("10.96.0.10", 80, TCP), 1, 0),
        (FrontendKey::address(addr("10.96.0.10")), 0, 0),
        (FrontendKey::node_port(any, Be16::new(30080), TCP), 1, EXTERNAL | FAR_LOCAL),
        (exact("203.0.113.100", 80, TCP), 1, EXTERNAL | SOURCE_RANGES | DENY_HOST | DENY_POD),
        (exact("10.96.0.20", 80, TCP), 2, 0),
        (exact("10.96.0.30", 53, UDP), 3, 0),
        (exact("10.96.0.40", 80, TCP), 4, NEAR_LOCAL | FAR_LOCAL | POD_LOCAL),
        (exact("10.96.0.50", 80, SCTP), 1, 0),
    ] {
        contents.frontends.push((key, FrontendValue::new(&key, ServiceId(id), flags)));
    }
    contents.source_ranges = vec![(ServiceId(1), prefix("198.51.100.0/24"))];
    contents.local_addresses = vec![(addr("192.0.2.10"), HOST | NODEPORT)];
    contents.service_cidrs = vec![prefix("10.96.0.0/16")];
    contents.pod_sources = vec![prefix("10.64.0.0/16")];
    contents
}

fn exact(ip: &str, port: u16, proto: u8) -> FrontendKey {
    FrontendKey::exact(addr(ip), Be16::new(port), proto)
}

fn maps(contents: &Contents) -> Simulator {
    let filter = filter_words(contents);
    let maps = Simulator::of(contents, &filter);
    maps.host_netns.set(HOST_NETNS);
    maps.clock.set(NOW);
    maps
}

fn ask(maps: &Simulator, proto: u8, target: &str, from: &str) -> Explanation {
    let target: SocketAddr = target.parse().unwrap();
    let from = (!from.is_empty()).then(|| addr(from));
    let question =
        Question { proto, addr: target.ip().into(), port: Be16::new(target.port()), from, cgroup: None };
    explain(maps, &Model::restore(CAPACITY, &maps.contents()), &question)
}

/// Returns `CLIENT VERDICT`, and the backends that the client may get, by the last octet, or the counter. A `!`
/// precedes a remembered backend.
fn told(explanation: &Explanation) -> Vec<String> {
    explanation.clients.iter().map(told_of).collect()
}

fn told_of(answer: &Answer) -> String {
    let backends: Vec<String> = answer.backends.iter().map(octet).collect();
    let remembered = answer.remembered.as_ref().map(|backend| format!(" !{}", octet(backend)));
    let what = if answer.verdict == Verdict::Served {
        format!("{}{}", backends.join(","), remembered.unwrap_or_default())
    } else {
        answer.counter.unwrap_or("-").to_owned()
    };
    format!("{:?} {:?} {what}", answer.client, answer.verdict)
}

fn octet(backend: &SocketAddr) -> String {
    Addr::from(backend.ip()).v4_octets()[3].to_string()
}

#[track_caller]
fn check(proto: u8, target: &str, from: &str, owner: Owner, want: &[&str]) {
    let explanation = ask(&maps(&contents()), proto, target, from);
    assert_eq!((explanation.owner, told(&explanation)), (owner, want.iter().map(|s| (*s).into()).collect()));
}

#[test]
fn every_kind_of_client_is_told_of_a_cluster_ip() {
    check(
        TCP,
        "10.96.0.10:80",
        "",
        Owner::Frontend,
        &["Host Served 1,2,3", "Pod Served 1,2,3", "PodPackets Served 1,2,3", "Outside Served 1,2,3"],
    );
    // SCTP sockets are not translated.
    check(SCTP, "10.96.0.50:80", "", Owner::Frontend, &["PodPackets Served 1,2,3", "Outside Served 1,2,3"]);
}

#[test]
fn a_client_is_of_the_kind_that_its_address_says() {
    for (from, want) in [
        ("192.0.2.10", &["Host Served 1,2,3"][..]),
        ("127.0.0.1", &["Host Served 1,2,3"]),
        ("10.64.9.9", &["Pod Served 1,2,3", "PodPackets Served 1,2,3"]),
        ("203.0.113.7", &["Outside Served 1,2,3"]),
    ] {
        check(TCP, "10.96.0.10:80", from, Owner::Frontend, want);
    }
    // Any address may be a pod's while the addresses of pods are not known.
    let unknown = Contents { pod_sources: Vec::new(), ..contents() };
    let told = told(&ask(&maps(&unknown), TCP, "10.96.0.10:80", "203.0.113.7"));
    assert_eq!(told, ["Pod Served 1,2,3", "Outside Served 1,2,3"]);
}

#[test]
fn what_is_no_frontend() {
    check(
        TCP,
        "10.96.0.10:81",
        "",
        Owner::UnusedPort,
        &[
            "Host Refused reject_unused_port",
            "Pod Refused reject_unused_port",
            "PodPackets Refused reject_unused_port",
            "Outside Refused reject_unused_port",
        ],
    );
    check(
        TCP,
        "10.96.9.9:80",
        "",
        Owner::InactiveAddress,
        &[
            "Host Denied drop_inactive_address",
            "Pod LeftToPackets left_to_packets",
            "PodPackets Dropped drop_inactive_address",
            "Outside Dropped drop_inactive_address",
        ],
    );
    check(TCP, "198.51.100.1:80", "10.64.9.9", Owner::Other, &["Pod NotOurs -", "PodPackets NotOurs -"]);
    check(TCP, "192.0.2.10:22", "203.0.113.7", Owner::Other, &["Outside NotOurs -"]);
}

#[test]
fn what_may_have_been_meant() {
    for (target, note) in [
        ("10.96.0.10:81", Some("it has 80/TCP")),
        (
            "198.51.100.1:30080",
            Some("30080 is a nodePort, but not on this address: --nodeport-addresses decides"),
        ),
        ("192.0.2.10:30080", None),
        ("198.51.100.1:80", None),
    ] {
        assert_eq!(ask(&maps(&contents()), TCP, target, "").note.as_deref(), note, "{target}");
    }
}

#[test]
fn without_endpoints() {
    check(
        TCP,
        "10.96.0.20:80",
        "",
        Owner::Frontend,
        &[
            "Host Refused reject_no_endpoint",
            "Pod Refused reject_no_endpoint",
            "PodPackets Refused reject_no_endpoint",
            "Outside Refused reject_no_endpoint",
        ],
    );
    check(
        TCP,
        "10.96.0.40:80",
        "",
        Owner::Frontend,
        &[
            "Host Denied drop_no_local_endpoint",
            "Pod LeftToPackets left_to_packets",
            "PodPackets Dropped drop_no_local_endpoint",
            "Outside Dropped drop_no_local_endpoint",
        ],
    );
}

#[test]
fn a_node_port_with_a_local_policy() {
    check(
        TCP,
        "192.0.2.10:30080",
        "",
        Owner::Frontend,
        &["Host Served 1,2,3", "Pod Served 1,2,3", "PodPackets Served 1,2,3", "Outside Served 1"],
    );
    let explanation = ask(&maps(&contents()), TCP, "192.0.2.10:30080", "");
    let frontend = explanation.frontend.unwrap();
    assert_eq!(frontend.name, "nodePort 30080/TCP (IPv4)");
    assert_eq!(frontend.flags, ["far-local", "external"]);
}

#[test]
fn source_ranges_are_judged_by_address() {
    let vip = "203.0.113.100:80";
    for (from, within, want) in [
        ("198.51.100.7", true, "Outside Served 1,2,3"),
        ("203.0.113.7", false, "Outside Dropped drop_source_range"),
        ("192.0.2.10", false, "Host Denied drop_source_range"),
    ] {
        let explanation = ask(&maps(&contents()), TCP, vip, from);
        assert_eq!(told(&explanation), [want]);
        let service = explanation.service.unwrap();
        assert_eq!(service.source_ranges, ["198.51.100.0/24"]);
        assert_eq!(service.client_in_source_ranges, Some(within), "{from}");
    }
    // Without an address, only the answers at sockets are known.
    check(
        TCP,
        vip,
        "",
        Owner::Frontend,
        &["Host Denied drop_source_range", "Pod LeftToPackets left_to_packets"],
    );
}

#[test]
fn a_device_can_make_a_client_near() {
    let maps = maps(&contents());
    let device = Device { flags: NEAR, ..Device::default() };
    maps.edge.devices.borrow_mut().insert(IfIndex(4), device);
    let told = told(&ask(&maps, TCP, "192.0.2.10:30080", "203.0.113.7"));
    assert_eq!(told, ["Outside Served 1", "NearDevice Served 1,2,3"]);
}

#[test]
fn session_affinity_remembers_who_asks() {
    let entry = |backend, generation, age: u64| AffinityValue {
        backend,
        generation,
        epoch: 3,
        pad: 0,
        last_seen: Nanos(NOW.wrapping_sub(age * 1_000_000_000)),
    };
    let host = AffinityKey { client: AffinityKey::netns_client(HOST_NETNS), service: ServiceId(3) };
    let outside = AffinityKey { client: addr("203.0.113.7"), service: ServiceId(3) };
    for (key, value, from, want) in [
        (outside, entry(BackendId(6), 9, 99), "203.0.113.7", "Outside Served 5,6 !6"),
        (outside, entry(BackendId(5), 9, 0), "203.0.113.7", "Outside Served 5,6 !5"),
        (outside, entry(BackendId(6), 9, 100), "203.0.113.7", "Outside Served 5,6"),
        (outside, entry(BackendId(6), 8, 0), "203.0.113.7", "Outside Served 5,6"),
        (outside, entry(BackendId(6), 9, 0), "203.0.113.8", "Outside Served 5,6"),
        (host, entry(BackendId(6), 9, 0), "192.0.2.10", "Host Served 5,6 !6"),
    ] {
        let maps = maps(&contents());
        maps.clients.borrow_mut().insert(key, value);
        assert_eq!(told(&ask(&maps, UDP, "10.96.0.30:53", from)), [want]);
    }
}

#[test]
fn every_backend_is_told_of() {
    let explanation = ask(&maps(&contents()), TCP, "10.96.0.10:80", "");
    let service = explanation.service.unwrap();
    assert_eq!(
        (service.namespace.as_str(), service.name.as_str(), service.port.as_str()),
        ("shop", "cart", "web")
    );
    let sets = service.backends.iter().map(|b| (b.in_cluster, b.in_local, b.serving, b.on_this_node));
    let want = [
        (true, true, true, true),
        (true, false, true, false),
        (true, false, true, false),
        (false, false, true, false),
    ];
    assert_eq!(sets.collect::<Vec<_>>(), want);
}

#[test]
fn every_output_says_the_same() {
    let explanation = ask(&maps(&contents()), TCP, "10.96.0.10:80", "10.64.9.9");
    let data = serde_json::to_value(&explanation).unwrap();
    for output in [crate::config::args::Output::Json, crate::config::args::Output::Yaml] {
        let mut text = Vec::new();
        assert!(print_data(output, &explanation, &mut text).unwrap());
        let read: serde_json::Value = serde_saphyr::from_slice(&text).unwrap();
        assert_eq!(read, data, "{output:?}");
    }
    let mut text = Vec::new();
    words(&explanation, &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    for part in [
        "10.96.0.10:80/TCP is a frontend",
        "service:   shop/cart, port web (id 1)",
        "10.64.0.2:8080  yes      -      yes",
        "pod of this node",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn an_agent_answers_at_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = reasons::socket(&dir.path().join("run/state.json"));
    let known = EndpointReasons {
        endpoint: "10.64.0.9:8080".parse().unwrap(),
        serving: false,
        on_this_node: true,
        not_in_cluster: Some("not ready".to_owned()),
        not_in_local: Some("not ready".to_owned()),
    };
    let port = reasons::PortReasons {
        port: "web".to_owned(),
        proto: TCP,
        family: "IPv4".to_owned(),
        endpoints: vec![known],
    };
    let cart = ObjectKey::new("shop", "cart");
    assert!(reasons::ask(&path, &cart).is_err(), "nobody there");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answers = runtime.block_on(async {
        let (questions, mut asked) = tokio::sync::mpsc::channel::<reasons::Asked>(1);
        tokio::spawn(reasons::serve(path.clone(), questions));
        let wanted = [cart.clone(), ObjectKey::new("shop", "other")];
        let client = tokio::task::spawn_blocking(move || {
            while !path.exists() {
                std::thread::yield_now();
            }
            wanted.map(|service| reasons::ask(&path, &service).unwrap())
        });
        for _ in 0..2 {
            let asked = asked.recv().await.unwrap();
            let answer = if asked.service == cart { vec![port.clone()] } else { Vec::new() };
            asked.reply.send(answer).unwrap();
        }
        client.await.unwrap()
    });
    assert_eq!(answers, [vec![port.clone()], Vec::new()]);

    // The agent's answer is added to the contents of the maps.
    let mut service = ask(&maps(&contents()), TCP, "10.96.0.10:80", "").service.unwrap();
    service.learn(&port.endpoints);
    let last = service.backends.last().unwrap();
    assert_eq!((last.endpoint.to_string().as_str(), last.reason.as_str()), ("10.64.0.9:8080", "not ready"));
    assert!(service.agent_answered && service.backends.len() == 5);
}

/// Returns the answers to a pod in the cgroup `cgroup`, and the reason at its socket, when the pod of cgroup 7 has
/// opted out.
fn in_cgroup(cgroup: Option<CgroupId>) -> (Vec<String>, &'static str) {
    let opted_out = Contents {
        opt_out: vec![(CgroupId(7), EVERYTHING), (CgroupId(8), INSIDE)],
        sandboxes: vec![(NetnsCookie(80), CgroupId(8))],
        node_flags: PODS_IN_PACKETS | OPTED_OUT | SANDBOXES_KNOWN,
        ..contents()
    };
    let (addr, port) = (addr("10.96.0.10"), Be16::new(80));
    let question = Question { proto: TCP, addr, port, from: Some(self::addr("10.64.1.50")), cgroup };
    let maps = maps(&opted_out);
    let explanation = explain(&maps, &Model::restore(CAPACITY, &maps.contents()), &question);
    let reason = explanation.clients.first().map_or("", |answer| answer.reason);
    (told(&explanation), reason)
}

#[test]
fn sockets_of_a_pod_that_has_opted_out_leave_everything_to_packets() {
    let packets = "PodPackets Served 1,2,3".to_owned();
    let (told, reason) = in_cgroup(Some(CgroupId(7)));
    assert_eq!(told, ["Pod LeftToPackets left_to_packets", &packets]);
    assert!(reason.starts_with("the pod has opted out"), "{reason}");
    for cgroup in [Some(CgroupId(8)), None] {
        assert_eq!(in_cgroup(cgroup), (vec!["Pod Served 1,2,3".to_owned(), packets.clone()], ""));
    }
}

fn note(explanation: &Explanation, here: Option<&str>, opted_out: usize) -> String {
    client_note(explanation, here, opted_out).unwrap_or_default()
}

/// The host's packet is answered where it would leave the host.
#[test]
fn a_process_of_the_host_is_refused_where_its_socket_cannot_be_told_more() {
    for (node_flags, silent) in
        [(0, "Host Denied drop_no_local_endpoint"), (HOST_IN_PACKETS, "Host Refused drop_no_local_endpoint")]
    {
        let maps = maps(&Contents { node_flags, ..contents() });
        assert_eq!(told(&ask(&maps, TCP, "10.96.0.40:80", "192.0.2.10")), [silent]);
        let empty = told(&ask(&maps, TCP, "10.96.0.20:80", "192.0.2.10"));
        assert_eq!(empty, ["Host Refused reject_no_endpoint"]);
    }
}

#[test]
fn what_limits_an_answer_is_told() {
    let mut explanation = ask(&maps(&contents()), TCP, "10.96.0.10:80", "10.64.1.50");
    assert_eq!(note(&explanation, Some("n1"), 0), "");
    assert!(note(&explanation, Some("n1"), 2).contains("opted out of the socket edge (2)"));
    let pod = PodView {
        namespace: "shop".to_owned(),
        name: "cart-1".to_owned(),
        node: Some("n1".to_owned()),
        host_network: false,
        opted_out: Some(false),
    };
    explanation.pod = Some(pod.clone());
    assert_eq!(note(&explanation, Some("n1"), 2), "");
    assert!(note(&explanation, Some("n2"), 2).starts_with("it runs on node n1"));
    explanation.pod = Some(PodView { opted_out: None, ..pod });
    assert!(note(&explanation, Some("n1"), 2).contains("opted out of the socket edge (2)"));
    // No pod's socket is asked about here.
    let of_host = ask(&maps(&contents()), TCP, "10.96.0.10:80", "192.0.2.10");
    assert_eq!(note(&of_host, Some("n1"), 2), "");
}
