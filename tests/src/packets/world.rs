//! One node with Services of both families, as map operations that fill the host's maps and the kernel's.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};

use proxy_agent::reconcile::sim::Simulator;
use proxy_agent::reconcile::sim::frame::Frame;
use proxy_agent::reconcile::store::{MapStore as _, Op, StoreError};
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::flags::{EXTERNAL, FAR_LOCAL, SOURCE_RANGES};
use proxy_common::abi::local_address::{HOST, NODEPORT};
use proxy_common::abi::proto::{SCTP, TCP, UDP};
use proxy_common::abi::{
    Affinity, Backend, BackendId, BackendState, Device, FrontendKey, FrontendValue, IfIndex, Service,
    ServiceId, SlotRange, device,
};
use proxy_common::addr::{Addr, Prefix};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::{Role, Verdict};
use proxy_common::datapath::lookup::may_be_ours;

/// Device to the network outside.
pub const NIC: IfIndex = IfIndex(2);
/// Device to other nodes' pods.
pub const OVERLAY: IfIndex = IfIndex(3);
/// Host side of the interface of [`Net::local`].
pub const POD: IfIndex = IfIndex(4);
/// External device without an address of its own.
pub const BARE: IfIndex = IfIndex(5);
/// Device whose packets all count as a pod's.
pub const NEAR: IfIndex = IfIndex(6);

/// The addresses and frontends of the world in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net {
    /// Whether the family is IPv6.
    pub v6: bool,
}

impl Net {
    /// Both families.
    pub const ALL: [Self; 2] = [Self { v6: false }, Self { v6: true }];

    /// Returns the address of this family.
    pub fn ip(self, v4: &str, v6: &str) -> IpAddr {
        let text = if self.v6 { v6 } else { v4 };
        text.parse().unwrap_or_else(|error| unreachable!("{text}: {error}"))
    }

