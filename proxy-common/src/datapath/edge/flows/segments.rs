//! Effects of packets of the client and of the backend on a flow.

use super::index::{give_way, link_snat, link_vip, remove_from};
use super::keys::vip_target;
use super::place::{Place, find_by_vip, has_snat, is_taken, of_vip};
use super::source::keeps_source;
use crate::abi::flow::state::{
    ASKED, ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, PROVEN, REPLIED, RESET, SUCCEEDED, TAKEN,
};
use crate::abi::flow::syn_time;
use crate::abi::{Counter, Flow, FlowKey, IfIndex, Nanos, proto};
use crate::datapath::edge::packet::Packet;
use crate::datapath::edge::parsed::{Parsed, Tuple, tcp};
use crate::datapath::edge::tables::{EdgeTables, FlowCell, Tier};
use crate::datapath::edge::timeouts;
use crate::datapath::edge::work::{Meeting, Numbers, Work};
use crate::datapath::select::remember_assured;

/// Number of bytes that the client's first acknowledgement may be ahead of the backend's SYN: data that the
/// backend may send before it.
const FIRST_WINDOW: u32 = 1 << 17;
/// Number of bytes that a client's RST may be ahead of what the backend has acknowledged. If more data was in
/// flight, the acknowledgements of the backend make the client send resets that fit.
const RESET_WINDOW: u32 = 1 << 16;
/// The same for a FIN, which is sent only once, after all data in flight.
const FIN_WINDOW: u32 = 1 << 22;

impl Numbers {
    /// Returns the numbers of a TCP segment, or zeros for other protocols.
    #[inline(always)]
    pub fn of(packet: &impl Packet, parsed: &Parsed) -> Self {
        if parsed.proto == proto::TCP
            && let Some([a, b, c, d, e, f, g, h, words]) = packet.load::<9>(parsed.transport.wrapping_add(4))
        {
            let headers =
                parsed.transport.wrapping_sub(parsed.ip).wrapping_add(u32::from(words >> 4).wrapping_mul(4));
            Self {
                seq: u32::from_be_bytes([a, b, c, d]),
                ack: u32::from_be_bytes([e, f, g, h]),
                data: parsed.bytes.wrapping_sub(headers),
            }
        } else {
            Self::default()
        }
    }
}

/// Returns the [`Meeting`] of a TCP packet of the client (`begins`: a SYN) with the flow in `place`, whose
/// key is in `work`. If a second flow has begun beside this one and the packet belongs to the second flow,
/// `place` and the key become those of the second flow.
#[inline(never)]
pub fn meet<T: EdgeTables>(
    tables: &T,
    parsed: &Parsed,
    begins: bool,
    work: &mut Work,
    place: &mut Place<T::Cell>,
) -> u32 {
    let tuple = &parsed.tuple;
    if place.flow().state & SUCCEEDED != 0 {
        if let Some(next) = successor(tables, tuple, work) {
            let there = next.flow();
            if begins {
                *place = next;
                let over = timeouts::closed(there.state) || is_taken(&there);
                return if over { Meeting::BESIDE } else { Meeting::GOES_ON };
            }
            if parsed.kind & (tcp::RST | tcp::ACK) == tcp::RST {
                // A RST without ACK: the client has received the answer to a SYN that somebody else sent. (A
                // client that ends its own connection sets ACK.)
                *place = next;
                return Meeting::GOES_ON;
            }
            if there.state & REPLIED != 0 && proves(&there, work.numbers.ack) {
                find_by_vip(tables, work.index.proto, tuple, work);
                give_way(tables, &work.key, place);
                find_by_vip(tables, work.index.proto, tuple, work);
                *place = next;
                return Meeting::GOES_ON;
            }
        }
        // The packet belongs to the old flow.
        find_by_vip(tables, work.index.proto, tuple, work);
    }
    let flow = place.flow();
    if !begins {
        return Meeting::GOES_ON;
    }
    if timeouts::closed(flow.state) {
        let open = flow.state & ASSURED != 0 && !timeouts::ended(&flow, work.now);
        if open {
            place.set_state(flow.state | SUCCEEDED);
        }
        return if open { Meeting::BESIDE } else { Meeting::REPLACES };
    }
    if is_taken(&flow) {
        return Meeting::AVOIDS;
    }
    if !is_gone(tables, &work.key, &flow) && !is_silent(place, &flow, work.now) {
        return Meeting::GOES_ON;
    }
    if flow.state & ASSURED == 0 {
        return Meeting::REPLACES;
    }
    place.set_state(flow.state | SUCCEEDED);
    Meeting::BESIDE
}

