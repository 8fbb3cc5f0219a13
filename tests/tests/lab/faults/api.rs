//! The API server instead of a directory, with every fault that it can cause for its clients.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use proxy_tests::apiserver::{ApiServer, Resource};
use proxy_tests::lab::Agent;
use proxy_tests::scenarios::{Loops, NODE, World, endpoint, served};
use serde_json::{Value, json};

use super::drift::verify_with;
use super::{KUBIA, KUBIA_VIP, numbers};

/// The changing Service.
pub(super) const READY: &str = "s13-readiness.yaml";
pub(super) const READY_VIP: &str = "10.97.97.97:80";
const READY_SERVICE: &str = "default/service-clusterip";

/// Returns the objects that the agents of a cluster are given: the objects of all files, and for each Endpoints
/// object the EndpointSlice that a controller of the cluster makes of it.
fn objects(world: &World) -> Result<Vec<Value>> {
    let mut objects = world.manifests().all()?;
    for object in &mut objects {
        if object["metadata"]["namespace"].is_null()
            && object["kind"] != "Node"
            && object["kind"] != "ServiceCIDR"
        {
            object["metadata"]["namespace"] = "default".into();
        }
        if object["kind"] == "Endpoints" {
            *object = mirrored(object)?;
        }
    }
    Ok(objects)
}

fn mirrored(endpoints: &Value) -> Result<Value> {
    let subset = &endpoints["subsets"][0];
    let addresses = subset["addresses"].as_array().context("addresses")?;
    let name = &endpoints["metadata"]["name"];
    Ok(json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": endpoints["metadata"]["namespace"],
            "name": name,
            "labels": { "kubernetes.io/service-name": name },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "", "port": subset["ports"][0]["port"] }],
        "endpoints": addresses
            .iter()
            .map(|address| json!({ "addresses": [address["ip"]], "conditions": { "ready": true } }))
            .collect::<Vec<_>>(),
    }))
}

/// Starts an API server on the loopback device of [`NODE`] with the objects of a world, and returns it with an agent
/// of the node for it.
pub(super) fn cluster(world: &World) -> Result<(ApiServer, Agent)> {
    let listener = world.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
    let server = ApiServer::start_on(listener)?;
    server.apply_all(objects(world)?)?;
    let kubeconfig = world.dir().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig)?;
    let agent = world.new_agent(NODE)?.kubeconfig(&kubeconfig);
    Ok((server, agent))
}

/// Returns the elements of the maps that decide which backends serve a Service, as bpftool prints them.
fn dumps(world: &World) -> Result<BTreeMap<&'static str, Vec<Value>>> {
    let mut dumps = BTreeMap::new();
    for map in [
        maps::FRONTENDS,
        maps::SERVICES,
        maps::SLOTS,
        maps::BACKENDS,
        maps::NAMES,
        maps::LOCAL_ADDRESSES,
        maps::SERVICE_CIDRS,
    ] {
        let pin = world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}")).join(map);
        let mut command = world.host().command("bpftool");
        command.args(["-j", "map", "dump", "pinned"]).arg(pin);
        let mut elements: Vec<Value> = serde_json::from_str(&command.text()?)?;
        // Each map draws the number that decides the order in its hash.
        elements.sort_by_cached_key(|element| element["key"].to_string());
        dumps.insert(map, elements);
    }
    Ok(dumps)
}

