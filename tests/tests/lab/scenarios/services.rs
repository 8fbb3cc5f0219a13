//! S01-S07: the kinds of Services.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use proxy_tests::lab::Place;
use proxy_tests::scenarios::{CLIENT_ADDRESS, NODE, World, at_most, evenly, refusal, served, until};
use serde_json::json;

use super::{KUBIA, LINUXEA, MANY, failure, failure_without_service};

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
        // The target ports are not ports of the Service.
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
            let want = failure_without_service(&place);
            assert_eq!(failure(&attempt), want, "an address of the ServiceCIDR without a Service");
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
        // The pods' own addresses, as DNS returns them, which are not translated.
        for (address, pod) in ["172.16.1.42:80", "172.16.2.44:80", "172.16.3.46:80"].into_iter().zip(LINUXEA)
        {
            let attempts = place.connect(address).http().times(10).run()?;
            evenly(&served(address, &attempts)?, &[pod])?;
        }
    }
    Ok(())
}
