//! Order in which Services are programmed. The loop programs in one turn only so much that no other Service is delayed
//! noticeably, and looks for news between turns.
//!
//! Light Services go before heavy ones, however many heavy ones change. A Service that is heavier than a turn is
//! programmed in parts, one part a turn, and the next heavy one after it. So no Service waits for a large one, and
//! no large Service waits for ever.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use tokio::task::{JoinError, JoinHandle};

use super::heavy::Begun;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::plan::Wanted;

/// Size of what is programmed in one turn of the loop, beside a part of a heavy Service: frontends, endpoints and source
/// ranges together. A Service that is larger is heavy.
const TURN: usize = 4_096;

/// Size of what is tried again beside a turn: so small that others hardly notice, and large enough for all to have
/// their turn.
const AGAIN: usize = TURN / 4;

/// Services that have changed.
#[derive(Debug, Default)]
pub(super) struct Queue {
    light: BTreeSet<(usize, ObjectKey)>,
    weights: BTreeMap<ObjectKey, usize>,
    heavy: VecDeque<ObjectKey>,
    /// Services that had no room and may have some now.
    again: BTreeSet<ObjectKey>,
    /// The Service of `again` that was tried last: the next one comes after it by name.
    tried: Option<ObjectKey>,
    under_way: UnderWay,
}

/// The heavy Service that is under way.
#[derive(Debug, Default)]
enum UnderWay {
    #[default]
    None,
    /// Its wanted state is being computed beside the loop.
    WorkingOut(ObjectKey, JoinHandle<Option<Wanted>>),
    /// It is being programmed in parts.
    Begun(Begun),
}

impl Queue {
    /// Adds a Service of this weight.
    pub(super) fn add(&mut self, service: ObjectKey, weight: usize) {
        if let Some(before) = self.weights.remove(&service) {
            self.light.remove(&(before, service.clone()));
        }
        // A Service that is under way with an older state ends first.
        if weight > TURN || self.under_way() == Some(&service) {
            if !self.heavy.contains(&service) {
                self.heavy.push_back(service);
            }
        } else if !self.heavy.contains(&service) {
            self.light.insert((weight, service.clone()));
            self.weights.insert(service, weight);
        }
    }

    /// Takes the light Services of this turn.
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

