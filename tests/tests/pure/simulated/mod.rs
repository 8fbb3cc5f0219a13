//! Runs a case without a kernel: the agent's own decisions on ordinary maps, and the datapath's decisions on their
//! contents.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::FrontendKind;
use proxy_common::addr::Family;
use proxy_tests::cases::{Case, Check, Connect, Dest, Expect, Frontend, Pace, Proto, Target};

pub(crate) mod agent;
pub(crate) mod clients;

use agent::Agent;
use clients::{Fate, Way};

/// Connections for each endpoint that they may go to, if the case gives no number.
const PER_TARGET: usize = 300;
/// Deviation that is allowed in each endpoint's share of them.
const UNEVEN: usize = PER_TARGET / 4;
/// Number of connections if all outcomes are alike.
const SOME: usize = 20;

/// Runs the steps of a case, one after the other, on the same agent. `pods_in_packets`: whether connections that
/// pods' sockets leave alone are judged as packets.
pub(crate) fn check(case: &Case, pods_in_packets: bool) -> Result<()> {
    let mut agent = Agent::new(&case.config, pods_in_packets)?;
    for (number, step) in case.steps.iter().enumerate() {
        agent.take_in(&step.objects).with_context(|| format!("step {number}"))?;
        for check in &step.checks {
            look(&agent, check).with_context(|| format!("step {number}: {check:?}"))?;
        }
    }
    Ok(())
}

fn look(agent: &Agent, check: &Check) -> Result<()> {
    match check {
        Check::Connect(connect) => {
            let ways: &[Way] = match connect.dest.proto {
                Proto::Udp if connect.sender.on_this_node() => &[Way::Connect, Way::Datagram],
                Proto::Udp | Proto::Tcp | Proto::Sctp | Proto::Ping => &[Way::Connect],
            };
            ways.iter()
                .try_for_each(|way| connections(agent, connect, *way).with_context(|| format!("by {way:?}")))
        }
        // Flows need packets, or a real socket.
        Check::Open(..) | Check::Say(..) => Ok(()),
        Check::Frontends(family, want) => {
            let got = frontends(agent, *family)?;
            ensure!(got == *want, "there are {got:?}");
            Ok(())
        }
        Check::ClusterSet(dest, want) => {
            let got = agent.service_behind(dest)?.cluster.len as usize;
            ensure!(got == *want, "there are {got}");
            Ok(())
        }
        Check::AffinitySeconds(dest, want) => {
            let got = agent.service_behind(dest)?.affinity.seconds;
            ensure!(got == *want, "it is {got}");
            Ok(())
        }
    }
}

/// Returns every frontend of a family.
fn frontends(agent: &Agent, family: Family) -> Result<BTreeSet<Frontend>> {
    let contents = agent.maps().contents();
    let keys = contents.frontends.iter().map(|(key, _)| key);
    keys.filter(|key| key.addr.family() == family && key.kind != FrontendKind::Address as u8)
        .map(|key| {
            let proto = clients::proto_of(key.proto).context("a protocol that no case has")?;
            Ok(if key.kind == FrontendKind::NodePort as u8 {
                Frontend::NodePort(proto, key.port.get())
            } else {
                Frontend::Address(proto, SocketAddr::new(key.addr.to_ip(), key.port.get()))
            })
        })
        .collect()
}

/// Makes connections, and compares their outcomes.
fn connections(agent: &Agent, connect: &Connect, way: Way) -> Result<()> {
    let targets = match &connect.expect {
        Expect::Spread(targets, _) | Expect::Sticky(targets, _) => targets.len(),
        Expect::Reject | Expect::Drop | Expect::Pass => 0,
    };
    let usual = Pace { connections: u32::try_from(SOME.max(targets * PER_TARGET))?, pause: Duration::ZERO };
    let pace = connect.pace.unwrap_or(usual);

    let mut all = BTreeMap::<Fate, usize>::new();
    for client in clients::of(connect.sender, agent) {
        let mut own = BTreeSet::new();
        for _ in 0..pace.connections {
            let fate = client.connect(agent, &connect.dest, way)?;
            own.insert(fate);
            *all.entry(fate).or_default() += 1;
            agent.pass(pace.pause);
        }
        if let Expect::Sticky(..) = connect.expect {
            ensure!(own.len() == 1, "{client:?} does not stay: {own:?}");
        }
    }

    let got: BTreeSet<Fate> = all.keys().copied().collect();
    let want = match &connect.expect {
        Expect::Spread(targets, _) => endpoints(targets),
        Expect::Sticky(targets, _) => {
            // A single client reaches only one of them.
            let want = endpoints(targets);
            if got.len() == 1 && got.is_subset(&want) && connect.sender.addresses().len() == 1 {
                got.clone()
            } else {
                want
            }
        }
        Expect::Reject => [Fate::Reject].into(),
        Expect::Drop => [Fate::Drop].into(),
        Expect::Pass => [Fate::Pass].into(),
    };
    ensure!(got == want, "they end as {all:?}");
    if connect.pace.is_none() && targets > 0 {
        ensure!(
            all.values().all(|count| count.abs_diff(PER_TARGET) <= UNEVEN),
            "the spread is uneven: {all:?}"
        );
    }
    Ok(())
}

fn endpoints(targets: &BTreeSet<Target>) -> BTreeSet<Fate> {
    targets.iter().map(|target| Fate::To(SocketAddr::new(target.endpoint.ip, target.port))).collect()
}

/// Returns the name of a destination, for messages.
fn show(dest: &Dest) -> String {
    format!("{}/{:?}", dest.addr, dest.proto)
}
