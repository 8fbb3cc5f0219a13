//! Objects by their labels, and what selectors find among them.

use std::collections::{BTreeMap, HashMap};

/// Labels, or what a selector wants them to be.
pub(in super::super) type Labels = BTreeMap<String, String>;

/// Objects of a namespace with their labels.
pub(super) struct Labelled<'a, T> {
    objects: Vec<(&'a Labels, T)>,
    /// Places in `objects`.
    with: HashMap<(&'a str, &'a str), Vec<usize>>,
}

impl<'a, T: Copy> Labelled<'a, T> {
    pub(super) fn new(objects: impl Iterator<Item = (&'a Labels, T)>) -> Self {
        let objects: Vec<_> = objects.collect();
        let mut with: HashMap<_, Vec<usize>> = HashMap::new();
        for (place, (labels, _)) in objects.iter().enumerate() {
            for (key, value) in *labels {
                with.entry((key.as_str(), value.as_str())).or_default().push(place);
            }
        }
        Self { objects, with }
    }

    /// Those that have all labels of a selector, in order; none if it is empty.
    pub(super) fn selected<'s>(&'s self, selector: &'s Labels) -> impl Iterator<Item = T> + use<'s, 'a, T> {
        let objects = self.candidates(selector).iter().filter_map(|place| self.objects.get(*place));
        let has_all = |labels: &Labels| selector.iter().all(|(key, value)| labels.get(key) == Some(value));
        objects.filter(move |(labels, _)| has_all(labels)).map(|(_, object)| *object)
    }

    /// The places of those that have the rarest of the labels of a selector.
    pub(super) fn candidates<'s>(&'s self, selector: &'s Labels) -> &'s [usize] {
        let with = |(key, value): (&'s String, &'s String)| -> &'s [usize] {
            self.with.get(&(key.as_str(), value.as_str())).map_or(&[], Vec::as_slice)
        };
        selector.iter().map(with).min_by_key(|places| places.len()).unwrap_or_default()
    }
}
