//! Devices, addresses and routes of a lab, as `ip -batch` lines.
//!
//! ```text
//!  client --veth-- hub (router) --bridge lan0-- eth0 node --veth-- eth0 pod
//!                               --bridge lan1-- eth1
//! ```
//! Pods and clients hold single addresses (/32, /128), as with most routed CNIs: their router has a host route to them,
//! and they reach everything by a gateway address that exists only as a permanent neighbour entry. Nodes route each
//! other's pod prefixes directly. The hub has no default route for nodes: what a node passes on although nobody
//! serves it comes back as "network unreachable", so that a test can tell it from a packet that was dropped (over TCP
//! after about a second: the kernel heeds the message at the first retransmission).

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::Result;

use super::netns::Netns;
use super::spec::{LabSpec, LeafSpec, NodeSpec, covers, host_length, hub_address, subnet_length};

/// MAC address of the router's end of every veth to a pod or a client.
const GATEWAY_MAC: &str = "02:00:00:00:00:01";
/// Routing table of the hub for what comes from clients and has no route in the main table.
const CLIENT_TABLE: u32 = 10;

/// Hub: bridges, their addresses, a port for each node device (whose peer appears in `nodes[i]`), pod prefixes.
pub(super) fn hub(spec: &LabSpec, nodes: &[Netns]) -> String {
    let mut batch = String::from("link set lo up\n");
    for lan in ["lan0", "lan1"] {
        line(&mut batch, format_args!("link add {lan} type bridge mcast_snooping 0"));
        line(&mut batch, format_args!("link set {lan} up"));
    }
    let mut subnets = std::collections::BTreeSet::new();
    for (index, (node, net)) in spec.nodes.iter().zip(nodes).enumerate() {
        for (lan, device, addresses) in [("lan0", "eth0", &node.eth0), ("lan1", "eth1", &node.eth1)] {
            if addresses.is_empty() {
                continue;
            }
            let port = format!("{lan}-{index}");
            let path = net.path();
            line(&mut batch, format_args!("link add {port} type veth peer name {device} netns {path}"));
            line(&mut batch, format_args!("link set {port} master {lan} up"));
            subnets.extend(addresses.iter().map(|&address| (lan, hub_address(address))));
        }
    }
    for &(lan, own) in &subnets {
        line(&mut batch, format_args!("address add {own}/{} dev {lan}{}", subnet_length(own), nodad(own)));
    }
    for node in &spec.nodes {
        route_pod_cidrs(&mut batch, node);
    }
    batch
}

/// Node `own` (an index): its devices, the default route, the pod prefixes of the other nodes.
pub(super) fn node(spec: &LabSpec, own: usize) -> String {
    let mut batch = String::from("link set lo up\n");
    let node = &spec.nodes[own];
    for (device, addresses) in [("eth0", &node.eth0), ("eth1", &node.eth1)] {
        for &address in addresses {
            let length = subnet_length(address);
            line(&mut batch, format_args!("address add {address}/{length} dev {device}{}", nodad(address)));
        }
        if !addresses.is_empty() {
            line(&mut batch, format_args!("link set {device} up"));
        }
    }
    for &primary in primaries(node).iter() {
        let hub = hub_address(primary);
        line(&mut batch, format_args!("route add {} via {hub} src {primary}", everything(primary)));
    }
    for (index, other) in spec.nodes.iter().enumerate() {
        if index != own {
            route_pod_cidrs(&mut batch, other);
        }
    }
    batch
}

/// The router's side of a pod or client: a veth whose peer is `eth0` of `leaf`, and the host routes. `sources` are
/// the router's own addresses to be used towards it.
pub(super) fn leaf_port(device: &str, spec: &LeafSpec, leaf: &Netns, sources: &[IpAddr]) -> String {
    let path = leaf.path();
    let mut batch = format!(
        "link add {device} address {GATEWAY_MAC} type veth peer name eth0 netns {path}\nlink set {device} up\n"
    );
    for &address in &spec.addresses {
        let source = sources.iter().find(|source| source.is_ipv4() == address.is_ipv4());
        let source = source.map(|source| format!(" src {source}")).unwrap_or_default();
        line(&mut batch, format_args!("route add {}{source} dev {device}", host_prefix(address)));
    }
    batch
}

/// The leaf's own side.
pub(super) fn leaf(spec: &LeafSpec) -> String {
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    for &address in &spec.addresses {
        line(&mut batch, format_args!("address add {} dev eth0{}", host_prefix(address), nodad(address)));
    }
    for (is_v4, gateway) in [(true, "169.254.1.1"), (false, "fe80::1")] {
        if let Some(&address) = spec.addresses.iter().find(|address| address.is_ipv4() == is_v4) {
            line(
                &mut batch,
                format_args!("neighbour add {gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent"),
            );
            let onlink = if is_v4 { " onlink" } else { "" };
            let all = everything(address);
            line(&mut batch, format_args!("route add {all} via {gateway} dev eth0 src {address}{onlink}"));
        }
    }
    batch
}

/// Hub: what a client's device brings and the main table has no route for follows [`outside_via`].
pub(super) fn client_rule(device: &str) -> String {
    let rule = format!("rule add pref 40000 iif {device} lookup {CLIENT_TABLE}");
    format!("{rule}\n-6 {rule}\n")
}

/// Hub: clients' traffic to Service addresses goes to `node`.
pub(super) fn outside_via(node: &NodeSpec) -> String {
    let mut batch = String::new();
    for &primary in primaries(node).iter() {
        let all = everything(primary);
        line(&mut batch, format_args!("route replace {all} via {primary} table {CLIENT_TABLE}"));
    }
    batch
}

/// Routes to a pod whose addresses lie outside of its node's prefixes, for the hub and the other nodes; empty if there
/// is nothing to be said.
pub(super) fn stray_pod(verb: &str, node: &NodeSpec, pod: &LeafSpec) -> Result<String> {
    let mut batch = String::new();
    for &address in &pod.addresses {
        let mut covered = false;
        for cidr in &node.pod_cidrs {
            covered |= covers(cidr, address)?;
        }
        if let (false, Some(via)) = (covered, node.primary(address)) {
            line(&mut batch, format_args!("route {verb} {} via {via}", host_prefix(address)));
        }
    }
    Ok(batch)
}

/// The primary addresses of a node, one per family.
pub(super) fn primaries(node: &NodeSpec) -> Vec<IpAddr> {
    let first = |is_v4| node.eth0.iter().copied().find(|address| address.is_ipv4() == is_v4);
    [first(true), first(false)].into_iter().flatten().collect()
}

fn route_pod_cidrs(batch: &mut String, node: &NodeSpec) {
    for cidr in &node.pod_cidrs {
        let is_v4 = !cidr.contains(':');
        if let Some(via) = node.eth0.iter().find(|address| address.is_ipv4() == is_v4) {
            line(batch, format_args!("route add {cidr} via {via}"));
        }
    }
}

fn host_prefix(address: IpAddr) -> String {
    format!("{address}/{}", host_length(address))
}

/// The default route of the family of `address`, in a form that says which.
fn everything(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" }
}

fn nodad(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "" } else { " nodad" }
}

fn line(batch: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(batch, "{text}");
}
