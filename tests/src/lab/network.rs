//! The shapes of cluster networks: the connections of a lab's pods, and other rules on a node for their packets.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::addr::Prefix;

use super::spec::NodeSpec;

/// Name of the bridge of [`PodLinks::Bridged`] on each node.
pub const BRIDGE: &str = "cni0";
/// Name of the device of [`NodeLinks::Vxlan`] on each node.
pub const OVERLAY: &str = "vxlan0";

/// The network of a cluster, as a CNI would have made it.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// Connection of pods to their node.
    pub pods: PodLinks,
    /// Path from a node to the pods of other nodes.
    pub nodes: NodeLinks,
    /// Other rules of nodes for packets that they forward.
    pub rules: Rules,
}

/// Connection of pods to their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodLinks {
    /// A host route to each pod, and single addresses (/32, /128) in the pods.
    #[default]
    Routed,
    /// A bridge [`BRIDGE`] that has the first address of each pod prefix. Pods have addresses in the whole prefix, and
    /// reach each other without their node's IP stack. Bridged packets still pass netfilter
    /// (`bridge-nf-call-iptables`).
    Bridged,
}

/// Path from a node to the pods of other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeLinks {
    /// Routed through `eth0`. The network outside knows the pods, too.
    #[default]
    Eth0,
    /// Routed through `eth1`, which every node needs. The network outside knows the pods, too.
    Eth1,
    /// Through a VXLAN device [`OVERLAY`] over `eth0`. The network outside has no routes to pods.
    Vxlan,
}

/// Rules of nodes for packets that they forward, besides routing. All off by default.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Pods' packets that leave the cluster get the node's address, as with most CNIs.
    pub masquerade: bool,
    /// Only established traffic and traffic from or to pods is forwarded. Packets that connection tracking finds
    /// invalid are dropped.
    pub forward_drop: bool,
    /// `rp_filter` is 1: the route to a packet's source has to be through the device that the packet came from.
    pub strict_rp_filter: bool,
    /// New connections to pods are dropped at the pod's node unless they come from these prefixes, pods, or nodes.
    pub allowed_to_pods: Option<Vec<String>>,
}

impl Rules {
    /// Returns all of these rules; `allowed` is for [`Rules::allowed_to_pods`].
    pub fn all(allowed: &[&str]) -> Self {
        let allowed_to_pods = Some(allowed.iter().map(|&prefix| prefix.to_owned()).collect());
        Self { masquerade: true, forward_drop: true, strict_rp_filter: true, allowed_to_pods }
    }
}

impl Network {
    /// Returns addresses that a node has besides those of `eth0` and `eth1`.
    pub(super) fn node_addresses(&self, node: &NodeSpec) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for cidr in &node.pod_cidrs {
            if self.pods == PodLinks::Bridged {
                addresses.push(gateway(cidr)?);
            }
            if self.nodes == NodeLinks::Vxlan {
                addresses.push(tunnel_address(cidr)?);
            }
        }
        Ok(addresses)
    }

    /// Returns kernel parameters of a node, as paths below `/proc/sys`.
    pub(super) fn sysctls(&self) -> Vec<(&'static str, &'static str)> {
        let mut list = Vec::new();
        if self.rules.strict_rp_filter {
            list.push(("net/ipv4/conf/all/rp_filter", "1"));
        }
        if self.pods == PodLinks::Bridged {
            list.push(("net/bridge/bridge-nf-call-iptables", "1"));
            list.push(("net/bridge/bridge-nf-call-ip6tables", "1"));
        }
        list
    }

    /// Returns the rules of a node for `nft -f`; empty if there are none.
    pub(super) fn ruleset(&self, nodes: &[NodeSpec], own: &NodeSpec) -> String {
        let pods = Sets::of(nodes.iter().flat_map(|node| node.pod_cidrs.iter().cloned()));
        let local = Sets::of(own.pod_cidrs.iter().cloned());
        let mut chains = String::new();
        if self.rules.masquerade {
            chain(&mut chains, "from_pods", "nat hook postrouting priority srcnat; policy accept;");
            for (family, local, pods) in local.with(&pods) {
                line(
                    &mut chains,
                    format_args!("{family} saddr {local} {family} daddr != {pods} masquerade; "),
                );
            }
            chains.push_str("}\n");
        }
        if self.rules.forward_drop {
            chain(&mut chains, "forwarded", "filter hook forward priority filter; policy drop;");
            line(&mut chains, format_args!("ct state established,related accept; ct state invalid drop; "));
            for (family, pods) in pods.families() {
                line(
                    &mut chains,
                    format_args!("{family} saddr {pods} accept; {family} daddr {pods} accept; "),
                );
            }
            chains.push_str("}\n");
        }
        if let Some(allowed) = &self.rules.allowed_to_pods {
            let hosts = nodes.iter().flat_map(|node| {
                let beside = self.node_addresses(node).unwrap_or_default();
                node.eth0.iter().chain(&node.eth1).copied().chain(beside).map(|address| address.to_string())
            });
            let pods = nodes.iter().flat_map(|node| node.pod_cidrs.iter().cloned());
            let allowed = Sets::of(allowed.iter().cloned().chain(hosts).chain(pods));
            chain(&mut chains, "to_pods", "filter hook forward priority filter + 10; policy accept;");
            line(&mut chains, format_args!("ct state established,related accept; "));
            for (family, local, allowed) in local.with(&allowed) {
                line(&mut chains, format_args!("{family} daddr {local} {family} saddr != {allowed} drop; "));
            }
            chains.push_str("}\n");
        }
        if chains.is_empty() { chains } else { format!("table inet lab {{\n{chains}}}\n") }
    }
}

