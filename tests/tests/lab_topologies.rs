//! A little of everything ([`proxy_tests::cases::smoke`]) on networks of other shapes than that of the cases, and beside
//! rules that others have put into the kernel. Each test runs with pods whose sockets are seen, and with pods whose
//! packets are.
//!
//! Bridged packets meet netfilter (`bridge-nf-call-iptables`), as on every node of a cluster: without it the kernel's
//! connection tracking sees one direction only of what two pods of one bridge say to each other.

mod live;

use anyhow::{Context as _, Result};
use live::Pods;
use proxy_tests::cases::{at_the_node, not_allowed, smoke};
use proxy_tests::lab::network::{Network, NodeLinks, PodLinks, Rules};
use proxy_tests::lab::{Lab, LabSpec, NodeSpec};

/// X by both families.
const X: [&str; 2] = ["203.0.113.7", "2001:db8:ff::7"];

/// The smoke cases on the nodes, pods and clients of the cases.
fn run(network: Network) -> Result<()> {
    run_on(LabSpec::cases()?.network(network), |_| Ok(()))
}

fn run_on(spec: LabSpec, prepare: impl Fn(&Lab) -> Result<()>) -> Result<()> {
    for pods in [Pods::Seen, Pods::Unseen] {
        live::check(smoke(), spec.clone(), pods, &prepare).with_context(|| format!("pods are {pods:?}"))?;
    }
    if spec.network.rules.allowed_to_pods.is_some() {
        live::check(not_allowed(), spec, Pods::Seen, &prepare).context("the filter")?;
    }
    Ok(())
}

/// Each node has one address, which is a Service's.
#[test]
fn services_at_the_address_of_the_node() -> Result<()> {
    for pods in [Pods::Seen, Pods::Unseen] {
        live::check(at_the_node(), LabSpec::cases()?, pods, |_| Ok(()))
            .with_context(|| format!("pods are {pods:?}"))?;
    }
    Ok(())
}

fn with(rules: Rules) -> Network {
    Network { rules, ..Network::default() }
}

#[test]
fn routed_pods() -> Result<()> {
    run(Network::default())
}

#[test]
fn routed_pods_with_masquerade() -> Result<()> {
    run(with(Rules { masquerade: true, ..Rules::default() }))
}

#[test]
fn routed_pods_where_little_is_forwarded() -> Result<()> {
    run(with(Rules { forward_drop: true, ..Rules::default() }))
}

#[test]
fn routed_pods_with_strict_rp_filter() -> Result<()> {
    run(with(Rules { strict_rp_filter: true, ..Rules::default() }))
}

#[test]
fn routed_pods_with_a_filter_before_them() -> Result<()> {
    let allowed_to_pods = Some(X.map(str::to_owned).to_vec());
    run(with(Rules { allowed_to_pods, ..Rules::default() }))
}

#[test]
fn routed_pods_with_everything() -> Result<()> {
    run(with(Rules::all(&X)))
}

fn bridged(rules: Rules) -> Network {
    Network { pods: PodLinks::Bridged, rules, ..Network::default() }
}

#[test]
fn bridged_pods() -> Result<()> {
    run(bridged(Rules::default()))
}

#[test]
fn bridged_pods_with_everything() -> Result<()> {
    run(bridged(Rules::all(&X)))
}

fn overlay(pods: PodLinks, rules: Rules) -> Network {
    Network { pods, nodes: NodeLinks::Vxlan, rules }
}

#[test]
fn an_overlay_between_nodes() -> Result<()> {
    run(overlay(PodLinks::Routed, Rules::default()))
}

#[test]
fn an_overlay_between_nodes_with_everything() -> Result<()> {
    run(overlay(PodLinks::Routed, Rules::all(&X)))
}

/// As flannel makes it.
#[test]
fn an_overlay_between_bridges_with_everything() -> Result<()> {
    run(overlay(PodLinks::Bridged, Rules::all(&X)))
}

/// n1 to n3 have a second device each, by which nodes reach each other's pods.
fn two_devices(rules: Rules) -> Result<LabSpec> {
    let mut spec = LabSpec::cases()?;
    for (node, number) in spec.nodes.iter_mut().zip([10, 20, 30]) {
        let addresses = [format!("198.51.100.{number}"), format!("2001:db8:2::{number}")];
        *node = NodeSpec::clone(node).eth1(&[&addresses[0], &addresses[1]])?;
    }
    Ok(spec.network(Network { nodes: NodeLinks::Eth1, rules, ..Network::default() }))
}

#[test]
fn two_devices_and_a_client_through_the_first() -> Result<()> {
    run_on(two_devices(Rules::default())?, |_| Ok(()))?;
    run_on(two_devices(Rules::all(&X))?, |_| Ok(()))
}

#[test]
fn two_devices_and_a_client_through_the_second() -> Result<()> {
    let through = |lab: &Lab| lab.through_eth1("X", "n1");
    run_on(two_devices(Rules::default())?, through)?;
    run_on(two_devices(Rules::all(&X))?, through)
}

/// Pods of other nodes are by `eth0`; the client's requests come by `eth1`.
#[test]
fn a_client_through_a_device_that_nobody_else_uses() -> Result<()> {
    run_on(LabSpec::cases()?, |lab| lab.through_eth1("X", "n1"))
}
