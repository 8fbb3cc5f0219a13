//! TCP at both ends, as far as it decides whether a connection lives: RFC 9293 with RFC 5961, in Linux' order. Every segment
//! has its exact numbers. Nothing gets lost but what the node drops, so there is no window and no reordering.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_tests::packets::{Body, Packet, Seen};

/// What both ends take from beyond the next byte.
const WINDOW: u32 = 1 << 16;
/// Milliseconds that a server waits for the third packet, and in TIME_WAIT.
const WAIT: u64 = 60_000;
/// Milliseconds between two answers to what does not fit (Linux: `tcp_invalid_ratelimit`).
const RATE: u64 = 500;
/// What makes a server close first.
pub(super) const BYE: &[u8] = b"bye";

/// How far an end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Client: SYN is sent.
    SynSent,
    /// Server: SYN and ACK are sent.
    SynReceived,
    /// Data may go.
    Open,
    /// FIN is sent first.
    FinWait,
    /// FIN is sent after the other one's.
    LastAck,
    /// Both are sent, and this end's was the first.
    TimeWait,
    /// There is nothing.
    Closed,
    /// The other end, or somebody in its name, has ended it.
    Reset,
    /// Nobody listens, it has been told.
    Refused,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) state: State,
    /// The next byte to be sent, and the next one to come.
    pub(super) next: u32,
    pub(super) wanted: u32,
    /// What has been sent last, until it is acknowledged.
    unheard: Vec<u8>,
    /// What has come since the last [`End::say`].
    pub(super) heard: Vec<u8>,
    since: u64,
    quiet_until: u64,
}

fn segment(from: SocketAddr, to: SocketAddr, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Packet {
    Packet::new(from, to, Body::Tcp { flags, seq, ack, data: data.to_vec() })
}

/// Whether `number` is not before `from`.
const fn at_or_after(number: u32, from: u32) -> bool {
    number.wrapping_sub(from) < 1 << 31
}

/// What a host without a socket answers.
pub(super) fn closed_port(seen: &Seen) -> Option<Packet> {
    let (flags, seq, ack) = seen.tcp?;
    let (from, to) = (seen.destination, seen.source);
    let length = seen.payload.len() as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    match flags {
        _ if flags & RST != 0 => None,
        _ if flags & ACK != 0 => Some(segment(from, to, RST, ack, 0, &[])),
        _ => Some(segment(from, to, RST | ACK, 0, seq.wrapping_add(length), &[])),
    }
}

impl End {
    fn new(state: State, number: u32, wanted: u32, now: u64) -> Self {
        let next = number.wrapping_add(1);
        Self { state, next, wanted, unheard: Vec::new(), heard: Vec::new(), since: now, quiet_until: 0 }
    }

    /// A client that is about to send SYN with this number.
    pub(super) fn client(number: u32, now: u64) -> Self {
        Self::new(State::SynSent, number, 0, now)
    }

    /// The client's SYN, for the first time or again.
    pub(super) fn syn(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        segment(from, to, SYN, self.next.wrapping_sub(1), 0, &[])
    }

    /// Data, to be sent now and by [`End::again`].
    pub(super) fn say(&mut self, data: &[u8]) {
        self.heard.clear();
        self.unheard = data.to_vec();
        self.next = self.next.wrapping_add(data.len() as u32);
    }

    /// What has been said last.
    pub(super) fn again(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        let seq = self.next.wrapping_sub(self.unheard.len() as u32);
        segment(from, to, PSH | ACK, seq, self.wanted, &self.unheard)
    }

    /// Nothing more will be said.
    pub(super) fn finish(&mut self, from: SocketAddr, to: SocketAddr) -> Packet {
        let seq = self.next;
        self.next = seq.wrapping_add(1);
        self.state = State::FinWait;
        segment(from, to, FIN | ACK, seq, self.wanted, &[])
    }

    /// An end by force.
    pub(super) fn abort(&mut self, from: SocketAddr, to: SocketAddr) -> Packet {
        self.state = State::Closed;
        segment(from, to, RST | ACK, self.next, self.wanted, &[])
    }

    fn plain(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        segment(from, to, ACK, self.next, self.wanted, &[])
    }

    /// What answers a segment that does not fit.
    fn protest(&mut self, from: SocketAddr, to: SocketAddr, now: u64) -> Vec<Packet> {
        if now < self.quiet_until {
            return Vec::new();
        }
        self.quiet_until = now + RATE;
        vec![self.plain(from, to)]
    }

    /// A client's segment arrives.
    pub(super) fn client_hears(&mut self, seen: &Seen, now: u64) -> Vec<Packet> {
        let Some((flags, seq, ack)) = seen.tcp else { return Vec::new() };
        let (from, to) = (seen.destination, seen.source);
        if self.state != State::SynSent {
            return self.hears(seen, now, false);
        }
        if flags & ACK != 0 && ack != self.next {
            let answer = segment(from, to, RST, ack, 0, &[]);
            return if flags & RST == 0 { vec![answer] } else { Vec::new() };
        }
        if flags & RST != 0 {
            if flags & ACK != 0 {
                self.state = State::Refused;
            }
        } else if flags & (SYN | ACK) == SYN | ACK {
            self.wanted = seq.wrapping_add(1);
            self.state = State::Open;
            return vec![self.plain(from, to)];
        }
        Vec::new()
    }

    /// What both ends do once there is a connection. A server (`echoes`) says again what it hears.
    fn hears(&mut self, seen: &Seen, now: u64, echoes: bool) -> Vec<Packet> {
        let Some((flags, seq, ack)) = seen.tcp else { return Vec::new() };
        let (from, to) = (seen.destination, seen.source);
        if flags & RST != 0 {
            if seq == self.wanted {
                self.state = if self.state == State::TimeWait { State::Closed } else { State::Reset };
                return Vec::new();
            }
            let inside = seq.wrapping_sub(self.wanted) < WINDOW;
            return if inside { self.protest(from, to, now) } else { Vec::new() };
        }
        if flags & SYN != 0 {
            return self.protest(from, to, now);
        }
        if flags & ACK == 0 {
            return Vec::new();
        }
        let data = &seen.payload;
        if seq != self.wanted {
            let repeated = !data.is_empty() && at_or_after(self.wanted, seq.wrapping_add(data.len() as u32));
            let inside = seq.wrapping_sub(self.wanted).wrapping_add(WINDOW) < 2 * WINDOW;
            if echoes && repeated && inside && !self.unheard.is_empty() {
                return vec![self.again(from, to)];
            }
            return self.protest(from, to, now);
        }
        // Of what has not been sent, or long ago.
        if self.next.wrapping_sub(ack) > WINDOW {
            return self.protest(from, to, now);
        }
        if ack == self.next {
            self.unheard.clear();
            match self.state {
                State::LastAck => {
                    self.state = State::Closed;
                    return Vec::new();
                }
                State::SynReceived => self.state = State::Open,
                State::SynSent
                | State::Open
                | State::FinWait
                | State::TimeWait
                | State::Closed
                | State::Reset
                | State::Refused => {}
            }
        }
        let mut answers = Vec::new();
        self.wanted = self.wanted.wrapping_add(data.len() as u32);
        if !data.is_empty() {
            self.heard.extend(data);
            if echoes {
                self.say(data);
                answers.push(self.again(from, to));
                if data.starts_with(BYE) {
                    answers.push(self.finish(from, to));
                }
            } else {
                answers.push(self.plain(from, to));
            }
        }
        if flags & FIN != 0 {
            self.wanted = self.wanted.wrapping_add(1);
            if self.state == State::FinWait {
                (self.state, self.since) = (State::TimeWait, now);
                answers.push(self.plain(from, to));
            } else {
                answers.push(self.finish(from, to));
                self.state = State::LastAck;
            }
        }
        answers
    }
}

/// What listens at one host.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    /// By its own end and its peer's.
    ends: BTreeMap<(SocketAddr, SocketAddr), End>,
    accepted: u32,
}

