//! Other users of the node: nftables rules that translate, and pods that opt out of the translation of their sockets.

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Place, Proto};
use serde_json::json;

use super::checks::{Answer, served};
use super::objects::{HERE, THERE, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::world::{ELSEWHERE, N1, NODE, ON_THIS_NODE, P, World, X, until};

pub(super) const ROWS: &[Row] =
    &[Row { id: "k061_nftables_dnat", check: nftables }, Row { id: "k062_opt_out", check: opt_out }];

/// Rules for a port of the node and an address that belong to nftables, with connection tracking that drops invalid
/// packets, as on most nodes.
const RULES: &str = "table inet rows {
    chain to { type nat hook prerouting priority dstnat; policy accept;
        ip daddr 192.0.2.10 tcp dport 29999 dnat ip to 10.64.1.11:8080
        ip daddr 198.18.7.7 tcp dport 80 dnat ip to 10.64.2.21:8080
    }
    chain from { type nat hook postrouting priority srcnat; policy accept;
        ct status dnat ip daddr 10.64.2.21 masquerade
    }
    chain through { type filter hook forward priority filter; policy accept;
        ct state invalid drop
    }
}";

fn nftables(world: &World) -> Result<Outcome> {
    world.host().net().nft(RULES)?;
    let checked = beside_rules(world);
    world.host().net().nft("delete table inet rows")?;
    checked?;
    right("DNAT of a port and an address beside nodePorts and clusterIPs")
}

fn beside_rules(world: &World) -> Result<()> {
    let client = world.lab().client("X");
    for (target, backend, seen) in [("192.0.2.10:29999", HERE, &X), ("198.18.7.7:80", THERE, &N1)] {
        served(&client, Proto::Tcp, target, Answer::from(backend, seen)).context("by nftables")?;
    }
    for way in [Proto::Tcp, Proto::Udp] {
        served(&client, way, &node_port(ON_THIS_NODE.number, false, 80), Answer::from(HERE, &X))?;
        served(&client, way, &node_port(ELSEWHERE.number, false, 80), Answer::from(THERE, &N1))?;
        served(&world.pod("P"), way, &cluster_ip(ELSEWHERE.number, false, 80), Answer::from(THERE, &P))?;
    }
    Ok(())
}

const UID: &str = "3f2b7c1e-0001-4a5b-8c9d-000000000001";

/// Checks the pod P from a cgroup that has opted out and from its own: only connections of the first are translated as
/// packets.
fn opt_out(world: &World) -> Result<Outcome> {
    let pod = world.lab().pod("P");
    let inside = pod.in_cgroup(&format!("kubepods/burstable/pod{UID}/0123abcd"))?;
    world.write(
        "pods",
        &[json!({
            "apiVersion": "v1", "kind": "Pod", "spec": { "nodeName": NODE }, "status": { "phase": "Running" },
            "metadata": {
                "namespace": "k", "name": "p", "uid": UID, "annotations": { "vipr.dev/socket-edge": "off" },
            },
        })],
    )?;
    wait_opted_out(world, &["k/p"])?;
    let vip = cluster_ip(ON_THIS_NODE.number, false, 80);
    in_packets(world, &inside, &vip, true).context("opted out")?;
    in_packets(world, &pod, &vip, false).context("beside it")?;
    world.write("pods", &[])?;
    wait_opted_out(world, &[])?;
    in_packets(world, &inside, &vip, false).context("back again")?;
    right("its packets are translated, by TCP and UDP; back again, its sockets")
}

fn wait_opted_out(world: &World, pods: &[&str]) -> Result<()> {
    until("the pods that have opted out", || {
        Ok((world.tool("status")?["agent"]["opted_out"] == json!(pods)).then_some(()))
    })
}

fn in_packets(world: &World, place: &Place, vip: &str, want: bool) -> Result<()> {
    for way in [Proto::Tcp, Proto::Udp] {
        let attempt = served(place, way, vip, Answer::from(HERE, &P))?;
        let client = attempt.peer.context("no client")?.to_string();
        ensure!(world.has_flow(&client, vip)? == want, "{way:?} as packets: not {want}");
    }
    Ok(())
}
