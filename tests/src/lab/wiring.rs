//! Devices, addresses and routes of a lab, as `ip -batch` lines.
//!
//! ```text
//!  client --veth-- hub (router) --bridge lan0-- eth0 node --veth-- eth0 pod
//!                               --bridge lan1-- eth1
//! ```
//! Pods and clients hold single addresses (/32, /128), as with most routed CNIs: their router has a host route to them,
//! and they reach everything by a gateway address that exists only as a permanent neighbour entry. Nodes route each
//! other's pod prefixes directly. ([`super::network`] has other networks.) The hub has no default route for nodes: a
//! packet to an address that nobody serves, which a node forwards, is answered with "network unreachable". So a test
//! can tell it from a packet that was dropped (over TCP after about a second: the kernel heeds the message at the first
//! retransmission).
//!
//! Packets of a client go to a node, unless their destination is a node or a pod. That includes addresses of other
//! clients: a client may have an address that is also a Service's, and the path to it still goes through the node.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context as _, Result};

use super::netns::Netns;
use super::network::{BRIDGE, Network, NodeLinks, OVERLAY, PodLinks, gateway, parse_cidr, tunnel_address};
use super::spec::{LabSpec, LeafSpec, NodeSpec, covers, host_length, hub_address, subnet, subnet_length};

/// MAC address of the router's end of every veth to a pod or a client.
const GATEWAY_MAC: &str = "02:00:00:00:00:01";
/// Routing table of the hub for packets that come from clients and are neither for nodes nor for pods.
const CLIENT_TABLE: u32 = 10;
/// Routing table of the hub for packets of clients that come through the second device of a node.
const SECOND_TABLE: u32 = 11;
/// MTU inside VXLAN, out of 1500 bytes.
const OVERLAY_MTU: u32 = 1450;

/// Returns the lines for the hub: bridges, their addresses, a port for each node device (whose peer appears in
/// `nodes[i]`), pod prefixes.
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
    let mut direct: Vec<String> = subnets.iter().map(|&(_, own)| subnet(own)).collect();
    for node in &spec.nodes {
        if spec.network.nodes != NodeLinks::Vxlan {
            route_pod_cidrs(&mut batch, node, &node.eth0);
        }
        direct.extend(node.pod_cidrs.iter().cloned());
    }
    for lan in ["lan0", "lan1"] {
        // Packets that come back from a node have passed it already.
        line(&mut batch, format_args!("rule add pref 50 iif {lan} lookup main"));
        line(&mut batch, format_args!("-6 rule add pref 50 iif {lan} lookup main"));
    }
    for table in [CLIENT_TABLE, SECOND_TABLE] {
        for prefix in &direct {
            line(&mut batch, format_args!("route add throw {prefix} table {table}"));
        }
    }
    batch
}

/// Returns the lines for node `own` (an index): its devices, the default route, the pod prefixes of the other nodes.
pub(super) fn node(spec: &LabSpec, own: usize) -> Result<String> {
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
    let others = spec.nodes.iter().enumerate().filter(|&(index, _)| index != own);
    match spec.network.nodes {
        NodeLinks::Eth0 => others.for_each(|(_, other)| route_pod_cidrs(&mut batch, other, &other.eth0)),
        NodeLinks::Eth1 => others.for_each(|(_, other)| route_pod_cidrs(&mut batch, other, &other.eth1)),
        NodeLinks::Vxlan => overlay(&mut batch, spec, own)?,
    }
    if spec.network.pods == PodLinks::Bridged {
        line(&mut batch, format_args!("link add {BRIDGE} type bridge mcast_snooping 0"));
        line(&mut batch, format_args!("link set {BRIDGE} up"));
        for cidr in &node.pod_cidrs {
            let (address, (_, length)) = (gateway(cidr)?, parse_cidr(cidr)?);
            line(&mut batch, format_args!("address add {address}/{length} dev {BRIDGE}{}", nodad(address)));
        }
    }
    Ok(batch)
}

