//! Objects that cannot be used: a line in the log for each, and a problem as long as it is so.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::shares::{Shares, tenant_of};
use crate::sources::Problem;

/// Lines of the log that a namespace has at once.
const LINES: u32 = 50;
/// It has one more each time this much has passed.
const PER_LINE: Duration = Duration::from_secs(10);
/// Objects of a namespace that are named as problems.
const NAMED: usize = 64;

/// All of them.
pub(super) struct Unusable {
    lines: Shares,
    /// By namespace and by the name that problems give to the object.
    namespaces: BTreeMap<String, BTreeMap<String, Reason>>,
    changed: bool,
}

struct Reason {
    text: String,
    /// The list that was the last one when it was told.
    list: u64,
}

impl Unusable {
    pub(super) fn new() -> Self {
        Self { lines: Shares::new(LINES, PER_LINE), namespaces: BTreeMap::new(), changed: false }
    }

    /// An object cannot be used. `list` is the number of the list of its kind that came last.
    pub(super) fn note(&mut self, problem: Problem, list: u64) {
        let Problem { object, reason: text } = problem;
        let namespace = tenant_of(&object);
        if let Some(unlogged) = self.lines.take(namespace, Instant::now()) {
            tracing::warn!(object, reason = text, unlogged, "unusable object");
        }
        let named = self.namespaces.entry(namespace.to_owned()).or_default();
        if named.len() >= NAMED && !named.contains_key(&object) {
            return;
        }
        let reason = Reason { text: text.clone(), list };
        self.changed |= named.insert(object, reason).is_none_or(|before| before.text != text);
    }

    /// An object can be used, or is gone.
    pub(super) fn mended(&mut self, object: &str) {
        if let Some(named) = self.namespaces.get_mut(tenant_of(object)) {
            self.changed |= named.remove(object).is_some();
            if named.is_empty() {
                self.namespaces.remove(tenant_of(object));
            }
        }
    }

    /// The list with this number is complete: whatever it did not have is gone.
    pub(super) fn list_ends(&mut self, kind: &str, list: u64) {
        let (prefix, mut gone) = (format!("{kind} "), false);
        for named in self.namespaces.values_mut() {
            let before = named.len();
            named.retain(|object, reason| reason.list == list || !object.starts_with(&prefix));
            gone |= named.len() < before;
        }
        self.namespaces.retain(|_, named| !named.is_empty());
        self.changed |= gone;
    }

    /// Whether the problems are others than at the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The whole list of problems.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        let all = self.namespaces.values().flatten();
        all.map(|(object, reason)| Problem { object: object.clone(), reason: reason.text.clone() })
    }
}
