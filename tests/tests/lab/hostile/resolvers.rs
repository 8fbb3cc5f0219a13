//! Node memory that one pod can use up by its sockets.

use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::lab::{HEAR, Proto, SEND_ONLY, Summary};

use super::world::{HERE, World};

/// Number of sockets that ask.
const SOCKETS: usize = 5_000;

/// Sockets that each ask one VIP take no room from others, however many they are. An answer that is read late still
/// comes from the address that was asked.
#[test]
fn h023_sockets_of_a_pod_take_no_room_of_others() -> Result<()> {
    let world = World::start()?;
    let mut resolvers = Vec::new();
    let question = format!("{SEND_ONLY}who?");
    for v6 in [false, true] {
        let target = HERE.cluster_ip(v6)?;
        let resolver = world.host().hold(target).proto(Proto::UdpUnconnected);
        let mut resolver = resolver.timeout(Duration::from_secs(10)).open()?;
        let asked = resolver.say(&question)?;
        ensure!(asked.ok, "{asked:?}");
        resolvers.push((target, resolver));
    }
    for v6 in [false, true] {
        let attack = world.attacker().connect(HERE.cluster_ip(v6)?).udp_unconnected().times(SOCKETS);
        let summary = Summary::of(&attack.run()?);
        ensure!(summary.ok > SOCKETS * 9 / 10, "the attack is none: {summary:?}");
    }
    let entries = world.datagrams()?;
    ensure!(entries == 0, "{entries} entries of UDP_FLOWS, which all pods share");
    for (target, mut resolver) in resolvers {
        let answer = resolver.say(&format!("{HEAR}{question}"))?;
        ensure!(answer.ok && answer.from == Some(target), "asked {target}: {answer:?}");
        let again = resolver.say("again")?;
        ensure!(again.ok && again.from == Some(target), "asked {target}: {again:?}");
    }
    Ok(())
}
