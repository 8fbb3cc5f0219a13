//! Creation of a flow: under a key of its own, with a backend that has been chosen.

use super::index::{link_vip, remove_from};
use super::keys::vip_target;
use super::place::{Place, is_taken, record, same_flow};
use super::source::random_port;
use crate::abi::flow::state::ASSURED;
use crate::abi::{Flow, FlowKey, FlowKind};
use crate::datapath::edge::parsed::Tuple;
use crate::datapath::edge::tables::{EdgeTables, FlowCell, Tier};
use crate::datapath::edge::timeouts;
use crate::datapath::edge::work::{Meeting, Work};

/// Number of tuples tried for a new flow: the client's own, then others with a random source port.
const TUPLE_TRIES: u32 = 4;

/// Removes the index entries of the client's tuple in `work`, and the expired records that they lead to.
/// Otherwise the index entry of an old flow would hide that of the new one. With [`Meeting::BESIDE`] the
/// assured flow stays.
#[inline(never)]
fn recycle<T: EdgeTables>(tables: &T, work: &mut Work) {
    if work.meeting != Meeting::BESIDE {
        recycle_in(tables, Tier::Assured, work);
    }
    recycle_in(tables, Tier::New, work);
}

#[inline(always)]
fn recycle_in<T: EdgeTables>(tables: &T, tier: Tier, work: &mut Work) {
    let Some(target) = tables.index(tier, &work.index) else { return };
    work.key = vip_target(&work.index, &target);
    if let Some(cell) = tables.flow(tier, &work.key)
        && timeouts::expired(&cell.get(), work.key.proto, work.now)
    {
        remove_from(tables, tier, &work.key, &cell);
    }
    tables.remove_index(tier, &work.index);
}

/// Creates the flow of the client of `tuple` that `work` describes, with another source port if another flow
/// has the client's own tuple. Writes the flow's key to `work`. `indexed`:
/// [`find_by_vip`](super::find_by_vip) has found an entry. Returns `None` if every tuple that was tried is
/// taken, or a map is full.
#[inline(never)]
pub fn create<T: EdgeTables>(
    tables: &T,
    tuple: &Tuple,
    indexed: bool,
    work: &mut Work,
) -> Option<Place<T::Cell>> {
    let Work { to, origin, .. } = *work;
    if indexed {
        recycle(tables, work);
    }
    work.flow = Flow {
        vip: tuple.destination,
        vip_port: tuple.destination_port,
        client_port: tuple.source_port,
        service: to.service,
        backend: to.backend,
        last_seen: work.now,
        ..Flow::default()
    };
    work.key = FlowKey {
        source: tuple.source,
        destination: work.new.destination,
        source_port: tuple.source_port,
        destination_port: work.new.destination_port,
        origin,
        proto: to.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    };
    for attempt in 0..TUPLE_TRIES {
        if tables.try_tuple(work, attempt == 0) {
            let place = record(tables, &work.key, work.now)?;
            let linked = link_vip(tables, place.tier, &work.key, &place.cell);
            return if linked { Some(place) } else { None };
        }
    }
    None
}

/// Tries to add the record in `work` for [`create`]: under the client's own tuple (`own`), or with a random
/// source port, which is written to its key. Returns false if another flow has the tuple.
#[inline(always)]
pub fn try_tuple<T: EdgeTables>(tables: &T, work: &mut Work, own: bool) -> bool {
    if !own {
        work.key.source_port = random_port(tables);
    }
    // A closed connection is replaced only under the client's own port. The client knows of its own closed
    // connections; the backend may still remember that of another client.
    match vacate(tables, work, own) {
        Key::TAKEN => false,
        // This is the flow that the new one is to be created beside.
        Key::OWN if work.meeting == Meeting::BESIDE => false,
        Key::FREE => {
            work.flow.check = work.key.check();
            // If adding fails, either another packet was faster or the map is full.
            tables.add_flow(Tier::New, &work.key, &work.flow) || !taken(tables, &work.key, &work.flow)
        }
        // The record of this flow exists; only its index entry was evicted.
        _ => true,
    }
}

/// Possible owners of a key.
struct Key;

impl Key {
    /// No flow has the key.
    const FREE: u32 = 0;
    /// The same flow has the key.
    const OWN: u32 = 1;
    /// Another flow has the key.
    const TAKEN: u32 = 2;
}

/// Removes the expired records under the key in `work`, and returns who has the key (see [`Key`]). `closed`:
/// records of closed connections are removed, too, unless somebody else's connection has the same addresses
/// and ports.
#[inline(never)]
fn vacate<T: EdgeTables>(tables: &T, work: &mut Work, closed: bool) -> u32 {
    let Work { key, flow, now, .. } = work;
    let mut tier = Tier::Assured;
    for _ in 0..2 {
        if let Some(cell) = tables.flow(tier, key) {
            let there = cell.get();
            let taken = is_taken(&there);
            let ended = timeouts::closed(there.state)
                && (there.state & ASSURED == 0 || timeouts::ended(&there, *now));
            if timeouts::expired(&there, key.proto, *now) || closed && !taken && ended {
                inherit(&cell, flow);
                remove_from(tables, tier, key, &cell);
            } else {
                return if same_flow(&there, flow) && !taken { Key::OWN } else { Key::TAKEN };
            }
        }
        tier = Tier::New;
    }
    Key::FREE
}

/// Gives a flow the SNAT source of its client's closed connection: the backend accepts the next connection
/// from that source at once.
#[inline(never)]
fn inherit<C: FlowCell>(cell: &C, flow: &mut Flow) {
    let before = cell.get();
    if timeouts::closed(before.state) && !is_taken(&before) && same_flow(&before, flow) {
        (flow.snat, flow.snat_port) = (before.snat, before.snat_port);
    }
}

/// Returns whether another flow has the key.
#[inline(never)]
fn taken<T: EdgeTables>(tables: &T, key: &FlowKey, flow: &Flow) -> bool {
    let there = match tables.flow(Tier::Assured, key) {
        Some(cell) => cell.get(),
        None => match tables.flow(Tier::New, key) {
            Some(cell) => cell.get(),
            None => return false,
        },
    };
    !same_flow(&there, flow)
}
