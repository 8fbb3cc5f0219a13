//! Start, restart and cleanup of the agent: the state it finds, the clients it must not disturb, and the state it
//! leaves.

use std::env;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::EbpfLoader;
use proxy_agent::bpf::dataplane::OBJECT;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::reconcile::plan::{LOCAL_ADDRESS_ENTRIES, PREFIX_ENTRIES};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use proxy_tests::lab::{Attempt, Flow, Held, Place, Proto};
use serde_json::{Value, json};

use super::attached::{clsact_programs, start, tcx_programs};
use super::checks::{Answer, is_served, served};
use super::kernel::has_tcx;
use super::objects::{HERE, THERE, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::tools::differences;
use super::world::{ANSWER, ELSEWHERE, N1, ON_THIS_NODE, P, READY, STICKY, U, World, X, until};
use super::{checks, devices, insns};

pub(super) const ROWS: &[Row] = &[
    Row { id: "k070_growth", check: growth },
    Row { id: "k071_restart", check: restart },
    Row { id: "k080_cleanup", check: cleanup },
];

/// Maps on which no others depend: with another layout, only their contents are lost.
const OTHER_LAYOUT: [&str; 3] = [maps::FLOWS, maps::NODE, maps::DEVICES];

/// Pins a new map, made by bpftool, at the place of one of Vipr's maps.
fn put_map(world: &World, version: &str, name: &str, layout: &str) -> Result<()> {
    let dir = world.node().pin_dir().join(version);
    fs::create_dir_all(&dir)?;
    let mut command = world.host().command("bpftool");
    command.args(["map", "create"]).arg(dir.join(name)).args(layout.split(' ')).args(["name", name]);
    command.text().context("the rows need bpftool").map(drop)
}

/// Returns key size, value size and capacity of a pinned map.
fn layout(world: &World, name: &str) -> Result<[u64; 3]> {
    let pin = world.node().pin_dir().join(format!("v{ABI_VERSION}")).join(name);
    let mut command = world.host().command("bpftool");
    command.args(["-j", "map", "show", "pinned"]).arg(pin);
    let shown: Value = serde_json::from_str(&command.text()?)?;
    let [key, value, entries] = ["bytes_key", "bytes_value", "max_entries"]
        .map(|name| shown[name].as_u64().with_context(|| format!("no {name} in {shown}")));
    Ok([key?, value?, entries?])
}

/// Checks the first start of the agent: with the pins of an earlier build, if one is given, else with maps of other
/// versions and layouts.
pub(super) fn takeover(world: &World) -> Result<Outcome> {
    let before = env::var_os("VIPR_AGENT_BEFORE").filter(|path| !path.is_empty());
    let what = match &before {
        Some(path) => after_another(world, Path::new(path))?,
        None => after_other_layouts(world)?,
    };
    let mut left: Vec<String> = fs::read_dir(world.node().pin_dir())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    left.sort();
    // The directory `made` holds notes of changes outside the pin directory; it may be missing.
    let left: Vec<String> = left.into_iter().filter(|name| name != "made").collect();
    ensure!(left == ["links".to_owned(), format!("v{ABI_VERSION}")], "pinned are {left:?}");
    served(&world.pod("P"), Proto::Tcp, &cluster_ip(ON_THIS_NODE.number, false, 80), Answer::from(HERE, &P))?;
    right(what)
}

/// Capacity of Service ports that an agent chooses for a cluster smaller than any real one. Maps left by such an agent
/// are soon full.
const FEW: u32 = 512;

/// Pins the maps that belong together, all in the right layout: with a small capacity of Service ports, and too small a
/// capacity for their endpoints.
fn small_maps(pins: &PinDir) -> Result<()> {
    pins.create()?;
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    let paths: Vec<_> = maps::ALL
        .iter()
        .filter(|spec| !spec.independent)
        .map(|spec| (spec.name, pins.map(spec.name)))
        .collect();
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    for (name, entries) in [
        (maps::SERVICES, FEW),
        (maps::NAMES, FEW),
        (maps::SERVICE_COUNTERS, FEW),
        // These maps do not grow.
        (maps::AFFINITY, 65_536),
        (maps::NEW_AFFINITY, 65_536),
        (maps::LOCAL_ADDRESSES, LOCAL_ADDRESS_ENTRIES),
        (maps::SERVICE_CIDRS, PREFIX_ENTRIES),
        (maps::POD_SOURCES, PREFIX_ENTRIES),
    ] {
        loader.map_max_entries(name, entries);
    }
    loader.load(OBJECT).context("making maps").map(drop)
}

fn after_other_layouts(world: &World) -> Result<String> {
    let own = format!("v{ABI_VERSION}");
    for version in ["v0", "v999"] {
        put_map(world, version, maps::FRONTENDS, "type hash key 24 value 16 entries 64")?;
    }
    small_maps(&PinDir::new(world.node().pin_dir()))?;
    for name in OTHER_LAYOUT {
        put_map(world, &own, name, "type array key 4 value 12 entries 3")?;
    }
    start(world)?;
    for name in OTHER_LAYOUT {
        let layout = layout(world, name)?;
        ensure!(layout != [4, 12, 3], "{name} is as it was found: {layout:?}");
    }
    let [services, frontends] =
        [layout(world, maps::SERVICES)?, layout(world, maps::FRONTENDS)?].map(|layout| layout[2]);
    ensure!(services == u64::from(FEW), "SERVICES was large enough, and has room for {services} now");
    ensure!(frontends > u64::from(FEW), "FRONTENDS was too small, and has room for {frontends}");
    Ok("of other versions: gone; of another layout, or too small: replaced; large enough: kept".to_owned())
}

/// Lets an earlier agent serve and die, and ours take over its state. No connected client may notice.
fn after_another(world: &World, program: &Path) -> Result<String> {
    let mut earlier = world.new_agent()?.program(program);
    earlier.start()?;
    earlier.wait_ready(READY)?;
    let mut clients = Clients::new(world)?;
    let version = earlier.tool("status", &[])?["agent"]["version"].as_str().unwrap_or("?").to_owned();
    earlier.kill9()?;
    clients.go_on("without an agent")?;
    start(world)?;
    clients.go_on("with ours")?;
    let count = clients.none_failed()?;
    Ok(format!("from the agent of version {version}: {count} connections beside, all answered"))
}

/// Pause between two connections: an emulated processor needs time for other work.
const PACE: Duration = Duration::from_millis(200);

/// Clients of all kinds: some stay connected, some make one connection after another.
struct Clients {
    held: Vec<Held>,
    flows: Vec<(String, Proto, Flow)>,
}

impl Clients {
    fn new(world: &World) -> Result<Self> {
        let (pod, unseen, outside) = (world.pod("P"), world.pod("U"), world.lab().client("X"));
        let mut held = Vec::new();
        for (place, target, way) in [
            (&pod, cluster_ip(ELSEWHERE.number, false, 80), Proto::Tcp),
            (&pod, cluster_ip(ON_THIS_NODE.number, false, 80), Proto::Udp),
            (&unseen, cluster_ip(ELSEWHERE.number, false, 80), Proto::Tcp),
            (&outside, node_port(ELSEWHERE.number, false, 80), Proto::Tcp),
            (&outside, node_port(ON_THIS_NODE.number, true, 80), Proto::Tcp),
            (&outside, node_port(ELSEWHERE.number, true, 80), Proto::Udp),
        ] {
            held.push(checks::held(place, way, &target)?);
        }
        let mut flows = Vec::new();
        for (place, target, way) in [
            (&pod, cluster_ip(ELSEWHERE.number, false, 80), Proto::Tcp),
            (&unseen, cluster_ip(ON_THIS_NODE.number, false, 80), Proto::Udp),
            (&outside, node_port(ELSEWHERE.number, false, 80), Proto::Tcp),
        ] {
            let connect = place.connect(&target).proto(way).timeout(ANSWER).pace(PACE);
            flows.push((target, way, connect.start()?));
        }
        let mut clients = Self { held, flows };
        clients.go_on("at first")?;
        Ok(clients)
    }

    /// Checks that every held connection still works, and that new ones do.
    fn go_on(&mut self, when: &str) -> Result<()> {
        for held in &mut self.held {
            let said = held.say(when)?;
            ensure!(said.ok && said.text.as_deref() == Some(when), "a held connection, {when}: {said:?}");
        }
        // The first of these connections may have begun before.
        self.flows.iter_mut().try_for_each(|(_, _, flow)| flow.wait_for(3)).with_context(|| when.to_owned())
    }

    /// Ends the clients. Returns the number of connections, none of which may have failed or reached another pod.
    fn none_failed(self) -> Result<usize> {
        let mut count = 0;
        for (target, way, flow) in self.flows {
            for attempt in flow.stop()? {
                let (backend, seen): (_, &[&str]) = match (attempt.server.as_deref(), way) {
                    (Some("L1"), _) => (HERE, &U),
                    (_, _) if target.starts_with("192.") => (THERE, &N1),
                    (_, _) => (THERE, &P),
                };
                is_served(&target, &attempt, way, Answer::from(backend, seen))
                    .with_context(|| target.clone())?;
                count += 1;
            }
        }
        Ok(count)
    }
}

/// Returns the numbers of the Services that exist from the beginning, and of their backends.
fn numbers(world: &World) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for tool in ["services", "backends"] {
        let Value::Array(list) = world.tool(tool)? else { bail!("no list of {tool}") };
        all.extend(list.into_iter().filter(|one| !one.to_string().contains("many-")).map(|mut one| {
            one["traffic"].take();
            one
        }));
    }
    Ok(all)
}

