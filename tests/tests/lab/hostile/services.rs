//! Services as large as the API allows, and larger than anybody needs.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Place, Proto};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};

use super::world::{HEALTH_PORT, HERE, NODE, World, served};

/// Time that a kubelet gives a probe.
const PROBE: Duration = Duration::from_secs(1);
/// Number of ports of a Service of the largest size.
const PORTS: u16 = 16_000;
const MIB: u64 = 1 << 20;

/// Returns a Service of so many ports, from 1 on, at so many externalIPs, all served by the pod of [`HERE`].
fn large(name: &str, number: u8, ports: u16, external_ips: u32) -> [Value; 2] {
    let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (u32::from(number) << 10);
    let external_ips: Vec<String> =
        (first..first + external_ips).map(|address| Ipv4Addr::from(address).to_string()).collect();
    let cluster_ip = format!("10.96.0.{number}");
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "h", "name": name },
        "spec": {
            "type": "ClusterIP", "ipFamilies": ["IPv4"], "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ports": numbered(ports, None), "externalIPs": external_ips,
        },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "namespace": "h", "name": name, "labels": { "kubernetes.io/service-name": name } },
        "ports": numbered(ports, Some(8080)),
        "endpoints": [{ "addresses": ["10.64.1.11"], "nodeName": "n1", "conditions": { "ready": true } }],
    });
    [service, slice]
}

/// Returns ports named `p1`, `p2` and so on. Each has the target port `target`, or without it the number in its name.
pub(super) fn numbered(count: u16, target: Option<u16>) -> Vec<Value> {
    (1..=count).map(|number| port(&format!("p{number}"), target.unwrap_or(number))).collect()
}

fn port(name: &str, number: u16) -> Value {
    json!({ "name": name, "protocol": "TCP", "port": number })
}

/// Returns the peak of the agent's memory.
fn peak(world: &World) -> Result<u64> {
    let pid = world.agent().id().context("the agent has ended")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Returns whether a connection is made at once.
fn is_served(place: &Place, to: SocketAddr) -> Result<bool> {
    Ok(place.connect(to).proto(Proto::Tcp).timeout(Duration::from_millis(200)).one()?.ok)
}

/// Returns the address of a port of a large Service.
fn at(number: u8, port: u16) -> SocketAddr {
    (Ipv4Addr::new(10, 96, 0, number), port).into()
}

/// An object of 63 KiB that once made a million frontends, 438 MiB and 18 seconds.
#[test]
fn h009_a_service_beyond_its_budget_costs_itself() -> Result<()> {
    let world = World::start()?;
    let before = peak(&world)?;
    // The Service is served while it is within its budget.
    let lawful = large("bomb", 31, 1_000, 10);
    world.write("bomb", &lawful)?;
    let client = world.victim();
    until("the lawful one", || Ok(served(&client, Proto::Tcp, "10.96.0.31:1000".parse()?).ok()))?;
    ensure!(world.problems("bomb")?.is_empty());

    world.write("bomb", &large("bomb", 31, 1_000, 1_000))?;
    let late = HERE.named("late", 11);
    world.write("late", &late.objects())?;
    until("another one", || Ok(served(&client, Proto::Tcp, late.cluster_ip(false)?).ok()))?;
    let refused =
        until("it is refused", || Ok(Some(world.problems("bomb")?).filter(|told| !told.is_empty())))?;
    ensure!(
        refused
            == [
                "spec.ports at spec.clusterIPs, spec.externalIPs and status.loadBalancer make 1001000 frontends, \
                     more than the 65536 of --max-service-frontends: the Service is not served"
            ],
        "{refused:?}"
    );
    let services = world.agent().tool("services", &[])?.to_string();
    ensure!(!services.contains("10.96.0.31"), "nothing of it is left");
    let took = peak(&world)? - before;
    ensure!(took < 64 * MIB, "{} MiB", took / MIB);

    world.write("bomb", &lawful)?;
    until("the lawful one again", || Ok(served(&client, Proto::Tcp, "10.96.0.31:1".parse()?).ok()))?;
    until("nothing is said", || Ok(world.problems("bomb")?.is_empty().then_some(())))
}

/// Numbers of the large Services.
const LARGE: Range<u8> = 31..35;

/// A change of one Service is programmed between the parts of large ones.
#[test]
fn h009_others_pass_while_large_services_are_programmed() -> Result<()> {
    let world = World::start()?;
    let host = world.host().clone();
    world.write("large", &all_large(true, &[])?)?;
    until("all of the large ones", || Ok(is_served(&host, at(34, 9_999))?.then_some(())))?;

    // Every port changes, and there are two more, which are the first and the last of the Service by name.
    world.write("large", &all_large(false, &[("a", 20_001), ("z", 20_002)])?)?;
    until("the first one changes", || Ok(is_served(&host, at(31, 20_001))?.then_some(())))?;
    let late = HERE.named("late", 11);
    world.write("late", &late.objects())?;
    until("another one", || Ok(is_served(&host, late.cluster_ip(false)?)?.then_some(())))?;
    ensure!(!is_served(&host, at(34, 20_002))?, "the large ones have changed before");
    for number in LARGE {
        until("all of the large ones", || Ok(is_served(&host, at(number, 20_002))?.then_some(())))?;
    }
    // The removal of all at once goes the same way.
    world.write("large", &[])?;
    until("they are gone", || Ok((!is_served(&host, at(34, 20_002))?).then_some(())))?;
    served(&host, Proto::Tcp, late.cluster_ip(false)?)
}

/// Returns the large Services with these further ports, and an endpoint that may be ready.
fn all_large(ready: bool, more: &[(&str, u16)]) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for number in LARGE {
        let [mut service, mut slice] = large(&format!("large-{number}"), number, PORTS, 3);
        let endpoint = json!({ "addresses": ["10.64.2.21"], "conditions": { "ready": ready } });
        slice["endpoints"].as_array_mut().context("endpoints")?.push(endpoint);
        for (name, number) in more {
            service["spec"]["ports"].as_array_mut().context("ports")?.push(port(name, *number));
            slice["ports"].as_array_mut().context("ports")?.push(port(name, 8080));
        }
        all.extend([service, slice]);
    }
    Ok(all)
}

