//! SNAT sources: a port of this node for each flow that needs SNAT.

use super::keys::{snat_index, snat_target};
use super::place::{Place, indexed, record};
use crate::abi::flow::SNAT_PORTS;
use crate::abi::{FlowKey, FlowRef, FrontendKey, Nanos};
use crate::be::Be16;
use crate::datapath::edge::tables::{EdgeTables, FlowCell as _, Tier};
use crate::datapath::edge::timeouts;
use crate::datapath::edge::work::Work;

/// Number of source ports tried before a flow is given up.
const PORT_TRIES: u32 = 16;

#[inline(always)]
pub(super) fn random_port(tables: &impl EdgeTables) -> Be16 {
    const COUNT: u64 = (SNAT_PORTS.end - SNAT_PORTS.start) as u64;
    let offset = (u64::from(tables.random()).wrapping_mul(COUNT) >> 32) as u16;
    Be16::new(SNAT_PORTS.start.wrapping_add(offset))
}

/// Finds a SNAT source at the address `work.new.source` for the flow with the key in `work`, and writes it to
/// the record. Returns false if all ports that were tried are taken.
#[inline(never)]
pub fn translate_source<T: EdgeTables>(tables: &T, work: &mut Work, place: &Place<T::Cell>) -> bool {
    for attempt in 0..PORT_TRIES {
        if tables.try_source(work, place.tier, attempt < PORT_TRIES / 2) {
            place.cell.set_snat(place.check, work.new.source, work.new.source_port);
            return true;
        }
    }
    false
}

/// Tries one port for [`translate_source`], and writes it to `work.new.source_port`. `spare`: accepts only a
/// port that no flow keeps and that no frontend has at our address. A request of the same backend to such a
/// frontend, from the port that the backend serves at, would be mistaken for a reply. (Without `spare`,
/// frontends are not excluded: a user who may set externalIPs could claim every port.)
#[inline(always)]
pub fn try_source<T: EdgeTables>(tables: &T, work: &mut Work, tier: Tier, spare: bool) -> bool {
    let Work { key, index, new, now, .. } = work;
    new.source_port = random_port(tables);
    let frontend = |key| tables.frontend(&key).is_some();
    if spare
        && (frontend(FrontendKey::exact(new.source, new.source_port, key.proto))
            || frontend(FrontendKey::node_port(new.source.unspecified(), new.source_port, key.proto)))
    {
        return false;
    }
    let target;
    (*index, target) = snat_index(key, &new.source, new.source_port);
    if let Some(other) = indexed(tables, index) {
        if owned(tables, index, &other, spare, *now) {
            return false;
        }
        tables.remove_index(Tier::New, index);
        tables.remove_index(Tier::Assured, index);
    }
    tables.add_index(tier, index, &target)
}

/// Returns whether a flow still has its SNAT source. Writes the index entry of the source again if it has
/// been evicted. Another flow may have taken the source of a flow that is not assured.
#[inline(never)]
pub fn keeps_source<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) -> bool {
    if place.tier == Tier::Assured {
        return true;
    }
    let flow = place.cell.get();
    let (index, target) = snat_index(key, &flow.snat, flow.snat_port);
    match indexed(tables, &index) {
        Some(there) => there == target,
        None => tables.add_index(Tier::New, &index, &target),
    }
}

/// Returns whether the flow that an index entry leads to still has its SNAT source and keeps it. With
/// `spare`, a flow keeps the source until the backend has forgotten the connection. Without `spare` (free
/// ports are rare), only an assured open connection keeps it; otherwise a flood would leave no source to
/// anybody.
///
/// A backend that ends a connection remembers it for a while, and refuses another connection from the same
/// source (TIME_WAIT, RFC 9293 §3.6.1). Taking over such a source therefore costs time.
#[inline(never)]
fn owned<T: EdgeTables>(tables: &T, index: &FlowKey, target: &FlowRef, spare: bool, now: Nanos) -> bool {
    let Some(owner) = record(tables, &snat_target(index, target), now) else { return false };
    let flow = owner.flow();
    flow.snat == index.destination
        && flow.snat_port == index.destination_port
        && if spare {
            !timeouts::forgotten(&flow, now)
        } else {
            owner.tier == Tier::Assured && !timeouts::ended(&flow, now)
        }
}
