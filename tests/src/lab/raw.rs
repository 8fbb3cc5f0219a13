//! Packets with headers made by the sender, which every process with NET_RAW can send: every container can.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use super::Place;
use crate::packets::{ETHERNET, Packet, read};

impl Place {
    /// Sends packets from here, each to its destination, with any source address.
    ///
    /// # Errors
    /// If raw sockets are not allowed, or there is no route to a destination.
    pub fn send_raw(&self, packets: impl IntoIterator<Item = Packet> + Send) -> Result<()> {
        self.net().enter(|| {
            let sockets = [AddressFamily::INET, AddressFamily::INET6].map(socket);
            let [v4, v6] = sockets;
            let (v4, v6) = (v4?, v6?);
            packets.into_iter().try_for_each(|packet| {
                let frame = packet.bytes();
                let to = read(&frame)?.destination.ip();
                let socket = if matches!(to, IpAddr::V4(_)) { &v4 } else { &v6 };
                let sent = sendto(socket, &frame[ETHERNET..], SendFlags::empty(), &SocketAddr::new(to, 0));
                sent.map(drop).with_context(|| format!("sending to {to}"))
            })
        })?
    }

    /// Sends the same packets from here again and again, as fast as the kernel takes them, until `stop` is set. Returns
    /// the number of packets sent.
    ///
    /// # Errors
    /// As [`Place::send_raw`].
    pub fn flood_raw(&self, packets: &[Packet], stop: &AtomicBool) -> Result<u64> {
        let frames: Vec<_> = packets.iter().map(|packet| (packet.destination.ip(), packet.bytes())).collect();
        self.net().enter(|| {
            let (v4, v6) = (socket(AddressFamily::INET)?, socket(AddressFamily::INET6)?);
            let mut sent = 0;
            for (to, frame) in frames.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let socket = if to.is_ipv4() { &v4 } else { &v6 };
                match sendto(socket, &frame[ETHERNET..], SendFlags::empty(), &SocketAddr::new(*to, 0)) {
                    Ok(_) => sent += 1,
                    Err(Errno::NOBUFS) => thread::yield_now(),
                    Err(error) => return Err(error).with_context(|| format!("sending to {to}")),
                }
            }
            Ok(sent)
        })?
    }
}

fn socket(family: AddressFamily) -> Result<OwnedFd> {
    socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).context("a raw socket")
}
