//! Two nodes of both families. On the first are the attacker, a pod that serves, and a pod whose connections are
//! served as packets. On the second is another pod that serves. A client is outside.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_agent::bpf::flow_maps::FlowMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::maps;
use proxy_common::abi::{Flow, FlowKey, FlowKind, UdpFlow, UdpFlowKey};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_tests::lab::{Agent, Held, Lab, LabSpec, Netns, Node, NodeSpec, Place, Proto};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Time that an answer may take: several retransmissions.
const ANSWER: Duration = Duration::from_secs(10);

/// A Service. Its number is the last part of its clusterIP, and is added to its nodePort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    /// Name.
    pub(super) name: &'static str,
    number: u16,
    node: &'static str,
    pod: [&'static str; 2],
}

/// Service with a pod of the attacker's node.
pub(super) const HERE: Service =
    Service { name: "here", number: 1, node: "n1", pod: ["10.64.1.11", "fd00:64:0:1::11"] };
/// Service with a pod of another node.
pub(super) const THERE: Service =
    Service { name: "there", number: 2, node: "n2", pod: ["10.64.2.21", "fd00:64:0:2::21"] };

/// Port at which the agent answers probes.
pub(super) const HEALTH_PORT: u16 = 10_256;

/// Port at which pods send back the data that they receive.
const ECHO_PORT: u16 = 8007;

/// Addresses of the client outside.
const CLIENT: [&str; 2] = ["203.0.113.7", "2001:db8:ff::7"];
/// Addresses of the attacker's node.
pub(super) const NODE: [&str; 2] = ["192.0.2.10", "2001:db8:1::10"];

/// Returns an address and port of a map as the standard library writes them.
pub(super) fn socket_addr(addr: Addr, port: Be16) -> SocketAddr {
    SocketAddr::new(IpAddr::from(addr.bytes).to_canonical(), port.get())
}

impl Service {
    fn at(v6: bool, ip: &str, port: u16) -> Result<SocketAddr> {
        let text = if v6 { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
        text.parse().context(text)
    }

    /// Returns another Service with the same pod.
    pub(super) const fn named(self, name: &'static str, number: u16) -> Self {
        Self { name, number, ..self }
    }

    /// Returns the clusterIP.
    pub(super) fn cluster_ip(self, v6: bool) -> Result<SocketAddr> {
        let ip = if v6 { format!("fd00:96::{}", self.number) } else { format!("10.96.0.{}", self.number) };
        Self::at(v6, &ip, 80)
    }

    /// Returns the nodePort on the attacker's node.
    pub(super) fn node_port(self, v6: bool) -> Result<SocketAddr> {
        Self::at(v6, NODE[usize::from(v6)], 30_080 + self.number)
    }

    /// Returns the echo address of the Service, for a client outside or inside the cluster.
    pub(super) fn echo(self, v6: bool, outside: bool) -> Result<SocketAddr> {
        let (mut at, port) =
            if outside { (self.node_port(v6)?, 30_190 + self.number) } else { (self.cluster_ip(v6)?, 7) };
        at.set_port(port);
        Ok(at)
    }

    /// Returns the pod's address.
    pub(super) const fn address(self, v6: bool) -> &'static str {
        self.pod[v6 as usize]
    }

    /// Returns the pod's address and port.
    pub(super) fn endpoint(self, v6: bool) -> Result<SocketAddr> {
        Self::at(v6, self.address(v6), 8080)
    }

    /// Returns the Service and its slices.
    pub(super) fn objects(self) -> Vec<Value> {
        let kinds = [("tcp", "TCP", 80, 30_080, 8080), ("udp", "UDP", 80, 30_080, 8080)];
        let echoes = [("echo-tcp", "TCP", 7, 30_190, ECHO_PORT), ("echo-udp", "UDP", 7, 30_190, ECHO_PORT)];
        let ports: Vec<Value> = kinds
            .into_iter()
            .chain(echoes)
            .map(|(name, protocol, port, base, _)| {
                json!({
                    "name": name, "protocol": protocol, "port": port, "nodePort": base + self.number,
                })
            })
            .collect();
        let ips = [format!("10.96.0.{}", self.number), format!("fd00:96::{}", self.number)];
        let mut objects = vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "h", "name": self.name },
            "spec": {
                "type": "NodePort", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": ips[0], "clusterIPs": ips,
                "ports": ports,
            },
        })];
        let slice_ports: Vec<Value> = kinds
            .into_iter()
            .chain(echoes)
            .map(|(name, protocol, .., port)| json!({ "name": name, "protocol": protocol, "port": port }))
            .collect();
        for (family, address) in ["IPv4", "IPv6"].into_iter().zip(self.pod) {
            let name = format!("{}-{}", self.name, family.to_lowercase());
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "namespace": "h", "name": name, "labels": { "kubernetes.io/service-name": self.name },
                },
                "ports": slice_ports,
                "endpoints": [{
                    "addresses": [address], "nodeName": self.node, "conditions": { "ready": true },
                }],
            }));
        }
        objects
    }
}