/// Adds the lines for the VXLAN device of node `own`, and for the routes to other nodes' pods through it.
fn overlay(batch: &mut String, spec: &LabSpec, own: usize) -> Result<()> {
    let node = &spec.nodes[own];
    let local = node.eth0.iter().find(|address| address.is_ipv4()).context("VXLAN needs IPv4 on eth0")?;
    let mac = tunnel_mac(own);
    line(
        batch,
        format_args!(
            "link add {OVERLAY} address {mac} type vxlan id 1 dev eth0 local {local} dstport 4789 nolearning"
        ),
    );
    line(batch, format_args!("link set {OVERLAY} up"));
    for cidr in &node.pod_cidrs {
        let address = tunnel_address(cidr)?;
        line(batch, format_args!("address add {} dev {OVERLAY}{}", host_prefix(address), nodad(address)));
    }
    for (index, other) in spec.nodes.iter().enumerate().filter(|&(index, _)| index != own) {
        let mac = tunnel_mac(index);
        for cidr in &other.pod_cidrs {
            let far = tunnel_address(cidr)?;
            line(batch, format_args!("neighbour add {far} lladdr {mac} dev {OVERLAY} nud permanent"));
            line(batch, format_args!("route add {cidr} via {far} dev {OVERLAY} onlink"));
        }
    }
    Ok(())
}

/// Returns the lines for node `own` with the other ends of its VXLAN device, for `bridge -batch`.
pub(super) fn overlay_peers(spec: &LabSpec, own: usize) -> String {
    let mut batch = String::new();
    if spec.network.nodes == NodeLinks::Vxlan {
        for (index, other) in spec.nodes.iter().enumerate().filter(|&(index, _)| index != own) {
            for address in other.eth0.iter().filter(|address| address.is_ipv4()).take(1) {
                let mac = tunnel_mac(index);
                line(&mut batch, format_args!("fdb append {mac} dev {OVERLAY} dst {address}"));
            }
        }
    }
    batch
}

fn tunnel_mac(index: usize) -> String {
    format!("02:00:00:00:02:{index:02x}")
}

/// Returns the lines for a node's side of a pod: as [`leaf_port`], or a port of its bridge.
pub(super) fn pod_port(
    network: &Network,
    node: &NodeSpec,
    device: &str,
    pod: &LeafSpec,
    leaf: &Netns,
) -> String {
    let mut batch = match network.pods {
        PodLinks::Routed => leaf_port(device, pod, leaf, &primaries(node)),
        PodLinks::Bridged => format!(
            "link add {device} type veth peer name eth0 netns {}\nlink set {device} master {BRIDGE} up\n",
            leaf.path()
        ),
    };
    if network.nodes == NodeLinks::Vxlan {
        line(&mut batch, format_args!("link set {device} mtu {OVERLAY_MTU}"));
    }
    batch
}

/// Returns the lines for a pod's own side.
pub(super) fn pod(network: &Network, node: &NodeSpec, pod: &LeafSpec) -> Result<String> {
    let mut batch = match network.pods {
        PodLinks::Routed => leaf(pod),
        PodLinks::Bridged => bridged_leaf(node, pod)?,
    };
    if network.nodes == NodeLinks::Vxlan {
        line(&mut batch, format_args!("link set eth0 mtu {OVERLAY_MTU}"));
    }
    Ok(batch)
}

fn bridged_leaf(node: &NodeSpec, pod: &LeafSpec) -> Result<String> {
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    for &address in &pod.addresses {
        let mut own = None;
        for cidr in &node.pod_cidrs {
            if covers(cidr, address)? {
                own = Some(cidr);
            }
        }
        let cidr = own.with_context(|| format!("{address} is in no pod prefix of {}", node.name))?;
        let (_, length) = parse_cidr(cidr)?;
        line(&mut batch, format_args!("address add {address}/{length} dev eth0{}", nodad(address)));
        line(&mut batch, format_args!("route add {} via {}", everything(address), gateway(cidr)?));
    }
    Ok(batch)
}

