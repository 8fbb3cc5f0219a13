//! Who is programmed next: the loop takes as much at once as nobody notices, and looks for news in between.
//!
//! Light Services go before heavy ones, however many of those change; one that is heavier than a turn is programmed in parts,
//! one part a turn, and the next heavy one after it. So nobody waits for another one's large Service, nor that one for ever.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{DesiredPort, PortKey};
use crate::reconcile::plan::LostClaims;

/// What is programmed in one turn: frontends, endpoints and source ranges together, some milliseconds of work.
pub(super) const TURN: usize = 4_096;
/// What those cost that are tried again beside them: so much that others hardly notice, and all of them have their turn.
const AGAIN: usize = TURN / 4;

/// Services that have changed.
#[derive(Debug, Default)]
pub(super) struct Queue {
    light: BTreeSet<(usize, ObjectKey)>,
    weights: BTreeMap<ObjectKey, usize>,
    heavy: VecDeque<ObjectKey>,
    /// Those that had no room and may have some now.
    again: BTreeSet<ObjectKey>,
    /// The last of them that was tried: the next one is behind it.
    tried: Option<ObjectKey>,
    /// The one of which it is worked out what it wants.
    worked_out: Option<ObjectKey>,
    /// The one of which some parts have been programmed.
    begun: Option<Begun>,
}

impl Queue {
    /// Adds a Service that costs so much.
    pub(super) fn add(&mut self, service: ObjectKey, weight: usize) {
        if let Some(before) = self.weights.remove(&service) {
            self.light.remove(&(before, service.clone()));
        }
        // What has begun with an older state of it ends first.
        if weight > TURN || self.under_way() == Some(&service) {
            if !self.heavy.contains(&service) {
                self.heavy.push_back(service);
            }
        } else if !self.heavy.contains(&service) {
            self.light.insert((weight, service.clone()));
            self.weights.insert(service, weight);
        }
    }

    /// The light ones of this turn.
    pub(super) fn take_light(&mut self) -> Vec<ObjectKey> {
        let (mut taken, mut sum) = (Vec::new(), 0);
        while let Some((weight, service)) = self.light.pop_first() {
            sum += weight;
            if sum > TURN && !taken.is_empty() {
                self.light.insert((weight, service));
                break;
            }
            self.weights.remove(&service);
            taken.push(service);
        }
        taken
    }

    /// Tries those again that had no room, some in each turn.
    pub(super) fn try_again<'a>(&mut self, refused: impl Iterator<Item = &'a ObjectKey>) {
        self.again.extend(refused.cloned());
    }

    /// Those that are tried again in this turn, one after another by name, so that each has its turn. `weight` says what one
    /// costs, if it is still to be tried. A heavy one waits among the heavy ones.
    pub(super) fn take_again(&mut self, weight: impl Fn(&ObjectKey) -> Option<usize>) -> Vec<ObjectKey> {
        let (mut taken, mut sum) = (Vec::new(), 0);
        while sum < AGAIN
            && let Some(service) = self.next_again()
        {
            self.again.remove(&service);
            self.tried = Some(service.clone());
            let Some(weight) = weight(&service) else { continue };
            // The heavy one ends this, too: one a turn is as many as are programmed.
            sum += weight;
            if weight > TURN {
                self.add(service, weight);
            } else if !self.weights.contains_key(&service) && !self.is_heavy(&service) {
                taken.push(service);
            }
        }
        taken
    }

    fn next_again(&self) -> Option<ObjectKey> {
        let behind = self
            .tried
            .as_ref()
            .and_then(|tried| self.again.range((Bound::Excluded(tried), Bound::Unbounded)).next());
        behind.or_else(|| self.again.first()).cloned()
    }

    fn is_heavy(&self, service: &ObjectKey) -> bool {
        self.under_way() == Some(service) || self.heavy.contains(service)
    }

    /// The heavy one that is being worked out or has begun.
    fn under_way(&self) -> Option<&ObjectKey> {
        self.begun.as_ref().map(|begun| &begun.service).or(self.worked_out.as_ref())
    }

    /// The heavy one that goes on, or else the one whose turn it is to begin: nobody, until what that wants is worked out and
    /// put back.
    pub(super) fn take_heavy(&mut self) -> Option<Heavy> {
        match self.begun.take() {
            Some(begun) => Some(Heavy::GoesOn(begun)),
            None if self.worked_out.is_some() => None,
            None => {
                self.worked_out = self.heavy.pop_front();
                self.worked_out.clone().map(Heavy::Begins)
            }
        }
    }

    /// Goes on with it in the next turn.
    pub(super) fn put_back(&mut self, begun: Begun) {
        (self.begun, self.worked_out) = (Some(begun), None);
    }

    /// Whether there is nobody for the next turn.
    pub(super) fn is_empty(&self) -> bool {
        let no_heavy = self.heavy.is_empty() || self.worked_out.is_some();
        self.light.is_empty() && self.again.is_empty() && self.begun.is_none() && no_heavy
    }

    /// Forgets everybody: all there is is programmed at once.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A heavy Service.
