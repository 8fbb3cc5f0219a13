//! Random traffic: clients, answers, errors and fragments that belong together, and packets that are broken in many
//! ways. The packets follow from a string of bytes alone, so that a fuzzer can steer them and a failure can be
//! repeated.

use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::IfIndex;
use proxy_common::datapath::edge::Verdict;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};

use super::wire::{Body, ETHERNET, Packet, Seen, Trouble, fragments, read};
use super::world::{BARE, NEAR, NIC, Net, OVERLAY, POD, World};

/// Devices, each as often as its relative frequency.
const DEVICES: [IfIndex; 10] = [NIC, NIC, NIC, NIC, OVERLAY, OVERLAY, OVERLAY, POD, BARE, NEAR];
/// Number of earlier packets that later ones can refer to.
const MEMORY: usize = 24;
/// Length of the longest packet that is made.
const LONGEST: usize = 1600;

/// One packet that enters or leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Device of the packet.
    pub device: IfIndex,
    /// Whether the packet leaves through it.
    pub egress: bool,
    /// All bytes.
    pub bytes: Vec<u8>,
    /// Seconds that pass before the packet.
    pub pause: u64,
}

/// Bytes that decide. Once they are used up, every choice is zero.
#[derive(Debug)]
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        match self.0 {
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
            [] => 0,
        }
    }

    fn number(&mut self, below: usize) -> usize {
        let high = if below > 256 { usize::from(self.byte()) << 8 } else { 0 };
        (high | usize::from(self.byte())) % below.max(1)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.number(of.len())).copied()
    }

    fn is_rare(&mut self) -> bool {
        self.byte() >= 0xf0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }
}

/// Packets, one after another, until the bytes that decide are used up.
#[derive(Debug)]
pub struct Traffic<'a> {
    choices: Choices<'a>,
    /// Packets that were sent, and the resulting ones.
    seen: Vec<Vec<u8>>,
    /// The last packet, if it goes on: it has entered and then leaves.
    inside: Option<Vec<u8>>,
    /// The last translated packet that has left, and its device: its receiver may react.
    outside: Option<(IfIndex, Vec<u8>)>,
    /// Fragments that have not been sent yet.
    rest: Vec<(IfIndex, bool, Vec<u8>)>,
}

