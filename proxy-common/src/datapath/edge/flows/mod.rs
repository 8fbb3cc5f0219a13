//! Flows: found by any of their tuples, made once, kept while they live.
//!
//! A flow begins in the maps that evict. It moves to those that never do when its client goes on after an answer: a
//! live backend answers spoofed requests too, so an answer alone proves nothing. For TCP the client has to acknowledge
//! what the backend sent. Until then only what answers the client's own SYN counts as an answer: somebody else may have a
//! connection between the same ends, straight to the backend.
//!
//! A SYN never ends an open flow. Where its backend has gone, or has been silent for too long, or it has been closed in this
//! moment, perhaps by somebody else, the SYN begins another one beside it, which takes its place when the client proves it.

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

/// Where a live record is.
///
/// The tier comes first: BTF cannot describe an `Option` whose tag lies behind something else.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place<C> {
    /// The map it is in.
    pub tier: Tier,
    /// [`FlowKey::check`] of its key.
    pub check: u32,
    /// The record.
    pub cell: C,
}

impl<C: FlowCell> Place<C> {
    /// What the record holds at this moment.
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

/// Whether the backend sees a source of ours.
#[inline(always)]
pub fn has_snat(flow: &Flow) -> bool {
    flow.snat_port != Be16 { bytes: [0; 2] }
}

/// The live record of a tuple of client and backend.
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

/// The live record that a request from `tuple.source` to the VIP `tuple.destination` belongs to. Its key is then in
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

/// The first half of [`by_vip`]: whether the tuple is in the index. Both keys are then in `work`, of the index and of
/// the record, whatever that may be.
#[inline(never)]
pub fn find_by_vip(tables: &impl EdgeTables, proto: u8, tuple: &Tuple, work: &mut Work) -> bool {
    work.index = key(FlowKind::Vip, work.origin, proto, tuple);
    let Some(target) = indexed(tables, &work.index) else { return false };
    work.key = vip_target(&work.index, &target);
    true
}

/// The second half of [`by_vip`]: the live record with `key`, if it is one of the tuple.
#[inline(never)]
pub fn of_vip<T: EdgeTables>(tables: &T, tuple: &Tuple, key: &FlowKey, now: u64) -> Option<Place<T::Cell>> {
    let place = record(tables, key, now)?;
    let flow = place.flow();
    let same = flow.vip == tuple.destination
        && flow.vip_port == tuple.destination_port
        && flow.client_port == tuple.source_port;
    if same { Some(place) } else { None }
}

/// The live record that a packet from the backend `tuple.source` to our own address belongs to. Its key is then in `work`.
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

/// Whether a packet begins another connection between the ends of a closed one: the client has asked for a VIP before, and
/// talks to the backend itself this time. (If it asks for a VIP again, its SYN makes the flow anew as it enters.) Such a
/// connection is nothing of ours, and the record would hide it.
#[inline(always)]
pub fn is_succeeded(flow: &Flow, parsed: &Parsed, now: u64) -> bool {
    parsed.proto == proto::TCP
        && parsed.kind & tcp::SYN != 0
        && timeouts::ended(flow, now)
        && flow.state & REPLIED != 0
}

/// The same of a packet that is the backend's without doubt. It sends no SYN on a connection that has been proved and that it
/// knows, so nothing has to be waited for, whoever may have closed the flow.
#[inline(always)]
pub fn is_succeeded_at_backend(flow: &Flow, parsed: &Parsed) -> bool {
    parsed.proto == proto::TCP
        && parsed.kind & tcp::SYN != 0
        && timeouts::closed(flow.state)
        && flow.state & ASSURED != 0
}

/// Whether somebody else has a connection between the ends of a flow.
#[inline(always)]
pub const fn is_taken(flow: &Flow) -> bool {
    flow.state & (TAKEN | ASSURED | PROVEN) == TAKEN
}

/// Whether two records are of one client and VIP.
#[inline(always)]
fn same_flow(one: &Flow, other: &Flow) -> bool {
    one.vip == other.vip && one.vip_port == other.vip_port && one.client_port == other.client_port
}

/// Forgets a flow whose client has begun another one. A closed connection stays, without its index: nobody gets its source
/// while its backend remembers it.
#[inline(never)]
pub fn give_way<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    if key.proto == proto::TCP && timeouts::closed(place.flow().state) {
        unlink_vip(tables, place.tier, key, &place.cell);
    } else {
        remove(tables, key, place);
    }
}

/// Forgets a flow: indexes first.
#[inline(always)]
pub fn remove<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    remove_from(tables, place.tier, key, &place.cell);
}
