//! How much of each namespace is kept: as much as its budget allows, the oldest objects first.
//!
//! What an object may come to is counted as it arrives: a Service by what its ports make with its addresses and source ranges, a
//! slice by what its ports make with its endpoints, each up to what one Service may have (beyond that it is not programmed).
//! Whatever it comes to, it counts for what there is to be kept of it. The objects of a namespace are in by age, up to the
//! first one that goes beyond the budget: so every node, and an agent that starts anew, has the same ones, a newcomer never
//! takes an older one's place, and a change costs a look into two trees.
//!
//! What is beyond is dropped: its age and cost stay. When there is room again, it is fetched.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Kind;
use crate::reconcile::cluster::{Change, ObjectKey, Service, Slice};
use crate::reconcile::desired::Budgets;
use crate::reconcile::shares::Shares;
use crate::sources::Problem;

/// Objects of a namespace and kind that are named when they are refused; the others are counted.
const NAMED: usize = 20;
/// Objects that a namespace has fetched at once.
const FETCHES: u32 = 50;
/// It has one more fetched each time this much has passed, on each node: whoever makes room and takes it away again has the
/// API server do no more than that.
const PER_FETCH: Duration = Duration::from_secs(1);

/// Frontends, endpoints and source ranges.
type Cost = [u64; 3];
/// Age and name.
type Rank = (i64, Arc<str>);

/// All namespaces.
pub(super) struct Tenants {
    budgets: Budgets,
    shares: BTreeMap<(Arc<str>, Kind), Share>,
    /// Objects that may be kept and are not there, by namespace.
    missing: BTreeMap<Arc<str>, BTreeSet<(Kind, Arc<str>)>>,
    /// Those of them that have been asked for.
    asked: BTreeSet<(Kind, ObjectKey)>,
    fetches: Shares,
    changed: bool,
}

impl Tenants {
    pub(super) fn new(budgets: Budgets) -> Self {
        Self {
            budgets,
            shares: BTreeMap::new(),
            missing: BTreeMap::new(),
            asked: BTreeSet::new(),
            fetches: Shares::new(FETCHES, PER_FETCH),
            changed: false,
        }
    }

    /// Appends what becomes of a change to `changes`. `created` is the age of its object.
    pub(super) fn pass(&mut self, change: Change, created: i64, changes: &mut Vec<Change>) {
        let (kind, key, cost) = match &change {
            Change::Service(service) => {
                (Kind::Services, service.key.clone(), Some(of_service(service, &self.budgets)))
            }
            Change::ServiceGone(key) => (Kind::Services, key.clone(), None),
            Change::Slice(slice) => {
                (Kind::EndpointSlices, slice.key.clone(), Some(of_slice(slice, &self.budgets)))
            }
            Change::SliceGone(key) => (Kind::EndpointSlices, key.clone(), None),
            Change::Node(_)
            | Change::ServiceCidr(..)
            | Change::ServiceCidrGone(_)
            | Change::Pod(_)
            | Change::PodGone(_) => return changes.push(change),
        };
        let limit = limit(&self.budgets);
        let place = (Arc::clone(&key.namespace), kind);
        let share = self.shares.entry(place.clone()).or_default();
        let was_in = share.is_in(&key.name);
        let refused = share.refused;
        let crossed = share.put(&key.name, cost.map(|cost| (created, cost)), &limit);
        let (is_in, is_empty) = (share.is_in(&key.name), share.objects.is_empty());
        self.changed |= refused != 0 || share.refused != 0;
        if is_empty {
            self.shares.remove(&place);
        }
        let has = was_in & !self.is_missing_no_more(kind, &key);

        for name in crossed.out.into_iter().filter(|name| *name != key.name) {
            let other = ObjectKey { namespace: Arc::clone(&key.namespace), name };
            if !self.is_missing_no_more(kind, &other) {
                changes.push(gone(kind, other));
            }
        }
        for name in crossed.back.into_iter().filter(|name| *name != key.name) {
            self.missing.entry(Arc::clone(&key.namespace)).or_default().insert((kind, name));
        }
        if is_in {
            changes.push(change);
        } else if has {
            changes.push(gone(kind, key));
        }
    }

    /// Forgets that an object is missing. True if it was.
    fn is_missing_no_more(&mut self, kind: Kind, key: &ObjectKey) -> bool {
        let asked = self.asked.remove(&(kind, key.clone()));
        let Some(of_namespace) = self.missing.get_mut(&key.namespace) else { return asked };
        let missing = of_namespace.remove(&(kind, Arc::clone(&key.name)));
        if of_namespace.is_empty() {
            self.missing.remove(&key.namespace);
        }
        asked || missing
    }