/// Returns the pod that the Service with session affinity gives to this client.
fn remembered(place: &Place) -> Result<String> {
    let target = cluster_ip(STICKY.number, false, 80);
    let attempt: Attempt = place.connect(&target).timeout(ANSWER).one()?;
    attempt.server.context("not answered")
}

/// Returns Services of many ports; only the last one has endpoints.
fn many(ports: u64) -> Vec<Value> {
    const EACH: u64 = 20;
    let services = ports.div_ceil(EACH);
    let mut objects = Vec::new();
    for number in 0..services {
        let ports: Vec<Value> =
            (0..EACH).map(|port| json!({ "name": format!("p{port}"), "port": 80 + port })).collect();
        let ip = format!("10.96.{}.{}", 100 + number / 250, 1 + number % 250);
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "k", "name": format!("many-{number}") },
            "spec": { "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": ports },
        }));
    }
    let last = services - 1;
    objects.push(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "k", "name": "many-last", "labels": { "kubernetes.io/service-name": format!("many-{last}") },
        },
        "ports": [{ "name": "p0", "port": 8080 }],
        "endpoints": [{ "addresses": [HERE.v4], "nodeName": HERE.node }],
    }));
    objects
}

/// Checks more Service ports than the maps can hold: the maps are made larger while clients go on.
fn growth(world: &World) -> Result<Outcome> {
    devices::remove_l3(world.host());
    let [.., small] = layout(world, maps::SERVICES)?;
    let (before, kept) = (numbers(world)?, remembered(&world.pod("P"))?);
    let mut clients = Clients::new(world)?;
    let objects = many(small);
    let last = objects[objects.len() - 2]["spec"]["clusterIP"].as_str().context("a clusterIP")?.to_owned();
    world.write("many", &objects)?;
    let large = until("larger maps", || {
        let [.., room] = layout(world, maps::SERVICES)?;
        Ok((room > small).then_some(room))
    })?;
    let target = format!("{last}:80");
    until("the last Service", || {
        Ok(world.pod("P").connect(&target).timeout(ANSWER).one()?.ok.then_some(()))
    })?;
    served(&world.pod("P"), Proto::Tcp, &target, Answer::from(HERE, &P))?;
    // The packet edge changes to the larger maps a moment later.
    let outside = world.lab().client("X");
    until("the last Service from outside", || {
        Ok(outside.connect(&target).timeout(ANSWER).one()?.ok.then_some(()))
    })?;
    served(&outside, Proto::Tcp, &target, Answer::from(HERE, &X))?;
    clients.go_on("with larger maps")?;
    let count = clients.none_failed()?;
    ensure!(numbers(world)? == before, "Services or backends have other numbers");
    ensure!(remembered(&world.pod("P"))? == kept, "session affinity is forgotten");
    let left = differences(world)?;
    ensure!(left.is_empty(), "{left:?}");
    right(format!("from {small} to {large} Service ports, {count} connections beside, all answered"))
}

