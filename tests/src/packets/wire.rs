//! Packets as tests write and read them. Headers and checksums come from etherparse, so that the datapath is not
//! compared with its own arithmetic.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::checksum::Sum16BitWords;
use etherparse::{
    IpNumber, IpSlice, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, TcpHeader, TcpSlice,
    UdpHeader, UdpSlice,
};
use proxy_common::abi::proto::{ICMP, ICMPV6, SCTP, TCP, UDP};
use proxy_common::datapath::edge::parsed::tcp;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
const NO_OPERATION: u8 = 1;

/// Reason of an ICMP error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No socket listens on the port.
    PortUnreachable,
    /// The packet is too large for a link on the way.
    TooBig,
    /// The packet's TTL or hop limit is used up.
    TimeExceeded,
    /// There is a shorter way.
    Redirect,
}

impl Trouble {
    /// Errors that are translated.
    pub const TRANSLATED: [Self; 3] = [Self::PortUnreachable, Self::TooBig, Self::TimeExceeded];

    /// Returns type and code of the error.
    pub const fn numbers(self, v6: bool) -> (u8, u8) {
        match (self, v6) {
            (Self::PortUnreachable, false) => (3, 3),
            (Self::TooBig, false) => (3, 4),
            (Self::TimeExceeded, false) => (11, 0),
            (Self::Redirect, false) => (5, 1),
            (Self::PortUnreachable, true) => (1, 4),
            (Self::TooBig, true) => (2, 0),
            (Self::TimeExceeded, true) => (3, 0),
            (Self::Redirect, true) => (137, 0),
        }
    }
}

/// Contents of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A segment.
    Tcp {
        /// Bits of [`tcp`].
        flags: u8,
        /// Sequence number.
        seq: u32,
        /// Acknowledgement number.
        ack: u32,
        /// Data.
        data: Vec<u8>,
    },
    /// A datagram.
    Udp {
        /// Data.
        data: Vec<u8>,
        /// Whether it has a checksum.
        checksum: bool,
    },
    /// An SCTP packet with one chunk.
    Sctp(Vec<u8>),
    /// An echo request.
    Ping,
    /// An ICMP error. A redirect for IPv6 is in the form of RFC 4861 §4.5.
    Error(Trouble, Vec<u8>),
    /// Another protocol.
    Other(u8, Vec<u8>),
}

/// A packet to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source. The port is used for TCP and UDP only.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// Contents.
    pub body: Body,
    /// TTL or hop limit.
    pub hops: u8,
    /// Whether it has IPv4 options, or IPv6 extension headers.
    pub extended: bool,
}

impl Packet {
    /// Returns a packet.
    pub const fn new(source: SocketAddr, destination: SocketAddr, body: Body) -> Self {
        Self { source, destination, body, hops: 60, extended: false }
    }

