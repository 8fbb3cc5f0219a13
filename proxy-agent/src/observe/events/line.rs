//! Queue of Events that wait to be written: each Event once, not too many, and no namespace behind all Events of
//! another. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::event::{Event, Regarding};
use crate::reconcile::shares::Shares;

/// Time after which the same Event may be taken again. An Event that has waited this long is not written any more.
const FORGET: Duration = Duration::from_secs(600);
/// Number of Events that may be written at once.
const BURST: u32 = 25;
/// Time after which one more Event may be written.
const PER_EVENT: Duration = Duration::from_secs(10);
/// Number of Events that one namespace may hand over at once.
const SHARE: u32 = 10;
/// Time after which a namespace may hand over one more Event.
const PER_SHARE: Duration = Duration::from_secs(60);
/// Number of Events that may wait.
const PLACES: usize = 1_024;

/// Fate of an Event that is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The Event waits for its turn.
    Waits,
    /// The Event waits in the place of another one, of the namespace with the most waiting Events.
    Displaces,
    /// The same Event has been handed over not long ago.
    Known,
    /// The namespace of the Event has handed over too many others.
    TooMany,
}

/// Next thing to do.
#[derive(Debug)]
pub(super) enum Next<D> {
    /// Write this Event.
    Write(Event, D),
    /// Drop an Event that has waited too long.
    Late(D),
    /// Write nothing before that time, unless the node has an Event.
    Rest(Instant),
    /// Nothing waits.
    Nothing,
}

/// The queue. Each Event comes with a `D`.
#[derive(Debug)]
pub(super) struct Line<D> {
    /// Waiting Events by namespace; the empty one is for the node's own.
    waiting: BTreeMap<Arc<str>, VecDeque<(Event, D, Instant)>>,
    /// Namespaces with waiting Events, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    places: usize,
    shares: Shares,
    taken: BTreeMap<Event, Instant>,
    /// Number of Events that may be written, as of `at`.
    tokens: u32,
    /// Time up to which `tokens` has been counted.
    at: Instant,
}

