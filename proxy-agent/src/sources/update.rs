//! Messages from a source to the agent.

use crate::reconcile::cluster::Change;

/// Message that a source sends to the agent, in order.
#[derive(Debug)]
pub enum Update {
    /// Changes that belong together; all are applied before anything is programmed.
    Changes(Vec<Change>),
    /// Every kind has delivered its first full list. Sent once; nothing is programmed or pruned before it.
    Synced,
    /// All objects (or files) that cannot be used at present, each with the reason. Replaces the previous list.
    Problems(Vec<Problem>),
}

/// Problem that a user has to fix.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Object or file concerned: `Service ns/name`, or `file.yaml, document 2`.
    pub object: String,
    /// Description of the problem: the field, what is wrong with it, and the consequence.
    pub reason: String,
}

/// Returns what happens to an object that cannot be used, as the end of a sentence.
pub(super) const fn outcome(was_known: bool) -> &'static str {
    if was_known { "its last good state stays in force" } else { "it is ignored" }
}