/// Kills the agent and starts it again; where TCX is available, the new agent has to change to filters.
fn restart(world: &World) -> Result<Outcome> {
    let (before, kept) = (numbers(world)?, remembered(&world.pod("P"))?);
    let mut clients = Clients::new(world)?;
    world.agent().kill9()?;
    clients.go_on("without an agent")?;
    let fresh = world.new_agent()?.flag("no-tcx", true);
    *world.agent() = fresh;
    start(world)?;
    until("filters on every device", || {
        let status = world.tool("status")?;
        let devices = status["agent"]["devices"].as_array().context("status tells no devices")?;
        let all = devices.iter().all(|device| device["attached"] == "clsact");
        Ok((!devices.is_empty() && all).then_some(()))
    })?;
    let filters = clsact_programs(world.host(), "eth0")?;
    ensure!(filters == ["edge_ingress", "edge_egress"], "by clsact: {filters:?}");
    let mut change = "";
    if has_tcx() {
        let links = tcx_programs(world.host(), "eth0")?;
        ensure!(links.is_empty(), "by TCX still: {links:?}");
        change = ", from TCX to clsact";
    }
    clients.go_on("with another agent")?;
    let count = clients.none_failed()?;
    ensure!(numbers(world)? == before, "Services or backends have other numbers");
    ensure!(remembered(&world.pod("P"))? == kept, "session affinity is forgotten");
    right(format!("held connections go on, {count} others, all answered{change}"))
}