impl Server {
    /// A segment arrives at the port where it listens.
    pub(super) fn hears(&mut self, seen: &Seen, now: u64) -> Vec<Packet> {
        let Some((flags, seq, ack)) = seen.tcp else { return Vec::new() };
        let key = (seen.destination, seen.source);
        let (from, to) = key;
        let begins = flags & (SYN | ACK | RST) == SYN;
        if let Some(end) = self.ends.get(&key) {
            let waits = matches!(end.state, State::SynReceived | State::TimeWait);
            let over = waits && now >= end.since + WAIT
                // A new connection may begin where the old one has ended, with higher numbers (RFC 6191).
                || begins && end.state == State::TimeWait && seq.wrapping_sub(end.wanted).wrapping_sub(1) < 1 << 31;
            if over || matches!(end.state, State::Closed | State::Reset) {
                self.ends.remove(&key);
            }
        }
        let Some(end) = self.ends.get_mut(&key) else {
            if !begins {
                return closed_port(seen).into_iter().collect();
            }
            self.accepted += 1;
            let number = 0x6000_0000_u32.wrapping_add(self.accepted << 16);
            let end = End::new(State::SynReceived, number, seq.wrapping_add(1), now);
            let answer = segment(from, to, SYN | ACK, number, end.wanted, &[]);
            self.ends.insert(key, end);
            return vec![answer];
        };
        if end.state == State::SynReceived && flags & RST == 0 {
            if begins {
                let number = end.next.wrapping_sub(1);
                let same = seq.wrapping_add(1) == end.wanted;
                let again = segment(from, to, SYN | ACK, number, end.wanted, &[]);
                return if same { vec![again] } else { end.protest(from, to, now) };
            }
            if flags & ACK != 0 && ack != end.next {
                return vec![segment(from, to, RST, ack, 0, &[])];
            }
        }
        end.hears(seen, now, true)
    }
}
