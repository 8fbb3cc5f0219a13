//! Services that had no room in the maps: when they are tried again, when maps are made larger, and when the Services
//! are told. Pure.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::reconcile::cluster::ObjectKey;

/// Services of which some part did not fit into the maps, and what comes of that.
#[derive(Debug)]
pub(super) struct Shortage {
    refused: BTreeSet<ObjectKey>,
    /// Whether the Services have to be tried again: there may be room, or they have to be told that there will be none.
    again: bool,
    /// Whether the maps could not be made larger at the last attempt, and some Service still does not fit.
    stuck: bool,
    /// Time before which maps are not made larger.
    grow_at: Instant,
}

impl Shortage {
    /// Makes the state without any such Service, in which maps may be made larger from `now` on.
    pub(super) fn new(now: Instant) -> Self {
        Self { refused: BTreeSet::new(), again: false, stuck: false, grow_at: now }
    }

    /// Adds Services that have just had no room.
    pub(super) fn refuse(&mut self, services: impl IntoIterator<Item = ObjectKey>) {
        self.refused.extend(services);
    }

    /// Takes in that a Service has been programmed as a whole, with or without room for all of it.
    pub(super) fn programmed(&mut self, service: &ObjectKey, has_room: bool) {
        match has_room {
            true => self.refused.remove(service),
            false => self.refused.insert(service.clone()),
        };
        self.stuck &= !self.refused.is_empty();
    }

    /// Returns whether the Service has to be tried again.
    pub(super) fn contains(&self, service: &ObjectKey) -> bool {
        self.refused.contains(service)
    }

    /// Returns whether Services that do not fit have to be told so. It is too early to complain before the maps have
    /// grown, or could not grow.
    pub(super) fn is_told(&self) -> bool {
        self.stuck
    }

    /// Takes in that numbers have come back.
    pub(super) fn make_room(&mut self) {
        self.again = true;
    }

    /// Takes the Services that have to be tried again, if there may be room for them. Nothing else makes room: a change
    /// of another Service is no reason to plan them.
    pub(super) fn take_again(&mut self) -> impl Iterator<Item = &ObjectKey> {
        let again = std::mem::take(&mut self.again);
        self.refused.iter().filter(move |_| again)
    }

    /// Returns whether the maps have to be made larger now: something did not fit, or soon would not (`is_tight`).
    pub(super) fn wants_growth(&self, is_tight: bool, now: Instant) -> bool {
        (is_tight || !self.refused.is_empty()) && now >= self.grow_at
    }

    /// Takes in that the maps have been made larger. Everything is programmed next.
    pub(super) fn grown(&mut self) {
        self.stuck = false;
    }

    /// Takes in that the maps could not be made larger. That is tried again at `grow_at`; the first time, the Services
    /// are tried again so that they are told.
    pub(super) fn not_grown(&mut self, grow_at: Instant) {
        self.grow_at = grow_at;
        self.again |= !self.stuck;
        self.stuck = !self.refused.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PERIOD: Duration = Duration::from_secs(30);

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("a", name)
    }

    fn again(shortage: &mut Shortage) -> Vec<String> {
        shortage.take_again().map(|service| service.name.to_string()).collect()
    }

    #[test]
    fn maps_grow_for_what_does_not_fit_or_soon_would_not_and_after_a_failure_only_later() {
        let now = Instant::now();
        let mut shortage = Shortage::new(now);
        assert!(!shortage.wants_growth(false, now));
        assert!(shortage.wants_growth(true, now));
        shortage.refuse([key("x")]);
        assert!(shortage.wants_growth(false, now));
        shortage.not_grown(now + PERIOD);
        for is_tight in [true, false] {
            assert!(!shortage.wants_growth(is_tight, now + PERIOD - Duration::from_millis(1)));
            assert!(shortage.wants_growth(is_tight, now + PERIOD));
        }
        // Growth that has succeeded may be repeated at once: a Service may need more than was computed.
        shortage.grown();
        assert!(shortage.wants_growth(false, now + PERIOD));
        shortage.programmed(&key("x"), true);
        assert!(!shortage.wants_growth(false, now + PERIOD));
    }

    #[test]
    fn services_are_tried_again_when_room_may_have_come_and_once_to_be_told() {
        let now = Instant::now();
        let mut shortage = Shortage::new(now);
        shortage.refuse([key("x"), key("y")]);
        assert_eq!(again(&mut shortage), [""; 0], "no room has come");
        shortage.make_room();
        assert_eq!(again(&mut shortage), ["x", "y"]);
        assert_eq!(again(&mut shortage), [""; 0], "once");
        assert!(!shortage.is_told(), "the maps may still grow");
        shortage.not_grown(now);
        assert!(shortage.is_told());
        assert_eq!(again(&mut shortage), ["x", "y"], "to be told");
        // They have been told.
        shortage.not_grown(now);
        assert_eq!(again(&mut shortage), [""; 0]);
        shortage.grown();
        assert!(!shortage.is_told() && shortage.contains(&key("x")));
    }

    #[test]
    fn nothing_is_stuck_once_everything_fits() {
        let now = Instant::now();
        let mut shortage = Shortage::new(now);
        shortage.refuse([key("x"), key("y")]);
        shortage.not_grown(now);
        shortage.programmed(&key("x"), false);
        shortage.programmed(&key("y"), true);
        assert!(shortage.is_told() && shortage.contains(&key("x")) && !shortage.contains(&key("y")));
        shortage.programmed(&key("x"), true);
        assert!(!shortage.is_told());
        // A Service that does not fit from here on is told only after another attempt to grow.
        shortage.programmed(&key("z"), false);
        assert!(!shortage.is_told());
        // Maps that were only tight, and could not grow, leave nobody stuck.
        let mut tight = Shortage::new(now);
        tight.not_grown(now);
        assert!(!tight.is_told());
    }
}
