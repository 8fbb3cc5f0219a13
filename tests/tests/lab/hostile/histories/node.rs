//! The node under attack: the datapath as compiled for the host, between the devices of a node that routes as Linux
//! does, and the participants behind each device.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use proxy_agent::reconcile::sim::Simulator;
use proxy_agent::reconcile::sim::frame::Frame;
use proxy_agent::reconcile::store::{MapStore as _, Op, StoreError};
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::proto::{TCP, UDP};
use proxy_common::abi::{
    Affinity, Backend, BackendId, BackendState, Device, FrontendKey, FrontendValue, IfIndex, Service,
    ServiceId, SlotRange, device,
};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::{Role, Verdict};
use proxy_tests::packets::{NIC, Net, OVERLAY, POD, World};

/// The host's side of the victim's interface.
const VICTIM: IfIndex = IfIndex(10);
/// The host's side of the attacker's interface.
const ATTACKER: IfIndex = IfIndex(11);
/// The bridge of nodes whose pods are not routed one by one. It has no program of ours.
const BRIDGE: IfIndex = IfIndex(99);
/// Ids of the Service that the attacker serves, and of its backend.
const EVIL_ID: u32 = 50;
/// Number of times that a packet may go round: an answer of the datapath may meet another answer, and no lawful
/// packet goes round more often.
const ROUNDS: usize = 4;

/// Place of a participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum At {
    /// A pod behind an interface of the node.
    Pod(IfIndex),
    /// Another node, or a pod of it.
    Beside,
    /// Outside the cluster.
    Outside,
    /// The node itself.
    Host,
}

impl At {
    /// Returns whether the participant is not behind this node.
    pub(super) fn is_past(self) -> bool {
        matches!(self, Self::Beside | Self::Outside)
    }
}

/// Participants. Their order is that of [`Who::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Who {
    /// Outside, and allowed to use every Service.
    Client,
    /// Outside, and not allowed to use every Service.
    Stranger,
    /// A pod of the node that is a client by packets.
    Victim,
    /// A pod of the node that serves.
    Local,
    /// Pods of another node that serve.
    Remote(u8),
    /// A pod of another node that is a client of nodePorts and VIPs here.
    Neighbour,
    /// A process on the node.
    Host,
    /// A pod of the node, with NET_RAW. It serves, too.
    Attacker,
    /// A sender outside that writes any source into its packets.
    Forger,
}

impl Who {
    /// All participants.
    pub(super) const ALL: [Self; 11] = [
        Self::Client,
        Self::Stranger,
        Self::Victim,
        Self::Local,
        Self::Remote(1),
        Self::Remote(2),
        Self::Remote(3),
        Self::Neighbour,
        Self::Host,
        Self::Attacker,
        Self::Forger,
    ];

    /// Returns the place of a participant.
    pub(super) const fn at(self) -> At {
        match self {
            Self::Client | Self::Stranger | Self::Forger => At::Outside,
            Self::Victim => At::Pod(VICTIM),
            Self::Local => At::Pod(POD),
            Self::Remote(_) | Self::Neighbour => At::Beside,
            Self::Host => At::Host,
            Self::Attacker => At::Pod(ATTACKER),
        }
    }

    /// Returns whether the participant is an attacker, whose connections need not work.
    pub(super) const fn is_hostile(self) -> bool {
        matches!(self, Self::Attacker | Self::Forger)
    }

    /// Returns the participant's address.
    pub(super) fn ip(self, net: Net) -> IpAddr {
        match self {
            Self::Client => net.client().ip(),
            Self::Stranger => net.stranger().ip(),
            Self::Victim => net.ip("10.64.0.51", "fd00:64::51"),
            Self::Local => net.local().ip(),
            Self::Remote(number) => net.remote(number).ip(),
            Self::Neighbour => net.remote(7).ip(),
            Self::Host => net.node(),
            Self::Attacker => net.ip("10.64.0.66", "fd00:64::66"),
            Self::Forger => net.ip("198.18.0.66", "2001:db8:18::66"),
        }
    }

    /// Returns the participant that has an address, if any.
    pub(super) fn of(net: Net, ip: IpAddr) -> Option<Self> {
        if ip == net.overlay() {
            return Some(Self::Host);
        }
        Self::ALL.into_iter().find(|who| who.ip(net) == ip)
    }
}

