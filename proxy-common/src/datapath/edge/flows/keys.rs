//! Keys of records, and of the index entries that lead to records.

use crate::abi::{Flow, FlowKey, FlowKind, FlowRef, Origin};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::edge::parsed::Tuple;

/// Returns the key of a tuple.
#[inline(always)]
pub fn key(kind: FlowKind, origin: Origin, proto: u8, tuple: &Tuple) -> FlowKey {
    FlowKey {
        source: tuple.source,
        destination: tuple.destination,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        origin,
        proto,
        kind: kind as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// Returns the tuple of packets in the other direction.
#[inline(always)]
pub fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        source: tuple.destination,
        destination: tuple.source,
        source_port: tuple.destination_port,
        destination_port: tuple.source_port,
    }
}

/// Returns the key of the record that an index entry from the VIP leads to.
#[inline(always)]
pub fn vip_target(index: &FlowKey, target: &FlowRef) -> FlowKey {
    FlowKey {
        source: index.source,
        destination: target.addr,
        source_port: target.client_port,
        destination_port: target.port,
        origin: index.origin,
        proto: index.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// Returns the key of the record that an index entry from our SNAT source leads to.
#[inline(always)]
pub fn snat_target(index: &FlowKey, target: &FlowRef) -> FlowKey {
    FlowKey {
        source: target.addr,
        destination: index.source,
        source_port: target.client_port,
        destination_port: index.source_port,
        origin: index.origin,
        proto: index.proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    }
}

/// Returns key and value of the index entry that leads from client and VIP to a record.
#[inline(always)]
pub fn vip_index(key: &FlowKey, flow: &Flow) -> (FlowKey, FlowRef) {
    let index = FlowKey {
        source: key.source,
        destination: flow.vip,
        source_port: flow.client_port,
        destination_port: flow.vip_port,
        origin: key.origin,
        proto: key.proto,
        kind: FlowKind::Vip as u8,
        pad: 0,
        pad_end: 0,
    };
    let check = index.check();
    (
        index,
        FlowRef { addr: key.destination, port: key.destination_port, client_port: key.source_port, check },
    )
}

/// Returns key and value of the index entry that leads from backend and SNAT source to a record.
#[inline(always)]
pub fn snat_index(key: &FlowKey, snat: &Addr, snat_port: Be16) -> (FlowKey, FlowRef) {
    let index = FlowKey {
        source: key.destination,
        destination: *snat,
        source_port: key.destination_port,
        destination_port: snat_port,
        origin: key.origin,
        proto: key.proto,
        kind: FlowKind::Snat as u8,
        pad: 0,
        pad_end: 0,
    };
    let check = index.check();
    (index, FlowRef { addr: key.source, port: key.source_port, client_port: key.source_port, check })
}
