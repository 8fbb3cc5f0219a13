//! The lab's networks of other shapes, and the rules that they may have: pods, nodes and clients reach each other as
//! such a network allows, without any proxy.

use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_tests::lab::network::{Network, NodeLinks, PodLinks, Rules};
use proxy_tests::lab::{Lab, LabSpec, Place, Proto};

/// Checks that `client` reaches `server` at `target` and is seen as `seen`.
#[track_caller]
fn reaches(client: &Place, target: &str, server: &str, seen: &str) -> Result<()> {
    for proto in [Proto::Tcp, Proto::Udp] {
        let attempt = client.connect(target).proto(proto).one()?;
        assert_eq!(attempt.server.as_deref(), Some(server), "{} to {target}: {attempt:?}", client.name());
        let peer = attempt.peer.context("no peer")?.ip().to_string();
        assert_eq!(peer, seen, "{} to {target} by {proto:?}", client.name());
    }
    Ok(())
}

/// Checks that there is no answer, or that a kernel knows no route.
fn does_not_reach(client: &Place, target: &str) -> Result<()> {
    let attempt = client.connect(target).timeout(Duration::from_millis(300)).one()?;
    let error = attempt.error.as_deref().unwrap_or("answered");
    assert!(matches!(error, "ETIMEDOUT" | "ENETUNREACH"), "{} to {target}: {error}", client.name());
    Ok(())
}

fn lab(network: Network) -> Result<Lab> {
    let lab = Lab::build(LabSpec::cases()?.network(network))?;
    for pod in ["L1", "V1", "V2", "R1", "P", "Q"] {
        lab.pod(pod).serve().tcp(8080).udp(8080).start()?;
    }
    for client in ["X", "Y"] {
        lab.client(client).serve().tcp(8080).udp(8080).start()?;
    }
    Ok(lab)
}

/// Checks that pods reach pods of their own node and of another by their own addresses.
fn pods_reach_pods(lab: &Lab) -> Result<()> {
    let p = lab.pod("P");
    reaches(&p, "10.64.1.11:8080", "L1", "10.64.1.50")?;
    reaches(&p, "10.64.2.21:8080", "R1", "10.64.1.50")?;
    reaches(&p, "[fd00:64:0:1::11]:8080", "V1", "fd00:64:0:1::50")?;
    reaches(&p, "[fd00:64:0:2::21]:8080", "V2", "fd00:64:0:1::50")?;
    reaches(&lab.pod("Q"), "10.64.1.11:8080", "L1", "10.64.2.50")
}

#[test]
fn bridged_pods() -> Result<()> {
    let lab = lab(Network { pods: PodLinks::Bridged, ..Network::default() })?;
    pods_reach_pods(&lab)?;
    let n1 = lab.node("n1").host();
    reaches(n1, "10.64.1.11:8080", "L1", "10.64.1.1")?;
    reaches(n1, "10.64.2.21:8080", "R1", "192.0.2.10")?;
    reaches(n1, "[fd00:64:0:1::11]:8080", "V1", "fd00:64:0:1::1")?;
    reaches(&lab.client("X"), "10.64.1.11:8080", "L1", "203.0.113.7")?;
    lab.add_pod("n1", "late", &["10.64.1.77"])?.serve().tcp(8080).udp(8080).start()?;
    reaches(&lab.pod("P"), "10.64.1.77:8080", "late", "10.64.1.50")?;
    lab.remove_pod("late")
}

#[test]
fn an_overlay() -> Result<()> {
    for pods in [PodLinks::Routed, PodLinks::Bridged] {
        let lab = lab(Network { pods, nodes: NodeLinks::Vxlan, ..Network::default() })?;
        pods_reach_pods(&lab)?;
        let n1 = lab.node("n1").host();
        reaches(n1, "10.64.2.21:8080", "R1", "10.64.1.254")?;
        reaches(n1, "[fd00:64:0:2::21]:8080", "V2", "fd00:64:0:1::fe")?;
        // The network outside has no route to pods.
        does_not_reach(&lab.client("X"), "10.64.1.11:8080")?;
    }
    Ok(())
}

