//! The same Services in nftables, for comparison: a verdict map from address, protocol and port to a chain per Service,
//! which translates by a random choice among its endpoints. Connections to a nodePort are masqueraded.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::objects::{self, World};
use crate::outside::{BASE_PORT, Backend, Ground};
use crate::traffic::Listener;

/// The `nft` program.
pub(super) struct Nft(());

impl Nft {
    /// Looks for `nft` in `PATH`.
    pub(super) fn find() -> Option<Self> {
        Command::new("nft").arg("--version").output().ok().filter(|output| output.status.success())?;
        Some(Self(()))
    }

    /// Makes the first node of `ground` serve its own Services and as many others as `world` has, instead of those it
    /// served before.
    ///
    /// # Errors
    /// With the error of `nft`, if it refuses the ruleset.
    pub(super) fn load(&self, ground: &Ground, world: World) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("rules");
        fs::write(&file, ruleset(ground, world)?)?;
        let host = ground.node().host();
        let mut nft = host.command("nft");
        nft.arg("-f").arg(&file);
        nft.text().context("loading the nftables ruleset")?;
        // By default a closed connection keeps its port for two minutes, and the ports would be used up in seconds.
        host.net().sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1")
    }
}

fn ruleset(ground: &Ground, world: World) -> Result<String> {
    let (mut chains, mut services, mut node_ports) = (String::new(), String::new(), String::new());
    for backend in Backend::ALL {
        let pod = ground.pod_address(backend, false)?;
        let service = ground.service(backend, false)?;
        for listener in Listener::ALL {
            let (chain, port) = (format!("{}-{listener:?}", backend.name()), listener.port(BASE_PORT));
            let proto = listener.protocol().to_lowercase();
            let node_port = ground.node_port(backend, false, listener)?.port();
            // Writing to a String does not fail.
            let _ = writeln!(chains, "chain {chain} {{ meta l4proto {proto} dnat to {pod}:{port}; }}");
            let _ = writeln!(chains, "chain {chain}-external {{ meta mark set 0x4000 goto {chain}; }}");
            let _ = writeln!(services, "{} . {proto} . {port} : goto {chain},", service.vip);
            let _ = writeln!(node_ports, "{proto} . {node_port} : goto {chain}-external,");
        }
    }
    // As many Services as the agent's cluster has, including the measured ones.
    for index in Backend::ALL.len()..world.services {
        let endpoint = |number| format!("{number} : {} . 8080", objects::endpoint(world, index, number));
        let endpoints: Vec<String> = (0..world.endpoints).map(endpoint).collect();
        let (count, endpoints) = (world.endpoints, endpoints.join(", "));
        let _ = writeln!(
            chains,
            "chain s{index} {{ meta l4proto tcp dnat ip to numgen random mod {count} map {{ {endpoints} }}; }}"
        );
        let _ = writeln!(services, "{} . tcp . 80 : goto s{index},", IpAddr::V4(objects::cluster_ip(index)));
    }
    Ok(format!(
        "add table ip bench\n\
         delete table ip bench\n\
         table ip bench {{\n\
         {chains}\
         map services {{\n\
         type ipv4_addr . inet_proto . inet_service : verdict\n\
         elements = {{\n{services}}}\n\
         }}\n\
         map node-ports {{\n\
         type inet_proto . inet_service : verdict\n\
         elements = {{\n{node_ports}}}\n\
         }}\n\
         chain prerouting {{\n\
         type nat hook prerouting priority dstnat\n\
         ip daddr . meta l4proto . th dport vmap @services\n\
         fib daddr type local meta l4proto . th dport vmap @node-ports\n\
         }}\n\
         chain postrouting {{\n\
         type nat hook postrouting priority srcnat\n\
         meta mark & 0x4000 == 0x4000 masquerade fully-random\n\
         }}\n\
         }}\n"
    ))
}
