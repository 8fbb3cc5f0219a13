//! TCP segments from invented senders.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};

use super::sys::{BATCH, send_some};
use crate::lab::Place;
use crate::packets::{ETHERNET, Packet};

/// Bytes of a segment without options and data: IPv4 and TCP header.
const LENGTH: usize = 40;

/// Packets to send.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// Destination address and port.
    pub target: SocketAddrV4,
    /// Source addresses, which are invented.
    pub senders: Senders,
    /// Bits of [`proxy_common::datapath::edge::parsed::tcp`]. Sequence numbers are random, acknowledgement numbers zero.
    pub flags: u8,
    /// Number of packets.
    pub packets: u64,
}

/// Sources of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Senders {
    /// Any port of any address of 128.0.0.0/3, at random.
    Anybody,
    /// Every port of one address, one after the other.
    One(Ipv4Addr),
}

/// Packets that were sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Number of packets.
    pub packets: u64,
    /// Time from the first to the last packet.
    pub took: Duration,
}

impl Sent {
    /// Packets per second.
    pub fn rate(&self) -> f64 {
        self.packets as f64 / self.took.as_secs_f64()
    }
}

impl Flood {
    /// Sends the packets from `place`, on as many threads as there are CPUs, and returns when all are sent. Sending
    /// waits for the kernel when its buffers are full, but is not paced.
    ///
    /// # Errors
    /// If raw sockets are not allowed, or there is no route to the target.
    pub fn send(&self, place: &Place) -> Result<Sent> {
        let threads = thread::available_parallelism().context("the number of CPUs")?.get() as u64;
        let start = Instant::now();
        thread::scope(|scope| {
            let spawned = (0..threads).map(|number| {
                let share = self.packets / threads + u64::from(number < self.packets % threads);
                scope.spawn(move || place.net().enter(|| self.send_share(number, threads, share))?)
            });
            let all: Vec<_> = spawned.collect();
            let mut results = all.into_iter().map(thread::ScopedJoinHandle::join);
            results.try_for_each(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        Ok(Sent { packets: self.packets, took: start.elapsed() })
    }

    /// Sends one thread's packets: every `step`th packet, beginning with `first`.
    fn send_share(&self, first: u64, step: u64, share: u64) -> Result<()> {
        let socket = self.socket().context("a raw socket")?;
        let template = Template::new(self.target, self.flags)?;
        let mut random = fastrand::Rng::with_seed(first);
        let (mut number, end) = (first, first + step * share);
        let mut batch = [[0; LENGTH]; BATCH];
        while number < end {
            let mut count = 0;
            for packet in &mut batch {
                if number >= end {
                    break;
                }
                *packet = template.packet(self.sender(number, &mut random), random.u32(..));
                number += step;
                count += 1;
            }
            let mut rest = &batch[..count];
            while !rest.is_empty() {
                match send_some(&socket, rest) {
                    Ok(sent) => rest = &rest[sent..],
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                    Err(error) => return Err(error).context("sendmmsg"),
                }
            }
        }
        Ok(())
    }

    fn sender(&self, number: u64, random: &mut fastrand::Rng) -> SocketAddrV4 {
        match self.senders {
            // Unicast addresses that the lab does not use.
            Senders::Anybody => {
                SocketAddrV4::new(Ipv4Addr::from(0x8000_0000 | random.u32(..) >> 3), random.u16(1..))
            }
            Senders::One(address) => SocketAddrV4::new(address, (number % 65_535) as u16 + 1),
        }
    }

    /// Opens a socket for packets with their IP header.
    fn socket(&self) -> io::Result<OwnedFd> {
        let socket =
            socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
        connect(&socket, &SocketAddr::from(self.target))?;
        Ok(socket)
    }
}

/// A segment without sender and sequence number.
struct Template {
    bytes: [u8; LENGTH],
    /// One's-complement sum for its TCP checksum.
    sum: u32,
}

const SOURCE: usize = 12;
const SOURCE_PORT: usize = 20;
const SEQUENCE: usize = 24;
const CHECKSUM: usize = 36;

impl Template {
    fn new(target: SocketAddrV4, flags: u8) -> Result<Self> {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let frame = Packet::tcp(nowhere, target.into(), flags, 0, 0).bytes();
        let bytes: [u8; LENGTH] = frame[ETHERNET..].try_into().context("a segment with data")?;
        let sum = u32::from(!u16::from_be_bytes([bytes[CHECKSUM], bytes[CHECKSUM + 1]]));
        Ok(Self { bytes, sum })
    }

    /// Returns the segment from `sender`. The kernel computes the checksum of the IP header.
    fn packet(&self, sender: SocketAddrV4, sequence: u32) -> [u8; LENGTH] {
        let mut bytes = self.bytes;
        let address = u32::from(*sender.ip());
        bytes[SOURCE..SOURCE + 4].copy_from_slice(&address.to_be_bytes());
        bytes[SOURCE_PORT..SOURCE_PORT + 2].copy_from_slice(&sender.port().to_be_bytes());
        bytes[SEQUENCE..SEQUENCE + 4].copy_from_slice(&sequence.to_be_bytes());
        let words = [address, sequence].map(|long| (long >> 16) + (long & 0xffff));
        let mut sum = self.sum + words[0] + words[1] + u32::from(sender.port());
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        bytes[CHECKSUM..CHECKSUM + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::datapath::edge::parsed::tcp;

    use super::*;

    #[test]
    fn packets_are_what_a_client_would_send() -> Result<()> {
        let target = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 30080);
        let template = Template::new(target, tcp::RST)?;
        let flood = Flood { target, senders: Senders::Anybody, flags: tcp::RST, packets: 0 };
        let mut random = fastrand::Rng::with_seed(7);
        for number in 0..1000 {
            let (sender, sequence) = (flood.sender(number, &mut random), random.u32(..));
            let frame = Packet::tcp(sender.into(), target.into(), tcp::RST, sequence, 0).bytes();
            let packet = template.packet(sender, sequence);
            // The addresses, and everything after the checksum of the IP header.
            assert_eq!(packet[SOURCE..], frame[ETHERNET + SOURCE..]);
            assert!((128..160).contains(&sender.ip().octets()[0]) && sender.port() > 0, "{sender}");
        }
        let one = Flood { senders: Senders::One(*target.ip()), ..flood };
        let ports: std::collections::BTreeSet<u16> =
            (0..65_535).map(|number| one.sender(number, &mut random).port()).collect();
        assert_eq!((ports.len(), ports.first()), (65_535, Some(&1)));
        Ok(())
    }
}
