//! Leads one socket: writes its order, connects it, and checks the result.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use aya::maps::{MapData, MapError, SkStorage};
use proxy_common::abi::SocketRecord;
use proxy_common::abi::socket::Order;
use proxy_common::abi::socket::order::{ADDRESS, PORT};
use proxy_common::addr::{Addr, Family};
use proxy_common::be::Be16;
use rustix::net::{connect, getpeername, getsockname};

use super::held::{Fate, Held};
use super::maps::{SocketMaps, map};
use crate::host::cgroups;
use crate::host::sockets::error::SocketsError;
use crate::reconcile::stale::Connected;

/// The maps of [`SocketMaps`], with their types.
pub(super) struct Storage {
    records: SkStorage<MapData, SocketRecord>,
    /// Written only by the sweeping thread.
    orders: Mutex<SkStorage<MapData, Order>>,
}

impl Storage {
    pub(super) fn open(maps: &SocketMaps) -> Result<Self, MapError> {
        Ok(Self {
            records: map(&maps.records)?.try_into()?,
            orders: Mutex::new(map(&maps.orders)?.try_into()?),
        })
    }

    /// Carries out the result of `order` for a socket.
    pub(super) fn treat(
        &self,
        socket: &Held<'_>,
        order: impl Fn(&Connected) -> Option<Order>,
        opted_out: &BTreeSet<Arc<str>>,
    ) -> Result<Fate, SocketsError> {
        let peer = (Addr::from(socket.id.destination_address), Be16::new(socket.id.destination_port));
        let record = self.record(&socket.copy)?.filter(|record| is_about(record, peer));
        let connected = Connected { peer, record, of_host: socket.namespace.of_host };
        match order(&connected) {
            // The hook would check the agent's own cgroup instead of the process's.
            Some(_) if is_of_one(socket.process, opted_out) => Ok(Fate::Left),
            Some(order) => self.lead(socket, order, record.is_some()),
            None => Ok(Fate::Left),
        }
    }

    fn record(&self, socket: &OwnedFd) -> Result<Option<SocketRecord>, SocketsError> {
        match self.records.get(socket, 0) {
            Ok(record) => Ok(Some(record)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(SocketsError::Storage(error)),
        }
    }

    /// Leads a socket. `seen` is whether the hooks have run for the socket. If not, the hooks first have to be seen to
    /// run: the socket may belong to a process outside of the cgroup that is served.
    fn lead(&self, socket: &Held<'_>, order: Order, seen: bool) -> Result<Fate, SocketsError> {
        let Held { copy, namespace, .. } = socket;
        let led = {
            let mut orders = self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if orders.insert(copy, order, 0).is_err() {
                // The owner has filled the memory that the kernel grants a socket.
                return Ok(Fate::Doomed);
            }
            let led = (seen || peer(copy).ok() == Some((ADDRESS, PORT))).then(|| ask(copy));
            // If the owner has connected the socket meanwhile, the hook has removed the order already.
            let _ = orders.remove(copy);
            led
        };
        match led {
            Some(Ok(())) => {}
            None => return Ok(Fate::Left),
            // Either the hook has not found the socket where it was, because its owner has connected it anew, or the
            // hook has refused the connection and the socket stays.
            Some(Err(error)) if is_refused(&error) => return Ok(Fate::Left),
            Some(Err(_)) => return Ok(Fate::Doomed),
        }
        // getpeername() goes through the hook, which shows the VIP only of a socket that is connected where its record
        // says.
        if peer(copy).ok() != Some((order.vip, order.vip_port)) {
            return Ok(Fate::Doomed);
        }
        let Some(record) = self.record(copy)?.filter(SocketRecord::is_connected) else {
            // The socket is connected to its VIP itself, and may have been before.
            return Ok(if seen { Fate::Led } else { Fate::Left });
        };
        namespace.enter()?;
        let sends_from = local(copy);
        let kernels = source_to(record.backend_addr, record.backend_port);
        Ok(match (sends_from, kernels) {
            (Ok(now), Ok(fresh)) if leads_as_far(now, fresh) => Fate::Led,
            _ => Fate::Doomed,
        })
    }
}

/// Returns whether a process belongs to one of these pods. Nothing is known of a process that has ended: another
/// process may have its socket.
fn is_of_one(process: &Path, pods: &BTreeSet<Arc<str>>) -> bool {
    !pods.is_empty()
        && std::fs::read_to_string(process.join("cgroup")).is_ok_and(|file| cgroups::is_below(&file, pods))
}

/// Returns whether a record is the reason why a socket is connected to `peer`.
fn is_about(record: &SocketRecord, peer: (Addr, Be16)) -> bool {
    record.is_connected() && (record.backend_addr, record.backend_port) == peer
}

/// Connects a socket to the address at which the hook carries out its order.
fn ask(socket: &OwnedFd) -> io::Result<()> {
    let is_v4 = matches!(SocketAddr::try_from(getsockname(socket)?)?, SocketAddr::V4(_));
    let to = ADDRESS.to_ip();
    let to = match to {
        IpAddr::V4(addr) if !is_v4 => IpAddr::V6(addr.to_ipv6_mapped()),
        IpAddr::V4(_) | IpAddr::V6(_) => to,
    };
    Ok(connect(socket, &SocketAddr::new(to, PORT.get()))?)
}

/// Returns whether the hook has refused connect(): ECONNREFUSED, or EPERM if it cannot choose (before 5.18).
fn is_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::EPERM))
}

