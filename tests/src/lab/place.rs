//! Places in which a program of the lab can run: pods, clients, and the host side of nodes.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::agent::Agent;
use super::exec::{Exec, Proc};
use super::netns::Netns;
use super::network::Network;
use super::residue::{self, Residue};
use super::serve::Serve;
use super::spec::NodeSpec;
use super::traffic::{Connect, Hold};

/// A network namespace with a cgroup. Clones are the same place.
#[derive(Clone, Debug)]
pub struct Place(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    net: Netns,
    cgroup: PathBuf,
    addresses: Vec<IpAddr>,
    servers: Mutex<Vec<Proc>>,
}

impl Place {
    /// Makes the cgroup of a place in namespace `net`.
    pub(super) fn new(name: &str, net: Netns, cgroup: PathBuf, addresses: Vec<IpAddr>) -> Result<Self> {
        fs::create_dir_all(&cgroup)
            .with_context(|| format!("cannot create the cgroup {}", cgroup.display()))?;
        Ok(Self(Arc::new(Inner { name: name.to_owned(), net, cgroup, addresses, servers: Mutex::default() })))
    }

    /// Returns a place with the same cgroup and another network namespace, which a process of this place has made.
    ///
    /// # Errors
    /// If the cgroup cannot be made.
    pub fn with_net(&self, name: &str, net: &Netns, addresses: &[IpAddr]) -> Result<Self> {
        Self::new(name, net.clone(), self.0.cgroup.clone(), addresses.to_vec())
    }

    /// Returns the place's name, with which its servers answer.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the addresses of the place's devices, except loopback.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.0.addresses
    }

    /// Returns the place's network namespace.
    pub fn net(&self) -> &Netns {
        &self.0.net
    }

    /// Returns the directory of the place's cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Prepares a program to run here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Exec {
        Exec::new(&self.0.net, &self.0.cgroup, program)
    }

    /// Returns the numbers of packets that a device here has received and sent.
    ///
    /// # Errors
    /// If the device does not exist.
    pub fn packets(&self, device: &str) -> Result<[u64; 2]> {
        let mut cat = self.command("cat");
        cat.arg("/proc/net/dev");
        let text = cat.text()?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:")));
        let columns: Vec<&str> =
            line.with_context(|| format!("no device {device}"))?.split_whitespace().collect();
        let column =
            |number: usize| -> Result<u64> { Ok(columns.get(number).context("too few columns")?.parse()?) };
        Ok([column(1)?, column(9)?])
    }

    /// Prepares connections from here to `target`, an `address:port`.
    pub fn connect(&self, target: impl ToString) -> Connect {
        Connect::new(self, target.to_string())
    }

    /// Prepares one connection from here to `target` that stays open.
    pub fn hold(&self, target: impl ToString) -> Hold {
        Hold::new(self, target.to_string())
    }

    /// Prepares servers here.
    pub fn serve(&self) -> Serve {
        Serve::new(self)
    }

    /// Keeps a server running until the place is stopped or gone.
    pub fn keep(&self, server: Proc) {
        self.servers().push(server);
    }

    /// Kills every process that runs here; on the host of a node that includes its agent. The place stays and can serve
    /// again.
    ///
    /// # Errors
    /// If a process does not die.
    pub fn stop(&self) -> Result<()> {
        residue::kill_cgroup(&self.0.cgroup)?;
        self.servers().clear();
        Ok(())
    }

    /// Fetches `path` from an HTTP server by a connection from here; returns the status code and the body.
    ///
    /// # Errors
    /// If no answer arrives within 5 seconds, or the answer is not HTTP.
    pub fn http_get(&self, server: SocketAddr, path: &str) -> Result<(u16, String)> {
        self.http(server, path, &[]).map(|answer| (answer.status, answer.body))
    }

    /// Does [`Place::http_get`] with these request headers, and returns the whole answer.
    ///
    /// # Errors
    /// As [`Place::http_get`].
    pub fn http(&self, server: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<HttpAnswer> {
        let answer = self.0.net.enter(|| http_get(server, path, headers))?;
        answer.with_context(|| format!("GET http://{server}{path}"))
    }

    fn servers(&self) -> std::sync::MutexGuard<'_, Vec<Proc>> {
        self.0.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answer of an HTTP server.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The headers, in lower case, each line with its line break.
    pub headers: String,
    /// The body.
    pub body: String,
}

impl HttpAnswer {
    /// Returns the value of a header, whose name must be in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

fn http_get(server: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<HttpAnswer> {
    let patience = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&server, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {server}\r\n{more}Connection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of the headers")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status line")?;
    let headers = head.split_once("\r\n").map_or_else(String::new, |(_, lines)| lines.to_lowercase());
    Ok(HttpAnswer { status, headers, body: body.to_owned() })
}

/// A pod: a place on a node. Clones are the same pod.
#[derive(Clone, Debug)]
pub struct Pod {
    place: Place,
    node: String,
    device: String,
}

impl Pod {
    pub(super) fn new(place: Place, node: &str, device: String) -> Self {
        Self { place, node: node.to_owned(), device }
    }

