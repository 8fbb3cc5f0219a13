//! S09, S12, S13, S17, S18: changes while clients go on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Held, Place, Proto};
use proxy_tests::scenarios::{Loops, NODE, World, at_most, endpoint, evenly, refusal, scaled_pod, served};
use serde_json::json;

use super::{LINUXEA, MANY, failure, failure_without_service};

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
        // The clusterIP and the nodePort of the Service have the same memory of a client.
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
    // With its first pod, the Service is served.
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
        let want = failure_without_service(&place);
        assert_eq!(failure(&place.connect(vip).http().one()?), want, "the Service is deleted");
    }
    world.manifests().put(file, &objects)?;
    world.manifests().patch_service(file, &json!({ "clusterIP": "10.111.250.81" }))?;
    let new_vip = "10.111.250.81:80";
    world.wait_ports(NODE, "scaling/kubia", |ports| {
        ports.iter().any(|port| port.frontend_names() == ["10.111.250.81:80/TCP"])
    })?;
    for place in world.clients() {
        evenly(&served(new_vip, &place.connect(new_vip).http().times(20).run()?)?, &["kubia-scaled-01"])?;
        let want = failure_without_service(&place);
        assert_eq!(failure(&place.connect(vip).http().one()?), want, "the old clusterIP stops");
    }
    Ok(())
}
