//! Flows: found by any of their tuples, made once, kept while they live.
//!
//! A flow begins in the maps that evict. It moves to those that never do when its client goes on after an answer: a
//! live backend answers spoofed requests too, so an answer alone proves nothing. For TCP the client has to acknowledge
//! what the backend sent.

use super::parse::{Parsed, Tuple, tcp};
use super::tables::{EdgeTables, FlowCell, Tier, Work};
use super::timeouts;
use crate::abi::flow::SNAT_PORTS;
use crate::abi::flow::state::{ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, PROVEN, REPLIED, RESET};
use crate::abi::{Counter, Flow, FlowKey, FlowKind, FlowRef, Origin, proto};
use crate::addr::Addr;
use crate::be::Be16;

/// How far the first acknowledgement may be ahead of the backend's SYN: what a backend may send before it.
const FIRST_WINDOW: u32 = 1 << 17;
/// How far a client's reset may be ahead of what the backend has acknowledged. Where more was on its way, its
/// acknowledgements make the client send resets that fit.
const RESET_WINDOW: u32 = 1 << 16;
/// Source ports tried before a flow is given up.
const PORT_TRIES: u32 = 16;
/// Tuples tried for a new flow: its own, and some with another source port. The verifier follows each.
const TUPLE_TRIES: u32 = 4;

/// Where a live record is.
///
/// The tier comes first: BTF cannot describe an `Option` whose tag lies behind something else.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place<C> {
    /// The map it is in.
    pub tier: Tier,
    /// The record.
    pub cell: C,
}

impl<C: FlowCell> Place<C> {
    /// What the record holds at this moment.
    #[inline(always)]
    pub fn flow(&self) -> Flow {
        self.cell.get()
    }
}

/// Whether the backend sees a source of ours.
#[inline(always)]
pub fn has_snat(flow: &Flow) -> bool {
    flow.snat_port != Be16 { bytes: [0; 2] }
}

/// A key of any kind.
#[inline(always)]
pub fn key(kind: FlowKind, origin: Origin, proto: u8, tuple: &Tuple) -> FlowKey {
    FlowKey {
        source: tuple.source,
        destination: tuple.destination,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        origin,
        proto,
        kind: kind as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// The tuple of packets in the other direction.
#[inline(always)]
pub fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        source: tuple.destination,
        destination: tuple.source,
        source_port: tuple.destination_port,
        destination_port: tuple.source_port,
    }
}

