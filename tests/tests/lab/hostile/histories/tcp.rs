//! TCP at both ends, as far as it decides whether a connection lives: RFC 9293 with RFC 5961, in Linux' order. Every
//! segment has its exact sequence numbers. Only the node drops packets, so there is no window and no reordering.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_tests::packets::{Body, Packet, Seen};

/// Number of bytes that both ends accept beyond the next one.
const WINDOW: u32 = 1 << 16;
/// Milliseconds that a server waits for the third packet, and in TIME_WAIT.
const WAIT: u64 = 60_000;
/// Milliseconds between two answers to segments that do not fit (Linux: `tcp_invalid_ratelimit`).
const RATE: u64 = 500;
/// Data that makes a server close first.
pub(super) const BYE: &[u8] = b"bye";

/// State of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Client: the SYN is sent.
    SynSent,
    /// Server: the SYN and ACK are sent.
    SynReceived,
    /// Data may be sent.
    Open,
    /// This end has sent its FIN first.
    FinWait,
    /// This end has sent its FIN after the other end's.
    LastAck,
    /// Both FINs are sent, and this end's was the first.
    TimeWait,
    /// There is no connection.
    Closed,
    /// The other end, or somebody in its name, has reset the connection.
    Reset,
    /// The peer has refused the connection: nobody listens.
    Refused,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) state: State,
    /// Next byte to be sent, and next byte to be received.
    pub(super) next: u32,
    pub(super) wanted: u32,
    /// Data sent last, until it is acknowledged.
    unheard: Vec<u8>,
    /// Data received since the last [`End::say`].
    pub(super) heard: Vec<u8>,
    since: u64,
    quiet_until: u64,
}

fn segment(from: SocketAddr, to: SocketAddr, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Packet {
    Packet::new(from, to, Body::Tcp { flags, seq, ack, data: data.to_vec() })
}

/// Returns whether `number` is not before `from`.
const fn at_or_after(number: u32, from: u32) -> bool {
    number.wrapping_sub(from) < 1 << 31
}

/// Returns the answer of a host without a socket.
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

    /// Returns a client that is about to send a SYN with this number.
    pub(super) fn client(number: u32, now: u64) -> Self {
        Self::new(State::SynSent, number, 0, now)
    }

    /// Returns the client's SYN, for the first time or again.
    pub(super) fn syn(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        segment(from, to, SYN, self.next.wrapping_sub(1), 0, &[])
    }

    /// Sets the data that [`End::again`] sends, now and later.
    pub(super) fn say(&mut self, data: &[u8]) {
        self.heard.clear();
        self.unheard = data.to_vec();
        self.next = self.next.wrapping_add(data.len() as u32);
    }

    /// Returns the last data once more.
    pub(super) fn again(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        let seq = self.next.wrapping_sub(self.unheard.len() as u32);
        segment(from, to, PSH | ACK, seq, self.wanted, &self.unheard)
    }

    /// Ends the connection. Returns the FIN.
    pub(super) fn finish(&mut self, from: SocketAddr, to: SocketAddr) -> Packet {
        let seq = self.next;
        self.next = seq.wrapping_add(1);
        self.state = State::FinWait;
        segment(from, to, FIN | ACK, seq, self.wanted, &[])
    }

    /// Aborts the connection. Returns the reset.
    pub(super) fn abort(&mut self, from: SocketAddr, to: SocketAddr) -> Packet {
        self.state = State::Closed;
        segment(from, to, RST | ACK, self.next, self.wanted, &[])
    }

    fn plain(&self, from: SocketAddr, to: SocketAddr) -> Packet {
        segment(from, to, ACK, self.next, self.wanted, &[])
    }

    /// Returns the answer to a segment that does not fit.
    fn protest(&mut self, from: SocketAddr, to: SocketAddr, now: u64) -> Vec<Packet> {
        if now < self.quiet_until {
            return Vec::new();
        }
        self.quiet_until = now + RATE;
        vec![self.plain(from, to)]
    }

    /// Handles a segment that reaches a client. Returns the answers.
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

    /// Handles a segment, at either end, once there is a connection. A server (`echoes`) sends back the data that it
    /// receives.
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
        // The acknowledged data has not been sent, or was sent long ago.
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

/// Sockets that listen at one host.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    /// Connections by the server's own end and the peer's.
    ends: BTreeMap<(SocketAddr, SocketAddr), End>,
    accepted: u32,
}

impl Server {
    /// Handles a segment that reaches the server's port. Returns the answers.
    pub(super) fn hears(&mut self, seen: &Seen, now: u64) -> Vec<Packet> {
        let Some((flags, seq, ack)) = seen.tcp else { return Vec::new() };
        let key = (seen.destination, seen.source);
        let (from, to) = key;
        let begins = flags & (SYN | ACK | RST) == SYN;
        if let Some(end) = self.ends.get(&key) {
            let waits = matches!(end.state, State::SynReceived | State::TimeWait);
            let over = waits && now >= end.since + WAIT
                // A new connection may begin where the old one has ended, with higher sequence numbers (RFC 6191).
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
