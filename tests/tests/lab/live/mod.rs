//! Runs a case with the agent, its BPF programs and real sockets, in a lab of its own.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use proxy_common::addr::Family;
use proxy_tests::cases::{Case, Check, Dest, Frontend, Pods, Proto};
use proxy_tests::lab::{Lab, LabSpec};
use serde_json::Value;

mod connections;
mod proxy;
mod world;

use connections::Kept;
use proxy::Proxy;
use world::World;

/// Divisor of the pauses of a case. Affinity timeouts become two seconds, and the pauses still differ clearly from
/// them on a busy machine.
const FASTER: u32 = 5;

/// Runs the steps of a case, one after the other, with the same agent, in a lab made from `spec`, which has the
/// nodes, pods and clients of [`LabSpec::cases`]. `prepare` gets the lab before there is an agent.
pub(crate) fn check(
    case: Case,
    spec: LabSpec,
    pods: Pods,
    prepare: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    let case = case.faster(FASTER);
    let world = World::build(&case, spec, pods)?;
    prepare(world.lab())?;
    let mut proxy = Proxy::new(&world, &case.config)?;
    let mut kept = BTreeMap::new();
    for (number, step) in case.steps.iter().enumerate() {
        proxy.program(number, &step.objects).with_context(|| format!("step {number}"))?;
        for check in &step.checks {
            look(&world, &proxy, &mut kept, check, pods)
                .with_context(|| format!("step {number}: {check:?}"))
                .with_context(|| proxy.counters())?;
        }
    }
    Ok(())
}

fn look(
    world: &World,
    proxy: &Proxy,
    kept: &mut BTreeMap<String, Kept>,
    check: &Check,
    pods: Pods,
) -> Result<()> {
    match check {
        Check::Say(name, expect) => kept.get_mut(name).map_or(Ok(()), |kept| kept.say(world, expect)),
        check if !check.is_live(pods) => Ok(()),
        Check::Connect(connect) => connections::check(world, connect),
        Check::Open(name, connect) => {
            kept.insert(name.clone(), connections::open(world, connect)?);
            Ok(())
        }
        Check::Frontends(family, want) => {
            let got: BTreeSet<Frontend> = proxy
                .services()?
                .iter()
                .filter(|service| service["family"] == family.to_string())
                .flat_map(names_of_frontends)
                .map(|name| frontend(&name, *family).with_context(|| format!("frontend {name:?}")))
                .collect::<Result<_>>()?;
            ensure!(got == *want, "there are {got:?}");
            Ok(())
        }
        Check::ClusterSet(dest, want) => {
            let service = service_behind(proxy, dest)?;
            let got = service["cluster"].as_array().map(Vec::len);
            ensure!(got == Some(*want), "there is {service}");
            Ok(())
        }
        Check::AffinitySeconds(dest, want) => {
            let service = service_behind(proxy, dest)?;
            ensure!(service["affinitySeconds"] == *want, "there is {service}");
            Ok(())
        }
    }
}

fn service_behind(proxy: &Proxy, dest: &Dest) -> Result<Value> {
    let name = format!("{}/{}", dest.addr, word(dest.proto));
    let mut services = proxy.services()?.into_iter();
    services
        .find(|service| names_of_frontends(service).contains(&name))
        .with_context(|| format!("no Service has the frontend {name}"))
}

fn names_of_frontends(service: &Value) -> Vec<String> {
    let list = service["frontends"].as_array().into_iter().flatten();
    list.filter_map(|frontend| Some(frontend["name"].as_str()?.to_owned())).collect()
}

/// Reads `ADDRESS:PORT/PROTOCOL` or `nodePort PORT/PROTOCOL (FAMILY)`.
fn frontend(name: &str, family: Family) -> Option<Frontend> {
    let (place, proto) = name.strip_suffix(&format!(" ({family})")).unwrap_or(name).rsplit_once('/')?;
    let proto = [Proto::Tcp, Proto::Udp, Proto::Sctp].into_iter().find(|known| word(*known) == proto)?;
    Some(match place.strip_prefix("nodePort ") {
        Some(port) => Frontend::NodePort(proto, port.parse().ok()?),
        None => Frontend::Address(proto, place.parse().ok()?),
    })
}

fn word(proto: Proto) -> &'static str {
    match proto {
        Proto::Tcp => "TCP",
        Proto::Udp => "UDP",
        Proto::Sctp => "SCTP",
        Proto::Ping => "ping",
    }
}
