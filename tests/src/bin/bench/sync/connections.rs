//! Changes as clients notice them: from the end of the write to the API server to the first connection that reflects
//! it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::lab::{Lab, Node};
use serde_json::{Value, json};

/// Time limit for a change.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two changes.
const PAUSE: Duration = Duration::from_millis(2);
/// Pause between two attempts of a client, so that it does not take the CPU that the API server runs on.
const PACE: Duration = Duration::from_millis(1);
/// Pods of the node that are the two endpoints.
const PODS: [(&str, &str); 2] = [("front-0", "10.64.1.200"), ("front-1", "10.64.1.201")];
/// First bytes of the clusterIPs here: they follow all clusterIPs of the worlds.
const FIRST_VIP: [u8; 3] = [10, 111, 200];

/// Makes the pods, and the ServiceCIDR, which lets the agent refuse connections to clusterIPs without a Service at
/// once.
///
/// # Errors
/// If the lab cannot add them.
pub(super) fn prepare(lab: &Lab, node: &Node, api: &ApiServer) -> Result<()> {
    for (name, address) in PODS {
        lab.add_pod(node.name(), name, &[address])?.serve().tcp(8080).start()?;
    }
    api.apply(json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" }, "spec": { "cidrs": ["10.96.0.0/12"] },
    }))?;
    Ok(())
}

/// Moves a Service from one pod to the other and back; returns the time until a client of the node, which connects once
/// a millisecond, reached the other pod, for each move.
///
/// # Errors
/// If a move is not noticed.
pub(super) fn moved_endpoints(node: &Node, api: &ApiServer, count: usize) -> Result<Vec<Duration>> {
    api.apply(service(0))?;
    api.apply(slice(0, 0))?;
    let mut took = Vec::with_capacity(count);
    let mut client = node.host().connect(target(0)).pace(PACE).start()?;
    let mut first_of = |pod: usize, since: Instant| loop {
        client.wait_for(1)?;
        if client.so_far()?.last().is_some_and(|attempt| attempt.server.as_deref() == Some(PODS[pod].0)) {
            return anyhow::Ok(since.elapsed());
        }
        let last = client.so_far()?.last();
        ensure!(since.elapsed() < PATIENCE, "no connection to {}: {last:?}", PODS[pod].0);
    };
    first_of(0, Instant::now())?;
    for change in 1..=count {
        api.apply(slice(0, change % 2))?;
        took.push(first_of(change % 2, Instant::now())?);
        thread::sleep(PAUSE);
    }
    Ok(took)
}

/// Makes Services, each with a client on the node that already tries to connect; returns the time until the client
/// could connect, for each Service.
///
/// # Errors
/// If a Service does not start to work.
pub(super) fn new_services(node: &Node, api: &ApiServer, count: usize) -> Result<Vec<Duration>> {
    let mut took = Vec::with_capacity(count);
    for index in 1..=count {
        let mut client = node.host().connect(target(index)).pace(PACE).start()?;
        client.wait_for(1)?;
        ensure!(
            client.so_far()?.iter().all(|attempt| !attempt.ok),
            "there is something at {}",
            target(index)
        );
        api.apply(service(index))?;
        api.apply(slice(index, 0))?;
        let since = Instant::now();
        loop {
            client.wait_for(1)?;
            if client.so_far()?.last().context("an attempt")?.ok {
                break;
            }
            ensure!(since.elapsed() < PATIENCE, "no connection to {}", target(index));
        }
        took.push(since.elapsed());
        client.stop()?;
    }
    Ok(took)
}

fn vip(index: usize) -> String {
    let [a, b, c] = FIRST_VIP;
    format!("{a}.{b}.{c}.{}", index + 1)
}

fn target(index: usize) -> String {
    format!("{}:80", vip(index))
}

fn service(index: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "front", "name": format!("front-{index}") },
        "spec": {
            "clusterIP": vip(index), "clusterIPs": [vip(index)], "ipFamilies": ["IPv4"],
            "ports": [{ "protocol": "TCP", "port": 80 }],
        },
    })
}

fn slice(index: usize, pod: usize) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "front", "name": format!("front-{index}-0"),
            "labels": { "kubernetes.io/service-name": format!("front-{index}") },
        },
        "ports": [{ "name": "", "protocol": "TCP", "port": 8080 }],
        "endpoints": [{ "addresses": [PODS[pod].1], "conditions": { "ready": true } }],
    })
}