#[derive(Debug)]
pub(super) enum Heavy {
    /// What it wants has to be worked out.
    Begins(ObjectKey),
    /// Some of it has.
    GoesOn(Begun),
}

/// A Service of which some parts have been programmed.
#[derive(Debug)]
pub(super) struct Begun {
    /// Which.
    pub(super) service: ObjectKey,
    /// `metadata.creationTimestamp`.
    pub(super) created: i64,
    /// What is said of it besides.
    pub(super) problems: Vec<String>,
    /// What had no room.
    pub(super) refused: Vec<String>,
    /// What it claims and others have.
    pub(super) lost: LostClaims,
    /// Connected UDP sockets may lead to where they should not any more.
    pub(super) udp_stale: bool,
    /// Ports that remain, the next one last.
    ports: Vec<DesiredPort>,
    gone: Vec<Arc<PortKey>>,
}

impl Begun {
    /// Nothing has been programmed of these ports, and nothing removed of those that are `gone`; both are in order.
    pub(super) fn new(
        service: ObjectKey,
        created: i64,
        mut ports: Vec<DesiredPort>,
        mut gone: Vec<Arc<PortKey>>,
        problems: Vec<String>,
    ) -> Self {
        ports.reverse();
        gone.reverse();
        let (refused, lost) = (Vec::new(), LostClaims::default());
        Self { service, created, problems, refused, lost, udp_stale: false, ports, gone }
    }

    /// The ports of the next part, in order, and those that go with it. `weight` says what it costs to remove a port.
    pub(super) fn next(
        &mut self,
        weight: impl Fn(&PortKey) -> usize,
    ) -> (Vec<DesiredPort>, Vec<Arc<PortKey>>) {
        let mut left = TURN;
        let ports = take(&mut self.ports, &mut left, |port| self::weight(port) + weight(&port.key));
        let gone = match self.ports.is_empty() {
            true => take(&mut self.gone, &mut left, |key| weight(key)),
            false => Vec::new(),
        };
        (ports, gone)
    }

    /// Whether there is no next part.
    pub(super) fn is_done(&self) -> bool {
        self.ports.is_empty() && self.gone.is_empty()
    }
}

/// At least one, and as many as there is time left for.
fn take<T>(from: &mut Vec<T>, left: &mut usize, weight: impl Fn(&T) -> usize) -> Vec<T> {
    let mut taken = Vec::new();
    while let Some(next) = from.pop_if(|next| taken.is_empty() || weight(next) <= *left) {
        *left = left.saturating_sub(weight(&next));
        taken.push(next);
    }
    taken
}

