//! Index entries of flows: written and removed with their records.

use super::keys::{snat_index, vip_index};
use super::place::{Place, has_snat, indexed};
use crate::abi::{FlowKey, proto};
use crate::datapath::edge::tables::{EdgeTables, FlowCell as _, Tier};
use crate::datapath::edge::timeouts;

/// Writes the index entry that leads from client and VIP to the record.
#[inline(never)]
pub(super) fn link_vip<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) -> bool {
    let (index, target) = vip_index(key, &cell.get());
    tables.put_index(tier, &index, &target)
}

/// Writes the index entry that leads from backend and SNAT source to the record, if the flow has SNAT.
#[inline(never)]
pub(super) fn link_snat<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) -> bool {
    let flow = cell.get();
    if !has_snat(&flow) {
        return true;
    }
    let (index, target) = snat_index(key, &flow.snat, flow.snat_port);
    tables.put_index(tier, &index, &target)
}

#[inline(never)]
pub(super) fn unlink_vip<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) {
    let (index, _) = vip_index(key, &cell.get());
    // The index entry may belong to another flow that the client has begun with the same tuple.
    let own = tables.index(tier, &index).is_some_and(|target| {
        target.addr == key.destination
            && target.port == key.destination_port
            && target.client_port == key.source_port
    });
    if own {
        tables.remove_index(tier, &index);
    }
}

#[inline(never)]
fn unlink_snat<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) {
    let flow = cell.get();
    if has_snat(&flow) {
        let (index, target) = snat_index(key, &flow.snat, flow.snat_port);
        if tables.index(tier, &index) == Some(target) {
            tables.remove_index(tier, &index);
        }
    }
}

#[inline(always)]
pub(super) fn remove_from<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) {
    unlink_vip(tables, tier, key, cell);
    unlink_snat(tables, tier, key, cell);
    tables.remove_flow(tier, key);
}

/// Writes the index entry from the VIP again if it has been evicted. For TCP, only the first packet of a
/// client could do so otherwise.
#[inline(never)]
pub fn keep_vip<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    if place.tier == Tier::New {
        let (index, target) = vip_index(key, &place.cell.get());
        if indexed(tables, &index).is_none() {
            tables.add_index(Tier::New, &index, &target);
        }
    }
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
