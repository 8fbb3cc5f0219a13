//! Upkeep of what is programmed: comparing it with the maps, making the maps larger, giving back numbers, sweeping
//! sockets.

use std::sync::Arc;
use std::time::Instant;

use proxy_common::abi::proto;

use super::Agent;
use crate::agent::error::AgentError;
use crate::agent::extent::Extent;
use crate::agent::kernel::Kernel;
use crate::agent::sizes::Needs;
use crate::agent::sweeps::{Due, Sweep};
use crate::bpf::chain;
use crate::bpf::dataplane::{PROGRAMS, Sizes};
use crate::bpf::sys;
use crate::host::process::give_back_memory;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::drift::differences;
use crate::reconcile::model::Freed;
use crate::reconcile::stale::Serving;

/// Number of differences that are logged when the maps are found changed.
const DRIFT_LOGGED: usize = 16;

impl Agent {
    /// Compares the maps with what was written, and the links with what was attached. If somebody else has written to
    /// the maps, everything is written anew. Detached programs are attached again.
    pub(super) fn audit(&mut self) {
        self.sweeps.add(Due { streams: true, follow: false });
        self.begin_sweep();
        let Some(kernel) = self.kernel.as_mut().filter(|_| self.extent < Extent::Everything) else {
            return;
        };
        let detached = kernel.dataplane.detached(&self.config.cgroup);
        if kernel.attached && !detached.is_empty() {
            tracing::warn!(programs = ?detached, "somebody else has detached programs; attaching them again");
            self.telemetry.metrics().drifted(detached.iter().map(|_| "links"));
            // A program that cannot be attached now is tried again at the next audit: packets are served meanwhile.
            let failed = kernel.dataplane.attach(&self.config.cgroup).err();
            let problem = failed.map(|error| format!("sockets are not served: {}", chain(&error)));
            self.told.report.set("cgroup".to_owned(), problem.into_iter().collect());
        }
        let contents = match kernel.dataplane.maps.contents() {
            Ok(contents) => contents,
            Err(error) => return tracing::warn!(%error, "the maps cannot be read back"),
        };
        let found = differences(&kernel.model, &contents, &kernel.dataplane.maps.filter());
        for difference in found.iter().take(DRIFT_LOGGED) {
            tracing::warn!(%difference, "somebody else has changed a map; writing everything anew");
        }
        if found.len() > DRIFT_LOGGED {
            tracing::warn!(differences = found.len(), "more has been changed than is named here");
        }
        self.telemetry.metrics().drifted(found.iter().map(|difference| difference.map));
        if !found.is_empty() {
            self.extent = Extent::Everything;
        }
        drop(contents);
        give_back_memory();
    }

    /// Moves to larger maps when something did not fit, or soon would not. Returns whether there is something to
    /// program or to tell because of that.
    pub(super) async fn grow(&mut self) -> bool {
        let Some(kernel) = &self.kernel else { return false };
        if !self.shortage.wants_growth(kernel.model.is_tight(), Instant::now()) {
            return false;
        }
        let capacity = kernel.dataplane.maps.capacity();
        let sizes = self.sizes(self.known.cluster.services().map(|service| &service.key));
        let grown = match sizes.least.fits_into(capacity) {
            // Maps of the same size gain nothing.
            true => Ok(None),
            false => self.open(sizes).await.map(Some),
        };
        let mut problems = Vec::new();
        match grown {
            Ok(Some(larger)) => {
                self.kernel = Some(larger);
                self.extent = Extent::Everything;
                self.shortage.grown();
                self.edge.maps_replaced();
            }
            not => {
                if let Err(error) = not {
                    let error = chain(&error);
                    tracing::warn!(%error, retry_in = ?self.config.sync_period, "maps cannot be made larger");
                    problems.push(format!(
                        "cannot be made larger: {error}; Services that do not fit are not served"
                    ));
                }
                self.shortage.not_grown(Instant::now() + self.config.sync_period);
            }
        }
        self.told.report.set("maps".to_owned(), problems);
        true
    }

    /// Returns the sizes of maps that these Services need.
    pub(super) fn sizes<'a>(&self, services: impl Iterator<Item = &'a ObjectKey>) -> Sizes {
        let mut needs = Needs::default();
        for wanted in services.filter_map(|service| self.known.wanted(service)) {
            needs.add(&wanted.desired);
        }
        needs.sizes(self.config.flow_table_size)
    }

    /// Makes or takes over maps of these sizes, and loads the programs.
    pub(super) async fn open(&mut self, sizes: Sizes) -> Result<Kernel, AgentError> {
        // The kernel's verifier takes a while, and probes have to be answered meanwhile.
        let (first, health) = (!self.edge.is_started(), self.told.health.clone());
        let opening = Kernel::open(self.config.pins.clone(), sizes, move |program| {
            if first {
                health.waiting_for(format!("the kernel verifies BPF program {program}"));
            }
        });
        let kernel = opening.await?;
        let dataplane = &kernel.dataplane;
        self.told.report.verified(&dataplane.verified);
        self.told.report.reasons_for_sockets(dataplane.set_retval);
        self.told.report.refused(&PROGRAMS, &dataplane.refused);
        if let Err(error) = &kernel.sweeper {
            self.told.report.set("node".to_owned(), vec![error.to_string()]);
        }
        Ok(kernel)
    }

    /// Gives back the numbers that have waited for the grace period.
    pub(super) fn release(&mut self, freed: Freed) {
        let Some(Kernel { model, grace, .. }) = &mut self.kernel else { return };
        model.release(freed);
        grace.begin(sys::grace_period);
        self.shortage.make_room();
    }

    /// Begins the sweep that is due, if it may begin.
    pub(super) fn begin_sweep(&mut self) {
        self.sweeps.begin(Instant::now(), |due| {
            let Kernel { model, sweeper, .. } = self.kernel.as_ref()?;
            let (sweeper, sockets) = sweeper.as_ref().ok()?;
            let sctp = model.ports.iter().filter(|(key, _)| key.proto == proto::SCTP);
            let sweep = Sweep {
                sweeper: Arc::clone(sweeper),
                sockets: Arc::clone(sockets),
                metrics: Arc::clone(self.telemetry.metrics()),
                families: self.config.families.clone(),
                serving: due.follow.then(|| Serving::of(model)),
                opted_out: self.opt_out.pods(),
                sctp: due.streams.then(|| sctp.map(|(_, port)| port.id).collect()),
            };
            Some(tokio::task::spawn_blocking(|| sweep.run()))
        });
    }
}
