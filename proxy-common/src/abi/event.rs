//! `EVENTS`, a ring buffer: what the datapath decides, told to whoever watches. `TRACE`, an mmapable array with one
//! element: whether somebody does.
//!
//! `proxy-agent monitor` writes `TRACE` and reads `EVENTS`; the datapath does the opposite. A full ring buffer loses
//! events and nothing else.

use bytemuck::{Pod, Zeroable};

use crate::addr::Addr;
use crate::be::Be16;

/// What somebody wants to be told of. The only element of `TRACE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Trace {
    /// Nanoseconds of the monotonic clock until which events are wanted: whoever watches prolongs it, and dies without
    /// leaving it on. 0 for nobody.
    pub until: u64,
    /// Service id; 0 for every one, and what belongs to none.
    pub service: u32,
    /// One in so many packets of flows that go on; 0 for none of them.
    pub sample: u32,
}

/// One decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// Source of the packet; zero at sockets.
    pub source: Addr,
    /// Destination of the packet, or what the application asked for.
    pub destination: Addr,
    /// Source of the packet afterwards; zero at sockets.
    pub new_source: Addr,
    /// Destination of the packet afterwards, or what the socket is connected to: zero if to nothing of ours.
    pub new_destination: Addr,
    /// Port of `source`.
    pub source_port: Be16,
    /// Port of `destination`.
    pub destination_port: Be16,
    /// Port of `new_source`.
    pub new_source_port: Be16,
    /// Port of `new_destination`.
    pub new_destination_port: Be16,
    /// Service id; 0 if it belongs to none, or that is not known.
    pub service: u32,
    /// Index of the device; 0 at sockets.
    pub ifindex: u32,
    /// IP protocol number.
    pub proto: u8,
    /// A [`crate::abi::Counter`], or [`PACKET`].
    pub what: u8,
    /// One of [`place`].
    pub place: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// [`Event::what`]: a packet of a flow that goes on is translated.
pub const PACKET: u8 = 255;

/// Values of [`Event::place`].
pub mod place {
    /// A socket.
    pub const SOCKET: u8 = 0;
    /// Into the host.
    pub const INGRESS: u8 = 1;
    /// Out of the host.
    pub const EGRESS: u8 = 2;
}

const _: () = assert!(size_of::<Trace>() == 16);
const _: () = assert!(size_of::<Event>() == 96);