impl<'a> Traffic<'a> {
    /// Returns the traffic that follows from `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { choices: Choices(bytes), seen: Vec::new(), inside: None, outside: None, rest: Vec::new() }
    }

    /// Records the result of the last packet, to which the next ones can refer.
    pub fn note(&mut self, step: &Step, verdict: Verdict, bytes: &[u8]) {
        let goes_on = matches!(verdict, Verdict::Pass | Verdict::Translated);
        self.inside = (goes_on && !step.egress).then(|| bytes.to_vec());
        if step.egress {
            self.outside = (verdict == Verdict::Translated).then(|| (step.device, bytes.to_vec()));
        }
        for packet in [&step.bytes[..], bytes] {
            if self.seen.len() >= MEMORY {
                self.seen.remove(0);
            }
            self.seen.push(packet.to_vec());
        }
    }

    fn remembered(&mut self) -> Option<Vec<u8>> {
        // One of the latest packets in most cases.
        let among = if self.choices.byte() & 1 == 0 { 3 } else { MEMORY };
        let back = self.choices.number(self.seen.len().min(among)) + 1;
        self.seen.get(self.seen.len().checked_sub(back)?).cloned()
    }

    fn net(&mut self) -> Net {
        Net { v6: self.choices.byte() & 1 == 1 }
    }

    /// Makes a packet of a client, in most cases its first one.
    fn request(&mut self) -> Packet {
        let net = self.net();
        let pod = SocketAddr::new(net.local().ip(), 41_000);
        let direct = SocketAddr::new(net.client().ip(), 41_001);
        let own = SocketAddr::new(net.node(), 41_002);
        let clients = [net.client(), net.client(), direct, net.stranger(), pod, net.remote(1), own];
        let vips = [
            net.here(),
            net.there(),
            net.twin(),
            net.ranged(),
            net.node_port(),
            net.policy(),
            net.nobody(),
            net.inactive(),
            net.beside(),
            SocketAddr::new(net.here().ip(), 81),
            SocketAddr::new(net.node(), 22),
            net.remote(1),
            net.local(),
        ];
        let source = self.choices.one(&clients).unwrap_or(net.client());
        let destination = self.choices.one(&vips).unwrap_or(net.there());
        let body = self.body();
        let hops = 64 - self.choices.byte() % 3;
        let extended = self.choices.is_rare();
        Packet { source, destination, body, hops, extended }
    }

    fn body(&mut self) -> Body {
        let flags = [SYN, SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK];
        let length = self.choices.number(40);
        match self.choices.byte() % 16 {
            0..=6 => {
                let flags = self.choices.one(&flags).unwrap_or(SYN);
                // Small numbers, so that some of them acknowledge each other.
                let (seq, ack) = (self.choices.byte().into(), self.choices.byte().into());
                Body::Tcp { flags, seq, ack, data: vec![0x2a; length] }
            }
            7..=11 => Body::Udp { data: self.choices.bytes(length), checksum: true },
            12 => Body::Udp { data: vec![0; length], checksum: false },
            13 => Body::Ping,
            14 => Body::Sctp(self.choices.bytes(length)),
            _ => Body::Other(self.choices.byte(), self.choices.bytes(length)),
        }
    }

    /// Makes the answer of a packet's receiver.
    fn answer(&mut self, to: &Seen) -> Packet {
        let body = match to.tcp {
            Some((flags, seq, ack)) => {
                let syn = flags & SYN != 0 && flags & ACK == 0;
                let more = [ACK, PSH | ACK, FIN | ACK, RST];
                let flags = if syn { SYN | ACK } else { self.choices.one(&more).unwrap_or(ACK) };
                let seq_next = if syn { u32::from(self.choices.byte()) << 4 } else { ack };
                Body::Tcp { flags, seq: seq_next, ack: seq.wrapping_add(1), data: Vec::new() }
            }
            None if to.proto == 17 => {
                let length = self.choices.number(30);
                Body::Udp { data: self.choices.bytes(length), checksum: true }
            }
            None => self.body(),
        };
        Packet {
            source: to.destination,
            destination: to.source,
            body,
            hops: 61,
            extended: self.choices.is_rare(),
        }
    }

    fn error(&mut self, about: &[u8]) -> Option<Packet> {
        if about.len() < ETHERNET + 40 || !matches!(about[ETHERNET] >> 4, 4 | 6) {
            return None;
        }
        let net = Net { v6: about[ETHERNET] >> 4 == 6 };
        let seen = read(about).ok();
        let from: [IpAddr; 3] =
            [net.router(), net.node(), seen.map_or(net.router(), |seen| seen.destination.ip())];
        let from = self.choices.one(&from)?;
        let all = [Trouble::PortUnreachable, Trouble::TooBig, Trouble::TimeExceeded, Trouble::Redirect];
        let trouble = self.choices.one(&all)?;
        let most = [28, 48, 60, 548];
        let most = if self.choices.is_rare() { self.choices.number(80) } else { self.choices.one(&most)? };
        (most >= 40 || !net.v6 && most >= 20)
            .then(|| Packet::error(from, trouble, about, most))
            .filter(|error| error.source.is_ipv4() == error.destination.is_ipv4())
    }

    /// Makes the reaction to a packet: an answer, or an error.
    fn reaction(&mut self, to: &[u8]) -> Option<Vec<u8>> {
        let reaction =
            if self.choices.byte() < 0xc0 { self.answer(&read(to).ok()?) } else { self.error(to)? };
        let bytes = reaction.bytes();
        Some(self.damage(bytes))
    }

    /// Makes the next packet to be sent.
    fn packet(&mut self) -> Option<Vec<u8>> {
        let bytes = match self.choices.byte() % 16 {
            0..=5 => self.request().bytes(),
            6..=9 => {
                let to = read(&self.remembered()?).ok()?;
                self.answer(&to).bytes()
            }
            10..=11 => {
                let about = self.remembered()?;
                self.error(&about)?.bytes()
            }
            12..=13 => self.remembered()?,
            14 => {
                let length = self.choices.number(100);
                let ethertype = self.choices.one(&[[0x08, 0x00], [0x86, 0xdd], [0x08, 0x06]])?;
                let mut bytes = [&[2; 12][..], &ethertype].concat();
                bytes.extend(self.choices.bytes(length));
                bytes
            }
            _ => self.request().extended().bytes(),
        };
        Some(self.damage(bytes))
    }

    /// Damages a packet: in most cases not at all, else other bits, another length, or another length field.
    fn damage(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        match self.choices.byte() {
            0xd8..=0xdf => {
                for _ in 0..=self.choices.number(3) {
                    let at = ETHERNET + self.choices.number(90);
                    let bits = self.choices.byte();
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= bits;
                    }
                }
            }
            0xe0..=0xe7 => bytes.truncate(ETHERNET + self.choices.number(100)),
            0xe8..=0xef => bytes.extend(vec![0x5a; self.choices.number(64)]),
            0xf0..=0xff => {
                // The length field of an IPv4 or an IPv6 header.
                let at = self.choices.one(&[ETHERNET + 2, ETHERNET + 4]).unwrap_or(ETHERNET + 2);
                let length = self.choices.number(2000).to_be_bytes();
                if let (Some(field), [.., high, low]) = (bytes.get_mut(at..at + 2), length) {
                    field.copy_from_slice(&[high, low]);
                }
            }
            _ => {}
        }
        bytes
    }
}