fn weight(port: &DesiredPort) -> usize {
    1 + port.frontends.len() + port.backends.len() + port.source_ranges.len()
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::SlotRange;
    use proxy_common::addr::Family;

    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("a", name)
    }

    fn taken(queue: &mut Queue) -> Vec<String> {
        queue.take_light().iter().map(|key| key.name.to_string()).collect()
    }

    fn port_key(number: usize) -> Arc<PortKey> {
        let port_name = format!("{number:02}").into();
        Arc::new(PortKey { service: key("s"), port_name, proto: 6, family: Family::V4 })
    }

    /// A port that costs a sixteenth of a turn.
    fn port(number: usize) -> DesiredPort {
        DesiredPort {
            key: PortKey::clone(&port_key(number)),
            frontends: Vec::new(),
            backends: Vec::new(),
            empty_local: SlotRange::REJECT,
            affinity_seconds: 0,
            source_ranges: vec![
                proxy_common::addr::Prefix::new(proxy_common::addr::Addr::ZERO, 0).unwrap();
                TURN / 16 - 1
            ],
        }
    }

    #[test]
    fn the_light_go_first_and_no_more_at_once_than_nobody_notices() {
        let mut queue = Queue::default();
        for (name, weight) in [("a", TURN), ("b", TURN / 2), ("c", TURN / 2), ("d", 1), ("e", TURN + 1)] {
            queue.add(key(name), weight);
        }
        assert_eq!(taken(&mut queue), ["d", "b"]);
        queue.add(key("late"), 2);
        // It has become lighter.
        queue.add(key("a"), 1);
        assert_eq!(taken(&mut queue), ["a", "late", "c"]);
        assert_eq!(taken(&mut queue), [""; 0]);
        assert!(!queue.is_empty(), "the heavy one");
        assert!(matches!(queue.take_heavy(), Some(Heavy::Begins(found)) if found == key("e")));
        assert!(queue.is_empty());
        // Until it is known what that one wants, another heavy one is nothing for the next turn.
        queue.add(key("f"), TURN + 1);
        assert!(queue.is_empty() && queue.take_heavy().is_none());
        queue.put_back(Begun::new(key("e"), 0, Vec::new(), Vec::new(), Vec::new()));
        assert!(!queue.is_empty());
    }

    #[test]
    fn heavy_ones_go_one_after_another_however_often_they_change() {
        let mut queue = Queue::default();
        for name in ["x", "y", "x"] {
            queue.add(key(name), TURN * 2);
        }
        let Some(Heavy::Begins(first)) = queue.take_heavy() else { panic!("nobody") };
        assert_eq!(first, key("x"));
        let begun = |service| Begun::new(service, 0, vec![port(0)], Vec::new(), Vec::new());
        queue.put_back(begun(first));
        // It has changed, and even become light: what has begun ends first, and another one's turn comes before.
        queue.add(key("x"), TURN * 2);
        queue.add(key("x"), 1);
        assert_eq!(taken(&mut queue), [""; 0]);
        assert!(matches!(queue.take_heavy(), Some(Heavy::GoesOn(begun)) if begun.service == key("x")));
        for name in ["y", "x"] {
            assert!(matches!(queue.take_heavy(), Some(Heavy::Begins(found)) if found == key(name)), "{name}");
            queue.put_back(begun(key(name)));
            assert!(matches!(queue.take_heavy(), Some(Heavy::GoesOn(_))));
        }
        queue.put_back(begun(key("z")));
        queue.clear();
        assert!(queue.is_empty());
    }

    #[test]
    fn who_had_no_room_is_tried_a_few_at_a_time_and_everybody_in_the_end() {
        let mut queue = Queue::default();
        let refused: BTreeSet<ObjectKey> = (0..10).map(|number| key(&format!("s{number}"))).collect();
        let names = |taken: Vec<ObjectKey>| taken.iter().map(|key| key.name.to_string()).collect::<Vec<_>>();
        let third = |_: &ObjectKey| Some(AGAIN / 3 + 1);
        queue.try_again(refused.iter());
        assert!(!queue.is_empty());
        assert_eq!(names(queue.take_again(third)), ["s0", "s1", "s2"]);
        // However often there is room, the last ones have their turn.
        queue.try_again(refused.iter());
        assert_eq!(names(queue.take_again(third)), ["s3", "s4", "s5"]);
        queue.try_again(refused.iter());
        // One that waits with its own change does not go twice, nor does one that is no longer refused.
        queue.add(key("s6"), 1);
        let weight = |service: &ObjectKey| (&*service.name != "s7").then_some(AGAIN / 3 + 1);
        assert_eq!(names(queue.take_again(weight)), ["s8", "s9"]);
        assert_eq!(names(queue.take_again(third)), ["s0", "s1", "s2"]);
        // A heavy one waits with the heavy ones, once.
        let mut queue = Queue::default();
        for _ in 0..2 {
            queue.try_again(refused.iter().take(2));
            assert_eq!(names(queue.take_again(|_| Some(TURN + 1))), [""; 0]);
        }
        assert_eq!(queue.heavy, [key("s0"), key("s1")]);
    }

    #[test]
    fn parts_are_as_large_as_a_turn_and_what_goes_goes_last() {
        let gone: Vec<_> = (50..60).map(port_key).collect();
        let mut begun = Begun::new(key("s"), 0, (0..20).map(port).collect(), gone, Vec::new());
        // Removing one costs a quarter of a turn, and so does replacing number 18.
        let weight = |key: &PortKey| match &*key.port_name {
            "18" => TURN / 4,
            name if name < "50" => 0,
            _ => TURN / 4,
        };
        let mut parts = Vec::new();
        while !begun.is_done() {
            let (ports, gone) = begun.next(weight);
            parts.push((ports.len(), gone.len()));
        }
        assert_eq!(parts, [(16, 0), (4, 2), (0, 4), (0, 4)]);
        // What is heavier than a turn is a part of its own.
        let mut begun = Begun::new(key("s"), 0, (0..2).map(port).collect(), Vec::new(), Vec::new());
        assert_eq!(begun.next(|_| TURN).0.len(), 1);
        assert_eq!(begun.next(|_| TURN).0.len(), 1);
        assert!(begun.is_done());
    }
}
