//! The lab: Kubernetes nodes, pods and clients as network namespaces of one machine.
//!
//! A [`Lab`] is built from a [`LabSpec`] in a fraction of a second, so every test makes its own; labs can run at the
//! same time. Pods and hosts are real network namespaces and cgroups with real processes in them: servers and clients
//! ([`Place::serve`], [`Place::connect`], [`Place::hold`]), the agent ([`Node::agent`]), or any program
//! ([`Place::command`]).
//!
//! Nothing outlives a lab. Namespaces have no names and end with their last descriptor. Child processes die with this
//! process. Cgroups and pins are removed when the lab is dropped, also by a panic; the next lab removes those of a
//! process that was killed.
//!
//! A lab needs root, `ip` (iproute2), cgroup v2 and bpffs, and `nft` for nodes with rules; the errors name a missing
//! one.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use proxy_tests::lab::{Lab, Summary};
//!
//! let lab = Lab::cases()?;
//! lab.pod("L1").serve().tcp(8080).start()?;
//! let attempts = lab.pod("P").connect("10.64.1.11:8080").times(20).run()?;
//! assert_eq!(Summary::of(&attempts).servers(), ["L1"]);
//! # Ok(())
//! # }
//! ```

mod agent;
pub mod binary;
pub mod container;
mod exec;
mod lines;
mod netns;
pub mod network;
mod place;
mod raw;
mod residue;
mod seccomp;
mod serve;
mod spec;
mod sys;
mod traffic;
mod wire;
mod wiring;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, ensure};

pub use agent::Agent;
pub use container::Container;
pub use exec::{Exec, Proc};
pub use netns::{Netns, Role};
pub use place::{HttpAnswer, Node, Place, Pod};
pub use serve::Serve;
pub use spec::{LabSpec, LeafSpec, NodeSpec};
pub use traffic::{Connect, Flow, Held, Hold};
pub use wire::{Attempt, HEAR, Line, Proto, SEND_ONLY, Summary};

use residue::Residue;

/// Nodes, pods and clients, connected, without any programs.
#[derive(Debug)]
pub struct Lab {
    // First, because dropping it kills every process; the places then find their processes dead.
    residue: Residue,
    spec: LabSpec,
    hub: Netns,
    nodes: Vec<Node>,
    pods: Mutex<BTreeMap<String, Pod>>,
    clients: Mutex<BTreeMap<String, Place>>,
    devices: AtomicU32,
}

impl Lab {
    /// Builds the world of the behaviour cases, [`LabSpec::cases`].
    ///
    /// # Errors
    /// As [`Lab::build`].
    pub fn cases() -> Result<Self> {
        Self::build(LabSpec::cases()?)
    }