impl Iterator for Traffic<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.choices.0.is_empty() {
            return None;
        }
        let pause = if self.choices.is_rare() { self.choices.number(400) as u64 } else { 0 };
        if let Some((device, egress, bytes)) = self.rest.pop() {
            return Some(Step { device, egress, bytes, pause });
        }
        let device = self.choices.one(&DEVICES).unwrap_or(NIC);
        if let Some(bytes) = self.inside.take()
            && self.choices.byte() < 0xe0
        {
            let device = if self.choices.byte() < 0xc0 { way_out(&bytes).unwrap_or(device) } else { device };
            return Some(Step { device, egress: true, bytes, pause });
        }
        if let Some((device, bytes)) = self.outside.take()
            && self.choices.byte() < 0xc0
            && let Some(bytes) = self.reaction(&bytes)
        {
            return Some(Step { device, egress: false, bytes, pause });
        }
        let bytes = self.packet().unwrap_or_else(|| self.request().bytes());
        let egress = self.choices.byte() & 7 == 0;
        let mut step = Step { device, egress, bytes, pause };
        step.bytes.truncate(LONGEST);
        if self.choices.is_rare() && step.bytes.len() > ETHERNET + 40 + 24 && read(&step.bytes).is_ok() {
            let [first, later] = fragments(&step.bytes, 16, u16::from(self.choices.byte() & 3));
            let (now, then) = if self.choices.is_rare() { (later, first) } else { (first, later) };
            self.rest.push((device, egress, then));
            step.bytes = now;
        }
        Some(step)
    }
}

/// Returns the device that the node would send a packet to.
fn way_out(bytes: &[u8]) -> Option<IfIndex> {
    let to = read(bytes).ok()?.destination.ip();
    let net = Net { v6: to.is_ipv6() };
    Some(if to == net.local().ip() {
        POD
    } else if [1, 2, 3].into_iter().any(|number| to == net.remote(number).ip()) {
        OVERLAY
    } else {
        NIC
    })
}

/// Checks the properties that hold for every packet.
///
/// # Errors
/// With the property that does not hold.
pub fn check(world: &World, step: &Step, verdict: Verdict, out: &[u8]) -> Result<(), String> {
    let before = &step.bytes[..];
    match verdict {
        Verdict::Pass if out != before => return Err("changed, but not translated".into()),
        Verdict::Pass | Verdict::Drop => {}
        Verdict::Translated | Verdict::Elsewhere => {
            if out.len() != before.len() {
                return Err("of another length".into());
            }
            if out[..ETHERNET] != before[..ETHERNET] {
                return Err("another Ethernet header".into());
            }
        }
        Verdict::Reply => {}
    }
    // A fragment by itself may belong to anyone, as far as the filter can tell.
    let unclear = verdict == Verdict::Drop && to(before).is_some_and(|to| world.may_be_ours(to));
    if verdict != Verdict::Pass && !concerns_us(before) && !unclear {
        return Err("none of ours".into());
    }
    let (Ok(was), true) = (read(before), matches!(verdict, Verdict::Translated | Verdict::Reply)) else {
        return Ok(());
    };
    let is = read(out).map_err(|error| format!("was right, and is now broken: {error:#}"))?;
    if verdict == Verdict::Reply {
        if is.destination.ip() != was.source.ip() {
            return Err(format!("answered to {}, not to {}", is.destination, was.source));
        }
    } else if (is.hops, is.proto, is.tcp, is.icmp) != (was.hops, was.proto, was.tcp, was.icmp)
        || is.icmp.is_none() && is.payload.len() != was.payload.len()
    {
        return Err(format!("{was:?} became {is:?}"));
    }
    Ok(())
}

/// Returns the destination in an IP header, whatever else the packet is.
fn to(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.get(12..14)? {
        [0x08, 0x00] => bytes.get(ETHERNET + 16..)?.first_chunk::<4>().copied().map(IpAddr::from),
        [0x86, 0xdd] => bytes.get(ETHERNET + 24..)?.first_chunk::<16>().copied().map(IpAddr::from),
        _ => None,
    }
}

/// Returns whether an address of the world is anywhere in the packet.
fn concerns_us(bytes: &[u8]) -> bool {
    let contains = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    Net::ALL.into_iter().any(|net| {
        let own = [net.node(), net.overlay(), net.ranged().ip(), net.here().ip(), net.local().ip()];
        own.into_iter().any(|address| match address {
            // ServiceCIDR and pods by their first bytes.
            IpAddr::V4(v4) => contains(&v4.octets()) || v4.octets()[0] == 10 && contains(&v4.octets()[..2]),
            IpAddr::V6(v6) => contains(&v6.octets()) || v6.octets()[0] == 0xfd && contains(&v6.octets()[..4]),
        })
    })
}
