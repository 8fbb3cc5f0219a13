//! All participants of a history, with their sockets, and the packets between them.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use proxy_agent::reconcile::store::StoreError;
use proxy_common::abi::proto::{TCP, UDP};
use proxy_tests::packets::{ETHERNET, Packet, Seen, Trouble, read};

use super::node::{At, Node, Setup, Who};
use super::tcp::{BYE, End, Server, State, closed_port};

/// Port of every server.
const SERVES: u16 = 8080;
/// Milliseconds before each try of a packet.
const PATIENCE: [u64; 4] = [0, 1_000, 2_000, 4_000];
/// Number of packets that no exchange reaches, except an endless one.
const HOPS: usize = 300;

/// A conversation: its client with the port, its target and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) who: Who,
    pub(super) port: u16,
    pub(super) target: SocketAddr,
    pub(super) udp: bool,
}

/// One forged packet.
#[derive(Clone, Debug)]
pub(super) struct Forged {
    /// Place where it enters the node.
    pub(super) from: At,
    pub(super) packet: Packet,
}

/// Events of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Opens a new connection.
    Open,
    /// Sends some bytes, which must come back. Over UDP: sends a question, which must be answered.
    Say,
    /// Does the same, after which the server closes.
    Bye,
    /// The client closes.
    Close,
    /// The client resets.
    Abort,
}

/// Reason why a history fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Harm {
    /// Line that it has happened to.
    pub(super) line: Line,
    pub(super) act: Act,
    pub(super) what: String,
}

/// All participants and the packets between them.
pub(super) struct Stage {
    pub(super) node: Node,
    setup: Setup,
    servers: BTreeMap<Who, Server>,
    pub(super) lines: Vec<Line>,
    /// The clients' ends of TCP, by line.
    pub(super) ends: Vec<Option<End>>,
    /// Data that a UDP client waits for, by line.
    asked: Vec<Option<Vec<u8>>>,
    /// Number of the next question or connection.
    number: u32,
    wire: VecDeque<(At, Vec<u8>, bool)>,
    /// Packets to be sent between the packets of the next act.
    pub(super) between: VecDeque<Forged>,
    /// The error about a packet that could not be read.
    broken: Option<String>,
    /// Number of packets that had to be sent once more.
    pub(super) again: u64,
}

impl Stage {
    /// Returns a node with these lines, without any traffic.
    pub(super) fn new(setup: Setup, lines: &[Line]) -> Result<Self, StoreError> {
        Ok(Self {
            node: Node::new(setup)?,
            setup,
            servers: BTreeMap::new(),
            lines: lines.to_vec(),
            ends: vec![None; lines.len()],
            asked: vec![None; lines.len()],
            number: 0,
            wire: VecDeque::new(),
            between: VecDeque::new(),
            broken: None,
            again: 0,
        })
    }

    /// Returns the lines of those who attack nobody.
    pub(super) fn honest(&self) -> impl Iterator<Item = &Line> + Clone {
        self.lines.iter().filter(|line| !line.who.is_hostile())
    }

    /// Returns the client's end of a line.
    pub(super) fn local(&self, line: &Line) -> SocketAddr {
        SocketAddr::new(line.who.ip(self.setup.net), line.port)
    }

    /// Returns whether the line's connection is open.
    pub(super) fn is_open(&self, line: usize) -> bool {
        self.ends[line].as_ref().is_some_and(|end| end.state == State::Open)
    }

    /// Sends a forged packet, and everything that follows from it.
    pub(super) fn attack(&mut self, forged: &Forged) {
        self.wire.push_back((forged.from, forged.packet.bytes(), true));
        self.settle();
    }

    fn send(&mut self, who: Who, packet: &Packet) {
        self.wire.push_back((who.at(), packet.bytes(), false));
    }

    /// Carries packets until there are none.
    fn settle(&mut self) {
        for _ in 0..HOPS {
            if let Some(Forged { from, packet }) = self.between.pop_front() {
                self.wire.push_front((from, packet.bytes(), true));
            }
            let Some((from, bytes, forged)) = self.wire.pop_front() else { return };
            let Some((who, bytes)) = self.node.carry(from, bytes) else { continue };
            for answer in self.arrives(who, &bytes, forged) {
                self.send(who, &answer);
            }
        }
        self.wire.clear();
    }

    /// Gives a packet to a host. Returns the host's answers.
    fn arrives(&mut self, who: Who, bytes: &[u8], forged: bool) -> Vec<Packet> {
        let seen = match read(bytes) {
            Ok(seen) => seen,
            Err(error) => {
                self.broken = Some(format!("{who:?} gets a broken packet: {error:#}: {bytes:02x?}"));
                return Vec::new();
            }
        };
        if seen.icmp.is_some() {
            self.error(who, &seen, forged);
            return Vec::new();
        }
        let udp = seen.proto == UDP;
        let now = self.node.now();
        if seen.destination.port() == SERVES && matches!(who, Who::Local | Who::Remote(_) | Who::Attacker) {
            return match udp {
                true => vec![Packet::udp(seen.destination, seen.source, &seen.payload)],
                false => self.servers.entry(who).or_default().hears(&seen, now),
            };
        }
        let line = self.lines.iter().position(|line| {
            (line.who, line.port, line.target, line.udp) == (who, seen.destination.port(), seen.source, udp)
                && seen.destination.ip() == who.ip(self.setup.net)
        });
        match (line, udp) {
            (Some(line), true) => {
                if self.asked[line].as_ref() == Some(&seen.payload) {
                    self.asked[line] = None;
                }
                Vec::new()
            }
            (Some(line), false) => match &mut self.ends[line] {
                Some(end) if !matches!(end.state, State::Closed | State::Reset | State::Refused) => {
                    end.client_hears(&seen, now)
                }
                _ => closed_port(&seen).into_iter().collect(),
            },
            (None, true) => vec![Packet::error(seen.destination.ip(), Trouble::PortUnreachable, bytes, 548)],
            (None, false) => closed_port(&seen).into_iter().collect(),
        }
    }

