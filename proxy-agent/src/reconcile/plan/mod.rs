//! From the desired state to the operations that produce it: pure, and ordered so that any prefix is safe.
//!
//! After each single operation of a [`Plan`] every frontend names a Service port whose sets name live backends. The
//! order, over all Services of a plan together:
//!
//! 1. names, new source ranges, new backends and new slot ranges are written, then the Services flip to them;
//! 2. frontends appear or move (one replacement each), then frontends vanish;
//! 3. unwanted source ranges are removed, and elements that nothing refers to are marked dead; their numbers are free
//!    after a grace period ([`Freed`]).
//!
//! A frontend with source ranges therefore never has fewer of them than its Service wants or wanted, and a service id
//! that is reused has no source ranges of its last owner.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, SERVING};
use proxy_common::abi::frontend::FrontendKind;
use proxy_common::abi::maps;
use proxy_common::abi::{Affinity, BackendState, FrontendKey, FrontendValue, Service, SlotRange, proto};
use proxy_common::addr::{Addr, Prefix};

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{DesiredPort, DesiredService, PortKey};
use crate::reconcile::model::{Claim, Freed, Model, Port, PortBackend, Title, members, service_name};
use crate::reconcile::store::Op;

mod left;
mod node;
mod part;
mod rivals;

#[cfg(test)]
mod tests;

pub use left::{LeftAlone, Sandbox, meets_edges, plan_left};
pub use node::{LOCAL_ADDRESS_ENTRIES, NodeTables, PREFIX_ENTRIES, plan_node};
pub(crate) use part::{Part, REASONS};
pub(crate) use rivals::{FrontendName, LostClaims, rivals};

/// Desired state of one Service. `Option<Wanted>` is `None` when the Service is gone.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// `metadata.creationTimestamp`.
    pub created: i64,
    /// State to program.
    pub desired: DesiredService,
}

/// Operations in order, and the numbers that they free.
#[derive(Debug, Default)]
pub struct Plan {
    /// Operations, to be carried out from first to last.
    pub ops: Vec<Op>,
    /// Numbers to give back after a grace period.
    pub freed: Freed,
    /// Services of which something could not be planned, with the reasons. Their refused parts keep their previous
    /// state.
    pub refused: BTreeMap<ObjectKey, Vec<String>>,
    /// Whether connected UDP sockets may no longer be where their VIP leads.
    pub(crate) udp_stale: bool,
}

impl Plan {
    fn refuse(&mut self, service: &ObjectKey, reason: std::fmt::Arguments<'_>) {
        let reasons = self.refused.entry(service.clone()).or_default();
        if reasons.len() < REASONS {
            reasons.push(reason.to_string());
        }
    }
}

/// A map that is too small for a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "map {map} is full: {need} more needed, {available} free, and it could not be made larger; `proxy-agent status` \
     says why"
)]
pub(crate) struct Full {
    map: &'static str,
    need: usize,
    available: u32,
}

/// Plans the change of `services` and advances `model` to the state after it.
///
/// `full` also removes every frontend that no Service claims. Pass it only after every source has delivered its first
/// list.
pub fn plan(model: &mut Model, services: &BTreeMap<ObjectKey, Option<Wanted>>, full: bool) -> Plan {
    let mut plan = Plan::default();
    let mut touched: BTreeSet<FrontendKey> = BTreeSet::new();
    let mut dead: Vec<Op> = Vec::new();
    if full {
        forget_stray_ranges(model, &mut plan);
    }

    for (service, wanted) in services {
        let (created, ports) = match wanted {
            Some(Wanted { created, desired }) => (*created, desired.ports.as_slice()),
            None => (i64::MAX, &[][..]),
        };
        let gone = ports_beside(model, service, ports);
        change_service(
            model,
            service,
            &Part { created, ports, gone: &gone },
            &mut plan,
            &mut touched,
            &mut dead,
        );
    }
    if full {
        touched.extend(model.frontends.keys().copied());
        for (id, epoch) in std::mem::take(&mut model.orphans) {
            dead.push(Op::Name(id, None));
            plan.freed.services.push((id, epoch));
        }
    }
    settle(model, touched, dead, &mut plan);
    plan
}

