//! The sides of the comparison: sets of namespaces that differ only in the translation on the first node.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Result, bail};

use super::Options;
use crate::outside::{BASE_PORT, Backend, Ground};
use crate::traffic::{Listener, Pair, Spot};

/// One side of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// The agent serves the first node; the client connects to its nodePort.
    Vipr,
    /// Nothing translates; the client connects to the pod.
    Plain,
    /// Same as `Plain`: its ratio to `Plain` shows the machine's noise.
    Control,
    /// Two programs without any table translate; the client connects to the nodePort.
    Floor,
    /// nftables translates; the client connects to the nodePort.
    Nftables,
}

/// The ground of each side.
pub(super) struct Grounds {
    grounds: BTreeMap<Side, Ground>,
    ipv6: bool,
    cpus: [usize; 2],
}

impl Grounds {
    /// Builds the grounds of `sides`.
    pub(super) fn new(sides: &[Side], options: &Options) -> Result<Self> {
        let &[client_cpu, server_cpu] = options.cpus.as_slice() else { bail!("--cpus takes two numbers") };
        let grounds = sides.iter().map(|&side| Ok((side, Ground::new()?))).collect::<Result<_>>()?;
        Ok(Self { grounds, ipv6: options.ipv6, cpus: [client_cpu, server_cpu] })
    }

    /// Returns the ground of one of the sides.
    pub(super) fn of(&self, side: Side) -> &Ground {
        &self.grounds[&side]
    }

    /// Starts both processes of a side.
    pub(super) fn start(&self, side: Side, backend: Backend) -> Result<Pair> {
        let ground = self.of(side);
        let [client_cpu, server_cpu] = self.cpus;
        let (client, server) = (ground.client(), ground.pod(backend));
        let name = format!("{side:?}, {}", backend.name());
        let (client, server) = (Spot::new(&client, client_cpu), Spot::new(&server, server_cpu));
        Pair::start(name, &client, &server, ground.pod_address(backend, self.ipv6)?, BASE_PORT)
    }

    /// Returns the address that the client of each side connects to for `listener`.
    pub(super) fn targets(
        &self,
        sides: &[Side],
        backend: Backend,
        listener: Listener,
    ) -> Result<BTreeMap<Side, SocketAddr>> {
        let target = |side| match side {
            Side::Vipr | Side::Floor | Side::Nftables => {
                self.of(side).node_port(backend, self.ipv6, listener)
            }
            Side::Plain | Side::Control => self.of(side).server(backend, self.ipv6, listener),
        };
        sides.iter().map(|&side| Ok((side, target(side)?))).collect()
    }
}