/// Returns the Service whose pod is the attacker's.
pub(super) fn evil(net: Net) -> SocketAddr {
    SocketAddr::new(if net.v6 { "fd00:10:96::3c" } else { "10.96.0.60" }.parse().unwrap_or(net.node()), 80)
}

/// Returns the pods behind a VIP, or the pod itself for its own address.
pub(super) fn backends(net: Net, target: SocketAddr) -> Vec<SocketAddr> {
    if target == net.here() {
        vec![net.local()]
    } else if target == net.spread() {
        [1, 2, 3].map(|number| net.remote(number)).into()
    } else if [net.there(), net.twin(), net.ranged(), net.node_port(), net.policy()].contains(&target) {
        vec![net.remote(1)]
    } else if target == evil(net) {
        vec![SocketAddr::new(Who::Attacker.ip(net), 8080)]
    } else {
        vec![target]
    }
}

/// Setup of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    /// Family.
    pub(super) net: Net,
    /// Whether each pod has a route of its own; otherwise all are behind a bridge.
    pub(super) routed: bool,
    /// Whether the kernel drops packets that came by another device than the way back (strict rp_filter).
    pub(super) strict: bool,
    /// Whether no time passes except the waiting of the ends. A packet that only shortens the life of a silent flow
    /// then does no harm.
    pub(super) swift: bool,
}

/// The node.
pub(super) struct Node {
    /// The maps.
    pub(super) sim: Simulator,
    setup: Setup,
    /// Number of packets that the datapath has seen.
    pub(super) packets: Cell<u64>,
}

impl Node {
    /// Returns a node without any flow.
    pub(super) fn new(setup: Setup) -> Result<Self, StoreError> {
        let World { mut sim, .. } = World::new()?;
        let net = setup.net;
        let at = evil(net);
        let state = BackendState { flags: IN_CLUSTER | SERVING | IN_LOCAL | ON_THIS_NODE, generation: 1 };
        let (addr, port) = (Who::Attacker.ip(net).into(), Be16::new(8080));
        let one = SlotRange { base: EVIL_ID, len: 1 };
        let mut ops = vec![
            Op::Backend(
                BackendId(EVIL_ID),
                Backend { addr, port, pad: [0; 2], service: ServiceId(EVIL_ID), state },
            ),
            Op::Slots(EVIL_ID, vec![BackendId(EVIL_ID)]),
            Op::Service(
                ServiceId(EVIL_ID),
                Service { cluster: one, local: one, affinity: Affinity::default() },
            ),
        ];
        for proto in [TCP, UDP] {
            let key = FrontendKey::exact(at.ip().into(), Be16::new(at.port()), proto);
            ops.push(Op::Frontend(key, Some(FrontendValue::new(&key, ServiceId(EVIL_ID), 0))));
        }
        for op in &ops {
            sim.apply(op)?;
        }
        let [v4, v6] = Net::ALL.map(|net| net.node().into());
        for device in [VICTIM, ATTACKER] {
            let value = Device { snat_v4: v4, snat_v6: v6, flags: device::flags::POD };
            sim.edge.devices.borrow_mut().insert(device, value);
        }
        Ok(Self { sim, setup, packets: Cell::new(0) })
    }

    /// Lets time pass, in milliseconds.
    pub(super) fn pass(&self, milliseconds: u64) {
        self.sim.clock.set(self.sim.clock.get() + milliseconds * 1_000_000);
    }

    /// Returns the milliseconds since the node was made.
    pub(super) fn now(&self) -> u64 {
        self.sim.clock.get() / 1_000_000
    }

    /// Returns the place that the kernel's routes lead to.
    fn route(&self, ip: IpAddr) -> At {
        Who::of(self.setup.net, ip).map_or(At::Outside, Who::at)
    }

    const fn device(at: At) -> IfIndex {
        match at {
            At::Pod(device) => device,
            At::Beside => OVERLAY,
            At::Outside => NIC,
            At::Host => IfIndex::NONE,
        }
    }

    const fn role(device: IfIndex) -> Role {
        if matches!(device, POD | VICTIM | ATTACKER) { Role::Pod } else { Role::External }
    }