/// Plans the change of a part of a Service, as [`plan`] does. All parts, in the order of their keys and with the
/// removed ports last, lead to the same state as one [`plan`] of the whole Service.
pub(crate) fn plan_part(model: &mut Model, service: &ObjectKey, part: &Part<'_>) -> Plan {
    let mut plan = Plan::default();
    let (mut touched, mut dead) = (BTreeSet::new(), Vec::new());
    change_service(model, service, part, &mut plan, &mut touched, &mut dead);
    settle(model, touched, dead, &mut plan);
    plan
}

/// Returns the ports of a Service that the model has and that are not among `ports`, which are sorted.
pub(crate) fn ports_beside(model: &Model, service: &ObjectKey, ports: &[DesiredPort]) -> Vec<Arc<PortKey>> {
    let mut wanted = ports.iter().map(|port| &port.key).peekable();
    let is_gone = |key: &&Arc<PortKey>| {
        while wanted.next_if(|wanted| **wanted < ***key).is_some() {}
        wanted.peek().is_none_or(|wanted| **wanted != ***key)
    };
    model.ports_of(service).filter(is_gone).cloned().collect()
}

fn change_service(
    model: &mut Model,
    service: &ObjectKey,
    part: &Part<'_>,
    plan: &mut Plan,
    touched: &mut BTreeSet<FrontendKey>,
    dead: &mut Vec<Op>,
) {
    for port in part.ports {
        match change_port(model, port, plan, dead) {
            Ok(key) => claim(model, &key, part.created, &port.frontends, touched),
            Err(full) => {
                plan.refuse(service, format_args!("port {:?}: {full}", port.key.port_name));
                keep_claims(model, port, part.created, touched);
            }
        }
    }
    for key in part.gone {
        claim(model, key, 0, &[], touched);
        remove_port(model, key, plan, dead);
    }
}

/// Ends a plan: first the frontends, then the elements that nothing refers to any more.
fn settle(model: &mut Model, touched: BTreeSet<FrontendKey>, mut dead: Vec<Op>, plan: &mut Plan) {
    frontends(model, touched, plan);
    for op in &dead {
        if let Op::SourceRange(id, range, false) = op {
            plan.freed.room |= model.source_ranges.remove(&(*id, *range));
        }
    }
    plan.ops.append(&mut dead);
}

/// Removes source ranges of ids that no Service port has, before such an id is given out.
fn forget_stray_ranges(model: &mut Model, plan: &mut Plan) {
    let live: BTreeSet<u32> = model.ports.values().map(|port| port.id).collect();
    let strays = model.source_ranges.extract_if(.., |(id, _)| !live.contains(id));
    plan.ops.extend(strays.map(|(id, range)| Op::SourceRange(id, range, false)));
}

