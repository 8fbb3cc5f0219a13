//! How long a flow lives, and after which packet.
//!
//! An assured TCP flow is prolonged by its backend's packets alone, and by the first of the client's that the backend has not
//! answered: from then on it has five minutes (as in the kernel's `nf_conntrack_tcp_timeout_unacknowledged`). Of other flows
//! every packet counts.
//!
//! TCP: RFC 5382 wants four minutes for half-open connections; an idle one lives a day and a half-closed one an hour, as
//! with kube-proxy's conntrack settings. UDP: RFC 4787 wants two minutes and recommends five.

use crate::abi::Flow;
use crate::abi::flow::state::{ASKED, ASSURED, CLIENT_FIRST, FIN_REPLY, FIN_REQUEST, RESET};
use crate::abi::proto;
use crate::datapath::tables::since;

const SECOND: u64 = 1_000_000_000;
/// A lost last acknowledgement has been asked for again by then: Linux waits 200 ms.
const QUIET: u64 = SECOND / 2;

/// How long a backend may say nothing to SYNs on an open flow, in units of [`crate::abi::flow::syn_time`]: 3 s, so that
/// the SYN that Linux sends then is the first that begins the flow anew.
const SILENCE: u16 = 44;

/// Nanoseconds that a flow in `state` lives after it was last prolonged.
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

/// Whether a record counts as absent.
#[inline(always)]
pub const fn expired(flow: &Flow, proto: u8, now: u64) -> bool {
    since(flow.last_seen, now) >= lifetime(proto, flow.state)
}

/// Whether both ends, or one by force, have ended a TCP connection: a SYN then begins another one.
#[inline(always)]
pub const fn closed(state: u32) -> bool {
    state & RESET != 0 || state & FIN_REQUEST != 0 && state & FIN_REPLY != 0
}

/// Whether the backend has said nothing for too long: a SYN met the open flow at `syn`, and another one meets it at `now`.
#[inline(always)]
pub const fn is_silent(syn: u16, now: u16) -> bool {
    syn != 0 && now.wrapping_sub(syn) >= SILENCE
}

/// Whether a connection has been closed and nothing has come since. Anybody could have sent what closed it; an open one that is
/// busy shows it.
#[inline(always)]
pub const fn ended(flow: &Flow, now: u64) -> bool {
    closed(flow.state) && is_quiet(flow, now)
}

/// Whether nothing has come for half a second.
#[inline(always)]
pub const fn is_quiet(flow: &Flow, now: u64) -> bool {
    since(flow.last_seen, now) >= QUIET
}

/// Whether the backend remembers nothing of a connection, so that another one may have the same source.
#[inline(always)]
pub const fn forgotten(flow: &Flow, now: u64) -> bool {
    ended(flow, now) && flow.state & (RESET | CLIENT_FIRST) != 0
}
