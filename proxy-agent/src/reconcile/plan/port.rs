//! The change of one Service port: room first, then backends, sets and affinity.
//!
//! Everything that can fail is checked before anything is taken, so a port that has no room stays as it was.

use std::sync::Arc;

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, SERVING};
use proxy_common::abi::{Affinity, BackendState, Service, ServiceId, SlotRange, maps, proto};
use proxy_common::addr::{Addr, Prefix};
use proxy_common::be::Be16;

use super::operations::{Full, Plan};
use crate::reconcile::desired::{DesiredBackend, DesiredPort, PortKey};
use crate::reconcile::model::{Model, Port, PortBackend, members, service_name};
use crate::reconcile::store::Op;

/// Brings the backends, sets and affinity of one Service port to the desired state.
pub(super) fn change_port(
    model: &mut Model,
    desired: &DesiredPort,
    plan: &mut Plan,
    dead: &mut Vec<Op>,
) -> Result<Arc<PortKey>, Full> {
    let known = model.ports.get_key_value(&desired.key).map(|(key, port)| (Arc::clone(key), port.clone()));
    if let Some((key, before)) = &known
        && unchanged(before, desired)
        && model.source_ranges_of(before.id).eq(desired.source_ranges.iter().copied())
    {
        return Ok(Arc::clone(key));
    }
    check_room(model, known.as_ref().map(|(_, before)| before), desired)?;
    let reserved = Reserved::take(model, desired)?;
    let fresh = known.is_none();
    let Some((key, before)) = known.or_else(|| begin(model, &desired.key, plan)) else {
        reserved.give_back(model);
        return Err(Full { map: maps::SERVICES, need: 1, available: 0 });
    };

    change_ranges(model, before.id, &desired.source_ranges, plan, dead);
    let backends = place_backends(model, &before, &desired.backends, plan, dead);
    plan.udp_stale |= key.proto == proto::UDP && strands_sockets(&before.backends, &backends);

    let (old, change) = (before.service, Change { before: &before, backends: &backends, fresh });
    let cluster = change.flip(model, plan, IN_CLUSTER, reserved.cluster, (old.cluster, SlotRange::REJECT));
    let local = change.flip(model, plan, IN_LOCAL, reserved.local, (old.local, desired.empty_local));
    let starts = old.affinity.seconds == 0 && desired.affinity_seconds != 0;
    let epoch = old.affinity.epoch.wrapping_add(u32::from(starts));
    let service = Service { cluster, local, affinity: Affinity { seconds: desired.affinity_seconds, epoch } };
    if fresh || service != old {
        plan.ops.push(Op::Service(before.id, service));
    }
    // Broken sets have just been rewritten.
    plan.freed.ranges.extend(before.replaced);
    let port = Port { id: before.id, service, backends, replaced: Vec::new(), claims: before.claims };
    model.ports.insert(Arc::clone(&key), port);
    Ok(key)
}

/// Checks that the backends and source ranges that are new have room.
fn check_room(model: &Model, before: Option<&Port>, desired: &DesiredPort) -> Result<(), Full> {
    let needed = desired
        .backends
        .iter()
        .filter(|wanted| before.is_none_or(|old| find(&old.backends, wanted.addr, wanted.port).is_none()))
        .count();
    check(maps::BACKENDS, needed, model.backend_ids.available())?;
    let needed = desired
        .source_ranges
        .iter()
        .filter(|range| before.is_none_or(|old| !model.source_ranges.contains(&(old.id, **range))))
        .count();
    // Unwanted source ranges make no room yet, because they are removed last.
    let used = u32::try_from(model.source_ranges.len()).unwrap_or(u32::MAX);
    check(maps::SOURCE_RANGES, needed, model.capacity.source_ranges.saturating_sub(used))
}

/// Slots that have been taken for the two sets of a Service port; none for an empty set.
struct Reserved {
    cluster: Option<SlotRange>,
    local: Option<SlotRange>,
}

impl Reserved {
    /// Takes slots for both sets, or for none of them.
    fn take(model: &mut Model, desired: &DesiredPort) -> Result<Self, Full> {
        let [in_cluster, in_local] = [IN_CLUSTER, IN_LOCAL]
            .map(|set| desired.backends.iter().filter(|backend| backend.flags & set != 0).count());
        let cluster = range_for(model, in_cluster)?;
        match range_for(model, in_local) {
            Ok(local) => Ok(Self { cluster, local }),
            Err(full) => {
                Self { cluster, local: None }.give_back(model);
                Err(full)
            }
        }
    }

