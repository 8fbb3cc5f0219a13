//! Connected UDP sockets that are not where their VIP leads. kube-proxy does this by removing UDP entries of conntrack.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::backend::flags::SERVING;
use proxy_common::abi::local_address::NODEPORT;
use proxy_common::abi::socket::Order;
use proxy_common::abi::{FrontendKey, ServiceId, SocketRecord, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;

use crate::reconcile::model::Model;

/// The serving backends behind every UDP frontend, at one moment.
#[derive(Debug, Default)]
pub(crate) struct Serving {
    frontends: BTreeMap<FrontendKey, ServiceId>,
    backends: BTreeMap<ServiceId, BTreeSet<(Addr, Be16)>>,
    /// Addresses that serve nodePorts.
    node_ports_at: BTreeSet<Addr>,
}

/// A connected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connected {
    /// Peer of the socket in the kernel.
    pub(crate) peer: (Addr, Be16),
    /// Record of the socket edge, if it is about `peer`.
    pub(crate) record: Option<SocketRecord>,
    /// Whether the socket is in the host's network namespace.
    pub(crate) of_host: bool,
}

impl Serving {
    /// Builds the index from the UDP part of `model`.
    pub(crate) fn of(model: &Model) -> Self {
        let udp = model.frontends.iter().filter(|(key, _)| key.proto == proto::UDP);
        let ports = model.ports.iter().filter(|(key, _)| key.proto == proto::UDP);
        let addresses = model.local_addresses.iter().filter(|(_, bits)| *bits & NODEPORT != 0);
        Self {
            frontends: udp.map(|(key, value)| (*key, value.service)).collect(),
            backends: ports
                .map(|(_, port)| {
                    let serving = port.backends.iter().filter(|b| b.state.flags & SERVING != 0);
                    (port.id, serving.map(|b| (b.addr, b.port)).collect())
                })
                .collect(),
            node_ports_at: addresses.map(|(addr, _)| *addr).collect(),
        }
    }

    /// Returns the order for the socket, or `None` if the socket is where it should be.
    ///
    /// A socket whose backend has left is moved to another backend, or to its VIP while no backend serves or no
    /// Service has the VIP. A socket of the host may be connected to a VIP itself, because no backend served or
    /// because the socket is older than the Service or the agent. It is moved to a backend. Datagrams of pods to a
    /// VIP itself are served as packets.
    pub(crate) fn order(&self, socket: &Connected) -> Option<Order> {
        let (peer, peer_port) = socket.peer;
        match socket.record {
            Some(SocketRecord { vip, vip_port, backend_addr, backend_port, .. }) => {
                let serving = self.serving((vip, vip_port));
                let stays = serving.is_some_and(|serving| serving.contains(&(backend_addr, backend_port)));
                (!stays).then_some(Order { vip, peer, vip_port, peer_port })
            }
            None => {
                let serves = self.serving(socket.peer).is_some_and(|serving| !serving.is_empty());
                (serves && socket.of_host).then_some(Order {
                    vip: peer,
                    peer,
                    vip_port: peer_port,
                    peer_port,
                })
            }
        }
    }

    /// Returns the backends that serve a VIP; `None` if no Service has the VIP.
    fn serving(&self, (addr, port): (Addr, Be16)) -> Option<&BTreeSet<(Addr, Be16)>> {
        let exact = self.frontends.get(&FrontendKey::exact(addr, port, proto::UDP));
        let service = exact.or_else(|| {
            let key = FrontendKey::node_port(addr.unspecified(), port, proto::UDP);
            self.node_ports_at.contains(&addr).then(|| self.frontends.get(&key)).flatten()
        });
        self.backends.get(service?)
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::BackendId;

    use super::*;

    /// Returns an address of 10.0.0.0/8 and port 53.
    fn at(third: u8, last: u8) -> (Addr, Be16) {
        (Addr::v4([10, 0, third, last]), Be16::new(53))
    }

    const HERE: fn() -> (Addr, Be16) = || (Addr::v4([192, 0, 2, 10]), Be16::new(30053));

    /// Service 1 at 10.0.0.1 and nodePort 30053 with the backend 10.0.1.1; Service 2 at 10.0.0.2 without backends.
    fn serving() -> Serving {
        let [first, second] = [1, 2].map(|last| {
            let (addr, port) = at(0, last);
            FrontendKey::exact(addr, port, proto::UDP)
        });
        let (here, port) = HERE();
        let node_port = FrontendKey::node_port(here.unspecified(), port, proto::UDP);
        Serving {
            frontends: [(first, ServiceId(1)), (second, ServiceId(2)), (node_port, ServiceId(1))].into(),
            backends: [(ServiceId(1), [at(1, 1)].into()), (ServiceId(2), BTreeSet::new())].into(),
            node_ports_at: [here].into(),
        }
    }

    #[test]
    fn a_socket_follows_its_service_and_no_other_one_is_touched() {
        let elsewhere = (Addr::v4([192, 0, 2, 11]), Be16::new(30053));
        for (vip, peer, led, why) in [
            (Some(at(0, 1)), at(1, 1), false, "its backend serves"),
            (Some(HERE()), at(1, 1), false, "its backend serves a nodePort"),
            (Some(at(0, 1)), at(1, 2), true, "its backend has left, another one serves"),
            (Some(at(0, 2)), at(1, 1), true, "its backend has left, nobody serves"),
            (Some(at(0, 3)), at(1, 1), true, "its Service is gone"),
            (None, at(0, 1), true, "connected to a VIP that is served"),
            (None, HERE(), true, "connected to a nodePort that is served"),
            (None, at(0, 2), false, "connected to a VIP that nobody serves"),
            (None, at(1, 1), false, "connected to a pod by its own address"),
            (None, elsewhere, false, "connected to the port of another host"),
        ] {
            let record = vip.map(|(vip, vip_port)| SocketRecord {
                vip,
                vip_port,
                backend_addr: peer.0,
                backend_port: peer.1,
                service: ServiceId(1),
                backend: BackendId(1),
            });
            let (to, to_port) = vip.unwrap_or(peer);
            let order = Order { vip: to, vip_port: to_port, peer: peer.0, peer_port: peer.1 };
            for of_host in [true, false] {
                let socket = Connected { peer, record, of_host };
                let in_packets = vip.is_none() && !of_host;
                assert_eq!(serving().order(&socket), (led && !in_packets).then_some(order), "{why}");
            }
        }
    }
}
