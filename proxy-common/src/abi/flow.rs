//! The packet edge's flows: `FLOWS` and `NEW_FLOWS` hold records, `FLOW_INDEX` and `NEW_FLOW_INDEX` lead to them.
//!
//! One record per flow, keyed by the tuple that packets carry between the edges: client and backend. Index entries
//! lead to it from the tuples of the outer sides: client and VIP, backend and our own address. The record is written
//! first, then its indexes; they are removed the other way round. An index without a record is a miss.
//!
//! Every key begins with the flow's [`Origin`]: whoever writes another one's address into a packet finds, makes and ends
//! flows of his own only.
//!
//! A datagram that leaves from a frontend's address and port without being a Service's is this host's own, or of a pod whose source
//! it has translated. A record of its own kind tells the answer from a request.
//!
//! Written by the edges; the agent only collects what has expired. The `NEW_…` maps are LRU hashes, in which a flood
//! can evict a flow until its client has proved that it hears the replies; the others never evict.

use bytemuck::{Pod, Zeroable};

use crate::{addr::Addr, be::Be16};

/// What a [`FlowKey`] is the key of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FlowKind {
    /// A record: client to backend.
    Record = 0,
    /// An index entry: client to VIP, as requests arrive.
    Vip = 1,
    /// An index entry: backend to our own address, as replies arrive from another node.
    Snat = 2,
    /// A record of `NEW_FLOWS` that belongs to no Service: a datagram that this host has sent from the address and port of a frontend.
    /// The key is the tuple of the answers; of the value only `check` and `last_seen` count.
    OwnDatagram = 3,
}

/// Where the client of a flow is: its requests enter there, and only what leaves there is its answer. A pod can write any
/// source address, but it cannot choose the interface that its packets enter through.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Origin {
    /// Index of the host's side of the pod's interface; 0 behind external devices, by any of which a packet may come.
    pub ifindex: u32,
}

impl Origin {
    /// Behind the external devices.
    pub const OUTSIDE: Self = Self { ifindex: 0 };

    /// Behind the interface of a pod.
    #[inline(always)]
    pub const fn pod(ifindex: u32) -> Self {
        Self { ifindex }
    }
}

/// Key of all four maps: an origin, and a tuple as packets carry it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct FlowKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port.
    pub source_port: Be16,
    /// Destination port.
    pub destination_port: Be16,
    /// Where the client is.
    pub origin: Origin,
    /// IP protocol number.
    pub proto: u8,
    /// A [`FlowKind`].
    pub kind: u8,
    /// Zero, by one store. (Bytes would be zeroed by a call, in a BPF program.)
    pub pad: u16,
    /// Zero.
    pub pad_end: u32,
}

impl FlowKey {
    /// 32 bits that depend on every byte of the key.
    #[inline(always)]
    pub fn check(&self) -> u32 {
        let words: &[u64; 6] = bytemuck::cast_ref(self);
        let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
        for word in words {
            hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        }
        (hash ^ (hash >> 32)) as u32
    }
}

/// Value of `FLOWS` and `NEW_FLOWS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// What the client talks to.
    pub vip: Addr,
    /// What the backend sees as the client, where that is not the client itself; zero otherwise.
    pub snat: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `snat`; not zero when both count.
    pub snat_port: Be16,
    /// The client's own port. The key has another one where two flows would have met.
    pub client_port: Be16,
    /// TCP. Until the backend has answered: how many bytes of data the client's SYN carried. Once the flow is assured: when
    /// a SYN met it that the backend has not answered ([`syn_time`]), 0 for none.
    pub syn: u16,
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
    /// Once the backend has answered: index of the device by which its answers enter, 0 for a process of this host.
    pub answered_by: u32,
    /// Of a client outside: index of the device by which its last packet has entered, over TCP the last one that fits. Its answers leave
    /// by it. Otherwise 0.
    pub asked_by: u32,
    /// [`FlowKey::check`] of the key: elements are reused under readers.
    pub check: u32,
    /// Bits of [`state`].
    pub state: u32,
    /// TCP, host order. Until the backend has answered: what its answer has to acknowledge at least, which is the number
    /// behind the client's SYN. Then, until the flow is assured: what the client's next acknowledgement number has to be.
    /// After that: what the backend has acknowledged, which a reset of the client has to follow.
    pub expected: u32,
    /// Zero.
    pub pad: u32,
    /// When the flow was last prolonged ([`crate::datapath::edge::timeouts`]): nanoseconds of the monotonic clock.
    pub last_seen: u64,
}