    /// Builds a lab.
    ///
    /// # Errors
    /// With what the machine lacks, or the `ip` command that failed.
    pub fn build(spec: LabSpec) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces and needs root: `sudo -E`"
        );
        ensure!(
            Path::new("/proc/net/if_inet6").exists(),
            "the lab needs IPv6: this kernel lacks it, or was started with ipv6.disable=1"
        );
        let residue = Residue::create()?;
        let hub = Netns::new(Role::Router)?;
        let mut nodes = Vec::new();
        for node in &spec.nodes {
            let net = Netns::new(Role::Router)?;
            nodes.push(Node::new(node, net, &residue, &spec.network, &spec.cluster_cidr)?);
        }
        let lab = Self {
            residue,
            spec,
            hub,
            nodes,
            pods: Mutex::default(),
            clients: Mutex::default(),
            devices: AtomicU32::new(0),
        };
        lab.wire()?;
        Ok(lab)
    }

    /// Makes everything that the specification names: routers first, because they make the devices of the others.
    fn wire(&self) -> Result<()> {
        let node_nets: Vec<Netns> = self.nodes.iter().map(|node| node.host().net().clone()).collect();
        let mut hub = wiring::hub(&self.spec, &node_nets);
        if let Some(first) = self.spec.nodes.first() {
            hub += &wiring::outside_via(first);
        }
        let mut node_batches: Vec<String> =
            (0..self.nodes.len()).map(|index| wiring::node(&self.spec, index)).collect::<Result<_>>()?;
        let mut leaves = Vec::new();

        for spec in &self.spec.clients {
            let (place, ports) = self.new_client(spec)?;
            hub += &ports;
            leaves.push((place.net().clone(), wiring::leaf(spec)));
            self.clients().insert(spec.name.clone(), place);
        }
        for (node, spec) in &self.spec.pods {
            let index = self.node_index(node)?;
            let (pod, port) = self.new_pod(&self.nodes[index], spec)?;
            node_batches[index] += &port;
            let stray = wiring::stray_pod("add", self.nodes[index].spec(), spec)?;
            hub += &stray;
            hub += &wiring::stray_pod_for_clients(&stray);
            for (_, batch) in node_batches.iter_mut().enumerate().filter(|&(other, _)| other != index) {
                *batch += &stray;
            }
            let leaf = wiring::pod(&self.spec.network, self.nodes[index].spec(), spec)?;
            leaves.push((pod.net().clone(), leaf));
            self.pods().insert(spec.name.clone(), pod);
        }

        self.hub.ip(&hub)?;
        all_at_once(node_nets.into_iter().zip(node_batches))?;
        all_at_once(leaves)?;
        self.nodes.iter().enumerate().try_for_each(|(index, node)| self.configure(index, node.host().net()))
    }

    /// Sets up a node's kernel parameters and rules, besides devices and routes.
    fn configure(&self, index: usize, net: &Netns) -> Result<()> {
        let network = &self.spec.network;
        for (key, value) in network.sysctls() {
            net.sysctl(key, value)?;
        }
        net.bridge(&wiring::overlay_peers(&self.spec, index))?;
        net.nft(&network.ruleset(&self.spec.nodes, &self.spec.nodes[index]))
    }

    /// Returns the node `name`.
    ///
    /// # Panics
    /// If no node has this name: a mistake of the test.
    #[track_caller]
    pub fn node(&self, name: &str) -> &Node {
        let known = || self.nodes.iter().map(Node::name).collect();
        self.nodes.iter().find(|node| node.name() == name).unwrap_or_else(|| unknown("node", name, known()))
    }

    /// Returns the pod `name`.
    ///
    /// # Panics
    /// If no pod has this name: a mistake of the test.
    #[track_caller]
    pub fn pod(&self, name: &str) -> Pod {
        let pods = self.pods();
        pods.get(name)
            .cloned()
            .unwrap_or_else(|| unknown("pod", name, pods.keys().map(String::as_str).collect()))
    }

    /// Returns the outside client `name`.
    ///
    /// # Panics
    /// If no client has this name: a mistake of the test.
    #[track_caller]
    pub fn client(&self, name: &str) -> Place {
        let clients = self.clients();
        let known = || clients.keys().map(String::as_str).collect();
        clients.get(name).cloned().unwrap_or_else(|| unknown("client", name, known()))
    }

    /// Returns all nodes, in the order of the specification.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns all pods, by name.
    pub fn all_pods(&self) -> Vec<Pod> {
        self.pods().values().cloned().collect()
    }

    /// Returns the namespace of the network between nodes and clients.
    pub fn hub(&self) -> &Netns {
        &self.hub
    }

    /// Returns the machine that the nodes run on: its network is the hub, and its cgroup is above theirs.
    /// `cluster_cidr` has the nodes' addresses.
    ///
    /// # Errors
    /// If the machine's cgroup cannot be made.
    pub fn outer(&self, cluster_cidr: &str) -> Result<Node> {
        Node::outer(&self.hub, &self.residue, cluster_cidr)
    }

    /// Adds a pod.
    ///
    /// # Errors
    /// If the name or an address is already used, or an address does not parse.
    pub fn add_pod(&self, node: &str, name: &str, addresses: &[&str]) -> Result<Pod> {
        ensure!(!self.pods().contains_key(name), "there is a pod {name} already");
        let spec = LeafSpec::new(name, addresses)?;
        let node = &self.nodes[self.node_index(node)?];
        let (pod, port) = self.new_pod(node, &spec)?;
        node.host().net().ip(&port)?;
        pod.net().ip(&wiring::pod(&self.spec.network, node.spec(), &spec)?)?;
        self.route_stray("add", node, &spec)?;
        self.pods().insert(name.to_owned(), pod.clone());
        Ok(pod)
    }

    /// Deletes a pod: its processes are killed and its device vanishes from the node.
    ///
    /// # Errors
    /// If no pod has this name, or a process does not die.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let pod = self.pods().remove(name).with_context(|| format!("no pod {name}"))?;
        pod.stop()?;
        let node = &self.nodes[self.node_index(pod.node())?];
        node.host().net().ip(&format!("link delete {}", pod.host_device()))?;
        let spec = LeafSpec { name: name.to_owned(), addresses: pod.addresses().to_vec() };
        self.route_stray("delete", node, &spec)?;
        residue::remove_cgroup(pod.cgroup())
    }

    /// Adds an outside client.
    ///
    /// # Errors
    /// If the name or an address is already used, or an address does not parse.
    pub fn add_client(&self, name: &str, addresses: &[&str]) -> Result<Place> {
        ensure!(!self.clients().contains_key(name), "there is a client {name} already");
        let spec = LeafSpec::new(name, addresses)?;
        let (place, port) = self.new_client(&spec)?;
        self.hub.ip(&port)?;
        place.net().ip(&wiring::leaf(&spec))?;
        self.clients().insert(name.to_owned(), place.clone());
        Ok(place)
    }

    /// Routes outside clients' traffic to `node`, except traffic to nodes' own addresses and to pods.
    ///
    /// # Errors
    /// If no node has this name.
    pub fn outside_via(&self, node: &str) -> Result<()> {
        self.hub.ip(&wiring::outside_via(self.nodes[self.node_index(node)?].spec()))
    }

    /// Routes a client's traffic to Service addresses and to `node` through `eth1`, and the replies back through it.
    /// [`Lab::outside_via`] has to name the same node; at first that is the first one.
    ///
    /// # Errors
    /// If the node has no such device.
    pub fn through_eth1(&self, client: &str, node: &str) -> Result<()> {
        let (client, node) = (self.client(client), &self.nodes[self.node_index(node)?]);
        ensure!(!node.spec().eth1.is_empty(), "{} has no eth1", node.name());
        self.hub.ip(&wiring::second_rule(client.addresses()))?;
        node.host().net().ip(&wiring::second_way_back(node.spec(), client.addresses()))
    }

    fn new_pod(&self, node: &Node, spec: &LeafSpec) -> Result<(Pod, String)> {
        let device = format!("veth{}", self.next_device());
        let cgroup = if self.spec.unseen.contains(&spec.name) {
            node.cgroup().with_file_name("unseen").join(&spec.name)
        } else {
            node.cgroup().join("pods").join(&spec.name)
        };
        let place = Place::new(&spec.name, Netns::new(Role::Leaf)?, cgroup, spec.addresses.clone())?;
        let port = wiring::pod_port(&self.spec.network, node.spec(), &device, spec, place.net());
        Ok((Pod::new(place, node.name(), device), port))
    }

    fn new_client(&self, spec: &LeafSpec) -> Result<(Place, String)> {
        let device = format!("client{}", self.next_device());
        let cgroup = self.residue.cgroup.join("outside").join(&spec.name);
        let place = Place::new(&spec.name, Netns::new(Role::Leaf)?, cgroup, spec.addresses.clone())?;
        let port = wiring::leaf_port(&device, spec, place.net(), &[]) + &wiring::client_rule(&device);
        Ok((place, port))
    }

    fn route_stray(&self, verb: &str, node: &Node, pod: &LeafSpec) -> Result<()> {
        let routes = wiring::stray_pod(verb, node.spec(), pod)?;
        if routes.is_empty() {
            return Ok(());
        }
        let others = self.nodes.iter().filter(|other| other.name() != node.name());
        for net in others.map(|other| other.host().net()).chain([&self.hub]) {
            net.ip(&routes)?;
        }
        self.hub.ip(&wiring::stray_pod_for_clients(&routes))
    }

    fn node_index(&self, name: &str) -> Result<usize> {
        self.nodes.iter().position(|node| node.name() == name).with_context(|| format!("no node {name}"))
    }

    fn next_device(&self) -> u32 {
        self.devices.fetch_add(1, Ordering::Relaxed)
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clients(&self) -> MutexGuard<'_, BTreeMap<String, Place>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[track_caller]
#[expect(clippy::panic, reason = "a wrong name is a mistake in the test's text, not a condition of the run")]
fn unknown<T>(what: &str, name: &str, known: Vec<&str>) -> T {
    panic!("no {what} {name:?} in this lab; there are {known:?}");
}

/// Runs each batch in its namespace, all at the same time.
fn all_at_once(batches: impl IntoIterator<Item = (Netns, String)>) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            batches.into_iter().map(|(net, batch)| scope.spawn(move || net.ip(&batch))).collect();
        let mut results = threads.into_iter().map(thread::ScopedJoinHandle::join);
        results.try_for_each(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
