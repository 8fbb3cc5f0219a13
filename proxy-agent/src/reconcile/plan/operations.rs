//! A plan: ordered operations, the numbers that they free, and refusals.

use std::collections::BTreeMap;

use super::part::REASONS;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::model::Freed;
use crate::reconcile::store::Op;

/// Operations in order, and the numbers that they free.
#[derive(Debug, Default)]
pub struct Plan {
    /// Operations, to be carried out from first to last.
    pub ops: Vec<Op>,
    /// Numbers to give back after a grace period.
    pub freed: Freed,
    /// Services of which something could not be planned, with the reasons. Their refused parts keep their previous
    /// state.
    pub refused: BTreeMap<ObjectKey, Vec<String>>,
    /// Whether connected UDP sockets may no longer be where their VIP leads.
    pub(crate) udp_stale: bool,
}

impl Plan {
    pub(super) fn refuse(&mut self, service: &ObjectKey, reason: std::fmt::Arguments<'_>) {
        let reasons = self.refused.entry(service.clone()).or_default();
        if reasons.len() < REASONS {
            reasons.push(reason.to_string());
        }
    }
}

/// A map that is too small for a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "map {map} is full: {need} more needed, {available} free, and it could not be made larger; `proxy-agent status` \
     says why"
)]
pub(crate) struct Full {
    pub(super) map: &'static str,
    pub(super) need: usize,
    pub(super) available: u32,
}
