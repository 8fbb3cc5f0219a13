//! One copy of every string and hint that many objects repeat: namespaces, Service and port names, zones.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::reconcile::cluster::Hints;

/// Number of values in a pool at which unused values are removed.
const SWEEP_AT: usize = 1024;

/// Pools of shared values.
#[derive(Debug, Default)]
pub(super) struct Shared {
    strings: Pool<str>,
    hints: Pool<Hints>,
}

impl Shared {
    /// Returns the shared copy of `text`.
    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        self.strings.get(text, |text| Arc::from(text))
    }

    /// Returns the shared copy of `hints`.
    pub(super) fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        self.hints.get(&hints, |hints| Arc::new(hints.clone()))
    }
}

#[derive(Debug)]
struct Pool<T: ?Sized> {
    values: BTreeSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { values: BTreeSet::new(), sweep_at: SWEEP_AT }
    }
}

impl<T: Ord + ?Sized> Pool<T> {
    fn get(&mut self, value: &T, make: impl FnOnce(&T) -> Arc<T>) -> Arc<T> {
        if let Some(found) = self.values.get(value) {
            return Arc::clone(found);
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = SWEEP_AT.max(self.values.len() * 2);
        }
        let made = make(value);
        self.values.insert(Arc::clone(&made));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one() {
        let mut shared = Shared::default();
        let zone = shared.string("za");
        assert!(Arc::ptr_eq(&zone, &shared.string("za")));
        let hints = Hints { zones: vec![zone], nodes: vec![] };
        assert!(Arc::ptr_eq(&shared.hints(hints.clone()), &shared.hints(hints)));
    }

    #[test]
    fn unused_values_are_forgotten() {
        let mut shared = Shared::default();
        let kept = shared.string("kept");
        for i in 0..10 * SWEEP_AT {
            shared.string(&format!("passing-{i}"));
        }
        assert!(shared.strings.values.len() <= SWEEP_AT, "{}", shared.strings.values.len());
        assert!(Arc::ptr_eq(&kept, &shared.string("kept")));
    }
}