    /// Has Services tried again that had no room, some in each turn.
    pub(super) fn try_again<'a>(&mut self, refused: impl Iterator<Item = &'a ObjectKey>) {
        self.again.extend(refused.cloned());
    }

    /// Takes the Services that are tried again in this turn, one after another by name, so that each has its turn.
    /// `weight` returns the cost of a Service, if it still has to be tried. A heavy Service waits among the heavy ones.
    pub(super) fn take_again(&mut self, weight: impl Fn(&ObjectKey) -> Option<usize>) -> Vec<ObjectKey> {
        let (mut taken, mut sum) = (Vec::new(), 0);
        while sum < AGAIN
            && let Some(service) = self.next_again()
        {
            self.again.remove(&service);
            self.tried = Some(service.clone());
            let Some(weight) = weight(&service) else { continue };
            // A heavy Service ends the loop, too: only one a turn is programmed.
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

    /// Returns the heavy Service that is being computed or programmed.
    fn under_way(&self) -> Option<&ObjectKey> {
        match &self.under_way {
            UnderWay::None => None,
            UnderWay::WorkingOut(service, _) | UnderWay::Begun(Begun { service, .. }) => Some(service),
        }
    }

    /// Takes the heavy Service that goes on. If there is none, has the wanted state of the next one computed by
    /// `work_out`, unless one is being computed.
    pub(super) fn take_heavy(
        &mut self,
        work_out: impl FnOnce(&ObjectKey) -> JoinHandle<Option<Wanted>>,
    ) -> Option<Begun> {
        match std::mem::take(&mut self.under_way) {
            UnderWay::Begun(begun) => return Some(begun),
            UnderWay::None => {
                if let Some(service) = self.heavy.pop_front() {
                    let task = work_out(&service);
                    self.under_way = UnderWay::WorkingOut(service, task);
                }
            }
            working_out @ UnderWay::WorkingOut(..) => self.under_way = working_out,
        }
        None
    }

    /// Waits until the wanted state of a heavy Service is computed, and returns it, to be put back. Never returns while
    /// none is being computed.
    pub(super) async fn worked_out(&mut self) -> (ObjectKey, Option<Wanted>) {
        let UnderWay::WorkingOut(service, task) = &mut self.under_way else {
            return std::future::pending().await;
        };
        let wanted = match task.await.map_err(JoinError::try_into_panic) {
            Ok(wanted) => wanted,
            // The panic continues as if the work had been done here.
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The task is cancelled only when the runtime shuts down.
            Err(Err(_)) => return std::future::pending().await,
        };
        let service = service.clone();
        self.under_way = UnderWay::None;
        (service, wanted)
    }

    /// Has a heavy Service go on in the next turn.
    pub(super) fn put_back(&mut self, begun: Begun) {
        self.under_way = UnderWay::Begun(begun);
    }

    /// Returns whether there is nothing for the next turn.
    pub(super) fn is_empty(&self) -> bool {
        let no_heavy = match self.under_way {
            UnderWay::None => self.heavy.is_empty(),
            UnderWay::WorkingOut(..) => true,
            UnderWay::Begun(_) => false,
        };
        self.light.is_empty() && self.again.is_empty() && no_heavy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("a", name)
    }

    fn taken(queue: &mut Queue) -> Vec<String> {
        names(queue.take_light())
    }

    /// Takes the heavy Service of this turn: one that goes on, and the name of one whose wanted state is computed from
    /// now on.
    fn heavy(queue: &mut Queue) -> (Option<Begun>, Option<String>) {
        let mut begins = None;
        let begun = queue.take_heavy(|service| {
            begins = Some(service.name.to_string());
            tokio::spawn(async { None })
        });
        (begun, begins)
    }

    fn begun(name: &str) -> Begun {
        Begun::new(key(name), 0, Vec::new(), Vec::new(), Vec::new())
    }

    #[tokio::test]
    async fn the_light_go_first_and_no_more_at_once_than_nobody_notices() {
        let mut queue = Queue::default();
        for (name, weight) in [("a", TURN), ("b", TURN / 2), ("c", TURN / 2), ("d", 1), ("e", TURN + 1)] {
            queue.add(key(name), weight);
        }
        assert_eq!(taken(&mut queue), ["d", "b"]);
        queue.add(key("late"), 2);
        // `a` has become lighter.
        queue.add(key("a"), 1);
        assert_eq!(taken(&mut queue), ["a", "late", "c"]);
        assert_eq!(taken(&mut queue), [""; 0]);
        assert!(!queue.is_empty(), "the heavy one");
        assert!(matches!(heavy(&mut queue), (None, Some(name)) if name == "e"));
        assert!(queue.is_empty());
        // Until the wanted state of `e` is known, another heavy Service is nothing for the next turn.
        queue.add(key("f"), TURN + 1);
        assert!(queue.is_empty() && matches!(heavy(&mut queue), (None, None)));
        assert_eq!(queue.worked_out().await.0, key("e"));
        queue.put_back(Begun::new(key("e"), 0, Vec::new(), Vec::new(), Vec::new()));
        assert!(!queue.is_empty());
    }

    #[tokio::test]
    async fn heavy_ones_go_one_after_another_however_often_they_change() {
        let mut queue = Queue::default();
        for name in ["x", "y", "x"] {
            queue.add(key(name), TURN * 2);
        }
        assert!(matches!(heavy(&mut queue), (None, Some(name)) if name == "x"));
        assert_eq!(queue.worked_out().await.0, key("x"));
        queue.put_back(begun("x"));
        // `x` has changed, and even become light: what has begun ends first, and the turn of `y` comes before the
        // change.
        queue.add(key("x"), TURN * 2);
        queue.add(key("x"), 1);
        assert_eq!(taken(&mut queue), [""; 0]);
        assert!(matches!(heavy(&mut queue), (Some(begun), None) if begun.service == key("x")));
        for name in ["y", "x"] {
            assert!(matches!(heavy(&mut queue), (None, Some(found)) if found == name), "{name}");
            assert_eq!(queue.worked_out().await.0, key(name));
            queue.put_back(begun(name));
            assert!(matches!(heavy(&mut queue), (Some(_), None)));
        }
        queue.put_back(begun("z"));
        assert!(!queue.is_empty());
        assert!(Queue::default().is_empty());
    }

    #[tokio::test]
    async fn a_service_that_changes_while_it_is_computed_waits_for_its_end() {
        let mut queue = Queue::default();
        queue.add(key("x"), TURN * 2);
        assert!(matches!(heavy(&mut queue), (None, Some(_))));
        queue.add(key("x"), 1);
        assert_eq!(taken(&mut queue), [""; 0]);
        assert!(queue.is_empty(), "nothing for this turn");
        queue.worked_out().await;
        queue.put_back(begun("x"));
        assert!(matches!(heavy(&mut queue), (Some(_), None)));
        assert!(matches!(heavy(&mut queue), (None, Some(name)) if name == "x"), "the change");
    }

    fn names(taken: Vec<ObjectKey>) -> Vec<String> {
        taken.iter().map(|key| key.name.to_string()).collect()
    }

    /// Returns a weight of which three fit beside a turn.
    fn third(_: &ObjectKey) -> Option<usize> {
        Some(AGAIN / 3 + 1)
    }

    #[test]
    fn who_had_no_room_is_tried_a_few_at_a_time_and_everybody_in_the_end() {
        let mut queue = Queue::default();
        let refused: BTreeSet<ObjectKey> = (0..10).map(|number| key(&format!("s{number}"))).collect();
        queue.try_again(refused.iter());
        assert!(!queue.is_empty());
        assert_eq!(names(queue.take_again(third)), ["s0", "s1", "s2"]);
        // The last Services have their turn, however often there is room.
        queue.try_again(refused.iter());
        assert_eq!(names(queue.take_again(third)), ["s3", "s4", "s5"]);
        queue.try_again(refused.iter());
        // A Service that waits with its own change is not tried twice. A Service that is no longer refused is not tried
        // at all.
        queue.add(key("s6"), 1);
        let taken = queue.take_again(|service| third(service).filter(|_| &*service.name != "s7"));
        assert_eq!(names(taken), ["s8", "s9"]);
        assert_eq!(names(queue.take_again(third)), ["s0", "s1", "s2"]);
        // A heavy Service waits with the heavy ones, once.
        let mut queue = Queue::default();
        for _ in 0..2 {
            queue.try_again(refused.iter().take(2));
            assert_eq!(names(queue.take_again(|_| Some(TURN + 1))), [""; 0]);
        }
        assert_eq!(queue.heavy, [key("s0"), key("s1")]);
    }
}
