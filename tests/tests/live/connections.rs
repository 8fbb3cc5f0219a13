//! Real connections, and what each of them must be like.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use proxy_tests::cases::{Connect, Expect, Pace, Proto, Target};
use proxy_tests::lab::{self, Attempt, Place};

use super::world::World;

/// Connections for each endpoint that they may go to, where the case names no number and there are several.
const PER_TARGET: usize = 100;
/// How far each endpoint's share of them may be off: more than six standard deviations.
const UNEVEN: usize = PER_TARGET / 2;
/// The same where all fates are alike.
const SOME: usize = 10;

/// Makes the connections of a check, by every kind of socket that there is for its protocol.
pub(super) fn check(world: &World, connect: &Connect) -> Result<()> {
    use lab::Proto as Way;
    let ways: &[Way] = match connect.dest.proto {
        Proto::Tcp => &[Way::Tcp],
        Proto::Udp => &[Way::Udp, Way::UdpUnconnected],
        Proto::Sctp => &[],
        Proto::Ping => &[Way::Ping],
    };
    for &way in ways {
        let mut servers = BTreeMap::<SocketAddr, usize>::new();
        let clients = world.clients(connect.sender);
        for (place, addresses) in &clients {
            let attempts = attempts(place, connect, way)?;
            let own = judge(connect, way, &attempts, addresses)?;
            if let Expect::Sticky(..) = connect.expect {
                ensure!(own.len() == 1, "{way:?}: {} does not stay: {own:?}", place.name());
            }
            for (server, count) in own {
                *servers.entry(server).or_default() += count;
            }
        }
        spread(connect, clients.len(), &servers)?;
    }
    Ok(())
}

/// Makes the connections of one client.
fn attempts(place: &Place, connect: &Connect, way: lab::Proto) -> Result<Vec<Attempt>> {
    let client = place.connect(connect.dest.addr).proto(way);
    match (&connect.expect, connect.pace) {
        // With long pauses, until every endpoint was reached; in time, as the case says.
        (Expect::Spread(targets, _), Some(Pace { connections, pause })) if !pause.is_zero() => {
            let mut flow = client.pace(pause).start()?;
            for _ in 0..connections {
                flow.wait_for(1)?;
                let seen: BTreeSet<_> =
                    flow.so_far()?.iter().filter_map(|attempt| attempt.endpoint).collect();
                if seen.len() >= targets.len() {
                    break;
                }
            }
            flow.stop()
        }
        (_, Some(Pace { connections, pause })) => {
            client.times(usize::try_from(connections)?).pace(pause).run()
        }
        (Expect::Spread(targets, _), None) if targets.len() > 1 => {
            client.times(targets.len() * PER_TARGET).run()
        }
        (_, None) => client.times(SOME).run(),
    }
}

/// Looks at every attempt by itself; counts which endpoint answered.
fn judge(
    connect: &Connect,
    way: lab::Proto,
    attempts: &[Attempt],
    seen_as: &[IpAddr],
) -> Result<BTreeMap<SocketAddr, usize>> {
    let mut servers = BTreeMap::new();
    for attempt in attempts {
        let fine = match &connect.expect {
            Expect::Spread(targets, _) | Expect::Sticky(targets, _) => {
                targets.iter().any(|target| answered_by(attempt, target))
                    && translated(attempt, connect, way, seen_as)
            }
            Expect::Reject => failed(attempt, way, "ECONNREFUSED"),
            Expect::Drop => failed(attempt, way, "EPERM"),
            Expect::Pass if way == lab::Proto::Ping => attempt.ok,
            Expect::Pass => {
                attempt.endpoint == Some(connect.dest.addr) && translated(attempt, connect, way, seen_as)
            }
        };
        ensure!(fine, "{way:?}: {attempt:?}");
        if let Some(endpoint) = attempt.endpoint {
            *servers.entry(endpoint).or_default() += 1;
        }
    }
    Ok(servers)
}

fn answered_by(attempt: &Attempt, target: &Target) -> bool {
    attempt.server.as_deref() == Some(target.endpoint.name)
        && attempt.endpoint == Some(SocketAddr::new(target.endpoint.ip, target.port))
}

/// The client sees what it asked for, and the server sees the client.
fn translated(attempt: &Attempt, connect: &Connect, way: lab::Proto, seen_as: &[IpAddr]) -> bool {
    let asked = Some(connect.dest.addr);
    let peer = if way == lab::Proto::UdpUnconnected { attempt.from } else { attempt.peername };
    let answer = if way == lab::Proto::Udp { attempt.from } else { asked };
    attempt.ok
        && peer == asked
        && answer == asked
        && attempt.peer.is_some_and(|client| seen_as.contains(&client.ip()))
}

/// The call that names the destination has failed, not a later one.
fn failed(attempt: &Attempt, way: lab::Proto, error: &str) -> bool {
    let stage = if way == lab::Proto::UdpUnconnected { "send" } else { "connect" };
    attempt.error.as_deref() == Some(error) && attempt.stage.as_deref() == Some(stage)
}

/// Every endpoint was reached, and about equally often.
fn spread(connect: &Connect, clients: usize, servers: &BTreeMap<SocketAddr, usize>) -> Result<()> {
    let targets = match &connect.expect {
        Expect::Spread(targets, _) => targets,
        Expect::Sticky(targets, _) if clients > 1 => targets,
        Expect::Sticky(..) | Expect::Reject | Expect::Drop | Expect::Pass => return Ok(()),
    };
    ensure!(servers.len() == targets.len(), "not all endpoints were reached: {servers:?}");
    if connect.pace.is_none() && targets.len() > 1 {
        let uneven = servers.values().find(|count| count.abs_diff(PER_TARGET) > UNEVEN);
        ensure!(uneven.is_none(), "the spread is uneven: {servers:?}");
    }
    Ok(())
}
