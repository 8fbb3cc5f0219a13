//! Every example does what its comments say: the real agent on the manifests of `examples/`, real servers, and real
//! clients in a pod and on the node. Live changes are changes of the files.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Attempt, Held, Place, Proto};
use proxy_tests::scenarios::{
    CLIENT_ADDRESS, Loops, NODE, World, at_most, endpoint, evenly, refusal, scaled_pod, served, until,
};
use serde_json::json;

const KUBIA: [&str; 3] = ["kubia-7nog1", "kubia-gzwli", "kubia-3inly"];
const LINUXEA: [&str; 3] = ["linuxea-0", "linuxea-1", "linuxea-2"];
/// Enough for [`evenly`].
const MANY: usize = 300;

fn failure(attempt: &Attempt) -> &str {
    attempt.error.as_deref().unwrap_or("answered")
}

#[test]
fn s01_one_address_and_three_pods() -> Result<()> {
    let mut world = World::start(&["s01-clusterip.yaml"])?;
    world.start_agent("node-b")?;
    let vip = "10.111.249.153:80";
    let far = world.lab().node("node-b").host().clone();
    let [pod, host] = world.clients();
    for (place, own) in [(pod, CLIENT_ADDRESS), (host, "192.168.1.11"), (far, "192.168.1.12")] {
        let attempts = place.connect(vip).http().times(MANY).run()?;
        evenly(&served(vip, &attempts)?, &KUBIA)?;
        for attempt in &attempts {
            let peer = attempt.peer.map(|peer| peer.ip().to_string());
            assert_eq!(peer.as_deref(), Some(own), "the pod sees its client: {attempt:?}");
            assert_eq!(attempt.endpoint.map(|endpoint| endpoint.port()), Some(8080), "{attempt:?}");
        }
    }
    Ok(())
}