    /// Returns the device that the kernel names for the way to an address.
    fn way_back(&self, ip: IpAddr) -> IfIndex {
        let at = self.route(ip);
        if matches!(at, At::Pod(_)) && !self.setup.routed { BRIDGE } else { Self::device(at) }
    }

    fn run(&self, device: IfIndex, entered_by: IfIndex, egress: bool, bytes: Vec<u8>) -> (Verdict, Vec<u8>) {
        self.packets.set(self.packets.get() + 1);
        let source = ends(&bytes).map_or(IfIndex::NONE, |(source, _)| self.way_back(source));
        let mut frame = Frame { entered_by, route_back: source, ..Frame::new(bytes, device) };
        let verdict = self.sim.packet(&mut frame, Self::role(device), egress);
        (verdict, frame.bytes)
    }

    /// Takes a packet through the node. Returns its place and its bytes afterwards; `None` if it was dropped.
    pub(super) fn forward(&self, from: At, bytes: Vec<u8>) -> Option<(At, Vec<u8>)> {
        let (mut from, mut bytes) = (from, bytes);
        for _ in 0..ROUNDS {
            let device = Self::device(from);
            if from != At::Host {
                match self.run(device, device, false, bytes) {
                    (Verdict::Drop, _) => return None,
                    (Verdict::Reply, back) => return self.leave(from, device, back).ok(),
                    (Verdict::Pass | Verdict::Translated | Verdict::Elsewhere, on) => bytes = on,
                }
                let (source, _) = ends(&bytes)?;
                let back = self.route(source);
                // The kernel takes no IPv4 packet with its own source address from a device. With strict rp_filter,
                // it takes none whose reply would leave by another device.
                if !self.setup.net.v6 && (back == At::Host || self.setup.strict && back != from) {
                    return None;
                }
            }
            let to = self.route(ends(&bytes)?.1);
            if to == At::Host {
                return Some((to, bytes));
            }
            match self.leave(to, device, bytes) {
                Ok(out) => return Some(out),
                // The reply goes back into the host, as if it had come by that device.
                Err(Some(back)) => (from, bytes) = (to, back),
                Err(None) => return None,
            }
        }
        None
    }

    /// Lets a packet leave. If it does not, returns the packet that the datapath gives back to the host in its place,
    /// if any.
    fn leave(&self, to: At, entered_by: IfIndex, bytes: Vec<u8>) -> Result<(At, Vec<u8>), Option<Vec<u8>>> {
        match self.run(Self::device(to), entered_by, true, bytes) {
            (Verdict::Pass | Verdict::Translated | Verdict::Elsewhere, out) => Ok((to, out)),
            (Verdict::Reply, back) => Err(Some(back)),
            (Verdict::Drop, _) => Err(None),
        }
    }

    /// Carries a packet. Returns its receiver, and the bytes that it gets.
    pub(super) fn carry(&self, from: At, bytes: Vec<u8>) -> Option<(Who, Vec<u8>)> {
        let net = self.setup.net;
        let (_, to) = ends(&bytes)?;
        // Participants that are not behind this node reach each other without it.
        if from.is_past() && Who::of(net, to).is_some_and(|who| who.at().is_past()) {
            return Who::of(net, to).map(|who| (who, bytes));
        }
        let (at, bytes) = self.forward(from, bytes)?;
        let who = Who::of(net, ends(&bytes)?.1)?;
        // A pod takes no packet for another address.
        (who.at() == at).then_some((who, bytes))
    }
}

/// Returns the source and destination of an IP packet.
pub(super) fn ends(bytes: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match bytes.get(12..14)? {
        [0x08, 0x00] => Some((address::<4>(bytes, 26)?, address::<4>(bytes, 30)?)),
        [0x86, 0xdd] => Some((address::<16>(bytes, 22)?, address::<16>(bytes, 38)?)),
        _ => None,
    }
}

fn address<const N: usize>(bytes: &[u8], at: usize) -> Option<IpAddr>
where
    IpAddr: From<[u8; N]>,
{
    Some(<[u8; N]>::try_from(bytes.get(at..at + N)?).ok()?.into())
}