    /// Handles an ICMP error. Linux believes an error about a SYN if its sequence number fits, and any error about a
    /// datagram.
    fn error(&mut self, who: Who, seen: &Seen, forged: bool) {
        let unreachable = Trouble::PortUnreachable.numbers(self.setup.net.v6);
        let quoted = quoted(&seen.payload);
        let (Some((source, target, proto, number)), true) = (quoted, seen.icmp == Some(unreachable)) else {
            return;
        };
        for index in 0..self.lines.len() {
            let line = self.lines[index];
            if line.who != who || self.local(&line) != source || line.target != target {
                continue;
            }
            // Nothing in a datagram shows that the error is forged, with or without a proxy.
            if line.udp && proto == UDP && !forged && self.asked[index].is_some() {
                self.broken = Some(format!("{line:?} is told that nobody is there"));
            }
            if !line.udp
                && proto == TCP
                && let Some(end) = &mut self.ends[index]
                && end.state == State::SynSent
                && number == end.next.wrapping_sub(1)
            {
                end.state = State::Refused;
            }
        }
    }

    /// Acts on a line, with as many tries as a host makes.
    pub(super) fn act(&mut self, index: usize, act: Act) -> Result<(), Harm> {
        let line = self.lines[index];
        let (from, to) = (self.local(&line), line.target);
        self.number += 1;
        let first = if act == Act::Bye { BYE } else { b"say" };
        let words = [first, &self.number.to_be_bytes()].concat();
        let mut last = None;
        match (act, self.ends[index].as_mut()) {
            (Act::Open, _) => {
                let number = 0x4000_0000 + (self.number << 17);
                self.ends[index] = Some(End::client(number, self.node.now()));
            }
            (Act::Say | Act::Bye, _) if line.udp => self.asked[index] = Some(words.clone()),
            (Act::Say | Act::Bye, Some(end)) => end.say(&words),
            (Act::Close, Some(end)) => last = Some(end.finish(from, to)),
            (Act::Abort, Some(end)) => last = Some(end.abort(from, to)),
            (Act::Say | Act::Bye | Act::Close | Act::Abort, None) => {}
        }
        if let Some(last) = last {
            // The next connection shows whether the other end has received it.
            self.send(line.who, &last);
            self.settle();
            return Ok(());
        }
        // An attacker has one try.
        let tries = if line.who.is_hostile() { 1 } else { PATIENCE.len() };
        for (tries, pause) in PATIENCE.into_iter().take(tries).enumerate() {
            self.node.pass(pause);
            self.again += u64::from(tries > 0);
            let packet = match (&self.ends[index], act) {
                (Some(end), Act::Open) if !line.udp => end.syn(from, to),
                (Some(end), _) if !line.udp => end.again(from, to),
                _ => Packet::udp(from, to, &words),
            };
            self.send(line.who, &packet);
            self.settle();
            let done = match &self.ends[index] {
                _ if line.udp => self.asked[index].is_none(),
                Some(End { state: State::Reset | State::Refused, .. }) => break,
                Some(end) if act == Act::Open => end.state != State::SynSent,
                Some(end) => end.heard == words,
                None => false,
            };
            if done && self.broken.is_none() {
                return Ok(());
            }
        }
        let state = self.ends[index].as_ref().map(|end| end.state);
        let what = self.broken.take().unwrap_or_else(|| format!("{state:?} in the end"));
        Err(Harm { line, act, what })
    }
}

/// Returns the quotation in an ICMP error: source, destination, protocol, and the first four bytes behind the ports.
fn quoted(quote: &[u8]) -> Option<(SocketAddr, SocketAddr, u8, u32)> {
    let (ethertype, proto, at) = match quote.first()? >> 4 {
        4 => ([0x08, 0x00], *quote.get(9)?, 20),
        _ => ([0x86, 0xdd], *quote.get(6)?, 40),
    };
    let ends = super::node::ends(&[&[0; ETHERNET - 2][..], &ethertype, quote].concat())?;
    let &[s0, s1, d0, d1, n0, n1, n2, n3] = quote.get(at..at + 8)? else { return None };
    let (source, destination) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
    let (source, destination) = (SocketAddr::new(ends.0, source), SocketAddr::new(ends.1, destination));
    Some((source, destination, proto, u32::from_be_bytes([n0, n1, n2, n3])))
}
