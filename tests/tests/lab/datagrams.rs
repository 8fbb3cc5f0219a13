//! Sockets follow their Service, and leave nothing behind: a client that has connected or sent by UDP does not notice
//! when the backends change.
//!
//! The lab has two nodes of both families, with a pod that serves on each. Clients are the host, a pod whose socket
//! is seen, a pod whose packets are translated at its interface, and a machine outside.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::StreamRecord;
use proxy_common::abi::maps;
use proxy_common::abi::socket::STREAM_SLOTS;
use proxy_tests::lab::{Agent, Attempt, Held, Lab, LabSpec, NodeSpec, Place, Proto, Summary};
use proxy_tests::scenarios::{PortView, until};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Time that an answer may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(5);
/// Time that a socket may take to follow.
const PATIENCE: Duration = Duration::from_secs(20);
const VIPS: [&str; 2] = ["10.96.0.5", "fd00:96::5"];
/// Names and addresses of the pods that serve, one on each node.
const SERVERS: [(&str, [&str; 2]); 2] =
    [("L1", ["10.64.1.11", "fd00:64:0:1::11"]), ("R1", ["10.64.2.21", "fd00:64:0:2::21"])];

struct World {
    // Dropped first: it runs in the lab.
    agent: Agent,
    lab: Lab,
    dir: TempDir,
}

impl World {
    fn start() -> Result<Self> {
        let mut world = Self::without_agent()?;
        world.agent.start_ready()?;
        Ok(world)
    }

