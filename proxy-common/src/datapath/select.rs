//! Which backend serves: the set that the client gets, session affinity, and one random pick.

use super::tables::{Tables, Tier, since};
use crate::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use crate::abi::frontend::flags::{DENY_HOST, DENY_POD, FAR_LOCAL, NEAR_LOCAL, POD_LOCAL};
use crate::abi::{Affinity, AffinityKey, AffinityValue, Backend, Counter, FrontendValue, Service, SlotRange};
use crate::addr::Addr;

/// Where a connection comes from, as far as policies care.
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
    /// Flags of a frontend that keep this client from being served at the socket, and that give it the local set.
    #[inline(always)]
    const fn bits(self) -> (u16, u16) {
        match self {
            Self::Host => (DENY_HOST, NEAR_LOCAL),
            Self::Pod => (DENY_POD, POD_LOCAL),
            Self::Near => (0, NEAR_LOCAL),
            Self::Far => (0, FAR_LOCAL),
        }
    }

    /// Whether anybody could be asking in its name.
    #[inline(always)]
    const fn may_be_forged(self) -> bool {
        matches!(self, Self::Near | Self::Far)
    }
}

/// What became of a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// This backend, with its id.
    Backend(u32, Backend),
    /// None, and the client is to be refused.
    Reject(Counter),
    /// None, and the client is to hear nothing.
    Drop(Counter),
}

/// Picks a backend of `frontend` for a new connection.
///
/// `identity` is what session affinity remembers a client by: its address, or its network namespace at the socket
/// edge ([`AffinityKey::netns_client`]).
#[inline(always)]
pub fn select(tables: &impl Tables, frontend: FrontendValue, client: Client, identity: Addr) -> Selection {
    let (service, range, in_set) = match offered(tables, frontend, client) {
        Ok(offered) => offered,
        Err(none) => return none,
    };
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

/// Why no backend of `frontend` serves the client, if none does.
#[inline(always)]
pub fn refusal(tables: &impl Tables, frontend: FrontendValue, client: Client) -> Option<Selection> {
    offered(tables, frontend, client).err()
}

/// The Service, and its set that the client gets; else what becomes of the client.
#[inline(always)]
fn offered(
    tables: &impl Tables,
    frontend: FrontendValue,
    client: Client,
) -> Result<(Service, SlotRange, u32), Selection> {
    let (deny, local) = client.bits();
    if frontend.flags & deny != 0 {
        return Err(Selection::Drop(Counter::DropSourceRange));
    }
    let Some(service) = tables.service(frontend.service) else {
        return Err(Selection::Drop(Counter::DropRetry));
    };
    let (range, in_set) =
        if frontend.flags & local != 0 { (service.local, IN_LOCAL) } else { (service.cluster, IN_CLUSTER) };
    if !range.is_empty() {
        Ok((service, range, in_set))
    } else if range == SlotRange::DROP {
        Err(Selection::Drop(Counter::DropNoLocalEndpoint))
    } else {
        Err(Selection::Reject(Counter::RejectNoEndpoint))
    }
}

#[inline(always)]
const fn entry(id: u32, backend: &Backend, affinity: Affinity, now: u64) -> AffinityValue {
    AffinityValue {
        backend: id,
        generation: backend.state.generation,
        epoch: affinity.epoch,
        pad: 0,
        last_seen: now,
    }
}

/// Remembers the client of packets for good when it has shown that it is there: with `backend` of `service`, if that has session
/// affinity.
#[inline(never)]
pub fn remember_assured(tables: &impl Tables, client: Addr, service: u32, backend: u32, now: u64) {
    if let Some(affinity) = tables.service(service).map(|service| service.affinity)
        && affinity.seconds != 0
        && let Some(there) = tables.backend(backend)
        && there.service == service
    {
        let key = AffinityKey { client, service };
        tables.remember(Tier::Assured, &key, &entry(backend, &there, affinity, now));
    }
}

/// The backend that the client had last, if that still counts.
#[inline(always)]
fn remembered(
    tables: &impl Tables,
    tier: Tier,
    key: &AffinityKey,
    affinity: Affinity,
    in_set: u32,
    now: u64,
) -> Option<(u32, Backend)> {
    let entry = tables.affinity(tier, key)?;
    if entry.epoch != affinity.epoch {
        return None;
    }
    let age = since(entry.last_seen, now);
    if age >= u64::from(affinity.seconds).wrapping_mul(1_000_000_000) {
        return None;
    }
    // The entry may be of another key (LRU elements are reused under readers): the backend itself vouches.
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

/// One random slot of the range.
#[inline(always)]
fn pick(tables: &impl Tables, service: u32, range: SlotRange) -> Selection {
    // A multiply and a shift spread 32 random bits over the range without a division.
    let offset = (u64::from(tables.random()).wrapping_mul(u64::from(range.len)) >> 32) as u32;
    let Some(id) = tables.slot(range.base.wrapping_add(offset)) else {
        return Selection::Drop(Counter::DropRetry);
    };
    match tables.backend(id) {
        Some(backend) if backend.service == service => Selection::Backend(id, backend),
        _ => Selection::Drop(Counter::DropRetry),
    }
}
