//! More Services than the maps were made for: the maps grow, and connections of clients go on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use proxy_tests::lab::{Place, Proto, Summary};
use proxy_tests::scenarios::{Loops, NODE, World, endpoint, served, until};
use serde_json::{Value, json};

use super::drift::verify_with;
use super::{KUBIA, KUBIA_VIP};

const STICKY: &str = "s02-session-affinity.yaml";
const STICKY_VIP: &str = "10.111.249.154:80";
const REDIS_VIP: &str = "10.96.65.65:6379";
const NODE_PORT: &str = "192.168.1.11:30123";
const FILES: [&str; 5] = [KUBIA, STICKY, "s08-nodeport.yaml", "s12-redis.yaml", "s14-dns.yaml"];
/// Numbers of Services whose ports, two each, nearly fill `SERVICES` (`FEW`), or exceed it (`MANY`). Of the maps that
/// a small cluster gets, `SERVICES` has the least room, 8192.
const FEW: u32 = 3_700;
const MANY: u32 = 4_500;
/// Number of Services for which the maps that have grown once are too small.
const MORE: u32 = 8_000;

/// Name under which `status` counts the objects of the namespace that it does not name.
const REST: &str = "all of default";

/// Returns a world whose agent retries once a second.
fn world() -> Result<World> {
    let mut world = World::new(&FILES)?;
    let manifests = world.manifests().dir().to_path_buf();
    let agent = world.new_agent(NODE)?.manifests(&manifests);
    let agent = agent.flag("iptables-sync-period", "1s").flag("iptables-min-sync-period", "1s").flag("v", 4);
    world.adopt(NODE, agent).start_ready()?;
    world.lab().outside_via(NODE)?;
    Ok(world)
}

/// Returns Services with two ports and without endpoints.
fn many(services: Range<u32>) -> String {
    let mut text = String::new();
    for number in services {
        let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + number);
        text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: many-{number} }}\nspec:\n  clusterIP: {ip}\n  \
             ports:\n  - {{ name: a, port: 80 }}\n  - {{ name: b, port: 81 }}\n",
        );
    }
    text
}

fn pin(world: &World, map: &str) -> PathBuf {
    world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}")).join(map)
}

/// Returns the number of elements that a map has room for.
fn room(world: &World, map: &str) -> Result<u64> {
    let mut command = world.host().command("bpftool");
    command.args(["-j", "map", "show", "pinned"]).arg(pin(world, map));
    let shown: Value = serde_json::from_str(&command.text().context("the lab needs bpftool")?)?;
    shown["max_entries"].as_u64().context("max_entries")
}

/// Returns the Service ports that were there before the many, each with its number, without their traffic.
fn ids(world: &World) -> Result<Vec<Value>> {
    let Value::Array(mut services) = world.tool(NODE, "services")? else { bail!("no list of Services") };
    services.retain(|service| !["many-", "later-"].iter().any(|new| service.to_string().contains(new)));
    for service in &mut services {
        service["traffic"].take();
    }
    Ok(services)
}

/// Returns the number of connections to the nodePort.
fn counted(world: &World) -> Result<u64> {
    let services = world.tool(NODE, "services")?;
    let mut services = services.as_array().context("services")?.iter();
    let counted = services.find(|service| service["name"] == "kubia-nodeport");
    counted.and_then(|service| service["traffic"]["connections"].as_u64()).context("kubia-nodeport")
}

/// Starts clients in a pod, on the node and outside, over TCP and UDP.
fn loops(world: &World) -> Result<Loops> {
    let mut loops = Loops::start(world, &[KUBIA_VIP])?;
    loops.add(NODE_PORT, world.outside().connect(NODE_PORT).http())?;
    for place in world.clients() {
        loops.add("10.96.0.10:53", place.connect("10.96.0.10:53").udp())?;
    }
    loops.go_on()?;
    Ok(loops)
}

/// Returns the backends that the Service with session affinity gives to a pod and to the node.
fn remembered(world: &World) -> Result<Vec<Vec<String>>> {
    let clients = world.clients();
    let servers = clients.iter().map(|place| {
        let summary = served(STICKY_VIP, &place.connect(STICKY_VIP).http().times(10).run()?)?;
        Ok(summary.servers().into_iter().map(str::to_owned).collect())
    });
    servers.collect()
}