    /// Returns a TCP segment; with PSH it carries some data.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8, seq: u32, ack: u32) -> Self {
        let data = if flags & tcp::PSH == 0 { Vec::new() } else { b"to whom it may concern".to_vec() };
        Self::new(source, destination, Body::Tcp { flags, seq, ack, data })
    }

    /// Returns a UDP datagram.
    pub fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Self {
        Self::new(source, destination, Body::Udp { data: data.to_vec(), checksum: true })
    }

    /// Returns an ICMP error from `source` to the sender of the quoted packet: the IP packet in `frame`, of which at
    /// most `most` bytes are quoted.
    ///
    /// # Panics
    /// If `frame` is not a packet.
    pub fn error(source: IpAddr, trouble: Trouble, frame: &[u8], most: usize) -> Self {
        let quote = &frame[ETHERNET..frame.len().min(ETHERNET + most)];
        let to = match quote[0] >> 4 {
            4 => IpAddr::from(<[u8; 4]>::try_from(&quote[12..16]).expect("four bytes")),
            _ => IpAddr::from(<[u8; 16]>::try_from(&quote[8..24]).expect("sixteen bytes")),
        };
        let body = Body::Error(trouble, quote.to_vec());
        Self::new(SocketAddr::new(source, 0), SocketAddr::new(to, 0), body)
    }

    /// Returns the same packet with another source and destination.
    #[must_use]
    pub fn between(&self, source: SocketAddr, destination: SocketAddr) -> Self {
        Self { source, destination, ..self.clone() }
    }

    /// Returns the packet with options or extension headers.
    #[must_use]
    pub fn extended(self) -> Self {
        Self { extended: true, ..self }
    }

    /// Returns the Ethernet frame.
    ///
    /// # Panics
    /// If the addresses are of different families, or the packet is too large.
    pub fn bytes(&self) -> Vec<u8> {
        let (proto, transport) = self.transport();
        let mut frame = MACS.to_vec();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                let length = u16::try_from(transport.len()).expect("a packet");
                let (source, destination) = (source.octets(), destination.octets());
                let mut header =
                    Ipv4Header::new(length, self.hops, proto, source, destination).expect("a packet");
                if self.extended {
                    header.options = [NO_OPERATION; 8].into();
                    header.total_len += 8;
                }
                header.header_checksum = header.calc_header_checksum();
                frame.extend(header.to_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd]);
                let (first, extensions) = if self.extended { extensions(proto) } else { (proto, Vec::new()) };
                let header = Ipv6Header {
                    payload_length: u16::try_from(extensions.len() + transport.len()).expect("a packet"),
                    next_header: first,
                    hop_limit: self.hops,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Ipv6Header::default()
                };
                frame.extend(header.to_bytes());
                frame.extend(extensions);
            }
            _ => unreachable!("{self:?}: addresses of two families"),
        }
        frame.extend(transport);
        frame
    }

    fn transport(&self) -> (IpNumber, Vec<u8>) {
        let v6 = self.source.is_ipv6();
        let (source, destination) = (self.source.port(), self.destination.port());
        let icmp = if v6 { ICMPV6 } else { ICMP };
        let (proto, mut bytes, checksum) = match &self.body {
            Body::Tcp { flags, seq, ack, data } => {
                let mut header = TcpHeader::new(source, destination, *seq, 0xfaf0);
                header.acknowledgment_number = *ack;
                [header.fin, header.syn, header.rst, header.psh, header.ack] =
                    [tcp::FIN, tcp::SYN, tcp::RST, tcp::PSH, tcp::ACK].map(|flag| flags & flag != 0);
                (TCP, [header.to_bytes().as_slice(), data].concat(), Some(16))
            }
            Body::Udp { data, checksum } => {
                let length = u16::try_from(8 + data.len()).expect("a packet");
                let header =
                    UdpHeader { source_port: source, destination_port: destination, length, checksum: 0 };
                (UDP, [header.to_bytes().as_slice(), data].concat(), checksum.then_some(6))
            }
            Body::Sctp(data) => {
                let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
                bytes.extend([0, 0, 0, 99, 0, 0, 0, 0]);
                bytes.extend(data);
                let crc = crc32c(&bytes).to_le_bytes();
                bytes[8..12].copy_from_slice(&crc);
                (SCTP, bytes, None)
            }
            Body::Ping => (icmp, vec![if v6 { 128 } else { 8 }, 0, 0, 0, 0, 7, 0, 1, 42, 42], Some(2)),
            Body::Error(trouble, quote) => {
                let (kind, code) = trouble.numbers(v6);
                let mut bytes = vec![kind, code, 0, 0, 0, 0, 5, 120];
                if v6 && *trouble == Trouble::Redirect {
                    bytes.extend([0xfe; 32]);
                    // The target's link-layer address, then padding to units of eight bytes.
                    bytes.extend([2, 1, 2, 0, 0, 0, 0, 9]);
                    let units = u8::try_from(quote.len() / 8 + 1).expect("a short quote");
                    bytes.extend([4, units, 0, 0, 0, 0, 0, 0]);
                    bytes.extend(&quote[..quote.len() / 8 * 8]);
                } else {
                    bytes.extend(quote);
                }
                (icmp, bytes, Some(2))
            }
            Body::Other(proto, bytes) => (*proto, bytes.clone(), None),
        };
        if let Some(at) = checksum {
            let sum = match (internet_checksum(self.source.ip(), self.destination.ip(), proto, &bytes), proto)
            {
                (0, UDP) => 0xffff,
                (sum, _) => sum,
            };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        (IpNumber(proto), bytes)
    }
}