    /// An object that is to be fetched now.
    pub(super) fn next_fetch(&mut self, now: Instant) -> Option<(Kind, ObjectKey)> {
        let fetches = &mut self.fetches;
        let (namespace, of_namespace) =
            self.missing.iter_mut().find(|(namespace, _)| fetches.take(namespace, now).is_some())?;
        let namespace = Arc::clone(namespace);
        let (kind, name) = of_namespace.pop_first()?;
        if of_namespace.is_empty() {
            self.missing.remove(&namespace);
        }
        let key = ObjectKey { namespace, name };
        self.asked.insert((kind, key.clone()));
        Some((kind, key))
    }

    /// Whether objects wait to be fetched.
    pub(super) fn waits(&self) -> bool {
        !self.missing.is_empty()
    }

    /// Whether what has been fetched is still asked for: nothing has been heard of the object meanwhile.
    pub(super) fn is_asked_for(&self, kind: Kind, key: &ObjectKey) -> bool {
        self.asked.contains(&(kind, key.clone()))
    }

    /// It could not be fetched, and is asked for again.
    pub(super) fn not_fetched(&mut self, kind: Kind, key: &ObjectKey) {
        if self.asked.remove(&(kind, key.clone())) {
            let of_namespace = self.missing.entry(Arc::clone(&key.namespace)).or_default();
            of_namespace.insert((kind, Arc::clone(&key.name)));
        }
    }

    /// Whether the problems may be others than at the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What is refused.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let beyond = self.shares.iter().filter(|(_, share)| share.refused > 0);
        beyond.flat_map(|((namespace, kind), share)| self.problems_of(namespace, *kind, share)).collect()
    }

    fn problems_of(&self, namespace: &str, kind: Kind, share: &Share) -> Vec<Problem> {
        let limit = limit(&self.budgets);
        let (object, consequence) = match kind {
            Kind::Services => ("Service", "the Service is not served"),
            Kind::EndpointSlices | Kind::Node | Kind::ServiceCidrs | Kind::Pods => {
                ("EndpointSlice", "its endpoints are not served")
            }
        };
        let edge = share.edge.as_ref().and_then(|(_, name)| share.objects.get(name));
        let field = edge.and_then(|(_, cost)| beyond(&share.sum, cost, &limit)).unwrap_or_default();
        let what = [
            ("frontends", "--max-namespace-frontends"),
            ("endpoints", "--max-namespace-endpoints"),
            ("source ranges", "--max-namespace-source-ranges"),
        ];
        let (Some((what, flag)), Some(may)) = (what.get(field), limit.get(field)) else { return Vec::new() };
        let reason = format!(
            "with the older ones of its namespace it makes more than the {may} {what} of {flag}: {consequence}; remove \
             others, or raise the limit"
        );
        let mut problems: Vec<Problem> = share
            .beyond()
            .take(NAMED)
            .map(|(_, name)| Problem {
                object: format!("{object} {namespace}/{name}"),
                reason: reason.clone(),
            })
            .collect();
        if let Some(more) = share.refused.checked_sub(NAMED).filter(|more| *more > 0) {
            let reason = format!("{more} more {object}s are refused, which are not named here");
            problems.push(Problem { object: format!("Namespace {namespace}"), reason });
        }
        problems
    }
}

/// The objects of a kind in one namespace.
#[derive(Default)]
struct Share {
    objects: BTreeMap<Arc<str>, (i64, Cost)>,
    ranks: BTreeSet<Rank>,
    /// What those that are in come to.
    sum: Cost,
    /// The first one that is not in; nor are those behind it.
    edge: Option<Rank>,
    /// How many are not in.
    refused: usize,
}

/// Objects that were in and are not any more, and the other way round.
#[derive(Debug, Default, PartialEq, Eq)]
struct Crossed {
    out: Vec<Arc<str>>,
    back: Vec<Arc<str>>,
}

impl Share {
    fn is_in(&self, name: &Arc<str>) -> bool {
        self.objects.get(name).is_some_and(|(created, _)| self.is_before(&(*created, Arc::clone(name))))
    }

    fn is_before(&self, rank: &Rank) -> bool {
        self.edge.as_ref().is_none_or(|edge| rank < edge)
    }

    /// Those that are not in, the oldest first.
    fn beyond(&self) -> impl Iterator<Item = &Rank> {
        self.edge.iter().flat_map(|edge| self.ranks.range(edge..))
    }

