//! The sides of the comparison: pairs of client and server processes that differ only in their cgroup and their ports.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use proxy_tests::lab::{Lab, Node, Place, Pod};

use super::Options;
use crate::cluster::Measured;
use crate::traffic::{Listener, Pair, Spot};

/// One side of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Below the cgroup that the agent serves; the client connects to the clusterIP.
    Vipr,
    /// In a cgroup without programs; the client connects to the pod.
    Plain,
    /// Same as `Plain`: its ratio to `Plain` shows the machine's noise.
    Control,
}

impl Side {
    pub(super) const ALL: [Self; 3] = [Self::Vipr, Self::Plain, Self::Control];

    /// Returns the first port of the side's server. The Service has the same ports.
    pub(super) fn base_port(self) -> u16 {
        match self {
            Self::Vipr => 7000,
            Self::Plain => 7100,
            Self::Control => 7200,
        }
    }
}

/// Lab and pods in which a comparison takes place.
pub(super) struct Ground {
    client: Pod,
    server: Pod,
    vip: IpAddr,
    server_address: IpAddr,
    plain_cgroup: PathBuf,
    cpus: [usize; 2],
}

impl Ground {
    pub(super) fn new(lab: &Lab, node: &Node, options: &Options) -> Result<Self> {
        let server = lab.pod(if options.remote { "far-server" } else { "server" });
        let vip = if options.ipv6 { "fd00:96::10" } else { "10.96.0.10" }.parse()?;
        let server_address = *server
            .addresses()
            .iter()
            .find(|address| address.is_ipv6() == options.ipv6)
            .context("no address of the family")?;
        let above = node.cgroup().parent().context("the node's cgroup has no parent")?;
        let &[client_cpu, server_cpu] = options.cpus.as_slice() else { bail!("--cpus takes two numbers") };
        Ok(Self {
            client: lab.pod("client"),
            server,
            vip,
            server_address,
            plain_cgroup: above.join("plain"),
            cpus: [client_cpu, server_cpu],
        })
    }

    /// Starts both processes of a side.
    pub(super) fn start(&self, side: Side) -> Result<Pair> {
        let [client_cpu, server_cpu] = self.cpus;
        let client = Spot { place: &self.client, cgroup: self.cgroup(side, &self.client)?, cpu: client_cpu };
        let server = Spot { place: &self.server, cgroup: self.cgroup(side, &self.server)?, cpu: server_cpu };
        Pair::start(format!("{side:?}"), &client, &server, self.server_address, side.base_port())
    }

    /// Returns the Service that is measured.
    pub(super) fn service(&self) -> Measured<'_> {
        Measured {
            name: "target",
            vip: self.vip,
            base_port: Side::Vipr.base_port(),
            base_node_port: None,
            endpoint: self.server_address,
            node: self.server.node(),
        }
    }

    /// Returns the address that the client of a side connects to for `listener`.
    pub(super) fn target(&self, side: Side, listener: Listener) -> SocketAddr {
        let address = if side == Side::Vipr { self.vip } else { self.server_address };
        SocketAddr::new(address, listener.port(side.base_port()))
    }

    /// Returns the address of the server itself.
    pub(super) fn pod(&self, side: Side, listener: Listener) -> SocketAddr {
        SocketAddr::new(self.server_address, listener.port(side.base_port()))
    }

    fn cgroup(&self, side: Side, place: &Place) -> Result<PathBuf> {
        if side == Side::Vipr {
            return Ok(place.cgroup().to_path_buf());
        }
        let dir = self.plain_cgroup.join(place.name());
        fs::create_dir_all(&dir).with_context(|| format!("cannot create the cgroup {}", dir.display()))?;
        Ok(dir)
    }
}
