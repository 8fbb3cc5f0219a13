//! What packets of the client and of the backend do to a flow.

use super::index::{link_snat, link_vip, remove_from};
use super::{Place, find_by_vip, give_way, has_snat, is_taken, keeps_source, of_vip, vip_target};
use crate::abi::flow::state::{
    ASKED, ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, PROVEN, REPLIED, RESET, SUCCEEDED, TAKEN,
};
use crate::abi::flow::syn_time;
use crate::abi::{Counter, Flow, FlowKey, proto};
use crate::datapath::edge::packet::Packet;
use crate::datapath::edge::parse::{Parsed, Tuple, tcp};
use crate::datapath::edge::tables::{EdgeTables, FlowCell, Tier, Work};
use crate::datapath::edge::timeouts;
use crate::datapath::select::remember_assured;

/// How far the first acknowledgement may be ahead of the backend's SYN: what a backend may send before it.
const FIRST_WINDOW: u32 = 1 << 17;
/// How far a client's reset may be ahead of what the backend has acknowledged. Where more was on its way, its
/// acknowledgements make the client send resets that fit.
const RESET_WINDOW: u32 = 1 << 16;
/// The same for a FIN, which is sent once only, behind all that is on its way.
const FIN_WINDOW: u32 = 1 << 22;

/// The numbers of a TCP segment, host order; zero of anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Numbers {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number: counts with ACK only.
    pub ack: u32,
    /// Bytes of data.
    pub data: u32,
}