    fn without_agent() -> Result<Self> {
        let n1 = ["192.0.2.10", "2001:db8:1::10"];
        let n2 = ["192.0.2.20", "2001:db8:1::20"];
        let spec = LabSpec { cluster_cidr: "10.64.0.0/12,fd00:64::/48".to_owned(), ..LabSpec::default() };
        let spec = spec
            .node(NodeSpec::new("n1", &n1, &["10.64.1.0/24", "fd00:64:0:1::/64"])?)
            .node(NodeSpec::new("n2", &n2, &["10.64.2.0/24", "fd00:64:0:2::/64"])?)
            .pod("n1", "seen", &["10.64.1.50", "fd00:64:0:1::50"])?
            .pod("n1", "unseen", &["10.64.1.51", "fd00:64:0:1::51"])?
            .unseen("unseen")
            .pod("n1", "L1", &SERVERS[0].1)?
            .pod("n2", "R1", &SERVERS[1].1)?
            .client("client", &["203.0.113.7", "2001:db8:ff::7"])?;
        let lab = Lab::build(spec)?;
        for (pod, _) in SERVERS {
            lab.pod(pod).serve().udp(8080).tcp(8080).start()?;
        }
        let dir = tempfile::Builder::new().prefix("lab-datagrams-").tempdir()?;
        fs::create_dir(dir.path().join("manifests"))?;
        let agent = lab
            .node("n1")
            .agent()?
            .quiet()
            .flag("iptables-sync-period", "1s")
            .manifests(&dir.path().join("manifests"));
        let world = Self { agent, lab, dir };
        world.write("node", &[world.lab.node("n1").object(), json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": ["10.96.0.0/16", "fd00:96::/112"] },
        })])?;
        Ok(world)
    }

    fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let next = self.dir.path().join("next");
        fs::write(&next, serde_json::to_vec(&list)?)?;
        Ok(fs::rename(&next, self.dir.path().join("manifests").join(name).with_extension("json"))?)
    }

    /// Gives the Service these backends, and waits until the maps have them.
    fn serve(&self, servers: &[&str]) -> Result<()> {
        let slices = ["IPv4", "IPv6"].into_iter().enumerate().map(|(family, name)| {
            let chosen = SERVERS.iter().filter(|(server, _)| servers.contains(server));
            let endpoints: Vec<Value> = chosen
                .map(|(server, addresses)| {
                    json!({
                        "addresses": [addresses[family]], "conditions": { "ready": true },
                        "nodeName": if *server == "L1" { "n1" } else { "n2" },
                    })
                })
                .collect();
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": name,
                "metadata": {
                    "namespace": "d", "name": format!("log-{}", name.to_lowercase()),
                    "labels": { "kubernetes.io/service-name": "log" },
                },
                "ports": [
                    { "name": "log", "protocol": "UDP", "port": 8080 }, { "name": "web", "protocol": "TCP", "port": 8080 },
                ], "endpoints": endpoints,
            })
        });
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "d", "name": "log" },
            "spec": {
                "type": "NodePort", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": VIPS[0], "clusterIPs": VIPS,
                "ports": [
                    { "name": "log", "protocol": "UDP", "port": 514, "nodePort": 30_514 },
                    { "name": "web", "protocol": "TCP", "port": 80, "nodePort": 30_080 },
                ],
            },
        });
        self.write("log", &[service].into_iter().chain(slices).collect::<Vec<_>>())?;
        let mut wanted: Vec<SocketAddr> = SERVERS
            .iter()
            .filter(|(server, _)| servers.contains(server))
            .flat_map(|(_, pods)| pods.map(|pod| pod.parse::<IpAddr>()))
            .map(|pod| Ok(SocketAddr::new(pod?, 8080)))
            .collect::<Result<_>>()?;
        wanted.sort_unstable();
        until("the Service", || {
            let ports = self.ports()?;
            let mut has: Vec<SocketAddr> =
                ports.iter().flat_map(|port| port.cluster.iter().copied()).collect();
            has.sort_unstable();
            Ok((ports.len() == 2 && has == wanted).then_some(()))
        })
    }

    /// Removes the Service.
    fn remove(&self) -> Result<()> {
        self.write("log", &[])?;
        until("the end of the Service", || Ok(self.ports()?.is_empty().then_some(())))
    }

    fn ports(&self) -> Result<Vec<PortView>> {
        let all: Vec<PortView> = serde_json::from_value(self.agent.tool("services", &[])?)?;
        Ok(all.into_iter().filter(|port| port.service() == "d/log" && port.protocol == "UDP").collect())
    }

    /// Returns the clients, each with an address of the Service.
    fn clients(&self) -> Vec<(Place, String)> {
        let pod = |name: &str| Place::clone(&self.lab.pod(name));
        let inside = [pod("seen"), pod("unseen"), self.lab.node("n1").host().clone()];
        let vips = [format!("{}:514", VIPS[0]), format!("[{}]:514", VIPS[1])];
        let ports = ["192.0.2.10:30514".to_owned(), "[2001:db8:1::10]:30514".to_owned()];
        let of = |place: Place, at: &[String; 2]| at.clone().map(|at| (place.clone(), at));
        let inside = inside.into_iter().flat_map(|place| of(place, &vips));
        inside.chain(of(Place::clone(&self.lab.client("client")), &ports)).collect()
    }
}

/// Sockets that are connected to the Service, each with its owner.
struct Sockets(Vec<(String, Held)>);

impl Sockets {
    fn open(world: &World) -> Result<Self> {
        let open = |(place, target): (Place, String)| {
            let held = place.hold(&target).udp().timeout(Duration::from_millis(300)).open()?;
            let who = format!("{} to {target}", place.name());
            ensure!(held.opened().error.is_none(), "connect() of {who}: {:?}", held.opened());
            Ok((who, held))
        };
        Ok(Self(world.clients().into_iter().map(open).collect::<Result<_>>()?))
    }

    /// Checks that this server answers each socket, and that the socket keeps its own address and the peer that it
    /// asked for.
    fn reach(&mut self, server: &str, when: &str) -> Result<()> {
        for (who, held) in &mut self.0 {
            let reached = held.say_until(PATIENCE, |answer| answer.server.as_deref() == Some(server));
            let answer = reached.with_context(|| format!("{who}, {when}"))?;
            let (local, peer) = (held.opened().local, held.opened().peername);
            ensure!(answer.local == local && answer.peername == peer, "{who}, {when}: {answer:?}");
            // No socket goes back.
            let again = held.say("again")?;
            ensure!(again.server.as_deref() == Some(server), "{who}, {when}: {again:?}");
        }
        Ok(())
    }