#[test]
fn s02_a_client_keeps_its_pod() -> Result<()> {
    let file = "s02-session-affinity.yaml";
    let world = World::start(&[file])?;
    let vip = "10.111.249.154:80";
    let mut places = world.clients().to_vec();
    for number in 0..12 {
        let (name, address) = (format!("client-{number}"), format!("172.16.1.{}", 200 + number));
        let pod = world.lab().add_pod(NODE, &name, &[&address])?;
        places.push(Place::clone(&pod));
    }
    let mut chosen = BTreeSet::new();
    for place in &places {
        // Two processes of one pod are one client.
        let mut attempts = place.connect(vip).http().times(20).run()?;
        attempts.extend(place.connect(vip).http().times(20).run()?);
        let summary = served(vip, &attempts)?;
        at_most(1, &summary)?;
        chosen.extend(summary.by_server.into_keys());
    }
    assert!(chosen.len() > 1, "14 clients all got {chosen:?}");

    world
        .manifests()
        .patch_service(file, &json!({ "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 1 } } }))?;
    world.wait_ports(NODE, "sticky/kubia", |ports| ports.iter().all(|port| port.affinity_seconds == 1))?;
    let mut after_a_pause = BTreeSet::new();
    until("another pod after the timeout", || {
        thread::sleep(Duration::from_millis(1200));
        let attempts = world.client().connect(vip).http().run()?;
        after_a_pause.extend(served(vip, &attempts)?.by_server.into_keys());
        Ok((after_a_pause.len() > 1).then_some(()))
    })
}

#[test]
fn s03_two_ports() -> Result<()> {
    let world = World::start(&["s03-two-ports.yaml"])?;
    for place in world.clients() {
        for (vip, target_port) in [("10.111.249.155:80", 8080), ("10.111.249.155:443", 8443)] {
            let attempts = place.connect(vip).http().times(MANY).run()?;
            evenly(&served(vip, &attempts)?, &KUBIA)?;
            let ports: BTreeSet<_> = attempts.iter().map(|a| a.endpoint.map(|e| e.port())).collect();
            assert_eq!(ports, BTreeSet::from([Some(target_port)]), "{vip}");
        }
        // The target ports are no ports of the Service.
        let attempt = place.connect("10.111.249.155:8080").one()?;
        assert_eq!(failure(&attempt), refusal(), "{attempt:?}");
    }
    Ok(())
}

#[test]
fn s04_one_name_and_several_numbers() -> Result<()> {
    let world = World::start(&["s04-named-ports.yaml"])?;
    let pods = ["kubia-7nog1", "kubia-gzwli", "kubia-v2-hm5tq"];
    for (vip, numbers) in
        [("10.111.249.156:80", [8080, 8080, 9080]), ("10.111.249.156:443", [8443, 8443, 9443])]
    {
        let attempts = world.client().connect(vip).http().times(MANY).run()?;
        evenly(&served(vip, &attempts)?, &pods)?;
        let reached: BTreeSet<_> =
            attempts.iter().filter_map(|a| Some((a.server.as_deref()?, a.endpoint?.port()))).collect();
        assert_eq!(reached, pods.into_iter().zip(numbers).collect(), "{vip}");
    }
    Ok(())
}

#[test]
fn s05_servers_outside_of_the_cluster() -> Result<()> {
    let world = World::start(&["s05-no-selector.yaml"])?;
    let vip = "10.96.5.5:80";
    for place in world.clients() {
        let attempts = place.connect(vip).http().times(MANY).run()?;
        evenly(&served(vip, &attempts)?, &["11.11.11.11", "22.22.22.22"])?;
    }
    Ok(())
}

#[test]
fn s06_external_name_and_back() -> Result<()> {
    let file = "s06-external-name.yaml";
    let world = World::start(&[file])?;
    let (service, vip) = ("external-name/external-service", "10.96.6.6:80");
    let by_name =
        json!({ "type": "ExternalName", "externalName": "someapi.somecompany.com", "clusterIP": null });
    let by_address = json!({ "type": "ClusterIP", "externalName": null, "clusterIP": "10.96.6.6" });
    for _ in 0..2 {
        world.wait_ports(NODE, service, <[_]>::is_empty)?;
        for place in world.clients() {
            let attempt = place.connect(vip).http().one()?;
            assert_eq!(failure(&attempt), "EPERM", "an address of the ServiceCIDR without a Service");
        }
        world.manifests().patch_service(file, &by_address)?;
        world.wait_endpoints(NODE, service, &["11.11.11.11:80"])?;
        for place in world.clients() {
            let attempts = place.connect(vip).http().times(20).run()?;
            evenly(&served(vip, &attempts)?, &["11.11.11.11"])?;
        }
        world.manifests().patch_service(file, &by_name)?;
    }
    assert_eq!(world.problems(NODE)?, BTreeMap::new());
    Ok(())
}

#[test]
fn s07_headless() -> Result<()> {
    let world = World::start(&["s07-headless.yaml"])?;
    assert_eq!(world.ports(NODE, "default/none-linuxea")?, []);
    assert_eq!(world.problems(NODE)?, BTreeMap::new());
    for place in world.clients() {
        // As DNS has it: the pods' own addresses, which nobody translates.
        for (address, pod) in ["172.16.1.42:80", "172.16.2.44:80", "172.16.3.46:80"].into_iter().zip(LINUXEA)
        {
            let attempts = place.connect(address).http().times(10).run()?;
            evenly(&served(address, &attempts)?, &[pod])?;
        }
    }
    Ok(())
}

#[test]
fn s08_a_port_on_every_node() -> Result<()> {
    let mut world = World::start(&["s08-nodeport.yaml"])?;
    world.start_agent("node-b")?;
    let far_client = world.lab().add_pod("node-b", "client-b", &["172.16.2.50"])?;
    let on = |node: &str| world.lab().node(node).host().clone();
    for (place, target) in [
        (Place::clone(&world.client()), "192.168.1.11:30123"),
        (on("node-a"), "192.168.1.11:30123"),
        (Place::clone(&far_client), "192.168.1.12:30123"),
        (on("node-b"), "192.168.1.12:30123"),
    ] {
        let attempts = place.connect(target).http().times(MANY).run()?;
        evenly(&served(target, &attempts)?, &KUBIA)?;
        // The clusterIP serves as well.
        let vip = "10.111.254.223:80";
        served(vip, &place.connect(vip).http().times(20).run()?)?;
    }
    Ok(())
}

#[test]
fn s09_patched_to_sticky_sessions_while_it_serves() -> Result<()> {
    let file = "s09-patched-live.yaml";
    let world = World::start(&[file])?;
    let mut loops = Loops::start(&world, &["10.96.66.66:80", "192.168.1.11:31180"])?;
    for _ in 0..2 {
        for summary in loops.next(MANY)? {
            evenly(&summary, &LINUXEA)?;
        }
        world.manifests().patch_service(file, &json!({ "sessionAffinity": "ClientIP" }))?;
        world.wait_ports(NODE, "default/linuxea", |ports| {
            ports.iter().all(|p| p.affinity_seconds == 10_800)
        })?;
        let sticky = loops.next(50)?;
        for summary in &sticky {
            at_most(1, summary)?;
        }
        // Both ways into the Service have one memory of a client.
        for ways in sticky.chunks(2) {
            assert_eq!(ways[0].servers(), ways[1].servers());
        }
        world.manifests().patch_service(file, &json!({ "sessionAffinity": "None" }))?;
        world.wait_ports(NODE, "default/linuxea", |ports| ports.iter().all(|p| p.affinity_seconds == 0))?;
    }
    loops.none_failed().map(drop)
}

fn redis(place: &Place) -> Result<Held> {
    let held = place.hold("10.96.65.65:6379").proto(Proto::Redis).open()?;
    ensure!(held.opened().ok, "{:?}", held.opened());
    Ok(held)
}

fn reply(held: &mut Held, command: &str) -> Result<String> {
    let answer = held.say(command)?;
    assert_eq!(answer.peername, Some("10.96.65.65:6379".parse()?), "{answer:?}");
    answer.text.clone().with_context(|| format!("{command}: {answer:?}"))
}

#[test]
fn s12_a_long_connection_lives_as_long_as_its_pod() -> Result<()> {
    let file = "s12-redis.yaml";
    let world = World::start(&[file])?;
    let vip = "10.96.65.65:6379";
    let (mut loops, mut old) = (Loops::default(), Vec::new());
    for place in world.clients() {
        let mut held = redis(&place)?;
        assert_eq!(reply(&mut held, "PING")?, "PONG");
        assert_eq!(reply(&mut held, "SET served-by redis-6wsr7")?, "OK");
        old.push(held);
        loops.add(vip, place.connect(vip).proto(Proto::Redis))?;
    }
    loops.go_on()?;

    world.add_pod(NODE, "redis-mq2xl", "172.16.1.65", ("redis", 6379))?;
    world.manifests().set_endpoints(file, vec![endpoint("redis-mq2xl", NODE, "172.16.1.65")])?;
    world.wait_endpoints(NODE, "default/redis", &["172.16.1.65:6379"])?;
    for place in world.clients() {
        // The new pod has a database of its own.
        assert_eq!(reply(&mut redis(&place)?, "GET served-by")?, "(nil)");
    }
    for held in &mut old {
        assert_eq!(reply(held, "GET served-by")?, "redis-6wsr7");
    }
    loops.go_on()?;
    world.lab().remove_pod("redis-6wsr7")?;
    for held in &mut old {
        let answer = held.say("PING")?;
        assert!(!answer.ok, "the pod is gone: {answer:?}");
    }
    loops.go_on()?;
    loops.none_failed().map(drop)
}

#[test]
fn s13_a_pod_is_not_ready_for_a_while() -> Result<()> {
    let file = "s13-readiness.yaml";
    let world = World::start(&[file])?;
    let (service, vip) = ("default/service-clusterip", "10.97.97.97:80");
    let mut loops = Loops::start(&world, &[vip])?;
    for _ in 0..2 {
        for summary in loops.next(MANY)? {
            evenly(&summary, &LINUXEA)?;
        }
        world.manifests().set_ready(file, "172.16.2.44", false)?;
        world.wait_endpoints(NODE, service, &["172.16.1.42:80", "172.16.3.46:80"])?;
        for summary in loops.next(MANY)? {
            evenly(&summary, &["linuxea-0", "linuxea-2"])?;
        }
        world.manifests().set_ready(file, "172.16.2.44", true)?;
        world.wait_endpoints(NODE, service, &["172.16.1.42:80", "172.16.2.44:80", "172.16.3.46:80"])?;
    }
    loops.none_failed().map(drop)
}

const DNS: &str = "10.96.0.10:53";
const COREDNS: [&str; 2] = ["coredns-4n8cx", "coredns-t9v2k"];

#[test]
fn s14_dns_over_udp_and_tcp() -> Result<()> {
    let world = World::start(&["s14-dns.yaml"])?;
    for place in world.clients() {
        for proto in [Proto::Udp, Proto::UdpUnconnected, Proto::Tcp] {
            let attempts = place.connect(DNS).proto(proto).times(200).run()?;
            evenly(&served(DNS, &attempts)?, &COREDNS)?;
            let ports: BTreeSet<_> = attempts.iter().map(|a| a.endpoint.map(|e| e.port())).collect();
            assert_eq!(ports, BTreeSet::from([Some(53)]), "{proto:?}");
        }
        let metrics = "10.96.0.10:9153";
        evenly(&served(metrics, &place.connect(metrics).http().times(200).run()?)?, &COREDNS)?;
        // A resolver that keeps its unconnected socket keeps its server.
        let attempts = place.connect(DNS).udp_unconnected().times(50).per_socket(50).run()?;
        at_most(1, &served(DNS, &attempts)?)?;
    }
    Ok(())
}

/// A resolver with a connected socket to that pod.
fn resolver(place: &Place, pod: &str) -> Result<Held> {
    until(&format!("a connection to {pod}"), || {
        let mut held = place.hold(DNS).udp().open()?;
        let answer = held.say("who are you?")?;
        ensure!(answer.ok && answer.peername == Some(DNS.parse::<SocketAddr>()?), "{answer:?}");
        Ok((answer.server.as_deref() == Some(pod)).then_some(held))
    })
}

#[test]
fn s14_a_dns_pod_that_has_gone_is_not_asked_again() -> Result<()> {
    let file = "s14-dns.yaml";
    let world = World::start(&[file])?;
    let [gone, left] = COREDNS;
    let (mut orphans, mut others, mut loops) = (Vec::new(), Vec::new(), Loops::default());
    for place in world.clients() {
        orphans.push(resolver(&place, gone)?);
        others.push(resolver(&place, left)?);
        // Sockets that are never connected and never replaced, one of them on each pod sooner or later.
        for _ in 0..4 {
            loops.add(DNS, place.connect(DNS).udp_unconnected().per_socket(usize::MAX))?;
        }
    }
    loops.go_on()?;

    world.manifests().set_endpoints(file, vec![endpoint(left, "node-b", "172.16.2.53")])?;
    world.wait_ports(NODE, "kube-system/kube-dns", |ports| {
        ports.iter().all(|port| port.cluster.iter().all(|e| e.ip() == IpAddr::from([172, 16, 2, 53])))
    })?;
    for orphan in &mut orphans {
        // It would be answered still: the pod runs. Its socket is ended all the same. Whether the application learns of
        // it as it sends or as it receives is a matter of chance.
        let ended = ["EDESTADDRREQ", "ECONNABORTED"];
        orphan.say_until(Duration::from_secs(30), |answer| ended.contains(&failure(answer)))?;
    }
    for summary in loops.next(20)? {
        assert_eq!(summary.servers(), [left]);
    }
    world.lab().remove_pod(gone)?;
    for summary in loops.next(20)? {
        assert_eq!(summary.servers(), [left]);
    }
    for other in &mut others {
        let answer = other.say("still there?")?;
        assert!(answer.ok, "a socket on a pod that stays is left alone: {answer:?}");
    }
    for place in world.clients() {
        // What a resolver does when its socket has ended: it opens another.
        evenly(&served(DNS, &place.connect(DNS).udp().times(20).run()?)?, &[left])?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn s15_an_endpoint_on_the_network_of_a_node() -> Result<()> {
    let mut world = World::start(&["s15-kubernetes.yaml"])?;
    world.start_agent("node-b")?;
    let vip = "10.96.0.1:443";
    let [pod, host] = world.clients();
    for place in [pod, host, world.lab().node("node-b").host().clone()] {
        let attempts = place.connect(vip).http().times(20).run()?;
        evenly(&served(vip, &attempts)?, &["node-b"])?;
        assert!(attempts.iter().all(|a| a.endpoint == Some(([192, 168, 1, 12], 6443).into())));
    }
    Ok(())
}

#[test]
fn s17_no_endpoint_is_a_refusal() -> Result<()> {
    let file = "s17-no-endpoints.yaml";
    let world = World::start(&[file])?;
    let vip = "10.96.17.17:80";
    for place in world.clients() {
        for attempt in place.connect(vip).http().times(20).timeout(Duration::from_secs(10)).run()? {
            assert_eq!((failure(&attempt), attempt.stage.as_deref()), (refusal(), Some("connect")));
        }
    }
    // With the first pod it is served.
    world.add_pod(NODE, "webapp-1", "172.16.1.17", ("http", 8080))?;
    world.manifests().change(file, |objects| {
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": { "name": "webapp-1", "labels": { "kubernetes.io/service-name": "webapp" } },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": 8080 }],
            "endpoints": [endpoint("webapp-1", NODE, "172.16.1.17")],
        }));
    })?;
    world.wait_endpoints(NODE, "default/webapp", &["172.16.1.17:8080"])?;
    for place in world.clients() {
        evenly(&served(vip, &place.connect(vip).http().times(20).run()?)?, &["webapp-1"])?;
    }
    Ok(())
}