/// Returns the flow of the client's tuple that has begun beside an assured one. Writes its key to `work`. If
/// there is none, the key in `work` is unspecified.
#[inline(always)]
fn successor<T: EdgeTables>(tables: &T, tuple: &Tuple, work: &mut Work) -> Option<Place<T::Cell>> {
    let target = tables.index(Tier::New, &work.index)?;
    work.key = vip_target(&work.index, &target);
    of_vip(tables, tuple, &work.key, work.now)
}

/// Returns whether the backend of a flow has left its Service, or its id now stands for another backend.
#[inline(always)]
fn is_gone(tables: &impl EdgeTables, key: &FlowKey, flow: &Flow) -> bool {
    tables.backend(flow.backend).is_none_or(|backend| {
        backend.addr != key.destination
            || backend.port != key.destination_port
            || backend.service != flow.service
            || backend.state.flags == 0
    })
}

/// Returns whether the backend has answered no SYN on an open flow for too long. Notes the time of the first
/// SYN. (One unanswered SYN proves nothing: backends limit how many SYNs they answer.)
#[inline(always)]
fn is_silent<C: FlowCell>(place: &Place<C>, flow: &Flow, now: Nanos) -> bool {
    if flow.state & ASSURED == 0 {
        return false;
    }
    if flow.syn == 0 {
        place.cell.set_syn(place.check, syn_time(now));
    }
    timeouts::is_silent(flow.syn, syn_time(now))
}

/// Returns whether an acknowledgement number shows that the client has received the backend's reply.
#[inline(always)]
const fn proves(flow: &Flow, ack: u32) -> bool {
    ack.wrapping_sub(flow.expected) < FIRST_WINDOW
}

/// Updates a flow for a packet of the client: advances the state, notes the device for the replies, and moves
/// the flow to the maps that never evict once the client has gone on after a reply.
#[inline(never)]
pub fn on_request<T: EdgeTables>(tables: &T, place: &Place<T::Cell>, parsed: &Parsed, work: &Work) {
    let Work { key, numbers, now, asked_by, .. } = work;
    let flow = place.flow();
    let mut state = flow.state;
    let (mut proven, mut prolongs, mut leads) = (true, true, true);
    if parsed.proto == proto::TCP {
        // A RST or FIN may be forged. The backend believes only one whose sequence number fits (RFC 5961
        // §3.2).
        let window = if parsed.kind & tcp::RST != 0 { RESET_WINDOW } else { FIN_WINDOW };
        let fits = state & ASSURED == 0 || numbers.seq.wrapping_sub(flow.expected) < window;
        if fits || parsed.kind & (tcp::RST | tcp::FIN) == 0 {
            state = tcp_state(state, parsed.kind, FIN_REQUEST);
        }
        // The window reaches backwards, too: a retransmission is behind what the backend has acknowledged.
        leads = parsed.kind & tcp::RST == 0
            && (state & ASSURED == 0
                || numbers.seq.wrapping_sub(flow.expected).wrapping_add(FIN_WINDOW) < 2 * FIN_WINDOW);
        proven = state & PROVEN != 0 || parsed.kind & tcp::ACK != 0 && proves(&flow, numbers.ack);
        if state & ASSURED != 0 {
            let asks =
                fits && parsed.kind & tcp::RST == 0 && (numbers.data != 0 || parsed.kind & tcp::FIN != 0);
            let ends = (state ^ flow.state) & (RESET | FIN_REQUEST) != 0;
            prolongs = ends || asks && state & ASKED == 0;
            if asks {
                state |= ASKED;
            }
        } else if state & REPLIED == 0
            && parsed.kind & (tcp::SYN | tcp::ACK) == tcp::SYN
            && (flow.expected == 0 || timeouts::is_quiet(&flow, *now))
        {
            // A different SYN shortly afterwards is somebody else's: the client retransmits its own SYN
            // unchanged.
            place.cell.set_expected(place.check, numbers.seq.wrapping_add(1));
            place.cell.set_syn(place.check, numbers.data as u16);
        }
    }
    if leads && flow.asked_by != *asked_by {
        place.cell.set_asked_by(place.check, *asked_by);
    }
    if prolongs {
        place.cell.set_last_seen(place.check, *now);
    }
    if state != flow.state {
        place.set_state(state);
    }
    // A flow that finds no room tries again with each packet, but is counted only once.
    if state & (REPLIED | ASSURED) == REPLIED
        && proven
        && !assure(tables, key, place, numbers.seq)
        && state & PROVEN == 0
    {
        place.set_state(state | PROVEN);
        tables.count(Counter::FlowsFull);
    }
}

