//! Clients that run continuously while something happens.

use std::time::Duration;

use anyhow::Result;

use super::World;
use super::checks::served;
use crate::lab::{Attempt, Connect, Flow, Summary};

/// Clients that make one connection after another, each to one target. Dropping them ends them.
#[derive(Debug, Default)]
pub struct Loops {
    flows: Vec<(String, Flow)>,
}

impl Loops {
    /// Starts HTTP requests from the pod [`CLIENT`](super::CLIENT) and from its node to each target, each on a new
    /// connection.
    ///
    /// # Errors
    /// If a client cannot be run.
    pub fn start(world: &World, targets: &[&str]) -> Result<Self> {
        let mut loops = Self::default();
        for place in world.clients() {
            for target in targets {
                loops.add(target, place.connect(target).http())?;
            }
        }
        loops.go_on()?;
        Ok(loops)
    }

    /// Adds a client, which makes a connection every few milliseconds.
    ///
    /// # Errors
    /// If the client cannot be run.
    pub fn add(&mut self, target: &str, connect: Connect) -> Result<()> {
        let flow = connect.pace(Duration::from_millis(2)).start()?;
        self.flows.push((target.to_owned(), flow));
        Ok(())
    }

    /// Waits for further connections of every client. Connections that began before this call have ended when it
    /// returns.
    ///
    /// # Errors
    /// If a client has died.
    pub fn go_on(&mut self) -> Result<()> {
        // The first connection that ends may have begun before.
        self.flows.iter_mut().try_for_each(|(_, flow)| flow.wait_for(2))
    }

    /// Returns the next `count` or more connections of each client, in the order in which the clients were added. All
    /// of them began after this call.
    ///
    /// # Errors
    /// If one of them failed, or a client has died.
    pub fn next(&mut self, count: usize) -> Result<Vec<Summary>> {
        self.go_on()?;
        let from: Vec<usize> =
            self.flows.iter_mut().map(|(_, flow)| Ok(flow.so_far()?.len())).collect::<Result<_>>()?;
        self.flows.iter_mut().try_for_each(|(_, flow)| flow.wait_for(count))?;
        let since =
            |((target, flow), from): (&mut (String, Flow), usize)| served(target, &flow.so_far()?[from..]);
        self.flows.iter_mut().zip(from).map(since).collect()
    }

    /// Ends the clients after a few more connections; returns the number of connections.
    ///
    /// # Errors
    /// If any connection since the start has failed, or its client saw another address than it asked for.
    pub fn none_failed(mut self) -> Result<usize> {
        self.go_on()?;
        let mut count = 0;
        for (target, flow) in self.flows {
            count += served(&target, &flow.stop()?)?.total;
        }
        Ok(count)
    }

    /// Ends the clients and returns the attempts of each.
    ///
    /// # Errors
    /// If a client has died.
    pub fn stop(self) -> Result<Vec<(String, Vec<Attempt>)>> {
        self.flows.into_iter().map(|(target, flow)| Ok((target, flow.stop()?))).collect()
    }
}
