//! A client outside, which connects to the node's ports, externalIPs and load-balancer addresses.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::Proto;

use super::checks::{Answer, is_served, served};
use super::objects::{HERE, THERE, balancer, external_ip, node_port};
use super::row::{Outcome, Row, right};
use super::world::{ANSWER, BOTH, ELSEWHERE, LOCAL, N1, ON_THIS_NODE, STICKY, World, X};

/// Function that returns the address and port of a Service, for a family.
type Frontend = fn(u16, bool, u16) -> String;

pub(super) const ROWS: &[Row] = &[
    Row { id: "k030_node_port", check: |world| frontend(world, node_port) },
    Row { id: "k031_external_ip", check: |world| frontend(world, external_ip) },
    Row { id: "k032_load_balancer", check: |world| frontend(world, balancer) },
    Row { id: "k033_policy_cluster", check: policy_cluster },
    Row { id: "k034_policy_local", check: policy_local },
    Row { id: "k035_affinity_outside", check: affinity },
];

/// Checks that a pod of this node sees the client, and that a pod of another node sees the node's address: its reply
/// has to come back through this node.
fn frontend(world: &World, of: Frontend) -> Result<Outcome> {
    let client = world.lab().client("X");
    for v6 in [false, true] {
        for way in [Proto::Tcp, Proto::Udp] {
            served(&client, way, &of(ON_THIS_NODE.number, v6, 80), Answer::from(HERE, &X))?;
            served(&client, way, &of(ELSEWHERE.number, v6, 80), Answer::from(THERE, &N1))?;
        }
    }
    right("a pod here sees the client, one elsewhere the node")
}

fn policy_cluster(world: &World) -> Result<Outcome> {
    let client = world.lab().client("X");
    for v6 in [false, true] {
        let target = balancer(BOTH.number, v6, 80);
        let mut met = BTreeSet::new();
        for attempt in client.connect(&target).timeout(ANSWER).times(40).run()? {
            let (backend, seen) =
                if attempt.server.as_deref() == Some("L1") { (HERE, X) } else { (THERE, N1) };
            is_served(&target, &attempt, Proto::Tcp, Answer::from(backend, &seen))?;
            met.insert(backend.name);
        }
        ensure!(met.len() == 2, "all of 40 connections to {met:?}");
    }
    right("both pods are met, each with its source")
}

/// Checks that a client outside reaches only the pod of this node, which sees the client. A pod as a client may reach
/// either endpoint.
fn policy_local(world: &World) -> Result<Outcome> {
    let client = world.lab().client("X");
    for v6 in [false, true] {
        for target in [balancer(LOCAL.number, v6, 80), node_port(LOCAL.number, v6, 80)] {
            for attempt in client.connect(&target).timeout(ANSWER).times(10).run()? {
                is_served(&target, &attempt, Proto::Tcp, Answer::from(HERE, &X))?;
            }
        }
    }
    right("the pod of this node, which sees the client")
}

fn affinity(world: &World) -> Result<Outcome> {
    let client = world.lab().client("X");
    let mut all = Vec::new();
    for v6 in [false, true] {
        let target = node_port(STICKY.number, v6, 80);
        let attempts = client.connect(&target).timeout(ANSWER).times(20).run()?;
        let servers: BTreeSet<_> = attempts.iter().map(|attempt| attempt.server.clone()).collect();
        ensure!(servers.len() == 1, "does not stay: {servers:?}");
        all.push(servers.into_iter().flatten().next().context("not answered")?);
    }
    right(format!("20 connections each stay with {}", all.join(", ")))
}