impl<D> Line<D> {
    /// Makes a queue in which nothing waits, and from which nothing has been written before `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            waiting: BTreeMap::new(),
            turns: VecDeque::new(),
            places: PLACES,
            shares: Shares::new(SHARE, PER_SHARE),
            taken: BTreeMap::new(),
            tokens: BURST,
            at: now,
        }
    }

    /// Takes an Event in, if it may wait.
    pub(super) fn take(&mut self, event: Event, with: D, now: Instant) -> Fate {
        if self.taken.get(&event).is_some_and(|at| now.saturating_duration_since(*at) < FORGET) {
            return Fate::Known;
        }
        let tenant: Arc<str> = match &event.regarding {
            Regarding::Node => "".into(),
            Regarding::Service(key) => Arc::clone(&key.namespace),
        };
        if !tenant.is_empty() && self.shares.take(&tenant, now).is_none() {
            return Fate::TooMany;
        }
        let full = self.waiting.values().map(VecDeque::len).sum::<usize>() >= self.places;
        if full {
            self.displace();
        }
        self.taken.retain(|_, at| now.saturating_duration_since(*at) < FORGET);
        self.taken.insert(event.clone(), now);
        let waiting = self.waiting.entry(Arc::clone(&tenant)).or_default();
        if waiting.is_empty() {
            self.turns.push_back(tenant);
        }
        waiting.push_back((event, with, now));
        if full { Fate::Displaces } else { Fate::Waits }
    }

    /// Removes the last Event of the namespace with the most waiting Events.
    fn displace(&mut self) {
        let Some((tenant, waiting)) = self.waiting.iter_mut().max_by_key(|(_, waiting)| waiting.len()) else {
            return;
        };
        if let Some((event, ..)) = waiting.pop_back() {
            self.taken.remove(&event);
        }
        if waiting.is_empty() {
            let tenant = Arc::clone(tenant);
            self.waiting.remove(&tenant);
            self.turns.retain(|turn| *turn != tenant);
        }
    }

    /// Returns the next thing to do: the node's own Events come first, then one of each namespace in turn.
    pub(super) fn next(&mut self, now: Instant) -> Next<D> {
        while self.tokens < BURST && now.saturating_duration_since(self.at) >= PER_EVENT {
            self.tokens += 1;
            self.at += PER_EVENT;
        }
        if self.tokens == BURST {
            self.at = now;
        }
        let of_node = self.waiting.contains_key("");
        if of_node {
            self.turns.retain(|turn| !turn.is_empty());
            self.turns.push_front("".into());
        } else if self.turns.is_empty() {
            return Next::Nothing;
        } else if self.tokens == 0 {
            return Next::Rest(self.at + PER_EVENT);
        }
        let Some(tenant) = self.turns.pop_front() else { return Next::Nothing };
        let Some(waiting) = self.waiting.get_mut(&tenant) else { return Next::Nothing };
        let next = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&tenant);
        } else {
            self.turns.push_back(tenant);
        }
        match next {
            None => Next::Nothing,
            Some((_, with, at)) if now.saturating_duration_since(at) >= FORGET => Next::Late(with),
            Some((event, with, _)) => {
                self.tokens -= u32::from(!of_node);
                Next::Write(event, with)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::cluster::ObjectKey;

    fn event(namespace: &str, name: &str, note: &str) -> Event {
        Event::problem(ObjectKey::new(namespace, name), note.to_owned())
    }

    /// Returns the namespaces of the Events that may be written at `now`, in that order.
    fn written(line: &mut Line<()>, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| match line.next(now) {
            Next::Write(Event { regarding: Regarding::Service(key), .. }, ()) => {
                Some(key.namespace.to_string())
            }
            Next::Write(Event { regarding: Regarding::Node, .. }, ()) => Some("node".to_owned()),
            Next::Late(()) | Next::Rest(_) | Next::Nothing => None,
        })
        .collect()
    }

    /// Returns the number of Events that are taken in out of a thousand of a namespace.
    fn flood(line: &mut Line<()>, namespace: &str, now: Instant) -> usize {
        let note = format!("{now:?}");
        let events = (0..1_000).map(|n| event(namespace, &n.to_string(), &note));
        let fates = events.map(|event| line.take(event, (), now));
        fates.filter(|fate| *fate != Fate::TooMany).count()
    }

    #[test]
    fn the_same_is_taken_once_in_a_while() {
        let t0 = Instant::now();
        let mut line = Line::new(t0);
        assert_eq!(line.take(event("a", "s", "x"), (), t0), Fate::Waits);
        assert_eq!(line.take(event("a", "s", "x"), (), t0), Fate::Known);
        assert_eq!(written(&mut line, t0), ["a"]);
        assert_eq!(line.take(event("a", "s", "x"), (), t0 + FORGET / 2), Fate::Known);
        // An Event with another note, object or reason is another one.
        let port = Event::check_port_failed(ObjectKey::new("a", "s"), "x".to_owned());
        for other in [event("a", "s", "y"), event("a", "t", "x"), event("b", "s", "x"), port] {
            assert_eq!(line.take(other, (), t0), Fate::Waits);
        }
        assert_eq!(line.take(event("a", "s", "x"), (), t0 + FORGET), Fate::Waits);
        assert_eq!(line.taken.len(), 1, "the memory is bounded");
    }

    #[test]
    fn a_flood_is_cut_off_and_passes_drop_by_drop() {
        let t0 = Instant::now();
        let mut line = Line::new(t0);
        assert_eq!(flood(&mut line, "a", t0), SHARE as usize);
        assert_eq!(written(&mut line, t0).len(), SHARE as usize);
        assert_eq!(flood(&mut line, "a", t0 + PER_SHARE - Duration::from_millis(1)), 0);
        assert_eq!(flood(&mut line, "a", t0 + PER_SHARE), 1);
        assert_eq!(flood(&mut line, "a", t0 + 1_000 * PER_SHARE), SHARE as usize);
        // All namespaces together write no more than the API server can bear.
        let now = t0 + 2_000 * PER_SHARE;
        let mut line = Line::new(now);
        for namespace in 0..20 {
            flood(&mut line, &namespace.to_string(), now);
        }
        assert_eq!(written(&mut line, now).len(), BURST as usize);
        assert!(matches!(line.next(now), Next::Rest(until) if until == now + PER_EVENT));
        assert_eq!(written(&mut line, now + PER_EVENT).len(), 1);
        assert_eq!(written(&mut line, now + 3 * PER_EVENT).len(), 2);
    }

    #[test]
    fn who_says_little_is_heard_beside_who_says_much() {
        let t0 = Instant::now();
        let mut line = Line::new(t0);
        for namespace in ["a", "b", "c"] {
            flood(&mut line, namespace, t0);
        }
        assert_eq!(line.take(event("quiet", "s", "x"), (), t0), Fate::Waits);
        assert_eq!(written(&mut line, t0)[..5], ["a", "b", "c", "quiet", "a"]);
        // With no tokens left the node's Event is written all the same, and a new namespace waits for one turn of each
        // other.
        assert_eq!(line.take(event("late", "s", "x"), (), t0), Fate::Waits);
        assert_eq!(line.take(Event::starting(), (), t0), Fate::Waits);
        assert_eq!(written(&mut line, t0), ["node"]);
        assert!(written(&mut line, t0 + 4 * PER_EVENT).contains(&"late".to_owned()));
    }

    #[test]
    fn the_places_are_bounded_and_those_with_most_make_room() {
        let t0 = Instant::now();
        let mut line = Line { places: 12, ..Line::new(t0) };
        assert_eq!(flood(&mut line, "a", t0), SHARE as usize);
        let mut others = (0..6).map(|n| line.take(event(&format!("b{n}"), "s", "x"), (), t0));
        assert!(others.by_ref().take(2).all(|fate| fate == Fate::Waits));
        assert!(others.all(|fate| fate == Fate::Displaces));
        let mut all = written(&mut line, t0);
        all.sort();
        assert_eq!(all, ["a", "a", "a", "a", "a", "a", "b0", "b1", "b2", "b3", "b4", "b5"]);
        // An Event that has waited too long is not written.
        line.take(event("a", "t", "x"), (), t0 + PER_SHARE);
        assert!(matches!(line.next(t0 + PER_SHARE + FORGET), Next::Late(())));
    }
}
