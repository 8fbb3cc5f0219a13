//! A sender outside, or a pod of another node, writes the address of a pod of this node or of another client into its
//! packets.

use std::net::SocketAddr;

use anyhow::Result;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_tests::lab::{Place, Proto};
use proxy_tests::packets::Packet;

use super::world::{Victim, World, served};

/// Returns the packets that are sent in the name of `victim` to an address of its Service. A datagram in the name of
/// a client outside begins a flow of that client, which docs/security.md concedes.
fn in_the_name_of(world: &World, victim: &Victim, to: SocketAddr) -> Vec<Packet> {
    let of_pod = world.victim().addresses().contains(&victim.local.ip());
    if victim.proto == Proto::Udp {
        return if of_pod { vec![Packet::udp(victim.local, to, b"forged")] } else { Vec::new() };
    }
    [SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK]
        .map(|flags| Packet::tcp(victim.local, to, flags, 0x1234_5678, 0x8765_4321))
        .into()
}

#[test]
fn h005_the_names_of_pods_and_of_other_clients_from_outside() -> Result<()> {
    let world = World::start()?;
    let mut victims = world.hold()?;
    let senders: [Place; 2] = [world.elsewhere(), world.client()];
    for agent in ["with an agent", "without an agent"] {
        for sender in &senders {
            let mut packets = Vec::new();
            for victim in &victims {
                let v6 = victim.local.is_ipv6();
                for to in [victim.service.cluster_ip(v6)?, victim.service.node_port(v6)?] {
                    packets.extend(in_the_name_of(&world, victim, to));
                }
            }
            for _ in 0..3 {
                sender.send_raw(packets.clone())?;
                for victim in &mut victims {
                    victim.goes_on(&format!("{agent}, forged by {}", sender.name()))?;
                }
                for place in [world.victim(), world.client()] {
                    for (_, target) in world.targets(&place)? {
                        for proto in [Proto::Tcp, Proto::Udp] {
                            served(&place, proto, target)?;
                        }
                    }
                }
            }
        }
        if agent == "with an agent" {
            world.agent().kill9()?;
        }
    }
    Ok(())
}