/// The nodes, their pods, and the agent of the first node.
pub(super) struct World {
    // Dropped first: it runs in the lab.
    agent: Mutex<Agent>,
    lab: Lab,
    dir: TempDir,
}

impl World {
    /// Starts a world whose agent is ready.
    pub(super) fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Does the same, with more flags of the agent.
    pub(super) fn start_with(flags: &[(&str, &str)]) -> Result<Self> {
        let pods = ["10.64.1.0/24", "fd00:64:0:1::/64"];
        let n1 = NodeSpec::new("n1", &NODE, &pods)?;
        let n2 =
            NodeSpec::new("n2", &["192.0.2.20", "2001:db8:1::20"], &["10.64.2.0/24", "fd00:64:0:2::/64"])?;
        let spec = LabSpec { cluster_cidr: "10.64.0.0/12,fd00:64::/48".to_owned(), ..LabSpec::default() };
        let spec = spec
            .node(n1)
            .node(n2)
            .pod("n1", "attacker", &["10.64.1.66", "fd00:64:0:1::66"])?
            .pod("n1", "victim", &["10.64.1.51", "fd00:64:0:1::51"])?
            .unseen("victim")
            .pod("n1", "L1", &HERE.pod)?
            .pod("n2", "R1", &THERE.pod)?
            .client("client", &CLIENT)?
            .client("forger", &["198.51.100.66", "2001:db8:fe::66"])?;
        let lab = Lab::build(spec)?;
        for pod in ["L1", "R1"] {
            lab.pod(pod).serve().tcp(8080).udp(8080).echo(ECHO_PORT).udp_echo(ECHO_PORT).start()?;
        }
        let dir = tempfile::Builder::new().prefix("lab-hostile-").tempdir()?;
        let mut objects = vec![
            lab.node("n1").object(),
            json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
                "spec": { "cidrs": ["10.96.0.0/16", "fd00:96::/112"] },
            }),
        ];
        objects.extend([HERE, THERE].into_iter().flat_map(Service::objects));
        fs::create_dir(dir.path().join("manifests"))?;
        let agent = lab.node("n1").agent()?.quiet().manifests(&dir.path().join("manifests"));
        // Probes of kubelets and load balancers come from everywhere.
        let agent = agent.flag("healthz-bind-address", format!("0.0.0.0:{HEALTH_PORT}"));
        let agent = flags.iter().fold(agent, |agent, (flag, value)| agent.flag(flag, value));
        let agent = Mutex::new(agent.flag("run-dir", dir.path().join("run").display()));
        let world = Self { agent, lab, dir };
        world.write("all", &objects)?;
        world.agent().start_ready()?;
        let log = world.agent().log();
        ensure!(!log.contains("has been taken for the host's"), "{log}");
        for place in [world.victim(), world.client()] {
            for (_, target) in world.targets(&place)? {
                served(&place, Proto::Tcp, target)?;
            }
        }
        Ok(world)
    }

    /// Replaces a file of manifests.
    pub(super) fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let next = self.dir.path().join("next");
        fs::write(&next, serde_json::to_vec(&list)?)?;
        Ok(fs::rename(&next, self.dir.path().join("manifests").join(name).with_extension("json"))?)
    }

    /// Returns the problems that `status` tells of a Service.
    pub(super) fn problems(&self, service: &str) -> Result<Vec<String>> {
        let status = self.agent().tool("status", &[])?;
        let problems = &status["agent"]["problems"][format!("Service h/{service}")];
        Ok(if problems.is_null() { Vec::new() } else { serde_json::from_value(problems.clone())? })
    }

    /// Returns a directory for files of a test.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the agent.
    pub(super) fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the first node's host.
    pub(super) fn host(&self) -> &Place {
        self.lab.node("n1").host()
    }

    /// Returns every network namespace.
    pub(super) fn nets(&self) -> Vec<Netns> {
        let places = self.lab.nodes().iter().map(Node::host).cloned();
        let places = places
            .chain(self.lab.all_pods().into_iter().map(|pod| Place::clone(&pod)))
            .chain([self.client()]);
        places.map(|place| place.net().clone()).chain([self.lab.hub().clone()]).collect()
    }

    /// Returns the flows that the first node serves: client, backend, the VIP that the client talks to, and our own
    /// source.
    pub(super) fn flows(&self) -> Result<Vec<(FlowKey, Flow)>> {
        let maps = FlowMaps::open(&PinDir::new(self.lab.node("n1").pin_dir()))?;
        let mut flows = Vec::new();
        for table in [&maps.flows, &maps.new_flows] {
            table.for_each(|flow| flows.push(flow))?;
        }
        flows.retain(|(key, _)| key.kind == FlowKind::Record as u8);
        Ok(flows)
    }

    /// Returns the number of entries that `UDP_FLOWS` has on the first node.
    pub(super) fn datagrams(&self) -> Result<usize> {
        let pin = PinDir::new(self.lab.node("n1").pin_dir()).map(maps::UDP_FLOWS);
        let map = HashMap::<_, UdpFlowKey, UdpFlow>::try_from(Map::HashMap(MapData::from_pin(pin)?))?;
        Ok(map.keys().filter(Result::is_ok).count())
    }

    /// Returns the pod that attacks others.
    pub(super) fn attacker(&self) -> Place {
        Place::clone(&self.lab.pod("attacker"))
    }

    /// Returns the attacker outside.
    pub(super) fn forger(&self) -> Place {
        Place::clone(&self.lab.client("forger"))
    }

    /// Returns a pod whose packets are translated at its interface.
    pub(super) fn victim(&self) -> Place {
        Place::clone(&self.lab.pod("victim"))
    }

    /// Returns the client outside.
    pub(super) fn client(&self) -> Place {
        Place::clone(&self.lab.client("client"))
    }

    /// Returns a pod of the other node.
    pub(super) fn elsewhere(&self) -> Place {
        Place::clone(&self.lab.pod("R1"))
    }

    /// Returns the targets of a place: pods by themselves, and Services.
    pub(super) fn targets(&self, place: &Place) -> Result<Vec<(Service, SocketAddr)>> {
        let mut targets = Vec::new();
        for v6 in [false, true] {
            for service in [HERE, THERE] {
                targets.push((service, service.endpoint(v6)?));
                targets.push((
                    service,
                    if place.name() == "client" { service.node_port(v6)? } else { service.cluster_ip(v6)? },
                ));
            }
        }
        Ok(targets)
    }

    /// Opens connections of every kind from both victims, and holds them.
    pub(super) fn hold(&self) -> Result<Vec<Victim>> {
        let mut all = Vec::new();
        for place in [self.victim(), self.client()] {
            for (service, target) in self.targets(&place)? {
                for proto in [Proto::Tcp, Proto::Udp] {
                    let held = place.hold(target).proto(proto).timeout(ANSWER).open()?;
                    let opened = held.opened();
                    ensure!(opened.ok, "{} to {target} by {proto:?}: {opened:?}", place.name());
                    let local = opened.local.context("a connected socket has an address")?;
                    let mut victim =
                        Victim { who: place.name().to_owned(), service, target, proto, local, held };
                    victim.goes_on("at first")?;
                    all.push(victim);
                }
            }
        }
        Ok(all)
    }
}