    /// Checks that nobody answers the sockets, and that none fails in an unexpected way. `told`: they are refused.
    fn reach_nobody(&mut self, told: bool, when: &str) -> Result<()> {
        let nobody = |answer: &Attempt| {
            let error = answer.error.as_deref();
            error == Some("ECONNREFUSED") || !told && error == Some("ETIMEDOUT")
        };
        for (who, held) in &mut self.0 {
            held.say_until(PATIENCE, nobody).with_context(|| format!("{who}, {when}"))?;
            let again = held.say("again")?;
            ensure!(nobody(&again), "{who}, {when}: {again:?}");
        }
        Ok(())
    }
}

#[test]
fn a_connected_socket_follows_its_service() -> Result<()> {
    let mut world = World::without_agent()?;
    let mut older = Sockets::open(&world)?;
    world.agent.start_ready()?;
    world.serve(&[])?;
    let mut early = Sockets::open(&world)?;
    early.reach_nobody(true, "without an endpoint")?;
    world.serve(&["L1"])?;
    early.reach("L1", "when the first endpoint comes")?;
    older.reach("L1", "when the agent and the Service are younger")?;
    let mut late = Sockets::open(&world)?;
    for (server, when) in [("R1", "when its backend is replaced"), ("L1", "when it is replaced again")] {
        world.serve(&[server])?;
        for sockets in [&mut older, &mut early, &mut late] {
            sockets.reach(server, when)?;
        }
    }
    world.serve(&[])?;
    for sockets in [&mut older, &mut early, &mut late] {
        sockets.reach_nobody(true, "when the last endpoint goes")?;
    }
    world.serve(&["R1"])?;
    for sockets in [&mut older, &mut early, &mut late] {
        sockets.reach("R1", "when an endpoint comes back")?;
    }
    world.remove()?;
    for sockets in [&mut older, &mut early, &mut late] {
        sockets.reach_nobody(false, "when the Service goes")?;
    }
    world.serve(&["L1"])?;
    for sockets in [&mut older, &mut early, &mut late] {
        sockets.reach("L1", "when the Service comes back")?;
    }
    Ok(())
}

/// The variable `VIPR_CHANGES` gives the number of times that the backend is replaced.
#[test]
fn datagrams_go_to_the_backend_that_there_is() -> Result<()> {
    let changes: usize = std::env::var("VIPR_CHANGES").map_or(Ok(6), |text| text.parse())?;
    let world = World::start()?;
    world.serve(&["L1"])?;
    let mut loads = Vec::new();
    for (place, target) in world.clients() {
        let connect =
            || place.connect(&target).per_socket(usize::MAX).timeout(ANSWER).pace(Duration::from_millis(5));
        for (kind, load) in [("connected", connect().udp()), ("unconnected", connect().udp_unconnected())] {
            loads.push((format!("{} {kind} to {target}", place.name()), load.start()?));
        }
    }
    for (who, load) in &mut loads {
        load.wait_for(2)?;
        let first = load.so_far()?;
        ensure!(first.iter().all(|attempt| attempt.ok), "{who}: {first:?}");
    }
    for change in 0..changes {
        let server = if change % 2 == 0 { "R1" } else { "L1" };
        world.serve(&[server])?;
        let settled = Instant::now() + Duration::from_secs(1);
        while Instant::now() < settled {
            std::thread::sleep(Duration::from_millis(50));
        }
        for (who, load) in &mut loads {
            // The first datagram may be on its way during the change.
            let before = load.so_far()?.len() + 1;
            load.wait_for(3)?;
            let after = load.so_far()?.get(before..).unwrap_or_default();
            let wrong = after.iter().filter(|a| a.server.as_deref().is_some_and(|by| by != server)).count();
            ensure!(wrong == 0, "{who}: one second after change {change} to {server}: {after:?}");
        }
    }
    let mut all = 0;
    for (who, load) in loads {
        let attempts = load.stop()?;
        let summary = Summary::of(&attempts);
        // A reply of a backend that arrives after the socket has moved on is lost, once for each change.
        let lost = summary.by_error.get("ETIMEDOUT").copied().unwrap_or_default();
        let failed = summary.total - summary.ok - lost;
        ensure!(failed == 0 && lost <= changes, "{who}: {summary:?}");
        all += summary.total;
    }
    println!("{changes} changes, {all} datagrams, none to a backend that had left a second before");
    Ok(())
}