impl Numbers {
    /// Those of a segment; of anything else zero.
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

/// What a TCP packet of the client does to the flow that it meets.
pub struct Meeting;

impl Meeting {
    /// Belongs to it, or to the one that has begun beside it.
    pub const GOES_ON: u32 = 0;
    /// Begins another one in its place.
    pub const REPLACES: u32 = 1;
    /// Begins another one between other ends: these are somebody else's.
    pub const AVOIDS: u32 = 2;
    /// Begins another one beside it.
    pub const BESIDE: u32 = 3;
}

/// What a TCP packet of the client (`begins`: a SYN) does to the flow in `place`, with its key in `work`. Where one has begun
/// beside it and the packet is that one's, both are then that one.
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
                // The client knows nothing of an answer to somebody's SYN. (Who ends his own connection acknowledges.)
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
        // It is the old one's.
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

/// The flow of the client's tuple that has begun beside an assured one. Its key is then in `work`; else nobody's may be.
#[inline(always)]
fn successor<T: EdgeTables>(tables: &T, tuple: &Tuple, work: &mut Work) -> Option<Place<T::Cell>> {
    let target = tables.index(Tier::New, &work.index)?;
    work.key = vip_target(&work.index, &target);
    of_vip(tables, tuple, &work.key, work.now)
}

/// Whether the backend of a flow has left its Service, or another one has its address now.
#[inline(always)]
fn is_gone(tables: &impl EdgeTables, key: &FlowKey, flow: &Flow) -> bool {
    tables.backend(flow.backend).is_none_or(|backend| {
        backend.addr != key.destination
            || backend.port != key.destination_port
            || backend.service != flow.service
            || backend.state.flags == 0
    })
}

/// Whether the backend has answered no SYN on an open flow for too long. Notes the first one. (One that is not answered proves
/// nothing: backends limit how many of them they answer.)
#[inline(always)]
fn is_silent<C: FlowCell>(place: &Place<C>, flow: &Flow, now: u64) -> bool {
    if flow.state & ASSURED == 0 {
        return false;
    }
    if flow.syn == 0 {
        place.cell.set_syn(place.check, syn_time(now));
    }
    timeouts::is_silent(flow.syn, syn_time(now))
}

/// Whether an acknowledgement of the client shows that it has heard the backend.
#[inline(always)]
const fn proves(flow: &Flow, ack: u32) -> bool {
    ack.wrapping_sub(flow.expected) < FIRST_WINDOW
}

/// A packet of the client: advances the state, notes the way of the answers, and makes the flow safe from eviction once the client has
/// gone on after an answer.
#[inline(never)]
pub fn on_request<T: EdgeTables>(tables: &T, place: &Place<T::Cell>, parsed: &Parsed, work: &Work) {
    let Work { key, numbers, now, asked_by, .. } = work;
    let (numbers, now) = (*numbers, *now);
    let flow = place.flow();
    let mut state = flow.state;
    let (mut proven, mut prolongs, mut leads) = (true, true, true);
    if parsed.proto == proto::TCP {
        // Anybody can send anything in the name of a client; the backend believes what fits (RFC 5961 §3.2).
        let window = if parsed.kind & tcp::RST != 0 { RESET_WINDOW } else { FIN_WINDOW };
        let fits = state & ASSURED == 0 || numbers.seq.wrapping_sub(flow.expected) < window;
        if fits || parsed.kind & (tcp::RST | tcp::FIN) == 0 {
            state = tcp_state(state, parsed.kind, FIN_REQUEST);
        }
        // What is sent again is behind what the backend has acknowledged.
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
            && (flow.expected == 0 || timeouts::is_quiet(&flow, now))
        {
            // Another SYN within moments is somebody else's: the client sends its own again as it was.
            place.cell.set_expected(place.check, numbers.seq.wrapping_add(1));
            place.cell.set_syn(place.check, numbers.data as u16);
        }
    }
    if leads && flow.asked_by != *asked_by {
        place.cell.set_asked_by(place.check, *asked_by);
    }
    if prolongs {
        place.cell.set_last_seen(place.check, now);
    }
    if state != flow.state {
        place.set_state(state);
    }
    // One that finds no room tries again with each packet, and is counted once.
    if state & (REPLIED | ASSURED) == REPLIED
        && proven
        && !assure(tables, key, place, numbers.seq)
        && state & PROVEN == 0
    {
        place.set_state(state | PROVEN);
        tables.count(Counter::FlowsFull);
    }
}

/// Moves a record with its indexes, when its client has gone on with `seq`. False, and nothing changed, if there is no
/// room.
#[inline(never)]
fn assure<T: EdgeTables>(tables: &T, key: &FlowKey, place: &Place<T::Cell>, seq: u32) -> bool {
    let mut flow = place.flow();
    if flow.check != place.check || has_snat(&flow) && !keeps_source(tables, key, place) {
        // Its element is another one's. Or its source is: its backend will not know what comes from a new one.
        return true;
    }
    flow.state = (flow.state | ASSURED) & !PROVEN;
    (flow.expected, flow.syn) = (seq, 0);
    if !tables.add_flow(Tier::Assured, key, &flow) {
        // Another packet of the flow has been faster; else there is no room.
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

/// Whether a packet of the backend is an answer to this client. Until its flow is proved, somebody else may have a connection
/// between the same ends; then the client's next SYN gets others.
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
        // Its SYN once more, or what follows that.
        numbers.seq.wrapping_sub(flow.expected).wrapping_add(1) < FIRST_WINDOW
    };
    if !fits && flow.state & TAKEN == 0 {
        place.set_state(flow.state | TAKEN);
    }
    fits
}

/// Whether a segment with this number, of the client (`request`) or of the backend, can be one of this flow. Until that is proved,
/// somebody else may have a connection between the same ends, and only the client's SYN is known to be the flow's, then what the
/// backend has answered.
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

/// An answer of the backend, which has entered by the device `by`.
#[inline(always)]
pub fn on_reply<C: FlowCell>(place: &Place<C>, parsed: &Parsed, work: &Work, by: u32) {
    let Place { cell, check, .. } = place;
    let (numbers, now) = (work.numbers, work.now);
    let flow = place.flow();
    let before = flow.state;
    let mut state = before & !ASKED;
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
                cell.set_expected(*check, numbers.ack);
            }
            if flow.syn != 0 {
                cell.set_syn(*check, 0);
                if begins {
                    // A backend that answers a SYN so has forgotten the connection before.
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
