//! Lifetimes of flows, and the packets that prolong flows.
//!
//! An assured TCP flow is prolonged only by packets of its backend, and by the first packet of the client
//! that the backend has not answered: from then on the flow has five minutes (as in the kernel's
//! `nf_conntrack_tcp_timeout_unacknowledged`). Any other flow is prolonged by every packet.
//!
//! TCP: RFC 5382 wants four minutes for half-open connections. An idle connection lives a day and a
//! half-closed one an hour, as with kube-proxy's conntrack settings. UDP: RFC 4787 wants two minutes and
//! recommends five.

use crate::abi::flow::state::{ASKED, ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, RESET};
use crate::abi::proto;
use crate::abi::{Flow, Nanos};
use crate::datapath::tables::since;

const SECOND: u64 = 1_000_000_000;
/// Time without a packet after which a flow is quiet. The peer has repeated its request for a lost last
/// acknowledgement by then: Linux waits 200 ms.
const QUIET: u64 = SECOND / 2;

/// Time for which a backend may leave SYNs on an open flow unanswered, in units of
/// [`crate::abi::flow::syn_time`]: 3 s, so that the SYN that Linux sends after 3 s is the first that begins
/// the flow anew.
const SILENCE: u16 = 44;

/// Returns the number of nanoseconds that a flow in `state` lives after it was last prolonged.
#[inline(always)]
pub const fn lifetime(proto: u8, state: u32) -> u64 {
    match proto {
        proto::TCP => {
            if state & RESET != 0 {
                10 * SECOND
            } else if state & FIN_REQUEST != 0 && state & FIN_REPLY != 0 {
                120 * SECOND
            } else if state & ASSURED == 0 {
                240 * SECOND
            } else if state & ASKED != 0 {
                300 * SECOND
            } else if state & (FIN_REQUEST | FIN_REPLY) != 0 {
                3_600 * SECOND
            } else {
                86_400 * SECOND
            }
        }
        // Heartbeats come every 30 seconds (RFC 9260 §16).
        proto::SCTP => 600 * SECOND,
        _ => {
            if state & ASSURED != 0 {
                300 * SECOND
            } else {
                120 * SECOND
            }
        }
    }
}

/// Returns whether a record has expired, and so counts as absent.
#[inline(always)]
pub const fn expired(flow: &Flow, proto: u8, now: Nanos) -> bool {
    since(flow.last_seen, now) >= lifetime(proto, flow.state)
}

/// Returns whether a TCP connection is closed: both ends have sent FIN, or one has sent RST. A SYN then
/// begins another connection.
#[inline(always)]
pub const fn closed(state: u32) -> bool {
    state & RESET != 0 || state & FIN_REQUEST != 0 && state & FIN_REPLY != 0
}

/// Returns whether the backend has been silent for too long: a SYN met the open flow at `syn`, and another
/// SYN meets it at `now`.
#[inline(always)]
pub const fn is_silent(syn: u16, now: u16) -> bool {
    syn != 0 && now.wrapping_sub(syn) >= SILENCE
}

/// Returns whether a connection has been closed and has been quiet since. Anybody could have sent the RST or
/// the FINs; a busy connection shows by its packets that it is still open.
#[inline(always)]
pub const fn ended(flow: &Flow, now: Nanos) -> bool {
    closed(flow.state) && is_quiet(flow, now)
}

/// Returns whether the flow has not been prolonged for half a second.
#[inline(always)]
pub const fn is_quiet(flow: &Flow, now: Nanos) -> bool {
    since(flow.last_seen, now) >= QUIET
}

/// Returns whether the backend remembers nothing of a connection, so that another connection may have the
/// same source.
#[inline(always)]
pub const fn forgotten(flow: &Flow, now: Nanos) -> bool {
    ended(flow, now) && flow.state & (RESET | CLIENT_FIRST) != 0
}
