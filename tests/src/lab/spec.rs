//! Specification of a lab as data: nodes, pods and clients with their addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::addr::Prefix;

use super::network::{Network, parse_cidr};

/// A node: a router namespace with its own pods.
#[derive(Clone, Debug, Default)]
pub struct NodeSpec {
    /// Name; also the agent's `--hostname-override`.
    pub name: String,
    /// Value of the zone label, if the node has one.
    pub zone: Option<String>,
    /// Addresses of `eth0`: IPv4 in a /24, IPv6 in a /64 that all nodes share. The first of each family is the node's
    /// primary address.
    pub eth0: Vec<IpAddr>,
    /// Addresses of `eth1`, in another /24 and /64; empty if the node has no `eth1`.
    pub eth1: Vec<IpAddr>,
    /// Prefixes of its pods, such as `10.64.1.0/24`: the other nodes route them to this node.
    pub pod_cidrs: Vec<String>,
    /// Path of the node's cgroup below the lab's; the node's name by default.
    pub cgroup: Option<String>,
}

impl NodeSpec {
    /// Returns a node with two addresses and one pod prefix of each family.
    ///
    /// # Errors
    /// If an address does not parse.
    pub fn new(name: &str, eth0: &[&str], pod_cidrs: &[&str]) -> Result<Self> {
        let pod_cidrs = pod_cidrs.iter().map(|&cidr| cidr.to_owned()).collect();
        Ok(Self { name: name.to_owned(), eth0: parse_all(eth0)?, pod_cidrs, ..Self::default() })
    }

    /// Sets the zone label.
    #[must_use]
    pub fn zone(self, zone: &str) -> Self {
        Self { zone: Some(zone.to_owned()), ..self }
    }

    /// Puts the node's cgroup elsewhere, for example below a pod if the node is a container.
    #[must_use]
    pub fn in_cgroup(self, cgroup: &str) -> Self {
        Self { cgroup: Some(cgroup.to_owned()), ..self }
    }

    /// Gives the node a second device.
    ///
    /// # Errors
    /// If an address does not parse.
    pub fn eth1(self, addresses: &[&str]) -> Result<Self> {
        Ok(Self { eth1: parse_all(addresses)?, ..self })
    }

    /// Returns the first address on `eth0` of the family of `like`.
    pub fn primary(&self, like: IpAddr) -> Option<IpAddr> {
        self.eth0.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }
}

/// A pod or an outside client: a namespace with `eth0` and host routes to it.
#[derive(Clone, Debug)]
pub struct LeafSpec {
    /// Name, unique in the lab.
    pub name: String,
    /// Its addresses, of either family.
    pub addresses: Vec<IpAddr>,
}

impl LeafSpec {
    /// Parses the addresses of a leaf.
    ///
    /// # Errors
    /// If an address does not parse.
    pub fn new(name: &str, addresses: &[&str]) -> Result<Self> {
        Ok(Self { name: name.to_owned(), addresses: parse_all(addresses)? })
    }
}

/// The specification of a whole lab.
#[derive(Clone, Debug, Default)]
pub struct LabSpec {
    /// The nodes. Outside clients' traffic to anything but nodes and pods goes to the first node at first.
    pub nodes: Vec<NodeSpec>,
    /// The pods, each with the name of its node.
    pub pods: Vec<(String, LeafSpec)>,
    /// The clients outside the cluster.
    pub clients: Vec<LeafSpec>,
    /// The prefixes of all pods, separated by commas: the agents' `--cluster-cidr`.
    pub cluster_cidr: String,
    /// Network between all of them.
    pub network: Network,
    /// Names of pods whose processes are in no cgroup of their node, as with a VM or a sandbox with a kernel of its
    /// own: programs on a node's sockets do not see theirs.
    pub unseen: BTreeSet<String>,
}

impl LabSpec {
    /// Adds a node.
    #[must_use]
    pub fn node(mut self, node: NodeSpec) -> Self {
        self.nodes.push(node);
        self
    }

    /// Adds a pod on `node`.
    ///
    /// # Errors
    /// If an address does not parse.
    pub fn pod(mut self, node: &str, name: &str, addresses: &[&str]) -> Result<Self> {
        self.pods.push((node.to_owned(), LeafSpec::new(name, addresses)?));
        Ok(self)
    }