/// Returns the address of the bridge in a pod prefix: the first one.
pub(super) fn gateway(cidr: &str) -> Result<IpAddr> {
    numbered(cidr, 1)
}

/// Returns the address of a node's end of the overlay, in its pod prefix.
pub(super) fn tunnel_address(cidr: &str) -> Result<IpAddr> {
    numbered(cidr, 254)
}

/// Parses a prefix; returns its base address as written and its length.
pub(super) fn parse_cidr(cidr: &str) -> Result<(IpAddr, u8)> {
    prefix(cidr).with_context(|| format!("not a prefix: {cidr:?}"))
}

fn prefix(cidr: &str) -> Option<(IpAddr, u8)> {
    let (base, length) = cidr.split_once('/')?;
    let (base, length): (IpAddr, u8) = (base.parse().ok()?, length.parse().ok()?);
    Prefix::new(base.into(), length)?;
    Some((base, length))
}

fn numbered(cidr: &str, number: u8) -> Result<IpAddr> {
    Ok(match parse_cidr(cidr)?.0 {
        IpAddr::V4(base) => Ipv4Addr::from(u32::from(base) | u32::from(number)).into(),
        IpAddr::V6(base) => Ipv6Addr::from(u128::from(base) | u128::from(number)).into(),
    })
}

/// Prefixes of both families, as sets of nft.
struct Sets {
    v4: BTreeSet<String>,
    v6: BTreeSet<String>,
}

impl Sets {
    fn of(prefixes: impl Iterator<Item = String>) -> Self {
        let (v6, v4) = prefixes.partition(|prefix| prefix.contains(':'));
        Self { v4, v6 }
    }

    /// Returns each family with a prefix, by its name in nft, with the set of its prefixes.
    fn families(&self) -> impl Iterator<Item = (&'static str, String)> {
        let both = [("ip", &self.v4), ("ip6", &self.v6)];
        both.into_iter().filter(|(_, set)| !set.is_empty()).map(|(family, set)| {
            let list: Vec<&str> = set.iter().map(String::as_str).collect();
            (family, format!("{{ {} }}", list.join(", ")))
        })
    }

    /// Returns each family with a prefix in both.
    fn with(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        let others: Vec<_> = other.families().collect();
        self.families()
            .filter_map(|(family, set)| {
                let (_, other) = others.iter().find(|(known, _)| *known == family)?;
                Some((family, set, other.clone()))
            })
            .collect()
    }
}

fn chain(text: &mut String, name: &str, head: &str) {
    line(text, format_args!("chain {name} {{ type {head}"));
}

fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{words}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_places_for_bridge_and_tunnel() -> Result<()> {
        for (cidr, first, last) in
            [("10.64.1.0/24", "10.64.1.1", "10.64.1.254"), ("fd00:64::/64", "fd00:64::1", "fd00:64::fe")]
        {
            assert_eq!(gateway(cidr)?.to_string(), first);
            assert_eq!(tunnel_address(cidr)?.to_string(), last);
        }
        assert!(gateway("10.64.1.0").is_err());
        Ok(())
    }

    #[test]
    fn rules_name_only_families_that_a_node_has() -> Result<()> {
        let node = NodeSpec::new("n1", &["192.0.2.10"], &["10.64.1.0/24"])?;
        let network = Network { rules: Rules::all(&["203.0.113.7"]), ..Network::default() };
        let rules = network.ruleset(std::slice::from_ref(&node), &node);
        assert!(rules.contains(
            "ip daddr { 10.64.1.0/24 } ip saddr != { 10.64.1.0/24, 192.0.2.10, 203.0.113.7 } drop"
        ));
        assert!(!rules.contains("ip6"), "{rules}");
        assert_eq!(Network::default().ruleset(std::slice::from_ref(&node), &node), "");
        Ok(())
    }
}