/// A time as [`Flow::syn`] has it: units of 67 ms, which repeat after 73 minutes. Never 0.
#[inline(always)]
pub const fn syn_time(nanos: u64) -> u16 {
    (nanos >> 26) as u16 | 1
}

/// Value of `FLOW_INDEX` and `NEW_FLOW_INDEX`: what, with the index key, makes the record's key.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowRef {
    /// [`FlowKind::Vip`]: the backend. [`FlowKind::Snat`]: the client.
    pub addr: Addr,
    /// Its port.
    pub port: Be16,
    /// The record's source port ([`FlowKind::Vip`]); for [`FlowKind::Snat`] the same as `port`.
    pub client_port: Be16,
    /// [`FlowKey::check`] of the index key.
    pub check: u32,
}

/// Bits of [`Flow::state`].
pub mod state {
    /// The backend has answered; over TCP, with SYN and ACK.
    pub const REPLIED: u32 = 1 << 0;
    /// The client has gone on after an answer: the flow is real, and in the maps that never evict.
    pub const ASSURED: u32 = 1 << 1;
    /// The client has sent FIN.
    pub const FIN_REQUEST: u32 = 1 << 2;
    /// The backend has sent FIN.
    pub const FIN_REPLY: u32 = 1 << 3;
    /// Either side has sent RST.
    pub const RESET: u32 = 1 << 4;
    /// The backend has sent what answers no SYN of this client: somebody else's connection has these ends. The client's next
    /// SYN gets others.
    pub const TAKEN: u32 = 1 << 5;
    /// The client has gone on after an answer, but there was no room in `FLOWS`: it moves when there is.
    pub const PROVEN: u32 = 1 << 6;
    /// The client's FIN came first, so that the backend does not wait in TIME_WAIT (RFC 9293 §3.6.1).
    pub const CLIENT_FIRST: u32 = 1 << 7;
    /// The client has sent data, or a FIN, that the backend has not answered.
    pub const ASKED: u32 = 1 << 8;
    /// A SYN has begun another flow of the same client and VIP in the maps that evict. It takes the place of this one when its
    /// client proves it.
    pub const SUCCEEDED: u32 = 1 << 9;
    /// The client talks to the backend itself, beside a flow to a Service by the same port. The VIP is the backend; there is no Service.
    pub const DIRECT: u32 = 1 << 10;
}

/// Ports that translated sources get: outside of Linux' ephemeral range (32768 on) and of the nodePorts
/// (30000-32767).
pub const SNAT_PORTS: core::ops::Range<u16> = 10_000..30_000;

/// Key of `FRAGMENTS`: one fragmented packet (RFC 791, RFC 8200).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Where it came from, or goes to: whoever writes another one's packet numbers gives his own fragments ports.
    pub origin: Origin,
    /// Identification, as on the wire (IPv4: in the first two bytes).
    pub id: [u8; 4],
    /// IP protocol number.
    pub proto: u8,
    /// 0 on ingress, 1 on egress.
    pub egress: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// Value of `FRAGMENTS`: the ports that only the first fragment carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FragmentPorts {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
}

const _: () = assert!(size_of::<FlowKey>() == 48);
const _: () = assert!(size_of::<Flow>() == 80);
const _: () = assert!(size_of::<FlowRef>() == 24);
const _: () = assert!(size_of::<FragmentKey>() == 44);
const _: () = assert!(size_of::<FragmentPorts>() == 4);
