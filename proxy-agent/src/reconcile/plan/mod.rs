//! From the desired state to the operations that produce it: pure, and ordered so that any prefix is safe.
//!
//! After each single operation of a [`Plan`] every frontend names a Service port whose sets name live backends. The
//! order, over all Services of a plan together:
//!
//! 1. names, new source ranges, new backends and new slot ranges are written, then the Services flip to them;
//! 2. frontends appear or move (one replacement each), then frontends vanish;
//! 3. unwanted source ranges are removed, and elements that nothing refers to are marked dead; their numbers are free
//!    after a grace period ([`crate::reconcile::model::Freed`]).
//!
//! A frontend with source ranges therefore never has fewer of them than its Service wants or wanted, and a service id
//! that is reused has no source ranges of its last owner.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_common::abi::frontend::FrontendKind;
use proxy_common::abi::maps;
use proxy_common::abi::{FrontendKey, FrontendValue, ServiceId, proto};

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{DesiredPort, DesiredService, PortKey};
use crate::reconcile::model::{Claim, Model, Title};
use crate::reconcile::store::Op;

mod left;
mod node;
mod operations;
mod part;
mod port;
mod rivals;

#[cfg(test)]
mod tests;

pub use left::{LeftAlone, plan_left};
pub(crate) use left::{Sandbox, meets_edges};
pub use node::{LOCAL_ADDRESS_ENTRIES, NodeTables, PREFIX_ENTRIES, plan_node};
pub(crate) use operations::Full;
pub use operations::Plan;
pub(crate) use part::{Part, REASONS};
use port::{change_port, remove_port};
pub(crate) use rivals::{FrontendName, LostClaims, rivals};

/// Desired state of one Service. `Option<Wanted>` is `None` when the Service is gone.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// `metadata.creationTimestamp`.
    pub created: i64,
    /// State to program.
    pub desired: DesiredService,
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
    model
        .ports_of(service)
        .filter(|key| {
            while wanted.next_if(|wanted| **wanted < ***key).is_some() {}
            wanted.peek().is_none_or(|wanted| **wanted != ***key)
        })
        .cloned()
        .collect()
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
    let live: BTreeSet<ServiceId> = model.ports.values().map(|port| port.id).collect();
    let strays = model.source_ranges.extract_if(.., |(id, _)| !live.contains(id));
    plan.ops.extend(strays.map(|(id, range)| Op::SourceRange(id, range, false)));
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
    let known = frontends.first().is_none_or(|(frontend, flags)| {
        let claims = model.claims.get(frontend).map_or(&[][..], Vec::as_slice);
        claims.binary_search(&claim_of(frontend, *flags)).is_ok()
    });
    if known && port.claims == frontends {
        let frontends = frontends.iter().map(|(frontend, _)| *frontend);
        touched.extend(frontends.filter(|frontend| model.unsettled.contains(frontend)));
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
    let kept: Vec<_> = desired
        .frontends
        .iter()
        .filter_map(|(key, _)| {
            let value = model.frontends.get(key)?;
            let ours = value.service == port.id || key.kind == FrontendKind::Address as u8;
            ours.then_some((*key, value.flags))
        })
        .collect();
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
            let id = if key.kind == FrontendKind::Address as u8 { ServiceId::NONE } else { winner.id };
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

fn find_claim(claims: &[(FrontendKey, u16)], key: &FrontendKey) -> Option<u16> {
    let at = claims.binary_search_by_key(key, |(key, _)| *key).ok()?;
    claims.get(at).map(|(_, flags)| *flags)
}
