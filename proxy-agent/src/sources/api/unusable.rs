//! Objects that cannot be used: problems as long as it is so. (Who tells problems writes them into the log, too.)

use std::collections::BTreeMap;

use crate::reconcile::shares::tenant_of;
use crate::sources::Problem;

/// Objects of a namespace that are named as problems.
const NAMED: usize = 64;

/// All of them.
#[derive(Default)]
pub(super) struct Unusable {
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
    /// An object cannot be used. `list` is the number of the list of its kind that came last.
    pub(super) fn note(&mut self, problem: Problem, list: u64) {
        let Problem { object, reason: text } = problem;
        let named = self.namespaces.entry(tenant_of(&object).to_owned()).or_default();
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

    /// The whole list of problems: of each namespace some by name, and how many more there are.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.namespaces.iter().flat_map(|(namespace, objects)| {
            let named = objects
                .iter()
                .take(NAMED)
                .map(|(object, reason)| Problem { object: object.clone(), reason: reason.text.clone() });
            let more = objects.len().checked_sub(NAMED).filter(|more| *more > 0).map(|more| Problem {
                object: format!("Namespace {namespace}"),
                reason: format!("{more} more objects cannot be used, which are not named here"),
            });
            named.chain(more)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_named_and_the_rest_is_counted() {
        let mut unusable = Unusable::default();
        let note = |unusable: &mut Unusable, number: usize, list| {
            unusable
                .note(Problem { object: format!("Service a/s{number:03}"), reason: "why".to_owned() }, list);
        };
        (0..NAMED + 2).for_each(|number| note(&mut unusable, number, 1));
        unusable.note(Problem { object: "EndpointSlice b/s".to_owned(), reason: "why".to_owned() }, 1);
        let told =
            |unusable: &Unusable| unusable.problems().map(|problem| problem.object).collect::<Vec<_>>();
        assert_eq!(told(&unusable).len(), NAMED + 2);
        assert_eq!(told(&unusable)[NAMED..], ["Namespace a", "EndpointSlice b/s"]);
        assert!(unusable.have_changed() && !unusable.have_changed());
        unusable.mended("Service a/s000");
        unusable.mended("Service a/s000");
        note(&mut unusable, 1, 2);
        unusable.list_ends("Service", 2);
        assert_eq!(told(&unusable), ["Service a/s001", "EndpointSlice b/s"]);
        assert!(unusable.have_changed());
    }
}