/// Returns the lines for the router's side of a pod or client: a veth whose peer is `eth0` of `leaf`, and the host
/// routes. `sources` are the router's own addresses to be used towards it.
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

/// Returns the lines for the leaf's own side.
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

/// Returns the line for the hub that routes packets from a client's device by [`outside_via`].
pub(super) fn client_rule(device: &str) -> String {
    let rule = format!("rule add pref 200 iif {device} lookup {CLIENT_TABLE}");
    format!("{rule}\n-6 {rule}\n")
}

/// Returns the lines for the hub that route clients' traffic to Service addresses to `node`.
pub(super) fn outside_via(node: &NodeSpec) -> String {
    let mut batch = String::new();
    for (addresses, table) in [(&node.eth0, CLIENT_TABLE), (&node.eth1, SECOND_TABLE)] {
        for address in firsts(addresses) {
            let all = everything(address);
            line(&mut batch, format_args!("route replace {all} via {address} table {table}"));
        }
    }
    // The node's own addresses, too: the node would drop packets to them on the other path.
    for second in firsts(&node.eth1) {
        for first in node.eth0.iter().filter(|first| first.is_ipv4() == second.is_ipv4()) {
            let prefix = host_prefix(*first);
            line(&mut batch, format_args!("route replace {prefix} via {second} table {SECOND_TABLE}"));
        }
    }
    batch
}

/// Returns the lines for the hub that route this client's traffic to Service addresses and to its node through the
/// node's `eth1`.
pub(super) fn second_rule(client: &[IpAddr]) -> String {
    let mut batch = String::new();
    for &address in client {
        let option = if address.is_ipv4() { "" } else { "-6 " };
        line(&mut batch, format_args!("{option}rule add pref 100 from {address} lookup {SECOND_TABLE}"));
    }
    batch
}

/// Returns the lines for a node with the way back to such a client.
pub(super) fn second_way_back(node: &NodeSpec, client: &[IpAddr]) -> String {
    let mut batch = String::new();
    for &address in client {
        for own in firsts(&node.eth1).into_iter().filter(|own| own.is_ipv4() == address.is_ipv4()) {
            let hub = hub_address(own);
            line(&mut batch, format_args!("route add {} via {hub} src {own}", host_prefix(address)));
        }
    }
    batch
}

/// Returns routes to a pod whose addresses lie outside its node's prefixes, for the hub and the other nodes; empty if
/// no address does.
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

/// Returns further lines for the hub, with those of [`stray_pod`], by which clients reach such a pod.
pub(super) fn stray_pod_for_clients(stray: &str) -> String {
    let mut batch = String::new();
    for text in stray.lines() {
        if let [route, verb, prefix, ..] = text.split(' ').collect::<Vec<_>>()[..] {
            for table in [CLIENT_TABLE, SECOND_TABLE] {
                line(&mut batch, format_args!("{route} {verb} throw {prefix} table {table}"));
            }
        }
    }
    batch
}

/// Returns the primary addresses of a node, one per family.
fn primaries(node: &NodeSpec) -> Vec<IpAddr> {
    firsts(&node.eth0)
}

/// Returns the first address of each family.
fn firsts(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let families = [true, false].into_iter();
    families
        .filter_map(|is_v4| addresses.iter().copied().find(|address| address.is_ipv4() == is_v4))
        .collect()
}

fn route_pod_cidrs(batch: &mut String, node: &NodeSpec, vias: &[IpAddr]) {
    for cidr in &node.pod_cidrs {
        let is_v4 = !cidr.contains(':');
        if let Some(via) = vias.iter().find(|address| address.is_ipv4() == is_v4) {
            line(batch, format_args!("route add {cidr} via {via}"));
        }
    }
}

fn host_prefix(address: IpAddr) -> String {
    format!("{address}/{}", host_length(address))
}

/// Returns the default route of the family of `address`, in a form that names the family.
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
