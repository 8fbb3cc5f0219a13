//! Trace events for users who watch. Without a watcher, tracing costs one read of `TRACE`.

use super::tables::{Socket, Tables};
use crate::abi::event::{PACKET, place};
use crate::abi::{Counter, Event, IfIndex, Nanos, ServiceId};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::edge::parsed::{Parsed, Tuple};

/// Returns whether anybody watches.
#[inline(always)]
pub fn watched(tables: &impl Tables) -> bool {
    tables.trace().until != Nanos(0)
}

/// Counts a packet that is not translated, and reports it as a trace event.
#[inline(always)]
pub fn refused(tables: &impl Tables, why: Counter, parsed: &Parsed, service: ServiceId, at: At) {
    tables.count(why);
    if watched(tables) {
        packet(tables, parsed, &parsed.tuple, service, at.about(why as u8));
    }
}

/// Reports a packet that is translated as a trace event. `begins`: the packet is the first of a flow.
#[inline(always)]
pub fn translated(
    tables: &impl Tables,
    parsed: &Parsed,
    new: &Tuple,
    service: ServiceId,
    at: At,
    begins: bool,
) {
    if watched(tables) {
        let what = if begins { Counter::Flow as u8 } else { PACKET };
        packet(tables, parsed, new, service, at.about(what));
    }
}

/// Position of a packet: device and direction.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Index of the device.
    pub ifindex: IfIndex,
    /// Whether the packet leaves.
    pub egress: bool,
}

impl At {
    /// Packs interface index, place and `what` into one word, because a BPF function takes five arguments.
    #[inline(always)]
    const fn about(self, what: u8) -> u64 {
        let place = if self.egress { place::EGRESS } else { place::INGRESS };
        (self.ifindex.0 as u64) << 32 | (place as u64) << 8 | what as u64
    }
}

#[inline(never)]
fn packet(tables: &impl Tables, parsed: &Parsed, new: &Tuple, service: ServiceId, about: u64) {
    let what = about as u8;
    if !wanted(tables, service, what == PACKET) {
        return;
    }
    let old = &parsed.tuple;
    tables.tell(|| Event {
        time: tables.now(),
        source: old.source,
        destination: old.destination,
        new_source: new.source,
        new_destination: new.destination,
        source_port: old.source_port,
        destination_port: old.destination_port,
        new_source_port: new.source_port,
        new_destination_port: new.destination_port,
        service,
        ifindex: IfIndex((about >> 32) as u32),
        proto: parsed.proto,
        what,
        place: (about >> 8) as u8,
        pad: [0; 5],
    });
}

/// Counts the result of a call on a socket, and reports it as a trace event. `to` is the address that the
/// call is translated to. `begins`: the call is not the next datagram of a flow.
#[inline(always)]
pub fn called(
    tables: &impl Tables,
    what: Counter,
    socket: &impl Socket,
    service: ServiceId,
    to: Option<(Addr, Be16)>,
    begins: bool,
) {
    tables.count(what);
    if watched(tables) {
        let about = u64::from(service.0) << 32 | u64::from(begins) << 8 | what as u64;
        match to {
            Some(to) => call(tables, socket, &to, about),
            None => call_to_nobody(tables, socket, about),
        }
    }
}

#[inline(never)]
fn call(tables: &impl Tables, socket: &impl Socket, to: &(Addr, Be16), about: u64) {
    tell_call(tables, socket, to, about);
}

/// As [`call`] with an address of zeros, which the caller does not have to store first.
#[inline(never)]
fn call_to_nobody(tables: &impl Tables, socket: &impl Socket, about: u64) {
    tell_call(tables, socket, &(Addr::ZERO, Be16::default()), about);
}

#[inline(always)]
fn tell_call(tables: &impl Tables, socket: &impl Socket, to: &(Addr, Be16), about: u64) {
    let (service, what) = (ServiceId((about >> 32) as u32), about as u8);
    if !wanted(tables, service, about >> 8 & 1 == 0) {
        return;
    }
    tables.tell(|| Event {
        time: tables.now(),
        destination: socket.addr(),
        destination_port: socket.port(),
        new_destination: to.0,
        new_destination_port: to.1,
        service,
        // MPTCP (262) becomes TCP (6).
        proto: socket.protocol() as u8,
        what,
        place: place::SOCKET,
        ..Event::default()
    });
}

#[inline(always)]
fn wanted(tables: &impl Tables, service: ServiceId, goes_on: bool) -> bool {
    let trace = tables.trace();
    if trace.until <= tables.now() || trace.service != ServiceId::NONE && trace.service != service {
        return false;
    }
    !goes_on || trace.sample != 0 && tables.random().is_multiple_of(trace.sample)
}