/// Moves a record and its index entries to the maps that never evict, when its client has gone on with `seq`.
/// Returns false, with nothing changed, if there is no room.
#[inline(never)]
fn assure<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>, seq: u32) -> bool {
    let mut flow = place.flow();
    if flow.check != place.check || has_snat(&flow) && !keeps_source(tables, key, place) {
        // Another flow has the element, or the SNAT source. The backend would not recognize packets from a
        // new source.
        return true;
    }
    flow.state = (flow.state | ASSURED) & !PROVEN;
    (flow.expected, flow.syn) = (seq, 0);
    if !tables.add_flow(Tier::Assured, key, &flow) {
        // Either another packet of the flow was faster, or there is no room.
        return tables.flow(Tier::Assured, key).is_some();
    }
    let done = link_vip(tables, Tier::Assured, key, &place.cell)
        && link_snat(tables, Tier::Assured, key, &place.cell);
    let leave = if done { Tier::New } else { Tier::Assured };
    remove_from(tables, leave, key, &place.cell);
    if done {
        remember_assured(tables, key, &flow);
    }
    done
}

/// Returns whether a packet of the backend is a reply to this client. Until the flow is proved, somebody else
/// may have a connection between the same addresses and ports. The client's next SYN then gets another source
/// port.
#[inline(always)]
pub fn is_answer<C: FlowCell>(place: &Place<C>, parsed: &Parsed, numbers: Numbers) -> bool {
    let flow = place.flow();
    if parsed.proto != proto::TCP || flow.state & (ASSURED | PROVEN) != 0 {
        return true;
    }
    let fits = if flow.state & REPLIED == 0 {
        parsed.kind & tcp::ACK != 0
            && parsed.kind & (tcp::SYN | tcp::RST) != 0
            && numbers.ack.wrapping_sub(flow.expected) <= flow.syn as u32
    } else {
        // The backend's SYN once more, or data that follows it.
        numbers.seq.wrapping_sub(flow.expected).wrapping_add(1) < FIRST_WINDOW
    };
    if !fits && flow.state & TAKEN == 0 {
        place.set_state(flow.state | TAKEN);
    }
    fits
}

/// Returns whether a segment with the sequence number `seq`, of the client (`request`) or of the backend, can
/// belong to this flow. Until the flow is proved, somebody else may have a connection between the same
/// addresses and ports. Only the client's SYN is then known to belong to the flow, and after that the
/// backend's reply.
#[inline(always)]
pub const fn has_sent(flow: &Flow, proto: u8, seq: u32, request: bool) -> bool {
    if proto != proto::TCP || flow.state & (ASSURED | PROVEN) != 0 {
        return true;
    }
    let ahead = seq.wrapping_add(1).wrapping_sub(flow.expected);
    match (request, flow.state & REPLIED != 0) {
        (true, false) => ahead == 0,
        (false, true) => ahead < FIRST_WINDOW,
        (true, true) | (false, false) => false,
    }
}

/// Updates a flow for a reply of the backend, which has entered by the device `by`.
#[inline(always)]
pub fn on_reply<C: FlowCell>(place: &Place<C>, parsed: &Parsed, work: &Work, by: IfIndex) {
    let Place { cell, check, .. } = place;
    let (numbers, now) = (work.numbers, work.now);
    let flow = place.flow();
    let before = flow.state;
    let mut state = before & !ASKED;
    if parsed.proto != proto::TCP {
        state |= REPLIED;
    } else {
        state = tcp_state(state, parsed.kind, FIN_REPLY);
        // A reset does not count as a reply: the backend sends it to anybody, and the client cannot prove
        // that it received it.
        let begins = parsed.kind & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK;
        if begins {
            state |= REPLIED;
        }
        if before & ASSURED != 0 {
            if parsed.kind & (tcp::RST | tcp::ACK) == tcp::ACK && numbers.ack != flow.expected {
                cell.set_expected(*check, numbers.ack);
            }
            if flow.syn != 0 {
                cell.set_syn(*check, 0);
                if begins {
                    // A backend that answers a SYN with SYN and ACK has forgotten the previous connection.
                    state &= !(FIN_REQUEST | FIN_REPLY | CLIENT_FIRST);
                }
            }
        } else if begins {
            cell.set_expected(*check, numbers.seq.wrapping_add(1));
        }
    }
    if flow.answered_by != by {
        cell.set_answered_by(*check, by);
    }
    cell.set_last_seen(*check, now);
    if state != before {
        place.set_state(state);
    }
}

/// Returns `state` with the RST or FIN of a packet. A packet without RST clears [`RESET`]: it shows that the
/// RST was not believed.
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
