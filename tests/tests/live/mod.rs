//! Runs a case with the agent, its BPF programs and real sockets, in a lab of its own.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use proxy_common::addr::Family;
use proxy_tests::cases::{Case, Check, Dest, Frontend, Proto};
use serde_json::Value;

mod connections;
mod proxy;
mod world;

use proxy::Proxy;
use world::World;

/// By how much the pauses of a case are shortened. Affinity timeouts become two seconds, and pauses stay well apart
/// from them on a busy machine.
const FASTER: u32 = 5;

/// Whether a check can be made in the lab at all.
pub(crate) fn is_runnable(check: &Check) -> bool {
    match check {
        // The kernels that tests run on seldom have SCTP.
        Check::Connect(connect) => connect.sender.on_this_node() && connect.dest.proto != Proto::Sctp,
        Check::Frontends(..) | Check::ClusterSet(..) | Check::AffinitySeconds(..) => true,
    }
}

/// Runs the steps of a case, one after the other, with one and the same agent.
pub(crate) fn check(case: Case) -> Result<()> {
    let case = case.on_sockets().faster(FASTER);
    let world = World::build(&case)?;
    let mut proxy = Proxy::new(&world, &case.config)?;
    for (number, step) in case.steps.iter().enumerate() {
        proxy.program(number, &step.objects).with_context(|| format!("step {number}"))?;
        for check in step.checks.iter().filter(|check| is_runnable(check)) {
            look(&world, &proxy, check).with_context(|| format!("step {number}: {check:?}"))?;
        }
    }
    Ok(())
}

fn look(world: &World, proxy: &Proxy, check: &Check) -> Result<()> {
    match check {
        Check::Connect(connect) => connections::check(world, connect),
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
