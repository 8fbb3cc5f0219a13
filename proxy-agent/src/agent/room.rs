//! Room in the maps: maps grow, numbers come back after a grace period, and Services that had no room are tried again.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Agent;
use super::extent::Extent;
use super::programmed::Programmed;
use super::sizes::Needs;
use crate::bpf::chain;
use crate::bpf::dataplane::Sizes;
use crate::bpf::sys;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::model::Freed;

impl Agent {
    /// Returns the sizes of maps that these Services need.
    pub(super) fn sizes<'a>(&self, services: impl Iterator<Item = &'a ObjectKey>) -> Sizes {
        let mut needs = Needs::default();
        for wanted in services.filter_map(|service| self.known.wanted(service)) {
            needs.add(&wanted.desired);
        }
        needs.sizes(self.config.flow_table_size)
    }

    /// Moves to larger maps when something did not fit, or soon would not. Returns whether there is something to
    /// program or to tell because of that.
    pub(super) async fn grow(&mut self) -> bool {
        let Some(programmed) = &self.programmed else { return false };
        if self.refused.is_empty() && !programmed.model.is_tight() || Instant::now() < self.grow_at {
            return false;
        }
        let capacity = programmed.dataplane.maps.capacity();
        let sizes = self.sizes(self.known.cluster.services().map(|service| &service.key));
        let grown = match sizes.least.fits_into(capacity) {
            // Maps of the same size gain nothing.
            true => Ok(None),
            false => self.open(sizes).await.map(Some),
        };
        let mut problems = Vec::new();
        match grown {
            Ok(Some(larger)) => {
                self.programmed = Some(larger);
                self.extent = Extent::Everything;
                self.stuck = false;
                self.facts.maps += 1;
            }
            not => {
                if let Err(error) = not {
                    let error = chain(&error);
                    tracing::warn!(%error, retry_in = ?self.config.sync_period, "maps cannot be made larger");
                    problems.push(format!(
                        "cannot be made larger: {error}; Services that do not fit are not served"
                    ));
                }
                self.grow_at = Instant::now() + self.config.sync_period;
                // The refused Services are told so.
                self.room |= !self.stuck;
                self.stuck = !self.refused.is_empty();
            }
        }
        self.report.set("maps".to_owned(), problems);
        true
    }

    /// Has the Services that had no room tried again if there may be some. Nothing else makes room: a change of another
    /// Service is no reason to plan them.
    pub(super) fn try_refused_again(&mut self) {
        if std::mem::take(&mut self.room) {
            self.queue.try_again(self.refused.iter());
        }
    }

    /// Notes Services whose frontends, newly theirs, had no room. The Services are told so when they are tried again.
    pub(super) fn refuse(&mut self, others: BTreeMap<ObjectKey, Vec<String>>) {
        self.queue.try_again(others.keys());
        self.refused.extend(others.into_keys());
    }

    /// Takes the refused Services whose turn it is.
    pub(super) fn take_refused(&mut self) -> Vec<ObjectKey> {
        let mut queue = std::mem::take(&mut self.queue);
        let taken = queue.take_again(|service| self.refused.contains(service).then(|| self.weight(service)));
        self.queue = queue;
        taken
    }

    /// Gives back the numbers that have waited for the grace period.
    pub(super) fn release(&mut self, freed: Freed) {
        let Some(Programmed { model, grace, .. }) = &mut self.programmed else { return };
        model.release(freed);
        grace.begin(sys::grace_period);
        self.room = true;
    }
}
