//! Objects that cannot be used. Each is a problem until it can be used or is gone. (The code that reports problems also
//! logs them.)

use std::collections::BTreeMap;

use crate::reconcile::shares::tenant_of;
use crate::sources::update::Problem;

/// Number of objects of a namespace that are named in problems; the others are counted.
const NAMED: usize = 64;

/// All objects that cannot be used.
#[derive(Default)]
pub(super) struct Unusable {
    /// Reasons by namespace and by the object's name in problems.
    namespaces: BTreeMap<String, BTreeMap<String, Reason>>,
    changed: bool,
}

/// Number of a list of all objects of a kind: lists are counted from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ListNumber(u64);

impl ListNumber {
    /// Returns the number of the list after this one.
    pub(super) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

struct Reason {
    text: String,
    /// Number of the latest list of the object's kind at the time of the note.
    list: ListNumber,
}

impl Unusable {
    /// Notes that an object cannot be used. `list` is the number of the latest list of the object's kind.
    pub(super) fn note(&mut self, problem: Problem, list: ListNumber) {
        let Problem { object, reason: text } = problem;
        let named = self.namespaces.entry(tenant_of(&object).to_owned()).or_default();
        let reason = Reason { text: text.clone(), list };
        self.changed |= named.insert(object, reason).is_none_or(|before| before.text != text);
    }

    /// Notes that an object can be used or is gone.
    pub(super) fn mended(&mut self, object: &str) {
        if let Some(named) = self.namespaces.get_mut(tenant_of(object)) {
            self.changed |= named.remove(object).is_some();
            if named.is_empty() {
                self.namespaces.remove(tenant_of(object));
            }
        }
    }

    /// Removes the objects of `kind` that the complete list with this number did not have.
    pub(super) fn list_ends(&mut self, kind: &str, list: ListNumber) {
        let (prefix, mut gone) = (format!("{kind} "), false);
        for named in self.namespaces.values_mut() {
            let before = named.len();
            named.retain(|object, reason| reason.list == list || !object.starts_with(&prefix));
            gone |= named.len() < before;
        }
        self.namespaces.retain(|_, named| !named.is_empty());
        self.changed |= gone;
    }

    /// Returns whether the problems have changed since the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns all problems: for each namespace some objects by name, and the number of the others.
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
        (0..NAMED + 2).for_each(|number| note(&mut unusable, number, ListNumber(1)));
        unusable.note(
            Problem { object: "EndpointSlice b/s".to_owned(), reason: "why".to_owned() },
            ListNumber(1),
        );
        assert_eq!(told(&unusable).len(), NAMED + 2);
        assert_eq!(told(&unusable)[NAMED..], ["Namespace a", "EndpointSlice b/s"]);
        assert!(unusable.have_changed() && !unusable.have_changed());
        unusable.mended("Service a/s000");
        unusable.mended("Service a/s000");
        note(&mut unusable, 1, ListNumber(2));
        unusable.list_ends("Service", ListNumber(2));
        assert_eq!(told(&unusable), ["Service a/s001", "EndpointSlice b/s"]);
        assert!(unusable.have_changed());
    }

    fn told(unusable: &Unusable) -> Vec<String> {
        unusable.problems().map(|problem| problem.object).collect::<Vec<_>>()
    }

    fn note(unusable: &mut Unusable, number: usize, list: ListNumber) {
        unusable.note(Problem { object: format!("Service a/s{number:03}"), reason: "why".to_owned() }, list);
    }
}