    fn at(self, v4: &str, v6: &str, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(v4, v6), port)
    }

    /// Returns a client outside the cluster, inside the source ranges of [`Net::ranged`].
    pub fn client(self) -> SocketAddr {
        self.at("203.0.113.7", "2001:db8:113::7", 40_000)
    }

    /// Returns another client outside the cluster, outside those ranges.
    pub fn stranger(self) -> SocketAddr {
        self.at("198.18.0.9", "2001:db8:18::9", 40_000)
    }

    /// Returns a router between the clients and the node.
    pub fn router(self) -> IpAddr {
        self.ip("192.0.2.1", "2001:db8:2::1")
    }

    /// Returns the node's primary address, which serves nodePorts and is the SNAT address on [`NIC`].
    pub fn node(self) -> IpAddr {
        self.ip("192.0.2.10", "2001:db8:2::10")
    }

    /// Returns the node's address on [`OVERLAY`].
    pub fn overlay(self) -> IpAddr {
        self.ip("10.65.0.1", "fd00:65::1")
    }

    /// Returns a pod of this node: the backend of [`Net::here`].
    pub fn local(self) -> SocketAddr {
        self.at("10.64.0.1", "fd00:64::1", 8080)
    }

    /// Pods of another node; the first one is the backend of most Services.
    pub fn remote(self, number: u8) -> SocketAddr {
        self.at(&format!("10.64.1.{number}"), &format!("fd00:64:0:1::{number}"), 8080)
    }

    /// Returns a clusterIP whose only backend is a pod of this node.
    pub fn here(self) -> SocketAddr {
        self.cluster_ip(10)
    }

    /// Returns a clusterIP whose only backend is a pod of another node.
    pub fn there(self) -> SocketAddr {
        self.cluster_ip(20)
    }

    /// Returns another clusterIP with the same backend as [`Net::there`].
    pub fn twin(self) -> SocketAddr {
        self.cluster_ip(21)
    }

    /// Returns a clusterIP without backends.
    pub fn nobody(self) -> SocketAddr {
        self.cluster_ip(30)
    }

    /// Returns a clusterIP with three backends on another node.
    pub fn spread(self) -> SocketAddr {
        self.cluster_ip(40)
    }

    /// Returns a clusterIP for which far clients get the local set, which is empty.
    pub fn policy(self) -> SocketAddr {
        self.cluster_ip(50)
    }

    /// Returns an address of the ServiceCIDR that no Service has.
    pub fn inactive(self) -> SocketAddr {
        self.cluster_ip(99)
    }

    /// Returns a load balancer's address with source ranges; its backend is that of [`Net::there`].
    pub fn ranged(self) -> SocketAddr {
        self.at("198.51.100.80", "2001:db8:51::80", 443)
    }

    /// Returns a nodePort; its backend is that of [`Net::there`].
    pub fn node_port(self) -> SocketAddr {
        SocketAddr::new(self.node(), 30_080)
    }

    /// Returns an address that is not the world's, in a block of addresses of which some are.
    pub fn beside(self) -> SocketAddr {
        self.at("10.96.200.7", "fd00:10:96::1:7", 80)
    }

    fn cluster_ip(self, number: u8) -> SocketAddr {
        self.at(&format!("10.96.0.{number}"), &format!("fd00:10:96::{number:x}"), 80)
    }

    /// Returns the offset of this family's ids from those of IPv4.
    const fn base(self) -> u32 {
        if self.v6 { 100 } else { 0 }
    }

    /// Returns the id of the Service of [`Net::there`].
    pub const fn there_id(self) -> u32 {
        self.base() + 2
    }

    /// Returns the id of the first backend of [`Net::spread`].
    pub const fn spread_id(self) -> u32 {
        self.base() + 5
    }

    fn prefix(self, v4: (&str, u8), v6: (&str, u8)) -> Prefix {
        let len = if self.v6 { v6.1 } else { v4.1 };
        let prefix = Prefix::new(self.ip(v4.0, v6.0).into(), len);
        prefix.unwrap_or_else(|| unreachable!("{v4:?}, {v6:?}"))
    }

    /// Returns the operations that fill the maps.
    pub fn ops(self) -> Vec<Op> {
        let base = self.base();
        let mut ops = vec![
            Op::ServiceCidr(self.prefix(("10.96.0.0", 17), ("fd00:10:96::", 112)), true),
            Op::PodSource(self.prefix(("10.64.0.0", 16), ("fd00:64::", 32)), true),
            Op::LocalAddress(self.node().into(), Some(HOST | NODEPORT)),
            Op::LocalAddress(self.overlay().into(), Some(HOST)),
            Op::SourceRange(
                ServiceId(base + 4),
                self.prefix(("203.0.113.0", 24), ("2001:db8:113::", 48)),
                true,
            ),
        ];
        let serving = |id: u32, service: u32, addr: SocketAddr, flags: u32| {
            let state = BackendState { flags: IN_CLUSTER | SERVING | flags, generation: 1 };
            Op::Backend(BackendId(base + id), backend(addr, base + service, state))
        };
        ops.extend([
            serving(1, 1, self.local(), IN_LOCAL | ON_THIS_NODE),
            serving(2, 2, self.remote(1), 0),
            serving(3, 3, self.remote(1), 0),
            serving(4, 4, self.remote(1), 0),
            serving(5, 5, self.remote(1), 0),
            serving(6, 5, self.remote(2), 0),
            serving(7, 5, self.remote(3), 0),
            serving(8, 6, self.remote(1), 0),
            serving(9, 7, self.remote(1), 0),
        ]);
        // Slots have the same numbers as backends.
        ops.push(Op::Slots(base + 1, (base + 1..base + 10).map(BackendId).collect()));
        let one = |id: u32| SlotRange { base: base + id, len: 1 };
        let three = SlotRange { base: base + 5, len: 3 };
        for (id, cluster, local) in [
            (1, one(1), one(1)),
            (2, one(2), SlotRange::DROP),
            (3, one(3), SlotRange::DROP),
            (4, one(4), SlotRange::DROP),
            (5, three, SlotRange::DROP),
            (6, one(8), SlotRange::DROP),
            (7, one(9), SlotRange::DROP),
            (8, SlotRange::REJECT, SlotRange::REJECT),
        ] {
            ops.push(Op::Service(
                ServiceId(base + id),
                Service { cluster, local, affinity: Affinity::default() },
            ));
        }
        for (at, id, flags) in [
            (self.here(), 1, 0),
            (self.there(), 2, 0),
            (self.twin(), 3, 0),
            (self.ranged(), 4, EXTERNAL | SOURCE_RANGES),
            (self.spread(), 5, 0),
            (self.policy(), 6, FAR_LOCAL),
            (self.nobody(), 8, 0),
        ] {
            let addr = at.ip().into();
            if flags & EXTERNAL == 0 {
                ops.push(frontend(FrontendKey::address(addr), 0, 0));
            }
            for proto in [TCP, UDP, SCTP] {
                ops.push(frontend(FrontendKey::exact(addr, Be16::new(at.port()), proto), base + id, flags));
            }
        }
        let any = Addr::from(self.node()).unspecified();
        for proto in [TCP, UDP, SCTP] {
            let port = Be16::new(self.node_port().port());
            ops.push(frontend(FrontendKey::node_port(any, port, proto), base + 7, EXTERNAL));
        }
        ops
    }

    /// Returns the entries of `DEVICES` for both families.
    pub fn devices() -> Vec<(IfIndex, Device)> {
        let [v4, v6] = Self::ALL;
        let own = Device { snat_v4: v4.node().into(), snat_v6: v6.node().into(), flags: 0 };
        let overlay = Device { snat_v4: v4.overlay().into(), snat_v6: v6.overlay().into(), flags: 0 };
        vec![
            (NIC, own),
            (OVERLAY, overlay),
            (POD, Device { flags: device::flags::POD, ..own }),
            (BARE, Device::default()),
            (NEAR, Device { flags: device::flags::NEAR | device::flags::POD, ..own }),
        ]
    }
}

