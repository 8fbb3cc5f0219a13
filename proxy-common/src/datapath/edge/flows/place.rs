//! Finds the record of a flow by any of its tuples.

use super::keys::{key, snat_target, vip_target};
use crate::abi::flow::state::{ASSURED, PROVEN, REPLIED, TAKEN};
use crate::abi::{Flow, FlowKey, FlowKind, FlowRef, Nanos, proto};
use crate::be::Be16;
use crate::datapath::edge::parsed::{Parsed, Tuple, tcp};
use crate::datapath::edge::tables::{EdgeTables, FlowCell, Tier};
use crate::datapath::edge::timeouts;
use crate::datapath::edge::work::Work;

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
pub fn record<T: EdgeTables>(tables: &T, key: &FlowKey, now: Nanos) -> Option<Place<T::Cell>> {
    let check = key.check();
    match live(tables, Tier::Assured, key, check, now) {
        Some(cell) => Some(Place { tier: Tier::Assured, check, cell }),
        None => live(tables, Tier::New, key, check, now).map(|cell| Place { tier: Tier::New, check, cell }),
    }
}

#[inline(always)]
fn live<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, check: u32, now: Nanos) -> Option<T::Cell> {
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
pub fn of_vip<T: EdgeTables>(tables: &T, tuple: &Tuple, key: &FlowKey, now: Nanos) -> Option<Place<T::Cell>> {
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
    let index = super::keys::key(FlowKind::Snat, *origin, proto, tuple);
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
pub fn is_succeeded(flow: &Flow, parsed: &Parsed, now: Nanos) -> bool {
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
pub(super) fn same_flow(one: &Flow, other: &Flow) -> bool {
    one.vip == other.vip && one.vip_port == other.vip_port && one.client_port == other.client_port
}

#[inline(always)]
pub(super) fn indexed<T: EdgeTables>(tables: &T, index: &FlowKey) -> Option<FlowRef> {
    let target = match tables.index(Tier::Assured, index) {
        Some(target) => target,
        None => tables.index(Tier::New, index)?,
    };
    if target.check == index.check() { Some(target) } else { None }
}
