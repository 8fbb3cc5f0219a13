//! S23: Services that have a selector and no slices.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use proxy_tests::scenarios::{Loops, NODE, World, evenly, served};
use serde_json::{Value, json};

use super::MANY;

const FILE: &str = "s23-selectors.yaml";
const SERVICE: &str = "selectors/webapp";
const VIP: &str = "10.97.68.130:80";
const PODS: [&str; 2] = ["webapp-wmtjx", "webapp-x7qzl"];
const BOTH: [&str; 2] = ["172.16.1.23:8080", "172.16.2.23:9080"];

/// Returns whether there is no problem of the file.
fn is_fine(problems: &BTreeMap<String, Vec<String>>) -> bool {
    !problems.keys().any(|object| object.starts_with(FILE))
}

/// Changes the first Pod of the file.
fn change_pod(world: &World, change: impl FnOnce(&mut Value)) -> Result<()> {
    world.manifests().change_one(FILE, "Pod", change)
}

#[test]
fn s23_pods_are_found_by_their_labels() -> Result<()> {
    let mut world = World::start(&[FILE])?;
    world.start_agent("node-b")?;
    assert!(is_fine(&world.problems(NODE)?), "{:#?}", world.problems(NODE)?);
    world.wait_endpoints(NODE, SERVICE, &BOTH)?;
    let far = world.lab().node("node-b").host().clone();
    let [pod, host] = world.clients();
    for place in [pod, host, far] {
        let attempts = place.connect(VIP).http().times(MANY).run()?;
        evenly(&served(VIP, &attempts)?, &PODS)?;
        let reached: BTreeSet<_> =
            attempts.iter().filter_map(|a| Some((a.server.as_deref()?, a.endpoint?.port()))).collect();
        assert_eq!(reached, PODS.into_iter().zip([8080, 9080]).collect());
    }
    Ok(())
}

#[test]
fn s23_numbers_that_nobody_has_named() -> Result<()> {
    let mut world = World::start(&[FILE])?;
    world.start_agent("node-b")?;
    let here = frontends(&world, NODE)?;
    assert_eq!(here, frontends(&world, "node-b")?, "every node has the same");
    let address = here.iter().find_map(|name| name.strip_suffix(":80/TCP")).context("an address")?;
    let node_port = here.iter().find_map(|name| name.strip_prefix("nodePort ")?.split('/').next());
    let node_port = node_port.context("a nodePort")?;
    for place in world.clients() {
        let vip = format!("{address}:80");
        evenly(&served(&vip, &place.connect(&vip).http().times(MANY).run()?)?, &PODS)?;
    }
    for node in ["192.168.1.11", "192.168.1.12"] {
        let vip = format!("{node}:{node_port}");
        evenly(&served(&vip, &world.outside().connect(&vip).http().times(MANY).run()?)?, &PODS)?;
    }
    Ok(())
}

fn frontends(world: &World, node: &str) -> Result<Vec<String>> {
    let ports = world.ports(node, "selectors/webapp-nodeport")?;
    let [port] = &ports[..] else { anyhow::bail!("{ports:?}") };
    Ok(port.frontend_names().into_iter().map(str::to_owned).collect())
}

#[test]
fn s23_pods_that_are_not_ready_leave_end_and_lose_their_label() -> Result<()> {
    let world = World::start(&[FILE])?;
    world.wait_endpoints(NODE, SERVICE, &BOTH)?;
    let mut loops = Loops::start(&world, &[VIP])?;
    for change in [
        json!({ "status": { "podIP": "172.16.1.23", "conditions": [{ "type": "Ready", "status": "False" }] } }),
        json!({ "metadata": {
            "name": PODS[0], "namespace": "selectors", "labels": { "app": "webapp" },
            "deletionTimestamp": "2026-01-01T00:00:00Z",
        } }),
        json!({ "status": { "podIP": "172.16.1.23", "phase": "Succeeded" } }),
        json!({ "metadata": { "name": PODS[0], "namespace": "selectors", "labels": { "app": "other" } } }),
    ] {
        change_pod(&world, |pod| {
            for (field, value) in change.as_object().into_iter().flatten() {
                pod[field] = value.clone();
            }
        })?;
        world.wait_endpoints(NODE, SERVICE, &BOTH[1..])?;
        for summary in loops.next(20)? {
            assert_eq!(summary.servers(), [PODS[1]], "{change}");
        }
        world.manifests().restore(FILE)?;
        world.wait_endpoints(NODE, SERVICE, &BOTH)?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn s23_what_goes_without_endpoints_is_named() -> Result<()> {
    let world = World::start(&[FILE])?;
    // Like the result of `kubectl create deployment`, as seen from the applied file.
    world.manifests().change(FILE, |objects| {
        objects.retain(|object| object["kind"] != "Pod");
        objects.push(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "webapp", "namespace": "selectors" },
            "spec": { "template": { "metadata": { "labels": { "app": "webapp" } } } },
        }));
    })?;
    for (document, name) in [(1, "webapp"), (2, "webapp-nodeport")] {
        let reason = "what Deployment selectors/webapp would make";
        world.wait_problems(NODE, |problems| is_named(problems, document, name, reason))?;
    }
    assert!(!world.client().connect(VIP).http().one()?.ok);
    world.manifests().restore(FILE)?;
    world.wait_problems(NODE, is_fine)?;
    served(VIP, &world.client().connect(VIP).http().times(20).run()?)?;
    Ok(())
}

fn is_named(problems: &BTreeMap<String, Vec<String>>, document: usize, name: &str, reason: &str) -> bool {
    problems.iter().any(|(object, reasons)| {
        object.starts_with(&format!("{FILE}, document {document} (line "))
            && object.ends_with(&format!("Service selectors/{name}"))
            && reasons.iter().any(|told| told.contains(reason))
    })
}
