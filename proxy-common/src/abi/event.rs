//! `EVENTS`, a ring buffer: decisions of the datapath, for a process that watches. `TRACE`, an mmapable array with one
//! element: whether a process watches.
//!
//! `proxy-agent monitor` writes `TRACE` and reads `EVENTS`; the datapath reads `TRACE` and writes `EVENTS`. A full ring
//! buffer loses events and nothing else.

use bytemuck::{Pod, Zeroable};

use super::ids::{IfIndex, Nanos, ServiceId};
use crate::addr::Addr;
use crate::be::Be16;

/// Events that the watching process wants. The only element of `TRACE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Trace {
    /// Time until which events are wanted; 0 if no process watches. The watching process prolongs it again and again, so
    /// that tracing ends when the process dies.
    pub until: Nanos,
    /// Service id; 0 for events of every Service and of none.
    pub service: ServiceId,
    /// Sampling of packets of flows that go on: one event for this many packets on average; 0 for none.
    pub sample: u32,
}

/// One decision of the datapath.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// Time of the decision.
    pub time: Nanos,
    /// Source of the packet; zero at sockets.
    pub source: Addr,
    /// Destination of the packet, or address that the application asked for.
    pub destination: Addr,
    /// Source of the packet after translation; zero at sockets.
    pub new_source: Addr,
    /// Destination of the packet after translation, or address that the socket was led to: zero if it was led to none.
    pub new_destination: Addr,
    /// Port of `source`.
    pub source_port: Be16,
    /// Port of `destination`.
    pub destination_port: Be16,
    /// Port of `new_source`.
    pub new_source_port: Be16,
    /// Port of `new_destination`.
    pub new_destination_port: Be16,
    /// Service id; 0 if the event belongs to no Service, or if the Service is not known.
    pub service: ServiceId,
    /// Index of the device; 0 at sockets.
    pub ifindex: IfIndex,
    /// IP protocol number.
    pub proto: u8,
    /// A [`crate::abi::Counter`], or [`PACKET`].
    pub what: u8,
    /// One of [`place`].
    pub place: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// [`Event::what`] of a packet that is translated in a flow that goes on.
pub const PACKET: u8 = 255;

/// Values of [`Event::place`].
pub mod place {
    /// The decision was made at a socket.
    pub const SOCKET: u8 = 0;
    /// The packet enters the host.
    pub const INGRESS: u8 = 1;
    /// The packet leaves the host.
    pub const EGRESS: u8 = 2;
}

const _: () = assert!(size_of::<Trace>() == 16);
const _: () = assert!(size_of::<Event>() == 96);