    fn give_back(self, model: &mut Model) {
        self.cluster.into_iter().chain(self.local).for_each(|range| model.slots.give_back(range));
    }
}

/// Gives a new Service port an id and a name. Returns `None` if no id is left.
fn begin(model: &mut Model, key: &PortKey, plan: &mut Plan) -> Option<(Arc<PortKey>, Port)> {
    let (id, epoch) = model.service_ids.take()?;
    let affinity = Affinity { seconds: 0, epoch };
    let service = Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, affinity };
    plan.ops.push(Op::Name(id, Some(Box::new(service_name(key)))));
    let port = Port { id, service, backends: Vec::new(), replaced: Vec::new(), claims: Vec::new() };
    Some((Arc::new(key.clone()), port))
}

/// Writes the wanted backends, and buries those that are not wanted any more. Returns the backends that the port has
/// then. Room for them has been checked.
fn place_backends(
    model: &mut Model,
    before: &Port,
    wanted: &[DesiredBackend],
    plan: &mut Plan,
    dead: &mut Vec<Op>,
) -> Vec<PortBackend> {
    let mut backends: Vec<PortBackend> = Vec::with_capacity(wanted.len());
    for wanted in wanted {
        let old = find(&before.backends, wanted.addr, wanted.port);
        let (id, state) = match old {
            Some(old) => (old.id, change_state(old, wanted.flags, plan, dead)),
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
        if find(&backends, old.addr, old.port).is_none() {
            bury(old, plan, dead);
        }
    }
    backends
}

/// Changes the flags of a backend that stays. Until the flip the old set is still in use, so the bits of both sets
/// count until then.
fn change_state(old: &PortBackend, flags: u32, plan: &mut Plan, dead: &mut Vec<Op>) -> BackendState {
    // The endpoint enters a set again: clients remembered for it are not sent back (cases P160 to P169).
    let enters = old.state.flags & IN_SETS == 0 && flags & IN_SETS != 0;
    let generation = old.state.generation.wrapping_add(u32::from(enters));
    let both = BackendState { flags: old.state.flags | flags, generation };
    if both != old.state {
        plan.ops.push(Op::BackendState(old.id, both));
    }
    let state = BackendState { flags, generation };
    if state != both {
        dead.push(Op::BackendState(old.id, state));
    }
    state
}

/// Returns whether connected UDP sockets have to be led elsewhere: the backend of some has stopped to serve, or the
/// first backend serves. (While no backend serves, sockets lead to the VIP itself.)
fn strands_sockets(before: &[PortBackend], after: &[PortBackend]) -> bool {
    before.iter().any(|old| serves(old) && !find(after, old.addr, old.port).is_some_and(serves))
        || !before.iter().any(serves) && after.iter().any(serves)
}

fn serves(backend: &PortBackend) -> bool {
    backend.state.flags & SERVING != 0
}

/// A Service port before and after a change of its backends.
struct Change<'a> {
    before: &'a Port,
    backends: &'a [PortBackend],
    /// Whether the port is new, so that nothing of it is in the maps yet.
    fresh: bool,
}

impl Change<'_> {
    /// Returns the range of the set with `flag`, written to `range` if its members have changed. `old` is the range
    /// until now, and the verdict that an empty set has.
    fn flip(
        &self,
        model: &mut Model,
        plan: &mut Plan,
        flag: u32,
        range: Option<SlotRange>,
        (old, empty): (SlotRange, SlotRange),
    ) -> SlotRange {
        let same = self.before.members(flag).eq(members(self.backends, flag)) && !self.fresh;
        if same && (if old.is_empty() { old == empty } else { range.is_some() }) {
            range.into_iter().for_each(|range| model.slots.give_back(range));
            return old;
        }
        if !old.is_empty() {
            plan.freed.ranges.push(old);
        }
        let Some(range) = range else { return empty };
        plan.ops.push(Op::Slots(range.base, members(self.backends, flag).collect()));
        range
    }
}

const IN_SETS: u32 = IN_CLUSTER | IN_LOCAL;

/// Brings the source ranges of a service id to the desired ones, which are sorted: additions at once, removals at the
/// end.
fn change_ranges(model: &mut Model, id: ServiceId, desired: &[Prefix], plan: &mut Plan, dead: &mut Vec<Op>) {
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
pub(super) fn remove_port(model: &mut Model, key: &Arc<PortKey>, plan: &mut Plan, dead: &mut Vec<Op>) {
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

fn find(backends: &[PortBackend], addr: Addr, port: Be16) -> Option<&PortBackend> {
    let at = backends.binary_search_by_key(&(addr, port), |b| (b.addr, b.port)).ok()?;
    backends.get(at)
}
