//! TCP segments in Ethernet frames, as bytes and back.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};
use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TcpHeader, TransportHeader};

/// Bytes of data in a segment with data.
const DATA: usize = 64;
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const HOPS: u8 = 64;

pub(super) const SYN: u8 = 0x02;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;

/// One TCP segment; those with PSH carry data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) flags: u8,
    pub(super) seq: u32,
    pub(super) ack: u32,
}

impl Frame {
    /// Returns the first segment of a connection.
    pub(super) fn syn(source: SocketAddr, destination: SocketAddr) -> Self {
        Self { source, destination, flags: SYN, seq: 1_000_000, ack: 0 }
    }

    /// Returns the receiver's next segment: SYN and ACK for a SYN, otherwise a segment with `flags`.
    pub(super) fn answer(&self, flags: u8) -> Self {
        let opens = self.flags == SYN;
        let taken = u32::from(self.flags & SYN != 0) + self.data().len() as u32;
        Self {
            source: self.destination,
            destination: self.source,
            flags: if opens { SYN | ACK } else { flags },
            seq: if opens { 7_000_000 } else { self.ack },
            ack: self.seq + taken,
        }
    }

    fn data(&self) -> &'static [u8] {
        if self.flags & PSH != 0 { &[0x2a; DATA] } else { &[] }
    }

    /// Returns the frame, as long as if it had data.
    ///
    /// # Errors
    /// If the addresses are of different families.
    pub(super) fn bytes(&self) -> Result<Vec<u8>> {
        let mut tcp = TcpHeader::new(self.source.port(), self.destination.port(), self.seq, 0xffff);
        (tcp.syn, tcp.psh) = (self.flags & SYN != 0, self.flags & PSH != 0);
        (tcp.ack, tcp.acknowledgment_number) = (self.flags & ACK != 0, self.ack);
        let ethernet = PacketBuilder::ethernet2(MACS[0], MACS[1]);
        let ip = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ethernet.ipv4(source.octets(), destination.octets(), HOPS)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ethernet.ipv6(source.octets(), destination.octets(), HOPS)
            }
            _ => bail!("{self:?}: addresses of two families"),
        };
        let packet = ip.tcp_header(tcp);
        let mut frame = Vec::new();
        let length = packet.size(DATA);
        packet.write(&mut frame, self.data())?;
        frame.resize(length, 0);
        Ok(frame)
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// If the frame is no TCP segment, or a checksum is wrong.
    pub(super) fn parse(frame: &[u8]) -> Result<Self> {
        let packet = PacketHeaders::from_ethernet_slice(frame)?;
        let Some(TransportHeader::Tcp(tcp)) = packet.transport else { bail!("no TCP header") };
        let data = packet.payload.slice();
        let (source, destination, checksum): (IpAddr, IpAddr, u16) = match packet.net {
            Some(NetHeaders::Ipv4(ip, _)) => {
                ensure!(ip.header_checksum == ip.calc_header_checksum(), "wrong IPv4 checksum");
                (ip.source.into(), ip.destination.into(), tcp.calc_checksum_ipv4(&ip, data)?)
            }
            Some(NetHeaders::Ipv6(ip, _)) => {
                (ip.source.into(), ip.destination.into(), tcp.calc_checksum_ipv6(&ip, data)?)
            }
            other => bail!("no IP header, but {other:?}"),
        };
        ensure!(tcp.checksum == checksum, "wrong TCP checksum");
        let flags = [(tcp.syn, SYN), (tcp.psh, PSH), (tcp.ack, ACK)];
        Ok(Self {
            source: SocketAddr::new(source, tcp.source_port),
            destination: SocketAddr::new(destination, tcp.destination_port),
            flags: flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
            seq: tcp.sequence_number,
            ack: tcp.acknowledgment_number,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_back() -> Result<()> {
        for (source, destination) in [("192.0.2.1:1", "192.0.2.2:80"), ("[fd00::1]:1", "[fd00::2]:80")] {
            let syn = Frame::syn(source.parse()?, destination.parse()?);
            let ack = syn.answer(0).answer(ACK | PSH);
            assert_eq!((ack.source, ack.destination, ack.flags), (syn.source, syn.destination, ACK | PSH));
            assert_eq!((ack.seq, ack.ack), (1_000_001, 7_000_001));
            for frame in [syn, ack] {
                assert_eq!(Frame::parse(&frame.bytes()?)?, frame);
            }
            let mut broken = ack.bytes()?;
            broken[60] ^= 1;
            assert!(Frame::parse(&broken).is_err());
        }
        Ok(())
    }
}
