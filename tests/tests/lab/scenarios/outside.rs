//! S08, S10, S11: clients outside; S16: addresses and ports that are not served.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Place, Proto};
use proxy_tests::scenarios::{OUTSIDE_ADDRESS, World, evenly, refusal, served, syns_sent_again};

use super::{KUBIA, MANY, failure};

#[test]
fn s08_a_port_on_every_node() -> Result<()> {
    let mut world = World::start(&["s08-nodeport.yaml"])?;
    world.start_agent("node-b")?;
    let far_client = world.lab().add_pod("node-b", "client-b", &["172.16.2.50"])?;
    for (place, target) in [
        (Place::clone(&world.client()), "192.168.1.11:30123"),
        (world.lab().node("node-a").host().clone(), "192.168.1.11:30123"),
        (Place::clone(&far_client), "192.168.1.12:30123"),
        (world.lab().node("node-b").host().clone(), "192.168.1.12:30123"),
    ] {
        let attempts = place.connect(target).http().times(MANY).run()?;
        evenly(&served(target, &attempts)?, &KUBIA)?;
        // The clusterIP serves as well.
        let vip = "10.111.254.223:80";
        served(vip, &place.connect(vip).http().times(20).run()?)?;
    }
    for (target, node) in [("192.168.1.11:30123", "node-a"), ("192.168.1.12:30123", "node-b")] {
        from_outside(&world, target, node)?;
    }
    Ok(())
}

/// Returns the node of a pod of [`KUBIA`].
fn node_of(pod: &str) -> &'static str {
    if pod == KUBIA[0] { "node-a" } else { "node-b" }
}

/// Checks that all pods of [`KUBIA`] answer a client outside. The pods of the node that the client came to must see
/// its own address, the pods of the other node the first node's address.
fn from_outside(world: &World, target: &str, node: &str) -> Result<()> {
    let attempts = world.outside().connect(target).http().times(MANY).run()?;
    evenly(&served(target, &attempts)?, &KUBIA)?;
    for attempt in &attempts {
        let local = attempt.server.as_deref().is_some_and(|pod| node_of(pod) == node);
        let own = world.lab().node(node).host().addresses();
        let seen = attempt.peer.context("no peer")?.ip();
        let right = if local { seen.to_string() == OUTSIDE_ADDRESS } else { own.contains(&seen) };
        assert!(right, "through {node}: {attempt:?}");
    }
    Ok(())
}

/// A client uses its ports over and over. The pods close the connections and remember each source: a SYN from a
/// remembered source for another port of the client would not be answered, and would be sent again a second later.
#[test]
fn s08_no_connection_comes_from_where_a_pod_remembers_another() -> Result<()> {
    let (world, target) = (World::start(&["s08-nodeport.yaml"])?, "192.168.1.11:30123");
    let outside = world.outside();
    outside.net().sysctl("net/ipv4/ip_local_port_range", "40000 41999")?;
    let attempts = outside.connect(target).http().times(6_000).run()?;
    evenly(&served(target, &attempts)?, &KUBIA)?;
    let again = syns_sent_again(&outside)?;
    // A busy machine alone may cause so many.
    ensure!(again <= 3, "{again} SYNs were sent again");
    Ok(())
}

#[test]
fn s10_an_address_from_a_cloud() -> Result<()> {
    let mut world = World::start(&["s10-loadbalancer.yaml"])?;
    world.start_agent("node-b")?;
    for (node, node_port) in [("node-a", "192.168.1.11:32143"), ("node-b", "192.168.1.12:32143")] {
        world.lab().outside_via(node)?;
        from_outside(&world, "203.0.113.80:80", node)?;
        from_outside(&world, node_port, node)?;
    }
    for place in world.clients() {
        let target = "203.0.113.80:80";
        evenly(&served(target, &place.connect(target).http().times(MANY).run()?)?, &KUBIA)?;
    }
    Ok(())
}

#[test]
fn s11_a_pod_sees_its_client_outside() -> Result<()> {
    let mut world = World::start(&["s11-local-policy.yaml"])?;
    world.start_agent("node-b")?;
    let (outside, pods) = (world.outside(), ["kubia-gzwli", "kubia-3inly"]);
    let target = "192.168.1.12:30124";
    let attempts = outside.connect(target).http().times(MANY).run()?;
    evenly(&served(target, &attempts)?, &pods)?;
    for attempt in &attempts {
        let peer = attempt.peer.map(|peer| peer.ip().to_string());
        assert_eq!(peer.as_deref(), Some(OUTSIDE_ADDRESS), "{attempt:?}");
    }
    let target = "192.168.1.11:30124";
    let silent = outside.connect(target).http().timeout(Duration::from_millis(500)).times(2).run()?;
    assert!(silent.iter().all(|attempt| failure(attempt) == "ETIMEDOUT"), "{silent:?}");
    // Inside the cluster, the address of the node without a pod serves as well.
    for place in world.clients() {
        evenly(&served(target, &place.connect(target).http().times(MANY).run()?)?, &pods)?;
    }
    Ok(())
}

#[test]
fn s16_refused_at_once() -> Result<()> {
    let world = World::start(&["s01-clusterip.yaml"])?;
    let [pod, host] = world.clients();
    for place in [pod, host, world.outside()] {
        let ping = place.connect("10.111.249.153:0").proto(Proto::Ping);
        let http = place.connect("10.111.249.153:81").http();
        let udp = place.connect("10.111.249.153:80").udp();
        for connect in [ping, http, udp] {
            for attempt in connect.times(5).timeout(Duration::from_secs(10)).run()? {
                assert_eq!(failure(&attempt), refusal(), "{}: {attempt:?}", place.name());
                assert!(attempt.elapsed_us < 1_000_000, "{}: {attempt:?}", place.name());
            }
        }
    }
    Ok(())
}