/// A connection that must not break.
pub(super) struct Victim {
    who: String,
    /// Service that answers.
    pub(super) service: Service,
    /// Destination of the connection.
    pub(super) target: SocketAddr,
    /// Protocol of the connection.
    pub(super) proto: Proto,
    /// The client's end.
    pub(super) local: SocketAddr,
    held: Held,
}

impl Victim {
    /// Checks that the connection carries data.
    pub(super) fn goes_on(&mut self, when: &str) -> Result<()> {
        let Self { who, target, proto, local, held, .. } = self;
        let said = held.say(when)?;
        ensure!(
            said.ok && said.text.as_deref() == Some(when),
            "{who}, {local} to {target} by {proto:?}, {when}: {said:?}"
        );
        Ok(())
    }
}

/// Checks that a new connection or datagram is answered.
pub(super) fn served(place: &Place, proto: Proto, target: SocketAddr) -> Result<()> {
    served_of(1, place, proto, target)
}

/// Checks that a new connection is answered after a flood, and one of several datagrams of one socket. A flooded
/// receiver drops everything that its queues do not hold, from any sender. TCP itself sends again.
pub(super) fn served_after_flood(place: &Place, proto: Proto, target: SocketAddr) -> Result<()> {
    let datagram = matches!(proto, Proto::Udp | Proto::UdpUnconnected);
    served_of(if datagram { 5 } else { 1 }, place, proto, target)
}

fn served_of(times: u32, place: &Place, proto: Proto, target: SocketAddr) -> Result<()> {
    let connect = place.connect(target).proto(proto).timeout(ANSWER / times);
    let attempts = connect.times(times as usize).per_socket(times as usize).run()?;
    ensure!(
        attempts.iter().any(|attempt| attempt.ok),
        "{} to {target} by {proto:?}: {attempts:?}",
        place.name()
    );
    Ok(())
}