#[test]
fn a_directory_and_the_api_make_the_same_maps() -> Result<()> {
    let mut world = World::new(&[])?;
    // The agent gives these Services the slices that an API server would have given them.
    std::fs::remove_file(world.manifests().dir().join("s23-selectors.yaml"))?;
    world.start_agent(NODE)?;
    let from_files = (numbers(&world, NODE)?, dumps(&world)?);
    world.take_agent(NODE)?.terminate()?;
    world.command(NODE, "cleanup")?.text()?;

    let (server, agent) = cluster(&world)?;
    world.adopt(NODE, agent).start_ready()?;
    let kubeconfig = world.dir().join("kubeconfig");
    assert_eq!(verify_with(&world, "--kubeconfig", &kubeconfig)?, []);
    let from_api = (numbers(&world, NODE)?, dumps(&world)?);
    assert_eq!(from_api.0, from_files.0);
    for (map, elements) in &from_files.1 {
        let used = elements
            .iter()
            .filter(|element| !element["value"].to_string().chars().all(|c| !matches!(c, '1'..='9')));
        assert!(used.count() > 0, "{map} is empty");
        assert!(from_api.1[map] == *elements, "{map} differs");
    }

    // Objects of the server that no agent has programmed.
    world.take_agent(NODE)?.kill9()?;
    for slice in server.list(Resource::EndpointSlices) {
        server.delete(&slice)?;
    }
    let found = verify_with(&world, "--kubeconfig", &kubeconfig)?;
    ensure!(found.iter().any(|(map, _)| map == maps::SERVICES), "{found:?}");
    Ok(())
}

#[test]
fn the_source_can_be_changed_without_anybody_noticing() -> Result<()> {
    let mut world = World::start(&[KUBIA, READY])?;
    let before = numbers(&world, NODE)?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP, READY_VIP])?;
    let (_server, agent) = cluster(&world)?;
    world.take_agent(NODE)?.terminate()?;
    world.adopt(NODE, agent).start_ready()?;
    loops.next(20)?;
    assert_eq!(numbers(&world, NODE)?, before);
    world.take_agent(NODE)?.terminate()?;
    world.start_agent(NODE)?;
    loops.next(20)?;
    assert_eq!(numbers(&world, NODE)?, before);
    loops.none_failed().map(drop)
}

#[test]
fn the_api_server_is_away_when_the_agent_starts() -> Result<()> {
    let mut world = World::new(&[KUBIA])?;
    let (server, mut agent) = cluster(&world)?;
    server.go_away();
    agent.start()?;
    let not_ready = proxy_tests::scenarios::until("an answer of /readyz", || Ok(agent.get("/readyz").ok()))?;
    assert_eq!(not_ready.0, 503, "{}", not_ready.1);
    assert!(not_ready.1.contains("first full list"), "{}", not_ready.1);
    assert!(!world.client().connect(KUBIA_VIP).http().one()?.ok, "nothing is programmed yet");
    server.come_back();
    agent.wait_ready(Duration::from_secs(60))?;
    served(KUBIA_VIP, &world.client().connect(KUBIA_VIP).http().times(10).run()?)?;

    // State that was programmed once serves on through a start without the server.
    let before = numbers(&world, NODE)?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    server.go_away();
    agent.kill9()?;
    agent.start()?;
    loops.next(100)?;
    assert!(!matches!(agent.get("/readyz"), Ok((200, _))), "ready without having seen the server");
    assert_eq!(numbers(&world, NODE)?, before);
    server.come_back();
    agent.wait_ready(Duration::from_secs(60))?;
    assert_eq!(numbers(&world, NODE)?, before);
    world.adopt(NODE, agent);
    loops.none_failed().map(drop)
}

/// Returns the slice of [`READY_SERVICE`] with the pods of these numbers.
pub(super) fn slice(world: &World, pods: &[usize]) -> Result<Value> {
    let all = [("node-a", "172.16.1.42"), ("node-b", "172.16.2.44"), ("node-b", "172.16.3.46")];
    let mut slice = world.manifests().objects(READY)?.remove(1);
    slice["metadata"]["namespace"] = "default".into();
    slice["endpoints"] = pods
        .iter()
        .map(|&pod| endpoint(&format!("linuxea-{pod}"), all[pod].0, all[pod].1))
        .collect::<Vec<_>>()
        .into();
    Ok(slice)
}

/// Waits until the node serves the pods of these numbers.
pub(super) fn wait_for(world: &World, pods: &[usize]) -> Result<()> {
    let all = ["172.16.1.42:80", "172.16.2.44:80", "172.16.3.46:80"];
    world.wait_endpoints(NODE, READY_SERVICE, &pods.iter().map(|&pod| all[pod]).collect::<Vec<_>>())
}
