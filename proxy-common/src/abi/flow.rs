//! The packet edge's flows: `FLOWS` and `NEW_FLOWS` hold records, `FLOW_INDEX` and `NEW_FLOW_INDEX` lead to them.
//!
//! Each flow has one record. Its key is the tuple that packets carry between the edges: client and backend. Index
//! entries lead to the record from the tuples of the outer sides: client and VIP, backend and our own address. The
//! record is written first, then its index entries; they are removed in the opposite order. An index entry without a
//! record is a miss.
//!
//! Every key begins with the flow's [`Origin`]: a sender that forges another one's source address finds, makes and ends
//! only flows of its own origin.
//!
//! A datagram that leaves from a frontend's address and port, but not for a Service, is this host's own, or is from a
//! pod whose source this host has translated. A record of a kind of its own tells the reply to such a datagram from a
//! request.
//!
//! Written by the edges; the agent only collects what has expired. The `NEW_…` maps are LRU hashes, in which a flood
//! can evict a flow until its client has proved that it hears the replies. The other maps never evict.

use bytemuck::{Pod, Zeroable};

use super::ids::{BackendId, IfIndex, Nanos, ServiceId};
use crate::{addr::Addr, be::Be16};

/// Kind of a [`FlowKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FlowKind {
    /// Key of a record: client to backend.
    Record = 0,
    /// Key of an index entry: client to VIP, as requests arrive.
    Vip = 1,
    /// Key of an index entry: backend to our own address, as replies arrive from another node.
    Snat = 2,
    /// Key of a record in `NEW_FLOWS` that belongs to no Service: a datagram that this host has sent from the address
    /// and port of a frontend. The key is the tuple of the replies. Only `check` and `last_seen` of the value are used.
    OwnDatagram = 3,
}

/// Place of a flow's client: its requests enter there, and only packets that leave there are its replies. A pod can
/// write any source address, but it cannot choose the interface that its packets enter through.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Origin {
    /// Index of the host's side of the pod's interface; 0 for a client behind external devices, any of which its
    /// packets may enter by.
    pub ifindex: IfIndex,
}

impl Origin {
    /// Origin of clients behind the external devices.
    pub const OUTSIDE: Self = Self { ifindex: IfIndex::NONE };

    /// Returns the origin of a pod behind this interface.
    #[inline(always)]
    pub const fn pod(ifindex: IfIndex) -> Self {
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
    /// Origin of the client.
    pub origin: Origin,
    /// IP protocol number.
    pub proto: u8,
    /// A [`FlowKind`].
    pub kind: u8,
    /// Zero, written by one store. (In a BPF program, single bytes would be zeroed by a call.)
    pub pad: u16,
    /// Zero.
    pub pad_end: u32,
}

impl FlowKey {
    /// Returns 32 bits that depend on every byte of the key.
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
    /// Address that the client talks to.
    pub vip: Addr,
    /// Source address that the backend sees, if it is not the client's own; zero otherwise.
    pub snat: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `snat`; not zero when both are used.
    pub snat_port: Be16,
    /// The client's own port. The key has another port if two flows would have had the same key.
    pub client_port: Be16,
    /// TCP. Until the backend has answered: number of data bytes in the client's SYN. Once the flow is assured: time
    /// ([`syn_time`]) of the client's first SYN that the backend has not answered; 0 for none.
    pub syn: u16,
    /// Service id.
    pub service: ServiceId,
    /// Backend id.
    pub backend: BackendId,
    /// Index of the device by which the backend's replies enter; 0 for a process of this host. Valid once the backend
    /// has answered.
    pub answered_by: IfIndex,
    /// Index of the device by which the last packet of a client outside has entered (over TCP: the last packet that
    /// fits). Replies leave by this device. 0 for other clients.
    pub asked_by: IfIndex,
    /// [`FlowKey::check`] of the key. Shows a reader that the element now holds another flow.
    pub check: u32,
    /// Bits of [`state`].
    pub state: u32,
    /// TCP, host order. Until the backend has answered: lowest number that its reply has to acknowledge, which is the
    /// number behind the client's SYN. Then, until the flow is assured: acknowledgement number that the client has to
    /// send next. After that: number that the backend has acknowledged, which a reset of the client has to follow.
    pub expected: u32,
    /// Zero.
    pub pad: u32,
    /// Time at which the flow was last prolonged ([`crate::datapath::edge::timeouts`]).
    pub last_seen: Nanos,
}

/// Returns a time in the form of [`Flow::syn`]: units of 67 ms, which repeat after 73 minutes. Never 0.
#[inline(always)]
pub const fn syn_time(time: Nanos) -> u16 {
    (time.0 >> 26) as u16 | 1
}

/// Value of `FLOW_INDEX` and `NEW_FLOW_INDEX`: makes the record's key, together with the index key.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowRef {
    /// [`FlowKind::Vip`]: the backend. [`FlowKind::Snat`]: the client.
    pub addr: Addr,
    /// Port of `addr`.
    pub port: Be16,
    /// The record's source port ([`FlowKind::Vip`]); for [`FlowKind::Snat`] the same as `port`.
    pub client_port: Be16,
    /// [`FlowKey::check`] of the index key.
    pub check: u32,
}

/// Bits of [`Flow::state`].
pub mod state {
    /// The backend has answered (over TCP: with SYN and ACK).
    pub const REPLIED: u32 = 1 << 0;
    /// The client has gone on after a reply: the flow is real, and is in the maps that never evict.
    pub const ASSURED: u32 = 1 << 1;
    /// The client has sent FIN.
    pub const FIN_REQUEST: u32 = 1 << 2;
    /// The backend has sent FIN.
    pub const FIN_REPLY: u32 = 1 << 3;
    /// Either side has sent RST.
    pub const RESET: u32 = 1 << 4;
    /// The backend has sent a packet that answers no SYN of this client: another connection has the same two ends. The
    /// client's next SYN gets another source.
    pub const TAKEN: u32 = 1 << 5;
    /// The client has gone on after a reply, but `FLOWS` had no room. The flow moves there when there is room.
    pub const PROVEN: u32 = 1 << 6;
    /// The client's FIN came first, so that the backend does not wait in TIME_WAIT (RFC 9293 §3.6.1).
    pub const CLIENT_FIRST: u32 = 1 << 7;
    /// The client has sent data or a FIN that the backend has not answered.
    pub const ASKED: u32 = 1 << 8;
    /// A SYN has begun another flow of the same client and VIP in the maps that evict. That flow replaces this one when
    /// its client proves that it hears the replies.
    pub const SUCCEEDED: u32 = 1 << 9;
    /// The client talks to the backend directly, beside a flow to a Service from the same port. The VIP is the backend;
    /// there is no Service.
    pub const DIRECT: u32 = 1 << 10;
}

/// Ports that translated sources get: outside of Linux' ephemeral range (32768 on) and of the nodePorts (30000-32767).
pub const SNAT_PORTS: core::ops::Range<u16> = 10_000..30_000;

/// Key of `FRAGMENTS`: one fragmented packet (RFC 791, RFC 8200).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Origin that the packet comes from (ingress) or goes to (egress). A sender that forges another one's packet
    /// numbers gives ports only to fragments of its own origin.
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

/// Value of `FRAGMENTS`: the ports, which only the first fragment carries.
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