    /// Adds a client outside the cluster.
    ///
    /// # Errors
    /// If an address does not parse.
    pub fn client(mut self, name: &str, addresses: &[&str]) -> Result<Self> {
        self.clients.push(LeafSpec::new(name, addresses)?);
        Ok(self)
    }

    /// Connects everything by another network than plain routes.
    #[must_use]
    pub fn network(self, network: Network) -> Self {
        Self { network, ..self }
    }

    /// Hides the sockets of a pod from its node.
    #[must_use]
    pub fn unseen(mut self, pod: &str) -> Self {
        self.unseen.insert(pod.to_owned());
        self
    }

    /// Returns three nodes without pods: `n1` and `n3` in zone `za`, `n2` in `zb`; `n1` has a second device.
    ///
    /// # Errors
    /// None, as long as its addresses parse.
    pub fn three_nodes() -> Result<Self> {
        let n1 =
            NodeSpec::new("n1", &["192.0.2.10", "2001:db8:1::10"], &["10.64.1.0/24", "fd00:64:0:1::/64"])?;
        let n2 =
            NodeSpec::new("n2", &["192.0.2.20", "2001:db8:1::20"], &["10.64.2.0/24", "fd00:64:0:2::/64"])?;
        let n3 =
            NodeSpec::new("n3", &["192.0.2.30", "2001:db8:1::30"], &["10.64.3.0/24", "fd00:64:0:3::/64"])?;
        let n1 = n1.zone("za").eth1(&["198.51.100.10", "2001:db8:2::10"])?;
        let empty = Self { cluster_cidr: "10.64.0.0/12,fd00:64::/48".to_owned(), ..Self::default() };
        Ok(empty.node(n1).node(n2.zone("zb")).node(n3.zone("za")))
    }

    /// Returns the world of the behaviour cases: [`LabSpec::three_nodes`], the senders P (also P6), Q, X (also X6) and
    /// Y, and the endpoints L1, L2, R1, R2, V1 and V2.
    ///
    /// # Errors
    /// None, as long as its addresses parse.
    pub fn cases() -> Result<Self> {
        Self::three_nodes()?
            .pod("n1", "P", &["10.64.1.50", "fd00:64:0:1::50"])?
            .pod("n1", "L1", &["10.64.1.11"])?
            .pod("n1", "L2", &["10.64.1.12"])?
            .pod("n1", "V1", &["fd00:64:0:1::11"])?
            .pod("n2", "Q", &["10.64.2.50"])?
            .pod("n2", "R1", &["10.64.2.21"])?
            .pod("n2", "V2", &["fd00:64:0:2::21"])?
            .pod("n3", "R2", &["10.64.3.31"])?
            .client("X", &["203.0.113.7", "2001:db8:ff::7"])?
            .client("Y", &["203.0.113.200"])
    }
}

/// Returns the address of the router between the nodes in the subnet of `address`.
pub(super) fn hub_address(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            Ipv4Addr::new(a, b, c, 1).into()
        }
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 1).into()
        }
    }
}

/// Returns the subnet of `address`, as a prefix.
pub(super) fn subnet(address: IpAddr) -> String {
    let base: IpAddr = match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            Ipv4Addr::new(a, b, c, 0).into()
        }
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    };
    format!("{base}/{}", subnet_length(address))
}

/// Returns the prefix length of the subnet that nodes share.
pub(super) fn subnet_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

/// Returns the prefix length of a single host.
pub(super) fn host_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Returns whether `cidr` contains `address`.
pub(super) fn covers(cidr: &str, address: IpAddr) -> Result<bool> {
    let (base, length) = parse_cidr(cidr)?;
    let prefix = Prefix::new(base.into(), length).with_context(|| format!("not a prefix: {cidr:?}"))?;
    Ok(prefix.contains(address.into()))
}

fn parse_all(addresses: &[&str]) -> Result<Vec<IpAddr>> {
    addresses
        .iter()
        .map(|text| text.parse().with_context(|| format!("not an IP address: {text:?}")))
        .collect()
}