/// Checks that cleanup leaves nothing, no pin, no program, no filter, and that no client is served.
fn cleanup(world: &World) -> Result<Outcome> {
    let pins = world.node().pin_dir();
    let mut held = checks::held(&world.pod("P"), Proto::Tcp, &cluster_ip(ELSEWHERE.number, false, 80))?;
    ensure!(!insns::names(pins)?.is_empty(), "no programs before");
    let trace = insns::trace(pins)?;
    world.agent().terminate()?;
    world.command("cleanup")?.text()?;
    ensure!(!pins.exists(), "{} is left", pins.display());
    ensure!(
        fs::read_dir(world.run_dir())?.next().is_none(),
        "files are left in {}",
        world.run_dir().display()
    );
    let devices = ["eth0", world.lab().pod("P").host_device(), "u0"].map(str::to_owned);
    for device in &devices {
        let filters = clsact_programs(world.host(), device)?;
        ensure!(filters.is_empty(), "filters are left on {device}: {filters:?}");
        if has_tcx() {
            ensure!(tcx_programs(world.host(), device)?.is_empty(), "links are left on {device}");
        }
    }
    // The kernel removes programs a moment after their last use.
    until("no programs", || Ok(insns::using(trace).is_empty().then_some(())))
        .with_context(|| format!("{:?}", insns::using(trace)))?;
    for (place, target) in [
        (world.pod("P"), cluster_ip(ON_THIS_NODE.number, false, 80)),
        (world.lab().client("X"), node_port(ON_THIS_NODE.number, false, 80)),
    ] {
        let attempt = place.connect(&target).timeout(super::world::SILENCE).one()?;
        ensure!(!attempt.ok, "{} is still served: {attempt:?}", place.name());
    }
    // A connected socket stays connected to its pod.
    ensure!(held.say("still there")?.ok, "a connection to a pod");
    right("no pins, programs, filters or files are left")
}