    /// Returns the name of the pod's node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns the pod with its processes in another cgroup of its node, where kubelet would put containers. Makes the
    /// cgroup.
    ///
    /// # Errors
    /// If the cgroup cannot be made.
    pub fn in_cgroup(&self, path: &str) -> Result<Place> {
        let node =
            self.place.cgroup().ancestors().nth(2).context("a pod's cgroup is pods/NAME of its node's")?;
        Place::new(
            self.place.name(),
            self.place.net().clone(),
            node.join(path),
            self.place.addresses().to_vec(),
        )
    }

    /// Returns the name of the node's end of the pod's veth.
    pub fn host_device(&self) -> &str {
        &self.device
    }
}

impl Deref for Pod {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

/// A node: a host place, a cgroup that holds it and all its pods, directories for pins and for files of the agent.
#[derive(Clone, Debug)]
pub struct Node {
    host: Place,
    spec: NodeSpec,
    cgroup: PathBuf,
    pin_dir: PathBuf,
    run_dir: PathBuf,
    cluster_cidr: String,
}

impl Node {
    pub(super) fn new(
        spec: &NodeSpec,
        net: Netns,
        residue: &Residue,
        network: &Network,
        cluster_cidr: &str,
    ) -> Result<Self> {
        let cgroup = residue.cgroup.join(spec.cgroup.as_ref().unwrap_or(&spec.name));
        let beside = network.node_addresses(spec)?;
        let addresses = spec.eth0.iter().chain(&spec.eth1).chain(&beside).copied().collect();
        let host = Place::new(&spec.name, net, cgroup.join("host"), addresses)?;
        let [pin_dir, run_dir] = [&residue.pins, &residue.run].map(|dir| dir.join(&spec.name));
        let cluster_cidr = cluster_cidr.to_owned();
        Ok(Self { host, spec: spec.clone(), cgroup, pin_dir, run_dir, cluster_cidr })
    }

    /// Returns the network between the nodes as a node whose pods are all other nodes.
    pub(super) fn outer(hub: &Netns, residue: &Residue, cluster_cidr: &str) -> Result<Self> {
        let spec = NodeSpec::new("outer", &[], &[])?;
        let host = Place::new(&spec.name, hub.clone(), residue.cgroup.join(&spec.name), Vec::new())?;
        let [pin_dir, run_dir] = [&residue.pins, &residue.run].map(|dir| dir.join(&spec.name));
        let cluster_cidr = cluster_cidr.to_owned();
        Ok(Self { host, spec, cgroup: residue.cgroup.clone(), pin_dir, run_dir, cluster_cidr })
    }

    /// Returns the node's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Returns the specification of the node.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// Returns the place of the node's host processes.
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// Returns the cgroup of the whole node: host processes in `host`, pods in `pods/NAME`.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Makes a place on this node: a cgroup below the node's, with a network namespace.
    ///
    /// # Errors
    /// If the cgroup cannot be made.
    pub fn place(&self, name: &str, cgroup: &str, net: &Netns) -> Result<Place> {
        Place::new(name, net.clone(), self.cgroup.join(cgroup), Vec::new())
    }

    /// Returns a directory on bpffs for this node's pins. It does not exist; its parent does, and is removed with the
    /// lab.
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Returns the agent's `--run-dir` on this node. It does not exist; its parent does, and is removed with the lab.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Returns the cluster's pod prefixes, as `--cluster-cidr` takes them.
    pub fn cluster_cidr(&self) -> &str {
        &self.cluster_cidr
    }

    /// Returns an agent for this node, not yet started.
    ///
    /// # Errors
    /// If there is no `proxy-agent` executable.
    pub fn agent(&self) -> Result<Agent> {
        Agent::new(self)
    }

    /// Returns the `Node` object that the API server would have for the node.
    pub fn object(&self) -> Value {
        let mut labels = json!({ "kubernetes.io/hostname": self.name() });
        if let Some(zone) = &self.spec.zone {
            labels["topology.kubernetes.io/zone"] = json!(zone);
        }
        let addresses: Vec<Value> = self
            .spec
            .eth0
            .iter()
            .map(|address| json!({ "type": "InternalIP", "address": address }))
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": self.name(), "labels": labels },
            "spec": { "podCIDR": self.spec.pod_cidrs.first(), "podCIDRs": self.spec.pod_cidrs },
            "status": { "addresses": addresses },
        })
    }
}