fn backend(addr: SocketAddr, service: u32, state: BackendState) -> Backend {
    Backend {
        addr: addr.ip().into(),
        port: Be16::new(addr.port()),
        pad: [0; 2],
        service: ServiceId(service),
        state,
    }
}

fn frontend(key: FrontendKey, service: u32, flags: u16) -> Op {
    Op::Frontend(key, Some(FrontendValue::new(&key, ServiceId(service), flags)))
}

/// The world in the host's maps.
#[derive(Debug)]
pub struct World {
    /// The simulator with the maps.
    pub sim: Simulator,
    /// Device of the host's route back to the source of an entering packet; 0 for none.
    pub route_back: Cell<IfIndex>,
    /// Devices of the host's routes to the destination of a leaving packet.
    pub ways: RefCell<Vec<IfIndex>>,
    /// Device to which the last packet was redirected; 0 if it left by its own.
    pub left_by: Cell<IfIndex>,
}

impl World {
    /// Returns the world of both families, without any flow, on a machine that has just started.
    ///
    /// # Errors
    /// None: ordered maps have no limit.
    pub fn new() -> Result<Self, StoreError> {
        let mut sim = Simulator::default();
        for op in Net::ALL.into_iter().flat_map(Net::ops) {
            sim.apply(&op)?;
        }
        sim.edge.devices.replace(Net::devices().into_iter().collect());
        Ok(Self { sim, route_back: Cell::default(), ways: RefCell::default(), left_by: Cell::default() })
    }

    /// Lets a packet enter through a device; returns the verdict and the resulting packet.
    pub fn enter(&self, device: IfIndex, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
        let mut frame = Frame { route_back: self.route_back.get(), ..Frame::new(bytes, device) };
        let verdict = self.sim.packet(&mut frame, role_of(device), false);
        (verdict, frame.bytes)
    }

    /// Lets a packet leave through the device by which it entered; returns the verdict and the resulting packet.
    pub fn leave(&self, device: IfIndex, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
        self.leave_from(device, device, bytes)
    }

    /// Lets a packet that entered by a device (0: made by the host) leave through another one; returns the verdict and
    /// the resulting packet.
    pub fn leave_from(&self, entered_by: IfIndex, device: IfIndex, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
        let route_back = self.route_back.get();
        let ways = self.ways.borrow().clone();
        let mut frame = Frame { entered_by, route_back, ways, ..Frame::new(bytes, device) };
        let verdict = self.sim.packet(&mut frame, role_of(device), true);
        self.left_by.set(frame.leaves_by);
        (verdict, frame.bytes)
    }

    /// Returns whether the filter reports that an address may belong to a Service or to the host.
    pub fn may_be_ours(&self, ip: IpAddr) -> bool {
        may_be_ours(&self.sim, &ip.into())
    }

    /// Lets time pass, in seconds.
    pub fn pass(&self, seconds: u64) {
        self.sim.clock.set(self.sim.clock.get() + seconds * 1_000_000_000);
    }
}

/// Returns the role of a device.
pub const fn role_of(device: IfIndex) -> Role {
    if matches!(device, POD | NEAR) { Role::Pod } else { Role::External }
}
