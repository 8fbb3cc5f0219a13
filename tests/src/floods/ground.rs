//! Two nodes, a nodePort of the first node with a pod on either, a crowd's client and the machine of an attacker.
//!
//! Replies of pods to senders that do not exist end in a black hole in the network, without an ICMP error.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Context as _, Result};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::Counter;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lab::{Agent, Lab, LabSpec, Node, NodeSpec, Place};

/// Primary address of the node whose nodePorts are used.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// Address of the crowd's client.
pub const CROWD_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const PORT: u16 = 8080;

/// Node of the pod behind a nodePort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The node that the client connects to.
    Local,
    /// Another node.
    Remote,
}

impl Backend {
    const ALL: [Self; 2] = [Self::Local, Self::Remote];

    /// Address of the nodePort, for TCP and UDP.
    pub const fn node_port(self) -> SocketAddrV4 {
        let port = match self {
            Self::Local => 30_080,
            Self::Remote => 30_081,
        };
        SocketAddrV4::new(NODE_ADDRESS, port)
    }

    /// Address of the pod itself.
    pub const fn pod(self) -> SocketAddrV4 {
        let address = match self {
            Self::Local => Ipv4Addr::new(10, 64, 1, 11),
            Self::Remote => Ipv4Addr::new(10, 64, 2, 21),
        };
        SocketAddrV4::new(address, PORT)
    }

    const fn node(self) -> &'static str {
        match self {
            Self::Local => "n1",
            Self::Remote => "n2",
        }
    }

    fn objects(self) -> [Value; 2] {
        let name = format!("echo-{}", self.node());
        let vip = Ipv4Addr::new(10, 96, 0, self.node_port().port().to_be_bytes()[1]);
        let metadata = json!({ "namespace": "default", "name": name });
        let endpoint_ports: Vec<Value> = ["TCP", "UDP"]
            .map(|protocol| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": PORT }))
            .into();
        let mut ports = endpoint_ports.clone();
        for port in &mut ports {
            port["nodePort"] = json!(self.node_port().port());
        }
        let mut slice = metadata.clone();
        slice["labels"] = json!({ "kubernetes.io/service-name": name });
        [
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": metadata,
                "spec": { "type": "NodePort", "clusterIP": vip, "clusterIPs": [vip], "ports": ports },
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": slice,
                "addressType": "IPv4",
                "ports": endpoint_ports,
                "endpoints": [{
                    "addresses": [self.pod().ip()], "nodeName": self.node(), "conditions": { "ready": true },
                }],
            }),
        ]
    }
}

/// The ground, with an agent.
#[derive(Debug)]
pub struct Ground {
    // Dropped first: the agent runs in the lab.
    agent: Agent,
    lab: Lab,
    _manifests: TempDir,
}

impl Ground {
    /// Builds the lab and starts the agent of the first node with further flags.
    ///
    /// # Errors
    /// If the lab cannot be built, or the agent does not become ready.
    pub fn new(flags: &[(&str, &str)]) -> Result<Self> {
        allow_open_files().context("the limit of open files")?;
        let spec = LabSpec { cluster_cidr: "10.64.0.0/16".to_owned(), ..LabSpec::default() }
            .node(NodeSpec::new("n1", &[&NODE_ADDRESS.to_string()], &["10.64.1.0/24"])?)
            .node(NodeSpec::new("n2", &["192.0.2.20"], &["10.64.2.0/24"])?)
            .pod("n1", "n1-echo", &[&Backend::Local.pod().ip().to_string()])?
            .pod("n2", "n2-echo", &[&Backend::Remote.pod().ip().to_string()])?
            .client("crowd", &[&CROWD_ADDRESS.to_string()])?
            .client("attacker", &["203.0.113.66"])?;
        let lab = Lab::build(spec)?;
        lab.hub().ip("route add blackhole default")?;
        for backend in Backend::ALL {
            let pod = lab.pod(&format!("{}-echo", backend.node()));
            pod.serve().echo(PORT).udp_echo(PORT).start()?;
        }
        // A node with one device would send each sender a redirect to the shorter way to the other node.
        for device in ["all", "eth0"] {
            lab.node("n1").host().net().sysctl(&format!("net/ipv4/conf/{device}/send_redirects"), "0")?;
        }
        let dir = tempfile::tempdir().context("a directory for manifests")?;
        let objects = Backend::ALL.into_iter().flat_map(Backend::objects).chain([lab.node("n1").object()]);
        for (number, object) in objects.enumerate() {
            std::fs::write(dir.path().join(format!("{number}.json")), object.to_string())?;
        }
        let mut agent = lab.node("n1").agent()?.manifests(dir.path());
        for (flag, value) in flags {
            agent = agent.flag(flag, value);
        }
        agent.start_ready()?;
        Ok(Self { agent, lab, _manifests: dir })
    }

    /// Returns the agent of the first node.
    pub fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    /// Returns the first node.
    pub fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    /// Returns the client of the crowd.
    pub fn client(&self) -> Place {
        self.lab.client("crowd")
    }

    /// Returns the machine that floods come from.
    pub fn attacker(&self) -> Place {
        self.lab.client("attacker")
    }

    /// Returns the maps of the first node.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn maps(&self) -> Result<KernelMaps> {
        Ok(KernelMaps::open(&PinDir::new(self.node().pin_dir()))?)
    }

    /// Returns a counter of the first node.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn counted(&self, counter: Counter) -> Result<u64> {
        Ok(self.maps()?.counter(counter)?)
    }

    /// Returns the number of packets that pods of the first node's Services have sent to clients.
    ///
    /// # Errors
    /// If its maps cannot be read.
    pub fn answers(&self) -> Result<u64> {
        let services = self.agent.tool("services", &[])?;
        services
            .as_array()
            .and_then(|ports| ports.iter().map(|port| port["traffic"]["replyPackets"].as_u64()).sum())
            .context("services without traffic")
    }

    /// Returns the address of a nodePort for clients.
    pub fn target(backend: Backend) -> SocketAddr {
        backend.node_port().into()
    }
}

/// Raises the limit of open files to this process's maximum: servers and crowds have one for each connection. Child
/// processes inherit the limit.
///
/// # Errors
/// With the kernel's error.
pub fn allow_open_files() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}