/// Returns hop-by-hop and destination options of nothing but padding, in front of `proto`.
fn extensions(proto: IpNumber) -> (IpNumber, Vec<u8>) {
    let bytes = [extension(IpNumber::IPV6_DESTINATION_OPTIONS, 4), extension(proto, 12)].concat();
    (IpNumber::IPV6_HEADER_HOP_BY_HOP, bytes)
}

fn extension(next: IpNumber, padding: u8) -> Vec<u8> {
    let body: Vec<u8> = [1, padding].into_iter().chain(std::iter::repeat_n(0, padding.into())).collect();
    Ipv6RawExtHeader::new_raw(next, &body).expect("padding").to_bytes().to_vec()
}

/// Returns the checksum of a transport header with its payload. If the checksum field is zero, the result is the value
/// for the field; if the field is right, the result is zero.
pub fn internet_checksum(source: IpAddr, destination: IpAddr, proto: u8, bytes: &[u8]) -> u16 {
    let mut sum = Sum16BitWords::new();
    if proto != ICMP {
        for address in [source, destination] {
            sum = match address {
                IpAddr::V4(v4) => sum.add_4bytes(v4.octets()),
                IpAddr::V6(v6) => sum.add_16bytes(v6.octets()),
            };
        }
        sum = sum.add_4bytes((bytes.len() as u32).to_be_bytes()).add_2bytes([0, proto]);
    }
    sum.add_slice(bytes).ones_complement().to_be()
}

/// Computes SCTP's checksum, bit by bit (RFC 9260, Appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 },
        )
    })
}

/// Cuts a packet into two fragments. The first has `first` bytes of payload, a multiple of eight.
///
/// # Panics
/// If the packet is too short for that, or has extension headers or options already.
pub fn fragments(frame: &[u8], first: usize, id: u16) -> [Vec<u8>; 2] {
    assert_eq!(first % 8, 0, "fragments are whole units of eight bytes");
    if frame[12..14] == [0x08, 0x00] {
        let (_, payload) = Ipv4Header::from_slice(&frame[ETHERNET..]).expect("an IPv4 header");
        [(0, &payload[..first], true), (first, &payload[first..], false)].map(|(from, bytes, more)| {
            let (mut header, _) = Ipv4Header::from_slice(&frame[ETHERNET..]).expect("an IPv4 header");
            header.identification = id;
            header.dont_fragment = false;
            header.more_fragments = more;
            header.fragment_offset = u16::try_from(from / 8).expect("small").try_into().expect("small");
            header.set_payload_len(bytes.len()).expect("small");
            header.header_checksum = header.calc_header_checksum();
            [&frame[..ETHERNET], &header.to_bytes(), bytes].concat()
        })
    } else {
        let (header, payload) = Ipv6Header::from_slice(&frame[ETHERNET..]).expect("an IPv6 header");
        [(0, &payload[..first], true), (first, &payload[first..], false)].map(|(from, bytes, more)| {
            let mut header = header.clone();
            let offset = u16::try_from(from / 8).expect("small").try_into().expect("small");
            let fragment = Ipv6FragmentHeader::new(header.next_header, offset, more, id.into());
            header.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
            header.payload_length = u16::try_from(8 + bytes.len()).expect("small");
            [&frame[..ETHERNET], &header.to_bytes(), &fragment.to_bytes(), bytes].concat()
        })
    }
}

/// A packet that was read, with every checksum right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source; port 0 for protocols without ports.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// IP protocol number.
    pub proto: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// TCP: flags, sequence number and acknowledgement number.
    pub tcp: Option<(u8, u32, u32)>,
    /// ICMP: type and code.
    pub icmp: Option<(u8, u8)>,
    /// Payload: data, or the quote of an ICMP error.
    pub payload: Vec<u8>,
}