/// Brings the backends, sets and affinity of one Service port to the desired state.
fn change_port(
    model: &mut Model,
    desired: &DesiredPort,
    plan: &mut Plan,
    dead: &mut Vec<Op>,
) -> Result<Arc<PortKey>, Full> {
    let known = model.ports.get_key_value(&desired.key).map(|(key, port)| (Arc::clone(key), port.clone()));
    let fresh = known.is_none();
    if let Some((key, before)) = &known
        && unchanged(before, desired)
        && model.source_ranges_of(before.id).eq(desired.source_ranges.iter().copied())
    {
        return Ok(Arc::clone(key));
    }
    let mut needed = desired.backends.len();
    if let Some((_, before)) = &known {
        let has =
            |d: &&crate::reconcile::desired::DesiredBackend| find(&before.backends, d.addr, d.port).is_some();
        needed -= desired.backends.iter().filter(has).count();
    }
    check(maps::BACKENDS, needed, model.backend_ids.available())?;
    let has = |range: &&Prefix| {
        known.as_ref().is_some_and(|(_, before)| model.source_ranges.contains(&(before.id, **range)))
    };
    let needed = desired.source_ranges.len() - desired.source_ranges.iter().filter(has).count();
    // Unwanted source ranges make no room yet, because they are removed last.
    let used = u32::try_from(model.source_ranges.len()).unwrap_or(u32::MAX);
    check(maps::SOURCE_RANGES, needed, model.capacity.source_ranges.saturating_sub(used))?;

    // Every check that can fail comes before anything is taken.
    let wants = |set: u32| desired.backends.iter().filter(|b| b.flags & set != 0).count();
    let cluster_range = range_for(model, wants(IN_CLUSTER))?;
    let local_range = range_for(model, wants(IN_LOCAL)).inspect_err(|_| {
        cluster_range.into_iter().for_each(|range| model.slots.give_back(range));
    })?;
    let give_up = |model: &mut Model| {
        cluster_range.into_iter().chain(local_range).for_each(|range| model.slots.give_back(range));
    };
    let (key, before) = match known {
        Some(known) => known,
        None => {
            let Some((id, epoch)) = model.service_ids.take() else {
                give_up(model);
                return Err(Full { map: maps::SERVICES, need: 1, available: 0 });
            };
            let affinity = Affinity { seconds: 0, epoch };
            let service = Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, affinity };
            let key = Arc::new(desired.key.clone());
            plan.ops.push(Op::Name(id, Some(Box::new(service_name(&key)))));
            (key, Port { id, service, backends: Vec::new(), replaced: Vec::new(), claims: Vec::new() })
        }
    };

    change_ranges(model, before.id, &desired.source_ranges, plan, dead);

    let mut backends: Vec<PortBackend> = Vec::with_capacity(desired.backends.len());
    for wanted in &desired.backends {
        let old = find(&before.backends, wanted.addr, wanted.port);
        let (id, state) = match old {
            Some(old) => {
                // The endpoint enters a set again: clients remembered for it are not sent back (semantics: affinity).
                let enters = old.state.flags & IN_SETS == 0 && wanted.flags & IN_SETS != 0;
                let generation = old.state.generation.wrapping_add(u32::from(enters));
                // Until the flip the old set is still in use, so the bits of both sets count.
                let both = BackendState { flags: old.state.flags | wanted.flags, generation };
                if both != old.state {
                    plan.ops.push(Op::BackendState(old.id, both));
                }
                let state = BackendState { flags: wanted.flags, generation };
                if state != both {
                    dead.push(Op::BackendState(old.id, state));
                }
                (old.id, state)
            }
            None => {
                let Some((id, generation)) = model.backend_ids.take() else { continue };
                (id, BackendState { flags: wanted.flags, generation })
            }
        };
        let backend = PortBackend { addr: wanted.addr, port: wanted.port, id, state };
        if old.is_none() {
            plan.ops.push(Op::Backend(id, backend.element(before.id)));
        }
        backends.push(backend);
    }
    for old in &before.backends {
        let new = find(&backends, old.addr, old.port);
        if new.is_none() {
            bury(old, plan, dead);
        }
        let serves = new.is_some_and(|new| new.state.flags & SERVING != 0);
        plan.udp_stale |= key.proto == proto::UDP && old.state.flags & SERVING != 0 && !serves;
    }
    // While no backend serves, sockets lead to the VIP itself. The first backend that serves ends that.
    let any_serves = |backends: &[PortBackend]| backends.iter().any(|b| b.state.flags & SERVING != 0);
    plan.udp_stale |= key.proto == proto::UDP && !any_serves(&before.backends) && any_serves(&backends);

    let mut set = |range: Option<SlotRange>, empty: SlotRange, flag: u32, old: SlotRange| {
        let same = before.members(flag).eq(members(&backends, flag)) && !fresh;
        if same && (if old.is_empty() { old == empty } else { range.is_some() }) {
            range.into_iter().for_each(|range| model.slots.give_back(range));
            return old;
        }
        if !old.is_empty() {
            plan.freed.ranges.push(old);
        }
        let Some(range) = range else { return empty };
        plan.ops.push(Op::Slots(range.base, members(&backends, flag).collect()));
        range
    };
    let old = before.service;
    let cluster = set(cluster_range, SlotRange::REJECT, IN_CLUSTER, old.cluster);
    let local = set(local_range, desired.empty_local, IN_LOCAL, old.local);
    let starts = old.affinity.seconds == 0 && desired.affinity_seconds != 0;
    let affinity = Affinity {
        seconds: desired.affinity_seconds,
        epoch: old.affinity.epoch.wrapping_add(u32::from(starts)),
    };
    let service = Service { cluster, local, affinity };
    if fresh || service != old {
        plan.ops.push(Op::Service(before.id, service));
    }
    // Broken sets have just been rewritten.
    plan.freed.ranges.extend(before.replaced);
    let port = Port { id: before.id, service, backends, replaced: Vec::new(), claims: before.claims };
    model.ports.insert(Arc::clone(&key), port);
    Ok(key)
}

