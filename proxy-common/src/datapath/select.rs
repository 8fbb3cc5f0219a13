//! Choice of a backend: the set that the client gets, session affinity, and one random pick.

use super::tables::{Tables, Tier, since};
use crate::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use crate::abi::frontend::flags::{DENY_HOST, DENY_POD, FAR_LOCAL, NEAR_LOCAL, POD_LOCAL};
use crate::abi::{
    Affinity, AffinityKey, AffinityValue, Backend, BackendId, Counter, Flow, FlowKey, FrontendValue, Nanos,
    ServiceId, SlotRange,
};
use crate::addr::Addr;

/// Client of a connection, as far as policies distinguish clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A process in the host's network namespace.
    Host,
    /// A pod of this node, seen at its socket.
    Pod,
    /// A packet from a near source (detect-local matches).
    Near,
    /// A packet from anywhere else.
    Far,
}

impl Client {
    /// Returns the flags of a frontend that keep this client from being served at the socket, and those that
    /// give it the local set.
    #[inline(always)]
    const fn bits(self) -> (u16, u16) {
        match self {
            Self::Host => (DENY_HOST, NEAR_LOCAL),
            Self::Pod => (DENY_POD, POD_LOCAL),
            Self::Near => (0, NEAR_LOCAL),
            Self::Far => (0, FAR_LOCAL),
        }
    }

    /// Returns whether anybody could send in the name of this client.
    #[inline(always)]
    const fn may_be_forged(self) -> bool {
        matches!(self, Self::Near | Self::Far)
    }
}

/// Result of a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Backend that was selected, with its id.
    Backend(BackendId, Backend),
    /// No backend: the client is to be refused.
    Reject(Counter),
    /// No backend: the client is to get no answer.
    Drop(Counter),
}

/// Picks a backend of `frontend` for a new connection.
///
/// `identity` stands for the client in session affinity: its address, or its network namespace at the socket
/// edge ([`AffinityKey::netns_client`]).
#[inline(always)]
pub fn select(tables: &impl Tables, frontend: FrontendValue, client: Client, identity: Addr) -> Selection {
    let (deny, local) = client.bits();
    if frontend.flags & deny != 0 {
        return Selection::Drop(Counter::DropSourceRange);
    }
    let Some(service) = tables.service(frontend.service) else {
        return Selection::Drop(Counter::DropRetry);
    };
    let (range, in_set) =
        if frontend.flags & local != 0 { (service.local, IN_LOCAL) } else { (service.cluster, IN_CLUSTER) };
    if range.is_empty() {
        return if range == SlotRange::DROP {
            Selection::Drop(Counter::DropNoLocalEndpoint)
        } else {
            Selection::Reject(Counter::RejectNoEndpoint)
        };
    }
    if service.affinity.seconds == 0 {
        return pick(tables, frontend.service, range);
    }

    let key = AffinityKey { client: identity, service: frontend.service };
    let now = tables.now();
    let mut tier = Tier::Assured;
    let mut found = remembered(tables, tier, &key, service.affinity, in_set, now);
    if found.is_none() && client.may_be_forged() {
        tier = Tier::New;
        found = remembered(tables, tier, &key, service.affinity, in_set, now);
    }
    let selection = match found {
        Some((id, backend)) => {
            tables.count(Counter::AffinityHit);
            Selection::Backend(id, backend)
        }
        None => pick(tables, frontend.service, range),
    };
    if let Selection::Backend(id, backend) = selection {
        tables.remember(tier, &key, &entry(id, &backend, service.affinity, now));
    }
    selection
}

#[inline(always)]
const fn entry(id: BackendId, backend: &Backend, affinity: Affinity, now: Nanos) -> AffinityValue {
    AffinityValue {
        backend: id,
        generation: backend.state.generation,
        epoch: affinity.epoch,
        pad: 0,
        last_seen: now,
    }
}