/// The live record of a tuple of client and backend.
#[inline(never)]
pub fn record<T: EdgeTables>(tables: &T, key: &FlowKey, now: u64) -> Option<Place<T::Cell>> {
    let check = key.check();
    match live(tables, Tier::Assured, key, check, now) {
        Some(cell) => Some(Place { cell, tier: Tier::Assured }),
        None => live(tables, Tier::New, key, check, now).map(|cell| Place { cell, tier: Tier::New }),
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

#[inline(always)]
fn indexed<T: EdgeTables>(tables: &T, index: &FlowKey) -> Option<FlowRef> {
    let target = match tables.index(Tier::Assured, index) {
        Some(target) => target,
        None => tables.index(Tier::New, index)?,
    };
    if target.check == index.check() { Some(target) } else { None }
}

/// The key of the record that an index entry from the VIP leads to.
#[inline(always)]
pub fn vip_target(index: &FlowKey, target: &FlowRef) -> FlowKey {
    FlowKey {
        source: index.source,
        destination: target.addr,
        source_port: target.client_port,
        destination_port: target.port,
        origin: index.origin,
        proto: index.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// The key of the record that an index entry from our own address leads to.
#[inline(always)]
pub fn snat_target(index: &FlowKey, target: &FlowRef) -> FlowKey {
    FlowKey {
        source: target.addr,
        destination: index.source,
        source_port: target.client_port,
        destination_port: index.source_port,
        origin: index.origin,
        proto: index.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// The index entry of a record from the VIP.
#[inline(always)]
pub fn vip_index(key: &FlowKey, flow: &Flow) -> (FlowKey, FlowRef) {
    let index = FlowKey {
        source: key.source,
        destination: flow.vip,
        source_port: flow.client_port,
        destination_port: flow.vip_port,
        origin: key.origin,
        proto: key.proto,
        kind: FlowKind::Vip as u8,
        pad: 0,
        pad_end: 0,
    };
    let check = index.check();
    (
        index,
        FlowRef { addr: key.destination, port: key.destination_port, client_port: key.source_port, check },
    )
}

/// The index entry of a record from our own address.
#[inline(always)]
pub fn snat_index(key: &FlowKey, snat: &Addr, snat_port: Be16) -> (FlowKey, FlowRef) {
    let index = FlowKey {
        source: key.destination,
        destination: *snat,
        source_port: key.destination_port,
        destination_port: snat_port,
        origin: key.origin,
        proto: key.proto,
        kind: FlowKind::Snat as u8,
        pad: 0,
        pad_end: 0,
    };
    let check = index.check();
    (index, FlowRef { addr: key.source, port: key.source_port, client_port: key.source_port, check })
}

/// Writes the index entry from the VIP.
#[inline(never)]
fn link_vip<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) -> bool {
    let (index, target) = vip_index(key, &cell.get());
    tables.put_index(tier, &index, &target)
}

/// Writes the index entry from our own address, if the flow has one.
#[inline(never)]
fn link_snat<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) -> bool {
    let flow = cell.get();
    if !has_snat(&flow) {
        return true;
    }
    let (index, target) = snat_index(key, &flow.snat, flow.snat_port);
    tables.put_index(tier, &index, &target)
}

#[inline(never)]
fn unlink_vip<T: EdgeTables>(tables: &T, tier: Tier, key: &FlowKey, cell: &T::Cell) {
    let (index, _) = vip_index(key, &cell.get());
    // The client may have begun another flow by the same tuple.
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

/// Removes what the client's tuple in `work` led to: a record that has expired, and any index entry. Else the entry of an
/// old flow would hide that of a new one.
#[inline(never)]
fn recycle<T: EdgeTables>(tables: &T, work: &mut Work) {
    recycle_in(tables, Tier::Assured, work);
    recycle_in(tables, Tier::New, work);
}

#[inline(always)]
fn recycle_in<T: EdgeTables>(tables: &T, tier: Tier, work: &mut Work) {
    let Some(target) = tables.index(tier, &work.index) else { return };
    work.key = vip_target(&work.index, &target);
    if let Some(cell) = tables.flow(tier, &work.key)
        && timeouts::expired(&cell.get(), work.key.proto, work.now)
    {
        remove(tables, &work.key, &Place { tier, cell });
    }
    tables.remove_index(tier, &work.index);
}

/// Makes the flow from the client of `tuple` that `work` says, with another source port if its own tuple is taken. Its key is
/// then in `work`. `indexed`: [`find_by_vip`] has found an entry. `None`: the backend has gone, every tuple that was tried
/// is taken, or there is no room.
#[inline(never)]
pub fn create<T: EdgeTables>(
    tables: &T,
    tuple: &Tuple,
    indexed: bool,
    work: &mut Work,
) -> Option<Place<T::Cell>> {
    let Work { now, to, origin, .. } = *work;
    if indexed {
        recycle(tables, work);
    }
    let backend = tables.backend(to.backend).filter(|backend| backend.service == to.service)?;
    work.flow = Flow {
        vip: tuple.destination,
        vip_port: tuple.destination_port,
        client_port: tuple.source_port,
        service: to.service,
        backend: to.backend,
        generation: backend.state.generation,
        last_seen: now,
        ..Flow::default()
    };
    work.key = FlowKey {
        source: tuple.source,
        destination: backend.addr,
        source_port: tuple.source_port,
        destination_port: backend.port,
        origin,
        proto: to.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    };
    for attempt in 0..TUPLE_TRIES {
        if attempt > 0 {
            work.key.source_port = random_port(tables);
        }
        // The backend remembers the closed connection of another client's port; the client knows about its own.
        match vacate(tables, &work.key, &work.flow, attempt == 0, now) {
            Key::TAKEN => continue,
            Key::FREE => {
                work.flow.check = work.key.check();
                // Somebody may have been faster; else there is no room.
                if !tables.add_flow(Tier::New, &work.key, &work.flow) && taken(tables, &work.key, &work.flow)
                {
                    continue;
                }
            }
            // Its index has been evicted while the record lived.
            _ => {}
        }
        if let Some(place) = record(tables, &work.key, now) {
            let linked = link_vip(tables, place.tier, &work.key, &place.cell);
            return if linked { Some(place) } else { None };
        }
    }
    None
}

/// Whether a packet begins another connection between the ends of a closed one: the client has asked for a VIP before, and
/// talks to the backend itself this time. (If it asks for a VIP again, its SYN makes the flow anew as it enters.) Such a
/// connection is nothing of ours, and the record would hide it.
#[inline(always)]
pub fn is_succeeded(flow: &Flow, parsed: &Parsed) -> bool {
    parsed.proto == proto::TCP
        && parsed.kind & tcp::SYN != 0
        && timeouts::closed(flow.state)
        && flow.state & REPLIED != 0
}

/// Where a new flow goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Choice {
    /// IP protocol number.
    pub proto: u8,
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
}

/// Whether a flow can have a key.
struct Key;

impl Key {
    /// Nobody has it.
    const FREE: u32 = 0;
    /// The very same flow has it.
    const OWN: u32 = 1;
    /// Another one has it.
    const TAKEN: u32 = 2;
}

/// Removes what has ended under a key (`closed`: also what has been closed), and says who has it.
#[inline(never)]
fn vacate<T: EdgeTables>(tables: &T, key: &FlowKey, flow: &Flow, closed: bool, now: u64) -> u32 {
    let mut tier = Tier::Assured;
    for _ in 0..2 {
        if let Some(cell) = tables.flow(tier, key) {
            let there = cell.get();
            if timeouts::expired(&there, key.proto, now) || closed && timeouts::closed(there.state) {
                remove(tables, key, &Place { cell, tier });
            } else {
                return if same_flow(&there, flow) { Key::OWN } else { Key::TAKEN };
            }
        }
        tier = Tier::New;
    }
    Key::FREE
}

/// Whether another flow has the key.
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

/// Whether two records are of one client and VIP.
#[inline(always)]
fn same_flow(one: &Flow, other: &Flow) -> bool {
    one.vip == other.vip && one.vip_port == other.vip_port && one.client_port == other.client_port
}

#[inline(always)]
fn random_port(tables: &impl EdgeTables) -> Be16 {
    const COUNT: u64 = (SNAT_PORTS.end - SNAT_PORTS.start) as u64;
    let offset = (u64::from(tables.random()).wrapping_mul(COUNT) >> 32) as u16;
    Be16::new(SNAT_PORTS.start.wrapping_add(offset))
}

/// Forgets a flow: indexes first.
#[inline(always)]
pub fn remove<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    unlink_vip(tables, place.tier, key, &place.cell);
    unlink_snat(tables, place.tier, key, &place.cell);
    tables.remove_flow(place.tier, key);
}

/// Our own source for packets of the flow with the key in `work` to another node: what it has, or a new one at `addr`.
/// False: all ports that were tried are taken. Afterwards the record holds it.
#[inline(never)]
pub fn translate_source<T: EdgeTables>(
    tables: &T,
    work: &mut Work,
    place: &Place<T::Cell>,
    addr: &Addr,
    now: u64,
) -> bool {
    let Work { key, index, .. } = work;
    for attempt in 0..PORT_TRIES {
        let port = random_port(tables);
        let target;
        (*index, target) = snat_index(key, addr, port);
        if let Some(other) = indexed(tables, index) {
            if owned(tables, index, &other, attempt < PORT_TRIES / 2, now) {
                continue;
            }
            tables.remove_index(Tier::New, index);
            tables.remove_index(Tier::Assured, index);
        }
        if tables.add_index(place.tier, index, &target) {
            place.cell.set_snat(*addr, port);
            return true;
        }
    }
    false
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

/// Makes the index entry from the VIP again if it has been evicted: of TCP, only the first packet of a client could.
#[inline(never)]
pub fn keep_vip<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>) {
    if place.tier == Tier::New {
        let (index, target) = vip_index(key, &place.cell.get());
        if indexed(tables, &index).is_none() {
            tables.add_index(Tier::New, &index, &target);
        }
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
            owner.tier == Tier::Assured && !timeouts::closed(flow.state)
        }
}

/// The numbers of a TCP segment, host order; zero of anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number: counts with ACK only.
    pub ack: u32,
}

/// A packet of the client: advances the state, and makes the flow safe from eviction once the client has gone on after
/// an answer.
#[inline(always)]
pub fn on_request<T: EdgeTables>(
    tables: &T,
    key: &FlowKey,
    place: &Place<T::Cell>,
    parsed: &Parsed,
    numbers: Numbers,
    now: u64,
) {
    let flow = place.flow();
    let mut state = flow.state;
    let mut proven = true;
    if parsed.proto == proto::TCP {
        // Anybody can send a reset in the name of a client; the backend believes one that fits (RFC 5961 §3.2).
        if parsed.kind & tcp::RST == 0
            || state & ASSURED == 0
            || numbers.seq.wrapping_sub(flow.expected) < RESET_WINDOW
        {
            state = tcp_state(state, parsed.kind, FIN_REQUEST);
        }
        proven = state & PROVEN != 0
            || parsed.kind & tcp::ACK != 0 && numbers.ack.wrapping_sub(flow.expected) < FIRST_WINDOW;
    }
    place.cell.set_last_seen(now);
    if state != flow.state {
        place.cell.set_state(state);
    }
    // One that finds no room tries again with each packet, and is counted once.
    if state & (REPLIED | ASSURED) == REPLIED
        && proven
        && !assure(tables, key, place, numbers.seq)
        && state & PROVEN == 0
    {
        place.cell.set_state(state | PROVEN);
        tables.count(Counter::FlowsFull);
    }
}

/// Moves a record with its indexes, when its client has gone on with `seq`. False, and nothing changed, if there is no
/// room.
#[inline(never)]
fn assure<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>, seq: u32) -> bool {
    let mut flow = place.flow();
    if has_snat(&flow) && !keeps_source(tables, key, place) {
        // Its backend will not know what comes from another source; and the entry of this one is somebody else's.
        return true;
    }
    flow.state = (flow.state | ASSURED) & !PROVEN;
    flow.expected = seq;
    if !tables.add_flow(Tier::Assured, key, &flow) {
        return false;
    }
    let done = link_vip(tables, Tier::Assured, key, &place.cell)
        && link_snat(tables, Tier::Assured, key, &place.cell);
    let leave = if done { Tier::New } else { Tier::Assured };
    remove(tables, key, &Place { cell: place.cell.clone(), tier: leave });
    done
}

/// A packet of the backend.
#[inline(always)]
pub fn on_reply<C: FlowCell>(place: &Place<C>, parsed: &Parsed, numbers: Numbers, now: u64) {
    let flow = place.flow();
    let before = flow.state;
    let mut state = before;
    if parsed.proto != proto::TCP {
        state |= REPLIED;
    } else {
        state = tcp_state(state, parsed.kind, FIN_REPLY);
        // A reset answers whoever asks, and gives the client nothing that it could prove to have heard.
        let begins = parsed.kind & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK;
        if begins {
            state |= REPLIED;
        }
        if before & ASSURED != 0 {
            if parsed.kind & (tcp::RST | tcp::ACK) == tcp::ACK && numbers.ack != flow.expected {
                place.cell.set_expected(numbers.ack);
            }
        } else if begins {
            place.cell.set_expected(numbers.seq.wrapping_add(1));
        }
    }
    place.cell.set_last_seen(now);
    if state != before {
        place.cell.set_state(state);
    }
}

/// RST and FIN as they are seen. What is sent after a RST shows that it was not believed.
#[inline(always)]
const fn tcp_state(state: u32, flags: u8, fin: u32) -> u32 {
    if flags & tcp::RST != 0 {
        state | RESET
    } else if flags & tcp::FIN != 0 {
        let first = state & (FIN_REQUEST | FIN_REPLY) == 0 && fin == FIN_REQUEST;
        (state & !RESET) | fin | if first { CLIENT_FIRST } else { 0 }
    } else {
        state & !RESET
    }
}