const IN_SETS: u32 = IN_CLUSTER | IN_LOCAL;

/// Brings the source ranges of a service id to the desired ones, which are sorted: additions at once, removals at the
/// end.
fn change_ranges(model: &mut Model, id: u32, desired: &[Prefix], plan: &mut Plan, dead: &mut Vec<Op>) {
    let stale: Vec<Prefix> =
        model.source_ranges_of(id).filter(|range| desired.binary_search(range).is_err()).collect();
    dead.extend(stale.into_iter().map(|range| Op::SourceRange(id, range, false)));
    for range in desired {
        if model.source_ranges.insert((id, *range)) {
            plan.ops.push(Op::SourceRange(id, *range, true));
        }
    }
}

/// Returns whether the kernel already holds exactly the desired state (frontends aside).
fn unchanged(port: &Port, desired: &DesiredPort) -> bool {
    let whole = |range: SlotRange, set: u32, empty: SlotRange| {
        if port.members(set).next().is_some() { !range.is_empty() } else { range == empty }
    };
    port.service.affinity.seconds == desired.affinity_seconds
        && whole(port.service.cluster, IN_CLUSTER, SlotRange::REJECT)
        && whole(port.service.local, IN_LOCAL, desired.empty_local)
        && port.backends.len() == desired.backends.len()
        && port.backends.iter().zip(&desired.backends).all(|(have, want)| {
            have.addr == want.addr && have.port == want.port && have.state.flags == want.flags
        })
}

/// Removes a Service port that no longer claims any frontend.
fn remove_port(model: &mut Model, key: &Arc<PortKey>, plan: &mut Plan, dead: &mut Vec<Op>) {
    let Some(port) = model.ports.remove(key) else { return };
    let epoch = port.service.affinity.epoch;
    let affinity = Affinity { seconds: 0, epoch };
    let service = Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, affinity };
    dead.push(Op::Service(port.id, service));
    for backend in &port.backends {
        bury(backend, plan, dead);
    }
    dead.extend(model.source_ranges_of(port.id).map(|range| Op::SourceRange(port.id, range, false)));
    // The name goes last: by the name a new agent finds the remains of the Service.
    dead.push(Op::Name(port.id, None));
    plan.freed.services.push((port.id, epoch));
    plan.freed.ranges.extend(port.ranges());
}

/// Marks a backend dead. Its address stays readable until the grace period is over.
fn bury(backend: &PortBackend, plan: &mut Plan, dead: &mut Vec<Op>) {
    let generation = backend.state.generation;
    dead.push(Op::BackendState(backend.id, BackendState { flags: 0, generation }));
    plan.freed.backends.push((backend.id, generation));
}

/// Replaces the claims of a Service port, and adds every affected frontend to `touched`.
fn claim(
    model: &mut Model,
    key: &Arc<PortKey>,
    created: i64,
    frontends: &[(FrontendKey, u16)],
    touched: &mut BTreeSet<FrontendKey>,
) {
    let claim_of = |frontend: &FrontendKey, flags| Claim {
        title: Title::of(frontend, flags),
        created,
        port: Arc::clone(key),
    };
    let Some(port) = model.ports.get_mut(key) else { return };
    // Same frontends and same creation time: nothing has changed.
    let known = |(frontend, flags): &(FrontendKey, u16)| {
        let claims = model.claims.get(frontend).map_or(&[][..], Vec::as_slice);
        claims.binary_search(&claim_of(frontend, *flags)).is_ok()
    };
    if port.claims == frontends && frontends.first().is_none_or(known) {
        let unsettled = |(frontend, _): &&(FrontendKey, u16)| model.unsettled.contains(frontend);
        touched.extend(frontends.iter().filter(unsettled).map(|(frontend, _)| *frontend));
        return;
    }
    touched.extend(port.claims.iter().chain(frontends).map(|(frontend, _)| *frontend));
    let before = std::mem::replace(&mut port.claims, frontends.to_vec());
    for (frontend, _) in &before {
        model.disclaim(frontend, key);
    }
    for (frontend, flags) in frontends {
        model.claim(*frontend, claim_of(frontend, *flags));
    }
}