/// Waits for larger maps, and for the many Services in them.
fn all_fit(world: &World, services: u32) -> Result<()> {
    let enough = u64::from(2 * services + services / 2);
    until("larger maps", || Ok((room(world, maps::SERVICES)? >= enough).then_some(())))?;
    (0..services).step_by(500).try_for_each(|number| {
        world.wait_ports(NODE, &format!("default/many-{number}"), |ports| ports.len() == 2).map(drop)
    })
}

/// Checks that a Service created after the growth is served, at the sockets and for packets from outside. The former
/// maps never get it.
fn a_later_one_is_served(world: &World, number: u16) -> Result<()> {
    let name = format!("later-{number}");
    let (vip, node_port) = (format!("10.110.0.{}", number + 1), 30_900 + number);
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name },
        "spec": {
            "type": "NodePort",
            "clusterIP": vip,
            "ports": [{ "name": "", "port": 80, "nodePort": node_port }],
        },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": name } },
        "addressType": "IPv4",
        "ports": [{ "name": "", "port": 8080 }],
        "endpoints": [endpoint("kubia-7nog1", "node-a", "172.16.1.4")],
    });
    world.manifests().put(&format!("{name}.yaml"), &[service, slice])?;
    for (place, target) in [
        (Place::clone(&world.client()), format!("{vip}:80")),
        (world.host().clone(), format!("{vip}:80")),
        (world.outside(), format!("192.168.1.11:{node_port}")),
    ] {
        until(&target, || {
            let attempts = place.connect(&target).http().times(10).run()?;
            Ok((Summary::of(&attempts).ok == 10).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn maps_grow_while_clients_go_on() -> Result<()> {
    let world = world()?;
    let (before, remembered_before) = (ids(&world)?, remembered(&world)?);
    ensure!(remembered_before.iter().all(|servers| servers.len() == 1), "{remembered_before:?}");
    let small = room(&world, maps::SERVICES)?;
    ensure!(
        (2 * FEW + 1..2 * MANY).contains(&u32::try_from(small)?),
        "{small}: the test needs other numbers"
    );
    let mut held = world.client().hold(REDIS_VIP).proto(Proto::Redis).open()?;
    let mut loops = loops(&world)?;
    loops.next(100)?;
    let counted_before = counted(&world)?;

    // The maps grow before they are full, and again because a Service does not fit.
    for (number, services) in [FEW, MORE].into_iter().enumerate() {
        world.manifests().write("many.yaml", &many(0..services))?;
        all_fit(&world, services)?;
        a_later_one_is_served(&world, u16::try_from(number)?)?;
        loops.next(100)?;
    }

    assert_eq!(ids(&world)?, before, "everything keeps its numbers");
    assert_eq!(remembered(&world)?, remembered_before, "clients are still remembered");
    ensure!(held.say("PING")?.ok, "a connection through the growth");
    let counted = counted(&world)?;
    ensure!(counted > counted_before && counted_before >= 100, "{counted_before}, then {counted}");
    assert_eq!(world.problems(NODE)?, Default::default());
    assert_eq!(verify_with(&world, "--manifests", world.manifests().dir())?, []);
    let left: BTreeSet<_> = fs::read_dir(pin(&world, ""))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    ensure!(left.iter().all(|name| !name.contains('-')), "{left:?}");
    loops.none_failed().map(drop)
}

/// Returns how many of the many Services are refused.
fn refused(problems: &BTreeMap<String, Vec<String>>) -> usize {
    let named = problems.keys().filter(|object| object.starts_with("Service default/many-")).count();
    // Only so many objects of a namespace are named; the others are counted.
    let counted = problems.get(REST).into_iter().flatten().flat_map(|reason| reason.split(' '));
    named + counted.filter_map(|word| word.parse::<usize>().ok()).sum::<usize>()
}

/// Returns the numbers of Services that were planned together, in order.
fn planned(log: &str) -> Vec<usize> {
    let services =
        log.lines().filter_map(|line| line.split_once("programming services=")?.1.split(' ').next());
    services.filter_map(|count| count.parse().ok()).collect()
}

#[test]
fn maps_that_cannot_grow_refuse_what_does_not_fit_and_nothing_else() -> Result<()> {
    let mut world = world()?;
    let before = ids(&world)?;
    // An obstacle that no agent removes is at the place where a larger map would be pinned.
    let obstacle = pin(&world, "SERVICES-larger");
    fs::create_dir(&obstacle)?;
    let mut loops = loops(&world)?;
    world.manifests().write("many.yaml", &many(0..MANY))?;
    // Each Service has two ports. Changes are programmed in parts, and the refused Services are named part by part.
    let problems = world.wait_problems(NODE, |problems| {
        problems.get("maps").is_some_and(|reasons| reasons.concat().contains("SERVICES-larger"))
            && problems.values().flatten().any(|reason| reason.contains("map SERVICES is full"))
            && (400..=900).contains(&refused(problems))
    })?;
    ensure!(
        problems.keys().all(|object| object == "maps" || object == REST || object.contains("many-")),
        "{problems:?}"
    );
    assert_eq!(ids(&world)?, before);
    loops.next(100)?;

    // After each refused Service has been reported, a change of another Service does not plan the refused ones again.
    let mut log = 0;
    until("an agent that is idle", || {
        let now = planned(&world.agent(NODE).log()).len();
        std::thread::sleep(Duration::from_millis(500));
        Ok((std::mem::replace(&mut log, now) == now).then_some(()))
    })?;
    for (affinity, is_on) in [("ClientIP", true), ("None", false)] {
        world.manifests().patch_service(KUBIA, &json!({ "sessionAffinity": affinity }))?;
        world.wait_ports(NODE, "default/kubia", |ports| {
            ports.iter().all(|port| (port.affinity_seconds > 0) == is_on)
        })?;
    }
    let planned = planned(&world.agent(NODE).log()).split_off(log);
    ensure!(!planned.is_empty() && planned.iter().all(|services| *services == 1), "{planned:?}");

    // When some Services have gone, the others fit into the maps as they are.
    world.manifests().write("many.yaml", &many(MANY - FEW..MANY))?;
    world.wait_problems(NODE, |problems| problems.keys().all(|object| object == "maps"))?;
    ensure!(room(&world, maps::SERVICES)? < u64::from(2 * MANY), "the maps have grown");
    (MANY - FEW..MANY).step_by(100).try_for_each(|number| {
        world.wait_ports(NODE, &format!("default/many-{number}"), |ports| ports.len() == 2).map(drop)
    })?;
    // Now the remaining ones have no room.
    world.manifests().write("many.yaml", &many(0..MANY))?;
    world.wait_problems(NODE, |problems| (400..=900).contains(&refused(problems)))?;

    // The next try succeeds.
    fs::remove_dir(&obstacle)?;
    all_fit(&world, MANY)?;
    world.wait_problems(NODE, |problems| problems.is_empty())?;
    a_later_one_is_served(&world, 0)?;
    assert_eq!(ids(&world)?, before);
    loops.none_failed().map(drop)
}

#[test]
fn an_agent_that_is_killed_while_maps_grow_leaves_nothing_half_done() -> Result<()> {
    let mut world = world()?;
    let (before, remembered_before) = (ids(&world)?, remembered(&world)?);
    let mut loops = loops(&world)?;
    world.agent(NODE).kill9()?;
    world.manifests().write("many.yaml", &many(0..MANY))?;
    // Reading the manifests takes most of the time, so each start gets a little further.
    let mut delay = 0;
    let small = room(&world, maps::SERVICES)?;
    while room(&world, maps::SERVICES)? == small {
        // On a busy machine, every part takes longer.
        delay += 100 + delay / 5;
        ensure!(delay < 10_000, "the maps do not grow");
        world.agent(NODE).start()?;
        std::thread::sleep(Duration::from_millis(delay));
        world.agent(NODE).kill9()?;
        loops.go_on()?;
    }
    world.agent(NODE).start_ready()?;
    a_later_one_is_served(&world, 0)?;
    assert_eq!(ids(&world)?, before);
    assert_eq!(remembered(&world)?, remembered_before);
    assert_eq!(verify_with(&world, "--manifests", world.manifests().dir())?, []);
    loops.none_failed().map(drop)
}