/// A program connects its socket to the Service and elsewhere, again and again, while the agent moves such sockets to
/// another backend. The socket stays where it was connected last, or is destroyed, and no connect() fails. This test
/// cannot hit every moment between the agent's steps; `sim::tests::orders` runs through all of them. The variable
/// `VIPR_CHANGES` gives the number of times that the backend is replaced.
#[test]
fn a_socket_that_its_owner_connects_elsewhere_is_not_led_away() -> Result<()> {
    let changes: usize = std::env::var("VIPR_CHANGES").map_or(Ok(6), |text| text.parse())?;
    let world = World::start()?;
    world.serve(&["L1"])?;
    world.lab.pod("unseen").serve().udp(8080).start()?;
    let mut owners = Vec::new();
    for place in [world.lab.node("n1").host().clone(), Place::clone(&world.lab.pod("seen"))] {
        for (vip, other) in VIPS.into_iter().zip(["10.64.1.51", "fd00:64:0:1::51"]) {
            let (vip, other) = (SocketAddr::new(vip.parse()?, 514), SocketAddr::new(other.parse()?, 8080));
            let owner = place.connect(vip.to_string()).udp().timeout(ANSWER).then(other).start()?;
            owners.push((format!("{} to {vip} and {other}", place.name()), owner));
        }
    }
    for change in 0..changes {
        for (_, owner) in &mut owners {
            owner.wait_for(10)?;
        }
        world.serve(&[if change % 2 == 0 { "R1" } else { "L1" }])?;
    }
    for (who, owner) in owners {
        let attempts = owner.stop()?;
        let destroyed =
            attempts.iter().filter(|attempt| attempt.stage.as_deref() != Some("peer") && !attempt.ok);
        let elsewhere: Vec<&Attempt> =
            attempts.iter().filter(|attempt| attempt.stage.as_deref() == Some("peer")).collect();
        let longest = attempts.iter().filter(|attempt| attempt.ok).map(|attempt| attempt.elapsed_us).max();
        println!(
            "{who}: {} times, {} sockets destroyed, {} us at most",
            attempts.len(),
            destroyed.count(),
            longest.unwrap_or_default()
        );
        ensure!(elsewhere.is_empty() && longest.is_some(), "{who}: {elsewhere:?}");
    }
    Ok(())
}

/// No hook reports the end of MPTCP's subflows, nor that of the kernel's own sockets.
#[test]
fn no_socket_leaves_anything_behind() -> Result<()> {
    let world = World::start()?;
    world.serve(&["L1"])?;
    let pins = PinDir::new(world.lab.node("n1").pin_dir());
    let taken = || -> Result<usize> {
        let map = Map::Array(MapData::from_pin(pins.map(maps::STREAMS))?);
        let streams: Array<_, StreamRecord> = map.try_into()?;
        let mut taken = 0;
        for slot in 0..STREAM_SLOTS {
            taken += usize::from(streams.get(&slot, 0)?.cookie != 0);
        }
        Ok(taken)
    };
    let vip = format!("{}:80", VIPS[0]);
    let mut open = Vec::new();
    for (place, _) in world.clients().iter().step_by(2).take(3) {
        let held = place.hold(&vip).proto(Proto::Tcp).timeout(ANSWER).open()?;
        ensure!(held.opened().ok, "{:?}", held.opened());
        open.push(held);
    }
    let before = taken()?;
    for attempt in world.lab.pod("seen").connect(&vip).proto(Proto::Mptcp).timeout(ANSWER).times(300).run()? {
        ensure!(attempt.ok, "{attempt:?}");
    }
    let left = taken()?;
    until("what 300 subflows have left is freed", || Ok((taken()? <= before).then_some(())))
        .with_context(|| format!("{left}, {}", world.agent.log()))?;
    println!("{before} before, {left} after 300 connections of MPTCP");
    // Connections that are still open are still known.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(taken()?, before);
    for held in &mut open {
        let answer = held.say("hello")?;
        ensure!(answer.peername == held.opened().peername, "{answer:?}");
    }
    Ok(())
}