/// Scales to the first `count` pods, which have to run, and waits until the node serves them.
fn scale(world: &World, file: &str, count: usize) -> Result<Vec<String>> {
    let pods: Vec<_> = (1..=count).map(scaled_pod).collect();
    let list = pods.iter().map(|(name, node, address)| endpoint(name, node, address)).collect();
    world.manifests().set_endpoints(file, list)?;
    let addresses: Vec<String> = pods.iter().map(|(_, _, address)| format!("{address}:8080")).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    world.wait_endpoints(NODE, "scaling/kubia", &addresses)?;
    Ok(pods.into_iter().map(|(name, ..)| name).collect())
}

#[test]
fn s18_scaled_up_and_down_and_made_again() -> Result<()> {
    let file = "s18-scaling.yaml";
    let world = World::start(&[file])?;
    let vip = "10.111.250.18:80";
    let mut loops = Loops::start(&world, &[vip])?;
    for number in 4..=10 {
        let (name, node, address) = scaled_pod(number);
        world.add_pod(node, &name, &address, ("http", 8080))?;
    }
    for count in [3, 10, 1] {
        let pods = scale(&world, file, count)?;
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        for summary in loops.next(100 * count)? {
            evenly(&summary, &pods)?;
        }
    }
    for number in 2..=10 {
        world.lab().remove_pod(&scaled_pod(number).0)?;
    }
    loops.next(20)?;
    loops.none_failed()?;

    let objects = world.manifests().objects(file)?;
    world.manifests().remove(file)?;
    world.wait_ports(NODE, "scaling/kubia", <[_]>::is_empty)?;
    for place in world.clients() {
        assert_eq!(failure(&place.connect(vip).http().one()?), "EPERM", "the Service is deleted");
    }
    world.manifests().put(file, &objects)?;
    world.manifests().patch_service(file, &json!({ "clusterIP": "10.111.250.81" }))?;
    let new_vip = "10.111.250.81:80";
    world.wait_ports(NODE, "scaling/kubia", |ports| {
        ports.iter().any(|port| port.frontend_names() == ["10.111.250.81:80/TCP"])
    })?;
    for place in world.clients() {
        evenly(&served(new_vip, &place.connect(new_vip).http().times(20).run()?)?, &["kubia-scaled-01"])?;
        assert_eq!(failure(&place.connect(vip).http().one()?), "EPERM", "the old clusterIP stops");
    }
    Ok(())
}