fn peer(socket: &OwnedFd) -> io::Result<(Addr, Be16)> {
    let peer = getpeername(socket)?.ok_or(io::ErrorKind::NotConnected)?;
    let peer = SocketAddr::try_from(peer)?;
    Ok((peer.ip().into(), Be16::new(peer.port())))
}

fn local(socket: &OwnedFd) -> io::Result<IpAddr> {
    Ok(Addr::from(SocketAddr::try_from(getsockname(socket)?)?.ip()).to_ip())
}

/// Returns the source address that a new socket in this thread's network namespace would use.
fn source_to(addr: Addr, port: Be16) -> io::Result<IpAddr> {
    let any = match addr.family() {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((addr.to_ip(), port.get()))?;
    Ok(socket.local_addr()?.ip())
}

/// Returns whether replies to `address` find the way back as well as replies to the kernel's choice. (Another address
/// of the same reach is kept, as NAT keeps it: a bridge's instead of the uplink's, for instance.)
fn leads_as_far(address: IpAddr, kernels: IpAddr) -> bool {
    let [own, other] = [address, kernels].map(|address| {
        let link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        (address.is_loopback(), link_local)
    });
    address == kernels || own == other
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::ServiceId;

    use super::*;

    #[test]
    fn a_source_is_kept_while_it_leads_as_far_as_the_kernels_choice() {
        for (address, kernels, kept) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("10.64.0.1", "192.0.2.1", true),
            ("127.0.0.1", "192.0.2.1", false),
            ("192.0.2.1", "127.0.0.1", false),
            ("169.254.1.1", "192.0.2.1", false),
            ("fe80::1", "fd00::1", false),
            ("fd00::2", "fd00::1", true),
            ("::1", "::1", true),
        ] {
            let [a, b] = [address, kernels].map(|text| text.parse().unwrap());
            assert_eq!(leads_as_far(a, b), kept, "{address} where the kernel takes {kernels}");
        }
    }

    #[test]
    fn a_record_counts_only_while_the_socket_is_connected_where_it_says() {
        let (backend_addr, backend_port) = (Addr::v4([10, 64, 1, 11]), Be16::new(1053));
        let record =
            SocketRecord { backend_addr, backend_port, service: ServiceId(1), ..SocketRecord::default() };
        assert!(is_about(&record, (backend_addr, backend_port)));
        let datagrams = SocketRecord { service: SocketRecord::DATAGRAMS, ..record };
        assert!(!is_about(&datagrams, (backend_addr, backend_port)));
        assert!(!is_about(&record, (backend_addr, Be16::new(1054))));
        assert!(!is_about(&record, (Addr::v4([10, 64, 1, 12]), backend_port)));
    }
}