/// Answers are received for datagrams sent from the port of a nodePort by a process of the host that is bound to it,
/// and by a pod whose packets the node sends from its own address. Neither is a client of the Service, which goes on
/// to serve beside them.
#[test]
fn who_asks_from_a_node_port_is_answered() -> Result<()> {
    let world = World::start()?;
    world.serve(&["R1"])?;
    let (host, client) = (world.lab.node("n1").host(), world.lab.client("client"));
    client.serve().udp(5300).udp(5301).start()?;
    world.lab.pod("unseen").serve().udp(8080).start()?;
    let masquerade = "table inet pods {\n chain out {\n type nat hook postrouting priority srcnat;\n\
         meta l4proto udp ip saddr 10.64.1.50 ip daddr 203.0.113.7 snat ip to 192.0.2.10:30514\n\
         }\n}\n";
    host.net().nft(masquerade)?;
    let reserved = || fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
    until("a reserved nodePort", || Ok(host.net().enter(reserved)??.contains("30514").then_some(())))?;
    let pod = world.lab.pod("seen");
    let (v4, v6) = ("192.0.2.10:30514", "[2001:db8:1::10]:30514");
    // Connection tracking has one entry for a source and its destination, so the pod asks another port. (By IPv6 the
    // pod could write the node's address itself; its datagrams are not told from such ones.)
    for (place, own, bound, target, server) in [
        (host, v4, v4, "203.0.113.7:5300", "client"),
        (host, v4, v4, "10.64.1.51:8080", "unseen"),
        (&pod, v4, "", "203.0.113.7:5301", "client"),
        (host, v6, v6, "[2001:db8:ff::7]:5300", "client"),
        (host, v6, v6, "[fd00:64:0:1::51]:8080", "unseen"),
    ] {
        for proto in [Proto::Udp, Proto::UdpUnconnected] {
            if bound.is_empty() && proto == Proto::Udp {
                continue;
            }
            let ask = place.connect(target).proto(proto).timeout(ANSWER).times(3).per_socket(3);
            let ask = if bound.is_empty() { ask } else { ask.bind(bound) };
            for answer in ask.run()? {
                ensure!(
                    answer.ok && answer.server.as_deref() == Some(server),
                    "{} by {bound:?} to {target}: {answer:?}",
                    place.name()
                );
            }
            let service = client.connect(own).udp().timeout(ANSWER).one()?;
            ensure!(service.ok && service.server.as_deref() == Some("R1"), "{own}: {service:?}");
        }
    }
    // Each question is shown, with its destination and source.
    let flows = world.agent.tool("flows", &[])?;
    let own = flows.as_array().into_iter().flatten().filter(|flow| flow["state"] == "own");
    let shown: BTreeSet<_> = own.map(|flow| [&flow["client"], &flow["vip"]].map(Value::as_str)).collect();
    let want = [
        ("203.0.113.7:5300", v4),
        ("10.64.1.51:8080", v4),
        ("203.0.113.7:5301", v4),
        ("[2001:db8:ff::7]:5300", v6),
    ];
    for (asked, from) in want {
        ensure!(shown.contains(&[Some(asked), Some(from)]), "{asked} from {from} is not in {flows}");
    }
    Ok(())
}
