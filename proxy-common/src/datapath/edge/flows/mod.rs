//! Flows: looked up by any of their tuples, created once, kept while they live.
//!
//! A flow begins in the maps that evict ([`Tier::New`]). It moves to the maps that never evict
//! ([`Tier::Assured`]) when its client goes on after a reply. A reply alone proves nothing, because a live
//! backend replies to spoofed requests, too. For TCP the client has to acknowledge what the backend sent.
//! Until then only a packet that answers the client's own SYN counts as a reply: somebody else may have a
//! direct connection to the backend between the same addresses and ports.
//!
//! A SYN never ends an open flow. It begins a second flow beside the open one if the backend has gone or has
//! been silent for too long, or if the flow was closed a moment ago (perhaps by somebody else). The second
//! flow takes the place of the first when the client proves it.

mod begin;
mod index;
mod keys;
mod segments;
mod source;

pub use self::begin::{Choice, create, try_tuple};
pub use self::index::keep_vip;
use self::index::{indexed, remove_from, unlink_vip};
pub use self::keys::{key, reversed, snat_index, snat_target, vip_index, vip_target};
pub use self::segments::{Meeting, Numbers, has_sent, is_answer, meet, on_reply, on_request};
pub use self::source::{keeps_source, translate_source, try_source};
use super::parse::{Parsed, Tuple, tcp};
use super::tables::{EdgeTables, FlowCell, Tier, Work};
use super::timeouts;
use crate::abi::flow::state::{ASSURED, PROVEN, REPLIED, TAKEN};
use crate::abi::{Flow, FlowKey, FlowKind, proto};
use crate::be::Be16;

/// Live record, and the map that holds it.
///
/// The tier comes first: BTF cannot describe an `Option` whose tag does not come first.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place<C> {
    /// Map that holds the record.
    pub tier: Tier,
    /// [`FlowKey::check`] of the record's key.
    pub check: u32,
    /// Record in place.
    pub cell: C,
}

impl<C: FlowCell> Place<C> {
    /// Returns the current content of the record.
    #[inline(always)]
    pub fn flow(&self) -> Flow {
        self.cell.get()
    }

    /// Replaces the state.
    #[inline(always)]
    pub fn set_state(&self, state: u32) {
        self.cell.set_state(self.check, state);
    }
}

/// Returns whether the flow has SNAT, so that the backend sees a source of ours.
#[inline(always)]
pub fn has_snat(flow: &Flow) -> bool {
    flow.snat_port != Be16 { bytes: [0; 2] }
}

/// Returns the live record with `key`, the tuple of client and backend.
#[inline(never)]
pub fn record<T: EdgeTables>(tables: &T, key: &FlowKey, now: u64) -> Option<Place<T::Cell>> {
    let check = key.check();
    match live(tables, Tier::Assured, key, check, now) {
        Some(cell) => Some(Place { tier: Tier::Assured, check, cell }),
        None => live(tables, Tier::New, key, check, now).map(|cell| Place { tier: Tier::New, check, cell }),
    }
}

#[inline(always)]
fn live<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, check: u32, now: u64) -> Option<T::Cell> {
    let cell = tables.flow(tier, key)?;
    let flow = cell.get();
    if flow.check == check && !timeouts::expired(&flow, key.proto, now) { Some(cell) } else { None }
}

/// Returns the live record of a request from `tuple.source` to the VIP `tuple.destination`. Writes its key to
/// `work`.
#[inline(never)]
pub fn by_vip<T: EdgeTables>(
    tables: &T,
    proto: u8,
    tuple: &Tuple,
    work: &mut Work,
) -> Option<Place<T::Cell>> {
    if find_by_vip(tables, proto, tuple, work) { of_vip(tables, tuple, &work.key, work.now) } else { None }
}

/// First half of [`by_vip`]: returns whether the tuple has an index entry. Writes the key of the entry and
/// the key of the record to `work`, without a look at the record.
#[inline(never)]
pub fn find_by_vip(tables: &impl EdgeTables, proto: u8, tuple: &Tuple, work: &mut Work) -> bool {
    work.index = key(FlowKind::Vip, work.origin, proto, tuple);
    let Some(target) = indexed(tables, &work.index) else { return false };
    work.key = vip_target(&work.index, &target);
    true
}

/// Second half of [`by_vip`]: returns the live record with `key`, if it belongs to the tuple.
#[inline(never)]
pub fn of_vip<T: EdgeTables>(tables: &T, tuple: &Tuple, key: &FlowKey, now: u64) -> Option<Place<T::Cell>> {
    let place = record(tables, key, now)?;
    let flow = place.flow();
    let same = flow.vip == tuple.destination
        && flow.vip_port == tuple.destination_port
        && flow.client_port == tuple.source_port;
    if same { Some(place) } else { None }
}

/// Returns the live record of a reply from the backend `tuple.source` to our SNAT source. Writes its key to
/// `work`.
#[inline(never)]
pub fn by_snat<T: EdgeTables>(
    tables: &T,
    proto: u8,
    tuple: &Tuple,
    work: &mut Work,
) -> Option<Place<T::Cell>> {
    let Work { key, now, origin, .. } = work;
    let index = self::key(FlowKind::Snat, *origin, proto, tuple);
    let target = indexed(tables, &index)?;
    *key = snat_target(&index, &target);
    let place = record(tables, key, *now)?;
    let flow = place.flow();
    let same = has_snat(&flow) && flow.snat == tuple.destination && flow.snat_port == tuple.destination_port;
    if same { Some(place) } else { None }
}

/// Returns whether a packet begins another connection between the addresses and ports of a closed one. The
/// client connected to a VIP before, and now connects to the backend itself. (A SYN to a VIP renews the flow
/// at ingress.) The new connection must not be translated, so the old record must not match it.
#[inline(always)]
pub fn is_succeeded(flow: &Flow, parsed: &Parsed, now: u64) -> bool {
    parsed.proto == proto::TCP
        && parsed.kind & tcp::SYN != 0
        && timeouts::ended(flow, now)
        && flow.state & REPLIED != 0
}

/// As [`is_succeeded`], for a packet that is the backend's without doubt. The backend sends no SYN on a
/// proved connection that it knows, so no quiet time is needed, no matter who closed the flow.
#[inline(always)]
pub fn is_succeeded_at_backend(flow: &Flow, parsed: &Parsed) -> bool {
    parsed.proto == proto::TCP
        && parsed.kind & tcp::SYN != 0
        && timeouts::closed(flow.state)
        && flow.state & ASSURED != 0
}

/// Returns whether somebody else has a connection between the addresses and ports of a flow that is not
/// proved.
#[inline(always)]
pub const fn is_taken(flow: &Flow) -> bool {
    flow.state & (TAKEN | ASSURED | PROVEN) == TAKEN
}

/// Returns whether two records are of the same client port and VIP.
#[inline(always)]
fn same_flow(one: &Flow, other: &Flow) -> bool {
    one.vip == other.vip && one.vip_port == other.vip_port && one.client_port == other.client_port
}

/// Removes a flow whose client has begun another one. The record of a closed TCP connection stays, without
/// its index entry from the VIP: no other flow gets its SNAT source while the backend remembers the
/// connection.
#[inline(never)]
pub fn give_way<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    if key.proto == proto::TCP && timeouts::closed(place.flow().state) {
        unlink_vip(tables, place.tier, key, &place.cell);
    } else {
        remove(tables, key, place);
    }
}

/// Removes a flow: its index entries first, then its record.
#[inline(always)]
pub fn remove<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    remove_from(tables, place.tier, key, &place.cell);
}
