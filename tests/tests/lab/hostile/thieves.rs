//! Services that claim addresses and ports of others: nodePorts, and ports of the node's own processes.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::Proto;
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::world::{HERE, NODE, World, served};

/// Port of a kubelet.
const KUBELET: u16 = 10_250;

/// Returns a Service that claims these addresses at a port, is older than all others, and has no endpoints.
fn thief(name: &str, number: u16, port: u16, load_balancer: bool) -> Value {
    let (v4, v6) = (format!("10.96.0.{number}"), format!("fd00:96::{number}"));
    let ingress: Vec<Value> = NODE.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "h", "name": name, "creationTimestamp": "2001-01-01T00:00:00Z" },
        "spec": {
            "type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": v4, "clusterIPs": [v4, v6],
            "ports": [{ "name": "tcp", "protocol": "TCP", "port": port }],
            "externalIPs": if load_balancer { json!([]) } else { json!(NODE) },
        },
        "status": { "loadBalancer": { "ingress": if load_balancer { json!(ingress) } else { json!([]) } } },
    })
}

fn at_node(v6: bool, port: u16) -> Result<SocketAddr> {
    let text = if v6 { format!("[{}]:{port}", NODE[1]) } else { format!("{}:{port}", NODE[0]) };
    text.parse().context(text)
}

/// Waits until `status` tells exactly `want` of a Service.
fn told(world: &World, service: &str, want: &[String]) -> Result<()> {
    let mut last = Vec::new();
    let found = until(service, || {
        last = world.problems(service)?;
        Ok((last == want).then_some(()))
    });
    found.with_context(|| format!("{last:?}"))
}

#[test]
fn h011_an_external_ip_takes_nobodys_node_port() -> Result<()> {
    let world = World::start()?;
    let number = HERE.node_port(false)?.port();
    world.write("thief", &[thief("thief", 21, number, false)])?;
    told(&world, "thief", &lost(number, "Service h/here has it as its nodePort"))?;
    for v6 in [false, true] {
        served(&world.client(), Proto::Tcp, HERE.node_port(v6)?)?;
        served(&world.victim(), Proto::Tcp, HERE.node_port(v6)?)?;
    }
    // An address given by a load balancer goes first, and the Service that loses it is told so.
    world.write("thief", &[thief("thief", 21, number, true)])?;
    told(&world, "here", &lost(number, "Service h/thief has it as its load-balancer address"))?;
    world.write("thief", &[])?;
    told(&world, "here", &[])?;
    served(&world.client(), Proto::Tcp, HERE.node_port(false)?)
}

fn lost(port: u16, why: &str) -> [String; 2] {
    [NODE[0].to_owned(), format!("[{}]", NODE[1])].map(|ip| format!("{ip}:{port}/TCP is not served: {why}"))
}

#[test]
fn h011_ports_of_the_host_are_the_hosts_where_that_is_asked_for() -> Result<()> {
    for protected in [false, true] {
        let flags = [("protect-node-addresses", "true")];
        let world = World::start_with(if protected { &flags } else { &[] })?;
        world.host().serve().tcp(KUBELET).start()?;
        for (number, load_balancer) in [(21, false), (22, true)] {
            let name = format!("thief-{number}");
            world.write(&name, &[thief(&name, number, KUBELET, load_balancer)])?;
            // The Service is programmed when its clusterIP is shown.
            let cluster_ip = format!("10.96.0.{number}:{KUBELET}");
            until("the thief is programmed", || {
                let services = world.agent().tool("services", &[])?.to_string();
                Ok(services.contains(&cluster_ip).then_some(()))
            })?;
            for v6 in [false, true] {
                let attempt = served(&world.client(), Proto::Tcp, at_node(v6, KUBELET)?);
                ensure!(attempt.is_ok() == protected, "{name}, protected: {protected}: {attempt:?}");
            }
            if protected {
                let field = if load_balancer { "status.loadBalancer.ingress" } else { "spec.externalIPs" };
                let why = "it is an address of this node (--protect-node-addresses)";
                told(&world, &name, &NODE.map(|ip| format!("{field}: {ip} is not served: {why}")))?;
            }
            world.write(&name, &[])?;
        }
    }
    Ok(())
}