#[test]
fn masquerade_of_what_leaves_the_cluster() -> Result<()> {
    for nodes in [NodeLinks::Eth0, NodeLinks::Vxlan] {
        let rules = Rules { masquerade: true, ..Rules::default() };
        let lab = lab(Network { nodes, rules, ..Network::default() })?;
        pods_reach_pods(&lab)?;
        reaches(&lab.pod("P"), "203.0.113.7:8080", "X", "192.0.2.10")?;
        reaches(&lab.pod("P"), "[2001:db8:ff::7]:8080", "X", "2001:db8:1::10")?;
    }
    Ok(())
}

#[test]
fn nothing_is_forwarded_but_for_pods() -> Result<()> {
    for pods in [PodLinks::Routed, PodLinks::Bridged] {
        let lab = lab(Network {
            pods,
            rules: Rules { forward_drop: true, strict_rp_filter: true, ..Rules::default() },
            ..Network::default()
        })?;
        pods_reach_pods(&lab)?;
        reaches(&lab.client("X"), "10.64.1.11:8080", "L1", "203.0.113.7")?;
        reaches(&lab.pod("P"), "203.0.113.7:8080", "X", "10.64.1.50")?;
        // From outside to outside, through n1.
        does_not_reach(&lab.client("X"), "203.0.113.200:8080")?;
    }
    Ok(())
}

#[test]
fn a_filter_knows_who_may_reach_pods() -> Result<()> {
    for pods in [PodLinks::Routed, PodLinks::Bridged] {
        let rules = Rules::all(&["203.0.113.7", "2001:db8:ff::7"]);
        let lab = lab(Network { pods, rules, ..Network::default() })?;
        pods_reach_pods(&lab)?;
        reaches(&lab.client("X"), "10.64.1.11:8080", "L1", "203.0.113.7")?;
        reaches(&lab.client("X"), "[fd00:64:0:1::11]:8080", "V1", "2001:db8:ff::7")?;
        does_not_reach(&lab.client("Y"), "10.64.1.11:8080")?;
        does_not_reach(&lab.client("Y"), "10.64.2.21:8080")?;
    }
    Ok(())
}

#[test]
fn a_second_device() -> Result<()> {
    let mut spec = LabSpec::cases()?;
    for (node, number) in spec.nodes.iter_mut().zip([10, 20, 30]) {
        let addresses = [format!("198.51.100.{number}"), format!("2001:db8:2::{number}")];
        *node = node.clone().eth1(&[&addresses[0], &addresses[1]])?;
    }
    let rules = Rules { strict_rp_filter: true, ..Rules::default() };
    let lab = Lab::build(spec.network(Network { nodes: NodeLinks::Eth1, rules, ..Network::default() }))?;
    lab.through_eth1("Y", "n1")?;
    // An address that n1 forwards, so that the server sees which way the packet came.
    let elsewhere = lab.add_client("elsewhere", &["198.18.5.5"])?;
    for place in [&elsewhere, &lab.pod("R1")] {
        place.serve().tcp(8080).udp(8080).start()?;
    }
    reaches(&lab.pod("P"), "10.64.2.21:8080", "R1", "10.64.1.50")?;
    reaches(lab.node("n1").host(), "10.64.2.21:8080", "R1", "198.51.100.10")?;
    let received =
        |device: &str| -> Result<u64> { lab.node("n1").host().packets(device).map(|[received, _]| received) };
    for (client, address, device) in [("X", "203.0.113.7", "eth0"), ("Y", "203.0.113.200", "eth1")] {
        let client = lab.client(client);
        let before = received(device)?;
        client.connect("198.18.5.5:8080").times(50).run()?;
        reaches(&client, "198.18.5.5:8080", "elsewhere", address)?;
        assert!(received(device)? - before >= 100, "{address} does not come through {device}");
    }
    Ok(())
}

#[test]
fn sockets_of_unseen_pods_are_in_no_cgroup_of_their_node() -> Result<()> {
    let lab = Lab::build(LabSpec::cases()?.unseen("P"))?;
    assert!(!lab.pod("P").cgroup().starts_with(lab.node("n1").cgroup()));
    assert!(lab.pod("L1").cgroup().starts_with(lab.node("n1").cgroup()));
    Ok(())
}
