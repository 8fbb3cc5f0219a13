//! Sources of our own: a port of this node for each flow to another one.

use super::index::indexed;
use super::{Place, record, snat_index, snat_target};
use crate::abi::flow::SNAT_PORTS;
use crate::abi::{FlowKey, FlowRef, FrontendKey};
use crate::be::Be16;
use crate::datapath::edge::tables::{EdgeTables, FlowCell as _, Tier, Work};
use crate::datapath::edge::timeouts;

/// Source ports tried before a flow is given up.
const PORT_TRIES: u32 = 16;

#[inline(always)]
pub(super) fn random_port(tables: &impl EdgeTables) -> Be16 {
    const COUNT: u64 = (SNAT_PORTS.end - SNAT_PORTS.start) as u64;
    let offset = (u64::from(tables.random()).wrapping_mul(COUNT) >> 32) as u16;
    Be16::new(SNAT_PORTS.start.wrapping_add(offset))
}

/// Our own source for packets of the flow with the key in `work` to another node, at the address `work.new.source`. False: all
/// ports that were tried are taken. Afterwards the record holds it.
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

/// Tries one port for [`translate_source`]: as the source port of `work.new` afterwards. `spare`: only what nobody keeps, and no
/// frontend of our own address: what that very backend asks for there, from the port that it serves at, would be taken for an
/// answer. (Frontends are never all that there is: whoever may have externalIPs could claim every port.)
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

/// Whether a flow still has its source: the index entry from there may have been evicted, and is then made again unless
/// another flow has taken the source, as it may from one that is not assured.
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

/// Whether a flow has the source that an index entry stands for, and keeps it. Where free ones have become rare (not
/// `spare`), only an open connection that is assured does: else a flood would leave none to anybody.
///
/// A backend that ends a connection remembers it for a while and refuses another one from there (TIME_WAIT, RFC 9293
/// §3.6.1), so it costs time to take such a source over.
#[inline(never)]
fn owned<T: EdgeTables>(tables: &T, index: &FlowKey, target: &FlowRef, spare: bool, now: u64) -> bool {
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
