//! Hosts and clusters with very many addresses and ServiceCIDRs.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::Proto;
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::world::{HERE, Service, World, served};

/// Number of addresses, as many as kube-proxy gives a node in its IPVS mode: one for each Service of a large cluster.
const ADDRESSES: u32 = 10_000;
const SERVICE_CIDRS: u32 = 300;

/// Checks that a Service created now is served.
fn a_change_arrives(world: &World, service: Service) -> Result<()> {
    world.write(service.name, &service.objects())?;
    let victim = world.victim();
    until(service.name, || Ok(served(&victim, Proto::Tcp, service.cluster_ip(false)?).ok()))?;
    let status = world.agent().tool("status", &[])?;
    let problems = status["agent"]["problems"].as_object().context("status tells problems")?;
    ensure!(problems.is_empty(), "{problems:?}");
    Ok(())
}

#[test]
fn h012_ten_thousand_addresses_and_three_hundred_service_cidrs() -> Result<()> {
    let world = World::start()?;
    let mut batch = String::new();
    for number in 0..ADDRESSES {
        let [.., high, low] = number.to_be_bytes();
        writeln!(batch, "address add 172.20.{high}.{low}/32 dev lo")?;
    }
    let file = world.dir().join("addresses");
    fs::write(&file, batch)?;
    let mut ip = world.host().command("ip");
    ip.arg("-batch").arg(&file);
    ip.text()?;
    let cidrs: Vec<Value> = (0..SERVICE_CIDRS)
        .map(|number| {
            let cidr = format!("10.{}.{}.0/24", 200 + number / 256, number % 256);
            json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
                "metadata": { "name": format!("cidr-{number}") }, "spec": { "cidrs": [cidr] },
            })
        })
        .collect();
    world.write("cidrs", &cidrs)?;
    a_change_arrives(&world, HERE.named("late", 11))?;
    // A new agent that finds all of this.
    world.agent().kill9()?;
    world.agent().start_ready()?;
    a_change_arrives(&world, HERE.named("later", 12))
}