    /// Replaces an object by one of this age and cost, or by none.
    fn put(&mut self, name: &Arc<str>, object: Option<(i64, Cost)>, limit: &Cost) -> Crossed {
        if let Some((created, cost)) = self.objects.remove(name) {
            let rank = (created, Arc::clone(name));
            self.ranks.remove(&rank);
            if self.is_before(&rank) {
                self.sum = subtract(&self.sum, &cost);
            } else {
                self.refused -= 1;
            }
            if self.edge.as_ref() == Some(&rank) {
                self.edge = self.behind(&rank);
            }
        }
        if let Some((created, cost)) = object {
            let rank = (created, Arc::clone(name));
            if self.is_before(&rank) {
                self.sum = add(&self.sum, &cost);
            } else {
                self.refused += 1;
            }
            self.objects.insert(Arc::clone(name), (created, cost));
            self.ranks.insert(rank);
        }
        let mut crossed = Crossed::default();
        while beyond(&self.sum, &Cost::default(), limit).is_some()
            && let Some(last) = self.last_in()
        {
            self.sum = subtract(&self.sum, &self.cost(&last));
            self.refused += 1;
            crossed.out.push(Arc::clone(&last.1));
            self.edge = Some(last);
        }
        while let Some(edge) = self.edge.take_if(|edge| {
            let cost = self.objects.get(&edge.1).map(|(_, cost)| *cost).unwrap_or_default();
            beyond(&self.sum, &cost, limit).is_none()
        }) {
            self.sum = add(&self.sum, &self.cost(&edge));
            self.refused -= 1;
            self.edge = self.behind(&edge);
            crossed.back.push(edge.1);
        }
        crossed
    }

    fn last_in(&self) -> Option<Rank> {
        let to = self.edge.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        self.ranks.range::<Rank, _>((Bound::Unbounded, to)).next_back().cloned()
    }

    fn behind(&self, rank: &Rank) -> Option<Rank> {
        self.ranks.range((Bound::Excluded(rank), Bound::Unbounded)).next().cloned()
    }

    fn cost(&self, (_, name): &Rank) -> Cost {
        self.objects.get(name).map(|(_, cost)| *cost).unwrap_or_default()
    }
}

fn gone(kind: Kind, key: ObjectKey) -> Change {
    match kind {
        Kind::Services => Change::ServiceGone(key),
        Kind::EndpointSlices | Kind::Node | Kind::ServiceCidrs | Kind::Pods => Change::SliceGone(key),
    }
}

fn limit(budgets: &Budgets) -> Cost {
    let of = &budgets.namespace;
    [of.frontends, of.endpoints, of.source_ranges].map(u64::from)
}

/// What a Service may come to.
fn of_service(service: &Service, budgets: &Budgets) -> Cost {
    let families = service.cluster_ips.iter().flatten().count();
    let (ports, ranges) = (service.ports.len(), service.source_ranges.len());
    let addresses = families + service.external_ips.len() + service.load_balancer_ips.len();
    let node_ports = service.ports.iter().filter(|port| port.node_port != 0).count() * families;
    let kept = 1 + ports + addresses + ranges + service.problems.len();
    let cost = |makes: usize, may: u32, kept| (makes as u64).min(may.into()).max(kept as u64);
    let of = &budgets.service;
    let cost = [
        cost(ports * addresses + node_ports, of.frontends, kept),
        0,
        cost(ports * ranges, of.source_ranges, 0),
    ];
    at_most(&cost, &limit(budgets))
}

/// What a slice may come to.
fn of_slice(slice: &Slice, budgets: &Budgets) -> Cost {
    let (ports, endpoints) = (slice.ports.len(), slice.endpoints.len());
    let hints = slice.endpoints.iter().filter_map(|endpoint| endpoint.hints.as_deref());
    let hints: usize = hints.map(|hints| hints.zones.len() + hints.nodes.len()).sum();
    let kept = 1 + ports + endpoints + hints + slice.problems.len();
    let makes = (ports * endpoints) as u64;
    let cost = [0, makes.min(budgets.service.endpoints.into()).max(kept as u64), 0];
    at_most(&cost, &limit(budgets))
}

/// One object alone is never too much: nothing would ever come behind it.
fn at_most(cost: &Cost, limit: &Cost) -> Cost {
    std::array::from_fn(|field| cost[field].min(limit[field]))
}

fn add(sum: &Cost, cost: &Cost) -> Cost {
    std::array::from_fn(|field| sum[field] + cost[field])
}

fn subtract(sum: &Cost, cost: &Cost) -> Cost {
    std::array::from_fn(|field| sum[field] - cost[field])
}

/// The field in which both together are more than the limit.
fn beyond(sum: &Cost, cost: &Cost, limit: &Cost) -> Option<usize> {
    add(sum, cost).iter().zip(limit).position(|(asked, may)| asked > may)
}

#[cfg(test)]
mod tests;
