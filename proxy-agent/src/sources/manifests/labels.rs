//! Index of objects by their labels, and lookup by selectors.

use std::collections::{BTreeMap, HashMap};

/// Labels of an object, or the labels that a selector demands.
pub(super) type Labels = BTreeMap<String, String>;

/// Objects of a namespace with their labels.
pub(super) struct Labelled<'a, T> {
    objects: Vec<(&'a Labels, T)>,
    /// Indices into `objects` by label.
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

    /// Returns the objects that have all labels of a selector, in order; none if the selector is empty.
    pub(super) fn selected<'s>(&'s self, selector: &'s Labels) -> impl Iterator<Item = T> + use<'s, 'a, T> {
        let objects = self.candidates(selector).iter().filter_map(|place| self.objects.get(*place));
        objects
            .filter(|(labels, _)| selector.iter().all(|(key, value)| labels.get(key) == Some(value)))
            .map(|(_, object)| *object)
    }

    /// Returns the indices of the objects that have the rarest label of a selector.
    pub(super) fn candidates<'s>(&'s self, selector: &'s Labels) -> &'s [usize] {
        selector
            .iter()
            .map(|(key, value)| self.with.get(&(key.as_str(), value.as_str())).map_or(&[][..], Vec::as_slice))
            .min_by_key(|places| places.len())
            .unwrap_or_default()
    }
}