/// Reads a frame.
///
/// # Errors
/// If a header is broken, or a checksum is wrong.
pub fn read(frame: &[u8]) -> Result<Seen> {
    let bytes = frame.get(ETHERNET..).context("no Ethernet header")?;
    let ip = IpSlice::from_slice(bytes)?;
    let hops = match &ip {
        IpSlice::Ipv4(v4) => {
            let header = v4.header().to_header();
            ensure!(header.header_checksum == header.calc_header_checksum(), "wrong IPv4 header checksum");
            header.time_to_live
        }
        IpSlice::Ipv6(v6) => v6.header().hop_limit(),
    };
    let (source, destination) = (ip.source_addr(), ip.destination_addr());
    let IpNumber(proto) = ip.payload_ip_number();
    let payload = ip.payload();
    let at = SocketAddr::new;
    let mut seen = Seen {
        source: at(source, 0),
        destination: at(destination, 0),
        proto,
        hops,
        tcp: None,
        icmp: None,
        payload: payload.payload.to_vec(),
    };
    if payload.fragmented {
        return Ok(seen);
    }
    let right = internet_checksum(source, destination, proto, payload.payload) == 0;
    match proto {
        TCP => {
            let slice = TcpSlice::from_slice(payload.payload)?;
            ensure!(right, "wrong TCP checksum");
            seen.source.set_port(slice.source_port());
            seen.destination.set_port(slice.destination_port());
            seen.tcp = Some((payload.payload[13], slice.sequence_number(), slice.acknowledgment_number()));
            seen.payload = slice.payload().to_vec();
        }
        UDP => {
            let slice = UdpSlice::from_slice(payload.payload)?;
            ensure!(right || slice.checksum() == 0 && source.is_ipv4(), "wrong UDP checksum");
            seen.source.set_port(slice.source_port());
            seen.destination.set_port(slice.destination_port());
            seen.payload = slice.payload().to_vec();
        }
        SCTP => {
            let mut bytes = payload.payload.to_vec();
            let header = bytes.get_mut(..12).context("a short SCTP header")?;
            let field = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
            header[8..12].fill(0);
            seen.source.set_port(u16::from_be_bytes([header[0], header[1]]));
            seen.destination.set_port(u16::from_be_bytes([header[2], header[3]]));
            // The device fills in a zero checksum.
            ensure!(field == 0 || crc32c(&bytes) == field, "wrong SCTP checksum");
            seen.payload = bytes.split_off(12);
        }
        ICMP | ICMPV6 => {
            ensure!(right, "wrong ICMP checksum");
            let [kind, code, _, _, _, _, _, _, rest @ ..] = payload.payload else {
                bail!("a short ICMP header")
            };
            seen.icmp = Some((*kind, *code));
            seen.payload = rest.to_vec();
        }
        _ => {}
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packets::Net;

    #[test]
    fn what_is_written_is_read() -> Result<()> {
        for net in Net::ALL {
            let (client, vip) = (net.client(), net.there());
            for extended in [false, true] {
                let segment = Packet { extended, ..Packet::tcp(client, vip, tcp::PSH | tcp::ACK, 7, 9) };
                let seen = read(&segment.bytes())?;
                assert_eq!((seen.source, seen.destination), (client, vip));
                assert_eq!(seen.tcp, Some((tcp::PSH | tcp::ACK, 7, 9)));
                assert_eq!(seen.payload, b"to whom it may concern");
                let error = Packet::error(net.router(), Trouble::TooBig, &segment.bytes(), 200);
                let seen = read(&error.bytes())?;
                assert_eq!(seen.destination.ip(), client.ip());
                assert_eq!(seen.icmp, Some(Trouble::TooBig.numbers(net.v6)));
                assert_eq!(seen.payload, segment.bytes()[ETHERNET..]);
            }
        }
        Ok(())
    }

    #[test]
    fn wrong_checksums_are_noticed() {
        for net in Net::ALL {
            let good = [
                Packet::tcp(net.client(), net.there(), tcp::SYN, 1, 0).bytes(),
                Packet::udp(net.client(), net.there(), b"odd").bytes(),
                Packet::new(net.client(), net.there(), Body::Ping).bytes(),
            ];
            for good in good {
                assert!(read(&good).is_ok());
                for at in [ETHERNET + 15, good.len() - 1] {
                    let mut bad = good.clone();
                    bad[at] ^= 0x10;
                    assert!(read(&bad).is_err(), "{at} of {good:02x?}");
                }
            }
        }
    }
}