/// Makes a refused port claim the frontends that it has, with the flags that they have. After a restart no port has
/// claims yet, so its frontends would otherwise be removed.
fn keep_claims(model: &mut Model, desired: &DesiredPort, created: i64, touched: &mut BTreeSet<FrontendKey>) {
    let Some((key, port)) = model.ports.get_key_value(&desired.key) else { return };
    if !port.claims.is_empty() {
        return;
    }
    let has = |(key, _): &(FrontendKey, u16)| {
        let value = model.frontends.get(key)?;
        let ours = value.service == port.id || key.kind == FrontendKind::Address as u8;
        ours.then_some((*key, value.flags))
    };
    let kept: Vec<_> = desired.frontends.iter().filter_map(has).collect();
    let key = Arc::clone(key);
    claim(model, &key, created, &kept, touched);
}

/// Gives every touched frontend to the winner of its claims.
fn frontends(model: &mut Model, mut touched: BTreeSet<FrontendKey>, plan: &mut Plan) {
    let in_the_way: Vec<_> = touched.iter().flat_map(|key| model.in_the_way_of(key)).collect();
    touched.extend(in_the_way);
    let mut appear = Vec::new();
    let mut vanish = Vec::new();
    // Frontends that vanish make no room yet, because they are removed last.
    let mut room = (model.capacity.frontends as usize).saturating_sub(model.frontends.len());
    for key in &touched {
        model.unsettled.remove(key);
        let value = model.holder(key).and_then(|holder| {
            let winner = model.ports.get(&holder.port)?;
            // A winner by nodePort needs no frontend at this address.
            let flags = find_claim(&winner.claims, key)?;
            // The frontend of a clusterIP as such belongs to all ports of the Service.
            let id = if key.kind == FrontendKind::Address as u8 { 0 } else { winner.id };
            Some(FrontendValue::new(key, id, flags))
        });
        let has = model.frontends.get(key).copied();
        match value {
            Some(value) if has == Some(value) => {}
            Some(value) => {
                if has.is_none() && room == 0 {
                    let full = Full { map: maps::FRONTENDS, need: 1, available: 0 };
                    if let Some(claim) = model.claims.get(key).and_then(|claims| claims.first()) {
                        plan.refuse(
                            &claim.port.service,
                            format_args!("frontend {}: {full}", FrontendName(key)),
                        );
                    }
                    model.unsettled.insert(*key);
                    continue;
                }
                room -= usize::from(has.is_none());
                plan.udp_stale |=
                    key.proto == proto::UDP && has.map(|has| has.service) != Some(value.service);
                model.frontends.insert(*key, value);
                appear.push((*key, value));
            }
            None => {
                if model.frontends.remove(key).is_some() {
                    plan.udp_stale |= key.proto == proto::UDP;
                    vanish.push(*key);
                }
            }
        }
    }
    // A clusterIP refuses unused ports only while all its used ports are there.
    appear.sort_by_key(|(key, _)| key.kind);
    vanish.sort_by_key(|key| std::cmp::Reverse(key.kind));
    plan.ops.extend(appear.into_iter().map(|(key, value)| Op::Frontend(key, Some(value))));
    plan.freed.room |= !vanish.is_empty();
    plan.ops.extend(vanish.into_iter().map(|key| Op::Frontend(key, None)));
}

fn range_for(model: &mut Model, len: usize) -> Result<Option<SlotRange>, Full> {
    if len == 0 {
        return Ok(None);
    }
    let taken = u32::try_from(len).ok().and_then(|len| model.slots.take(len));
    taken.map(Some).ok_or_else(|| Full { map: maps::SLOTS, need: len, available: model.slots.available() })
}

fn check(map: &'static str, need: usize, available: u32) -> Result<(), Full> {
    if need > available as usize { Err(Full { map, need, available }) } else { Ok(()) }
}

fn find(backends: &[PortBackend], addr: Addr, port: proxy_common::be::Be16) -> Option<&PortBackend> {
    let at = backends.binary_search_by_key(&(addr, port), |b| (b.addr, b.port)).ok()?;
    backends.get(at)
}

fn find_claim(claims: &[(FrontendKey, u16)], key: &FrontendKey) -> Option<u16> {
    let at = claims.binary_search_by_key(key, |(key, _)| *key).ok()?;
    claims.get(at).map(|(_, flags)| *flags)
}
