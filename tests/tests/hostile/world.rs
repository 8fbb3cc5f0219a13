//! Two nodes of both families. On the first are the attacker, a pod that serves, and a pod whose connections are served in
//! packets; on the second another pod that serves. A client is outside.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Agent, Held, Lab, LabSpec, NodeSpec, Place, Proto};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long an answer may take: several retransmissions.
const ANSWER: Duration = Duration::from_secs(10);

/// A Service: its number is the last one of its clusterIP, and of its nodePort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service {
    /// Name.
    pub(super) name: &'static str,
    number: u16,
    node: &'static str,
    pod: [&'static str; 2],
}

/// Served by a pod of the attacker's node.
pub(super) const HERE: Service =
    Service { name: "here", number: 1, node: "n1", pod: ["10.64.1.11", "fd00:64:0:1::11"] };
/// Served by a pod of another one.
pub(super) const THERE: Service =
    Service { name: "there", number: 2, node: "n2", pod: ["10.64.2.21", "fd00:64:0:2::21"] };

/// Where the agent answers probes.
pub(super) const HEALTH_PORT: u16 = 10_256;

/// Addresses of the client outside.
const CLIENT: [&str; 2] = ["203.0.113.7", "2001:db8:ff::7"];
/// Addresses of the attacker's node.
pub(super) const NODE: [&str; 2] = ["192.0.2.10", "2001:db8:1::10"];

impl Service {
    fn at(v6: bool, ip: &str, port: u16) -> Result<SocketAddr> {
        let text = if v6 { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
        text.parse().context(text)
    }

    /// Another one with the same pod.
    pub(super) const fn named(self, name: &'static str, number: u16) -> Self {
        Self { name, number, ..self }
    }

    /// Its clusterIP.
    pub(super) fn cluster_ip(self, v6: bool) -> Result<SocketAddr> {
        let ip = if v6 { format!("fd00:96::{}", self.number) } else { format!("10.96.0.{}", self.number) };
        Self::at(v6, &ip, 80)
    }

    /// Its nodePort on the attacker's node.
    pub(super) fn node_port(self, v6: bool) -> Result<SocketAddr> {
        Self::at(v6, NODE[usize::from(v6)], 30_080 + self.number)
    }

    /// Its pod.
    pub(super) fn endpoint(self, v6: bool) -> Result<SocketAddr> {
        Self::at(v6, self.pod[usize::from(v6)], 8080)
    }

    /// It and its slices.
    pub(super) fn objects(self) -> Vec<Value> {
        let ports = ["TCP", "UDP"];
        let of = |protocol: &&str| {
            let port = 30_080 + self.number;
            json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": 80, "nodePort": port })
        };
        let ips = [format!("10.96.0.{}", self.number), format!("fd00:96::{}", self.number)];
        let mut objects = vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "h", "name": self.name },
            "spec": {
                "type": "NodePort", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": ips[0], "clusterIPs": ips,
                "ports": ports.iter().map(of).collect::<Vec<_>>(),
            },
        })];
        let slice_ports: Vec<Value> = ports
            .iter()
            .map(|protocol| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": 8080 }))
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

/// The nodes, their pods, and the agent of the first.
pub(super) struct World {
    // Dropped first: it runs in the lab.
    agent: Mutex<Agent>,
    lab: Lab,
    dir: TempDir,
}

impl World {
    /// A world that is served.
    pub(super) fn start() -> Result<Self> {
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
            .client("client", &CLIENT)?;
        let lab = Lab::build(spec)?;
        for pod in ["L1", "R1"] {
            lab.pod(pod).serve().tcp(8080).udp(8080).start()?;
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

    /// A directory for whatever a test needs.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The agent.
    pub(super) fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first node's host.
    pub(super) fn host(&self) -> &Place {
        self.lab.node("n1").host()
    }

    /// The pod that harms others.
    pub(super) fn attacker(&self) -> Place {
        Place::clone(&self.lab.pod("attacker"))
    }

    /// A pod whose packets are translated at its interface.
    pub(super) fn victim(&self) -> Place {
        Place::clone(&self.lab.pod("victim"))
    }

    /// The client outside.
    pub(super) fn client(&self) -> Place {
        Place::clone(&self.lab.client("client"))
    }

    /// What a place talks to: pods by themselves, and Services.
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

    /// Connections of every kind from both victims, that stay.
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

/// A connection that nobody may break.
pub(super) struct Victim {
    who: String,
    /// Who answers.
    pub(super) service: Service,
    /// What it is connected to.
    pub(super) target: SocketAddr,
    /// How.
    pub(super) proto: Proto,
    /// The client's end.
    pub(super) local: SocketAddr,
    held: Held,
}

impl Victim {
    /// It carries data.
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

/// A new connection or datagram is answered.
pub(super) fn served(place: &Place, proto: Proto, target: SocketAddr) -> Result<()> {
    let attempt = place.connect(target).proto(proto).timeout(ANSWER).one()?;
    ensure!(attempt.ok, "{} to {target} by {proto:?}: {attempt:?}", place.name());
    Ok(())
}