/// Remembers a client of the packet edge in [`Tier::Assured`] when it has shown that it is there. The entry
/// has the backend of the client's flow. Nothing is remembered if that backend has left its Service, or if
/// the Service has no session affinity.
#[inline(never)]
pub fn remember_assured(tables: &impl Tables, key: &FlowKey, flow: &Flow) {
    if let Some(affinity) = tables.service(flow.service).map(|service| service.affinity)
        && affinity.seconds != 0
        && let Some(there) = tables.backend(flow.backend)
        && there.service == flow.service
        && there.addr == key.destination
        && there.port == key.destination_port
        && there.state.flags & (IN_CLUSTER | IN_LOCAL) != 0
    {
        let client = AffinityKey { client: key.source, service: flow.service };
        tables.remember(Tier::Assured, &client, &entry(flow.backend, &there, affinity, flow.last_seen));
    }
}

/// Returns the backend that the client had last, if the entry is still valid.
#[inline(always)]
fn remembered(
    tables: &impl Tables,
    tier: Tier,
    key: &AffinityKey,
    affinity: Affinity,
    in_set: u32,
    now: Nanos,
) -> Option<(BackendId, Backend)> {
    let entry = tables.affinity(tier, key)?;
    if entry.epoch != affinity.epoch {
        return None;
    }
    let age = since(entry.last_seen, now);
    if age >= u64::from(affinity.seconds).wrapping_mul(1_000_000_000) {
        return None;
    }
    // The entry may be another key's (LRU elements are reused under readers), so the backend itself is
    // checked.
    let backend = tables.backend(entry.backend)?;
    if backend.service != key.service
        || backend.state.generation != entry.generation
        || backend.state.flags & in_set == 0
    {
        tables.count(Counter::AffinityStale);
        return None;
    }
    Some((entry.backend, backend))
}

/// Number of backends that [`another`] looks at.
const OTHERS: u32 = 4;

/// Looks for a backend that is `wanted` among a few of the client's set, starting at a random one. It serves
/// callers that do not want the backend that [`select`] has returned. Returns `None` also if the Service port
/// has session affinity.
#[inline(always)]
pub fn another(
    tables: &impl Tables,
    frontend: FrontendValue,
    client: Client,
    mut wanted: impl FnMut(BackendId, &Backend) -> bool,
) -> Option<(BackendId, Backend)> {
    let (_, local) = client.bits();
    let service = tables.service(frontend.service).filter(|service| service.affinity.seconds == 0)?;
    let range = if frontend.flags & local != 0 { service.local } else { service.cluster };
    if range.is_empty() {
        return None;
    }
    let mut offset = random_below(tables, range.len);
    for _ in 0..OTHERS.min(range.len) {
        if let Selection::Backend(id, backend) = at(tables, frontend.service, range, offset)
            && wanted(id, &backend)
        {
            return Some((id, backend));
        }
        offset = if offset.wrapping_add(1) == range.len { 0 } else { offset.wrapping_add(1) };
    }
    None
}

/// Returns the backend in a random slot of the range.
#[inline(always)]
fn pick(tables: &impl Tables, service: ServiceId, range: SlotRange) -> Selection {
    at(tables, service, range, random_below(tables, range.len))
}

/// Returns a random number below `len`. A multiplication and a shift spread 32 random bits without a
/// division.
#[inline(always)]
fn random_below(tables: &impl Tables, len: u32) -> u32 {
    (u64::from(tables.random()).wrapping_mul(u64::from(len)) >> 32) as u32
}

/// Returns the backend in a slot of the range.
#[inline(always)]
fn at(tables: &impl Tables, service: ServiceId, range: SlotRange, offset: u32) -> Selection {
    let Some(id) = tables.slot(range.slot(offset)) else {
        return Selection::Drop(Counter::DropRetry);
    };
    match tables.backend(id) {
        Some(backend) if backend.service == service => Selection::Backend(id, backend),
        _ => Selection::Drop(Counter::DropRetry),
    }
}
