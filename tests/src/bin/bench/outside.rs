//! The ground of the benchmarks with a client outside the cluster: a node whose nodePorts the client uses, with a
//! backend pod on that node and one on another node.
//!
//! Packets take the same path with and without translation. A client that connects to the far pod directly is routed
//! through the first node in both directions, like a client of that node's nodePort:
//!
//! ```text
//! client -- hub -- n1 -- server          (local)
//!            |      \
//!            +------ n2 -- far-server    (remote)
//! ```

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use proxy_tests::lab::{Lab, LabSpec, Node, NodeSpec, Place, Pod};

use crate::cluster::Measured;
use crate::traffic::Listener;

/// First port of every server.
pub(crate) const BASE_PORT: u16 = 7000;
/// Routing table of the hub for a client that connects to the far pod directly.
const DETOUR: u32 = 20;

/// Node of the backend pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Backend {
    /// The node that the client connects to.
    Local,
    /// Another node.
    Remote,
}

impl Backend {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Local, Self::Remote];

    /// Returns the name of the backend in reports, and of its Service.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }

    fn node(self) -> &'static str {
        match self {
            Self::Local => "n1",
            Self::Remote => "n2",
        }
    }

    fn pod(self) -> &'static str {
        match self {
            Self::Local => "server",
            Self::Remote => "far-server",
        }
    }
}

/// Nodes, pods and the client, without any proxy.
pub(crate) struct Ground {
    lab: Lab,
}

impl Ground {
    /// Builds the lab.
    ///
    /// # Errors
    /// As [`Lab::build`].
    pub(crate) fn new() -> Result<Self> {
        let n1 =
            NodeSpec::new("n1", &["192.0.2.10", "2001:db8:1::10"], &["10.64.1.0/24", "fd00:64:0:1::/64"])?;
        let n2 =
            NodeSpec::new("n2", &["192.0.2.20", "2001:db8:1::20"], &["10.64.2.0/24", "fd00:64:0:2::/64"])?;
        let cluster_cidr = "10.64.0.0/12,fd00:64::/48".to_owned();
        let spec = LabSpec { cluster_cidr, ..LabSpec::default() }
            .node(n1)
            .node(n2)
            .pod("n1", "server", &["10.64.1.11", "fd00:64:0:1::11"])?
            .pod("n1", "inside", &["10.64.1.50", "fd00:64:0:1::50"])?
            .pod("n2", "far-server", &["10.64.2.11", "fd00:64:0:2::11"])?
            .client("client", &["203.0.113.7", "2001:db8:ff::7"])?;
        let ground = Self { lab: Lab::build(spec)? };
        for ipv6 in [false, true] {
            ground.detour(ipv6)?;
        }
        // A node with one device would send clients redirects to the shorter way.
        for device in ["all", "eth0"] {
            ground.node().host().net().sysctl(&format!("net/ipv4/conf/{device}/send_redirects"), "0")?;
        }
        // A client that closes first then has ports left: its kernel reuses the port of an old connection after a
        // second.
        for (key, value) in [("ip_local_port_range", "1024 65535"), ("tcp_tw_reuse", "1")] {
            ground.client().net().sysctl(&format!("net/ipv4/{key}"), value)?;
        }
        Ok(ground)
    }

    /// Routes between the client and the far pod through the first node.
    fn detour(&self, ipv6: bool) -> Result<()> {
        let client = self.client_address(ipv6)?;
        let pod = self.pod_address(Backend::Remote, ipv6)?;
        let via = self.node_address(ipv6)?;
        let family = if ipv6 { "-6 " } else { "" };
        self.lab.hub().ip(&format!(
            "{family}route add {pod} via {via} table {DETOUR}\n\
             {family}rule add pref 100 from {client} to {pod} lookup {DETOUR}\n"
        ))?;
        self.lab.node("n2").host().net().ip(&format!("{family}route add {client} via {via}\n"))
    }

    /// Returns the node that the client talks to.
    pub(crate) fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    /// Returns the client outside.
    pub(crate) fn client(&self) -> Place {
        self.lab.client("client")
    }

    /// Returns a pod of the first node that is no backend.
    pub(crate) fn inside(&self) -> Pod {
        self.lab.pod("inside")
    }

    /// Returns the pod that serves.
    pub(crate) fn pod(&self, backend: Backend) -> Pod {
        self.lab.pod(backend.pod())
    }

    /// Returns the client's address.
    pub(crate) fn client_address(&self, ipv6: bool) -> Result<IpAddr> {
        address(&self.client(), ipv6)
    }

    /// Returns the address of the node that the client talks to.
    pub(crate) fn node_address(&self, ipv6: bool) -> Result<IpAddr> {
        address(self.node().host(), ipv6)
    }

    /// Returns the address of the pod that serves.
    pub(crate) fn pod_address(&self, backend: Backend, ipv6: bool) -> Result<IpAddr> {
        address(&self.pod(backend), ipv6)
    }

    /// Returns the address of the pod that is no backend.
    pub(crate) fn inside_address(&self, ipv6: bool) -> Result<IpAddr> {
        address(&self.inside(), ipv6)
    }

    /// Returns the address of the server itself.
    pub(crate) fn server(&self, backend: Backend, ipv6: bool, listener: Listener) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.pod_address(backend, ipv6)?, listener.port(BASE_PORT)))
    }

    /// Returns the nodePort in front of the server.
    pub(crate) fn node_port(&self, backend: Backend, ipv6: bool, listener: Listener) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.node_address(ipv6)?, listener.port(base_node_port(backend, ipv6))))
    }

    /// Returns the Service in front of the server.
    pub(crate) fn service(&self, backend: Backend, ipv6: bool) -> Result<Measured<'static>> {
        Ok(Measured {
            name: service_name(backend, ipv6),
            vip: vip(backend, ipv6),
            base_port: BASE_PORT,
            base_node_port: Some(base_node_port(backend, ipv6)),
            endpoint: self.pod_address(backend, ipv6)?,
            node: backend.node(),
        })
    }
}

fn service_name(backend: Backend, ipv6: bool) -> &'static str {
    match (backend, ipv6) {
        (Backend::Local, false) => "local",
        (Backend::Remote, false) => "remote",
        (Backend::Local, true) => "local6",
        (Backend::Remote, true) => "remote6",
    }
}

fn vip(backend: Backend, ipv6: bool) -> IpAddr {
    let number = 0x10 + backend as u16;
    if ipv6 {
        IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, number])
    } else {
        IpAddr::from([10, 96, 0, number as u8])
    }
}

fn base_node_port(backend: Backend, ipv6: bool) -> u16 {
    30_000 + 100 * backend as u16 + 1000 * u16::from(ipv6)
}

fn address(place: &Place, ipv6: bool) -> Result<IpAddr> {
    let mut all = place.addresses().iter().copied();
    all.find(|address| address.is_ipv6() == ipv6).context("no address of the family")
}
