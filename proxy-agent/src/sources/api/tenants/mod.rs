//! Limits the objects that are kept of each namespace: as many as its budget allows, the oldest first.
//!
//! The cost of an object is computed on arrival. A Service costs its ports times its addresses (frontends), and its
//! ports times its source ranges; a slice costs its ports times its endpoints. Each product counts up to the budget of
//! one Service, because an object beyond that is not programmed. In frontends and endpoints, an object costs at least
//! the number of items that are kept of it.
//!
//! The objects of a namespace are admitted by age, up to the first one that exceeds the budget. So every node, and a
//! restarted agent, admits the same objects; a new object never displaces an older one; and a change costs a lookup in
//! two trees.
//!
//! An object beyond the budget is dropped, except for its age and cost. It is fetched when there is room again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::kind::Kind;
use crate::reconcile::cluster::{Change, ObjectKey, Service, Slice};
use crate::reconcile::desired::Budgets;
use crate::reconcile::shares::Shares;
use crate::sources::update::Problem;

/// Number of refused objects of a namespace and kind that are named in problems; the others are counted.
const NAMED: usize = 20;
/// Number of objects that a namespace may have fetched at once.
const FETCHES: u32 = 50;
/// Time after which a namespace may have one more object fetched, on each node. This limits the load on the API server
/// if somebody makes room and takes it away again and again.
const PER_FETCH: Duration = Duration::from_secs(1);

/// Frontends, endpoints and source ranges.
type Cost = [u64; 3];
/// Creation time and name.
type Rank = (i64, Arc<str>);

/// Objects of all namespaces.
pub(super) struct Tenants {
    budgets: Budgets,
    shares: BTreeMap<(Arc<str>, Kind), Share>,
    /// Objects that may be kept but have yet to be fetched, by namespace.
    missing: BTreeMap<Arc<str>, BTreeSet<(Kind, Arc<str>)>>,
    /// Objects that are being fetched.
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

    /// Applies the budget to a change and appends the resulting changes to `changes`. `created` is the creation time of
    /// the object.
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

    /// Forgets that an object is missing; returns whether it was.
    fn is_missing_no_more(&mut self, kind: Kind, key: &ObjectKey) -> bool {
        let asked = self.asked.remove(&(kind, key.clone()));
        let Some(of_namespace) = self.missing.get_mut(&key.namespace) else { return asked };
        let missing = of_namespace.remove(&(kind, Arc::clone(&key.name)));
        if of_namespace.is_empty() {
            self.missing.remove(&key.namespace);
        }
        asked || missing
    }

    /// Returns an object that is to be fetched now.
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

    /// Returns whether objects wait to be fetched.
    pub(super) fn waits(&self) -> bool {
        !self.missing.is_empty()
    }

    /// Returns whether a fetched object is still wanted: no change has concerned it meanwhile.
    pub(super) fn is_asked_for(&self, kind: Kind, key: &ObjectKey) -> bool {
        self.asked.contains(&(kind, key.clone()))
    }

    /// Notes that an object could not be fetched, so that it is requested again.
    pub(super) fn not_fetched(&mut self, kind: Kind, key: &ObjectKey) {
        if self.asked.remove(&(kind, key.clone())) {
            let of_namespace = self.missing.entry(Arc::clone(&key.namespace)).or_default();
            of_namespace.insert((kind, Arc::clone(&key.name)));
        }
    }

    /// Returns whether the problems may have changed since the last call.
    pub(super) fn have_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns the problems of refused objects.
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
    /// Total cost of the admitted objects.
    sum: Cost,
    /// First object that is not admitted; the objects behind it are not admitted either.
    edge: Option<Rank>,
    /// Number of objects that are not admitted.
    refused: usize,
}

/// Objects that are no longer admitted (`out`), and objects that are now admitted (`back`).
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

    /// Returns the objects that are not admitted, the oldest first.
    fn beyond(&self) -> impl Iterator<Item = &Rank> {
        self.edge.iter().flat_map(|edge| self.ranks.range(edge..))
    }

    /// Replaces an object by one with this age and cost, or removes it.
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

/// Returns the cost of a Service.
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

/// Returns the cost of a slice.
fn of_slice(slice: &Slice, budgets: &Budgets) -> Cost {
    let (ports, endpoints) = (slice.ports.len(), slice.endpoints.len());
    let hints = slice.endpoints.iter().filter_map(|endpoint| endpoint.hints.as_deref());
    let hints: usize = hints.map(|hints| hints.zones.len() + hints.nodes.len()).sum();
    let kept = 1 + ports + endpoints + hints + slice.problems.len();
    let makes = (ports * endpoints) as u64;
    let cost = [0, makes.min(budgets.service.endpoints.into()).max(kept as u64), 0];
    at_most(&cost, &limit(budgets))
}

/// Limits the cost of one object to the budget: a larger one would keep out all objects behind it for ever.
fn at_most(cost: &Cost, limit: &Cost) -> Cost {
    std::array::from_fn(|field| cost[field].min(limit[field]))
}

fn add(sum: &Cost, cost: &Cost) -> Cost {
    std::array::from_fn(|field| sum[field] + cost[field])
}

fn subtract(sum: &Cost, cost: &Cost) -> Cost {
    std::array::from_fn(|field| sum[field] - cost[field])
}

/// Returns the first field in which both costs together exceed the limit.
fn beyond(sum: &Cost, cost: &Cost, limit: &Cost) -> Option<usize> {
    add(sum, cost).iter().zip(limit).position(|(asked, may)| asked > may)
}

#[cfg(test)]
mod tests;
