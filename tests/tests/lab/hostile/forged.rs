//! A pod with NET_RAW writes another pod's address into its packets.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_tests::lab::Proto;
use proxy_tests::packets::Packet;
use proxy_tests::scenarios::until;

use super::world::{HERE, THERE, Victim, World, served, served_after_flood};

/// Returns the packets that can be sent to `to` in the name of `victim`.
fn in_the_name_of(victim: &Victim, to: SocketAddr) -> Vec<Packet> {
    if victim.proto == Proto::Udp {
        return vec![Packet::udp(victim.local, to, b"forged")];
    }
    [SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK]
        .map(|flags| Packet::tcp(victim.local, to, flags, 0x1234_5678, 0x8765_4321))
        .into()
}

/// Checks that every connection goes on, and that new ones can be made.
fn nobody_notices(world: &World, victims: &mut [Victim], when: &str) -> Result<()> {
    victims.iter_mut().try_for_each(|victim| victim.goes_on(when))?;
    for place in [world.victim(), world.client()] {
        for (_, target) in world.targets(&place)? {
            for proto in [Proto::Tcp, Proto::Udp] {
                served(&place, proto, target)?;
            }
        }
    }
    Ok(())
}

/// The attacker sends requests in the name of each connection's client, to every address of the Services that lead to
/// the same pod.
#[test]
fn h001_requests_in_the_name_of_others() -> Result<()> {
    let world = World::start()?;
    let mut victims = world.hold()?;
    let attacker = world.attacker();
    for agent in ["with an agent", "without an agent"] {
        for strict in ["0", "1"] {
            for device in ["all", "default"] {
                world.host().net().sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), strict)?;
            }
            let mut packets = Vec::new();
            for victim in &victims {
                let v6 = victim.local.is_ipv6();
                for to in [victim.service.cluster_ip(v6)?, victim.service.node_port(v6)?] {
                    packets.extend(in_the_name_of(victim, to));
                }
            }
            for _ in 0..3 {
                attacker.send_raw(packets.clone())?;
                nobody_notices(&world, &mut victims, agent)?;
            }
        }
        if agent == "with an agent" {
            world.agent().kill9()?;
        }
    }
    Ok(())
}

/// The kernel's own routes show the owner of an address: a packet from another pod's address is dropped, a packet of
/// the owner is served.
#[test]
fn h003_the_address_of_another_pod() -> Result<()> {
    let world = World::start()?;
    let (attacker, victim) = (world.attacker(), world.victim());
    for v6 in [false, true] {
        let before = dropped(&world)?;
        for (sender, expected) in [(&victim, 0), (&attacker, 2)] {
            let own =
                victim.addresses().iter().copied().find(|ip| ip.is_ipv6() == v6).context("an address")?;
            let (from, to) = (SocketAddr::new(own, 61_234), HERE.cluster_ip(v6)?);
            sender.send_raw([Packet::udp(from, to, b"?"), Packet::tcp(from, to, SYN, 1, 0)])?;
            until("the packets have been judged", || {
                Ok((dropped(&world)? == before + expected).then_some(()))
            })?;
        }
    }
    Ok(())
}

fn dropped(world: &World) -> Result<u64> {
    let status = world.agent().tool("status", &[])?;
    status["counters"]["drop_foreign_source"].as_u64().context("a counter")
}

/// Datagrams and SYNs from every port of both victims. The victims' own requests are answered, each time.
#[test]
fn h002_all_ports_of_others() -> Result<()> {
    let world = World::start()?;
    let mut victims = world.hold()?;
    let attacker = world.attacker();
    for v6 in [false, true] {
        for place in [world.victim(), world.client()] {
            let own = place.addresses().iter().copied().find(|ip| ip.is_ipv6() == v6);
            let Some(own) = own else { anyhow::bail!("{} has no such address", place.name()) };
            for service in [HERE, THERE] {
                for to in [service.cluster_ip(v6)?, service.node_port(v6)?] {
                    // The ephemeral range of Linux.
                    let sources = (32_768..=60_999).map(|port| SocketAddr::new(own, port));
                    attacker.send_raw(sources.clone().map(|from| Packet::udp(from, to, b"?")))?;
                    attacker.send_raw(sources.map(|from| Packet::tcp(from, to, SYN, 1, 0)))?;
                }
            }
            for (_, target) in world.targets(&place)? {
                for proto in [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected] {
                    for _ in 0..10 {
                        served_after_flood(&place, proto, target)?;
                    }
                }
            }
        }
    }
    nobody_notices(&world, &mut victims, "after all")
}

/// A sender outside sends packets in the name of a pod of this node, from the port that the pod itself uses. The
/// pod's own packets to the same backend do not belong to that flow.
#[test]
fn h004_in_the_name_of_a_pod_from_outside() -> Result<()> {
    let world = World::start()?;
    let mut victims = world.hold()?;
    victims.retain(|victim| world.victim().addresses().contains(&victim.local.ip()));
    let forger = world.client();
    for agent in ["with an agent", "without an agent"] {
        for strict in ["0", "1"] {
            for device in ["all", "default"] {
                world.host().net().sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), strict)?;
            }
            for victim in &victims {
                let to = victim.service.node_port(victim.local.is_ipv6())?;
                forger.send_raw(in_the_name_of(victim, to))?;
            }
            nobody_notices(&world, &mut victims, agent)?;
        }
        if agent == "with an agent" {
            world.agent().kill9()?;
        }
    }
    Ok(())
}

/// By the port of one socket, a client sends to a Service, then to its pod, and so on: each answers from its own
/// address.
#[test]
fn h002_a_client_talks_to_a_service_and_to_its_pod_by_one_port() -> Result<()> {
    let world = World::start()?;
    for v6 in [false, true] {
        for place in [world.victim(), world.client()] {
            let own = place.addresses().iter().copied().find(|ip| ip.is_ipv6() == v6);
            let own = SocketAddr::new(own.context("an address")?, 41_234);
            for proto in [Proto::Udp, Proto::UdpUnconnected] {
                for _ in 0..2 {
                    for (_, target) in world.targets(&place)?.into_iter().filter(|(_, to)| to.is_ipv6() == v6)
                    {
                        let attempt = place.connect(target).proto(proto).bind(own).one()?;
                        anyhow::ensure!(attempt.ok, "{} to {target} by {proto:?}: {attempt:?}", place.name());
                    }
                }
            }
        }
    }
    Ok(())
}