/// Returns how long the agent has planned, by its own account.
fn planned(world: &World) -> Result<f64> {
    let metrics = world.agent().metrics()?;
    let name = "vipr_programming_duration_seconds_sum{stage=\"plan\"} ";
    let sample = metrics.lines().find_map(|line| line.strip_prefix(name)).context("a sample")?;
    Ok(sample.parse()?)
}

/// The agent has one thread for everything but probes and metrics.
#[test]
fn h009_probes_are_answered_while_a_long_plan_runs() -> Result<()> {
    let world = World::start()?;
    world.agent().kill9()?;
    let large: Vec<Value> =
        (31..37).flat_map(|number| large(&format!("large-{number}"), number, PORTS, 3)).collect();
    world.write("large", &large)?;
    // At its start, an agent plans everything at once.
    world.agent().start()?;
    let to: SocketAddr = format!("{}:{HEALTH_PORT}", NODE[0]).parse()?;
    let host = world.host().clone();
    let (mut probes, mut slowest, mut ready) = (0, Duration::ZERO, false);
    let end = Instant::now() + Duration::from_secs(120);
    while !ready && Instant::now() < end {
        for path in ["/livez", "/readyz"] {
            let start = Instant::now();
            let Ok((status, body)) = host.http_get(to, path) else { continue };
            slowest = slowest.max(start.elapsed());
            ensure!(path != "/livez" || status == 200, "/livez: {status} {body}");
            ready = path == "/readyz" && status == 200;
            probes += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(ready, "the agent is not ready");
    let plan = planned(&world)?;
    ensure!(plan > 2.0 * PROBE.as_secs_f64(), "no long plan: {plan} s");
    ensure!(slowest < PROBE, "a probe took {slowest:?} of {probes}, the plan {plan} s");
    ensure!(probes > 20, "{probes}");
    Ok(())
}
