//! Lookup of the owner of an address and port: one hash lookup for a clusterIP, externalIP or load-balancer
//! address.

use super::tables::Tables;
use crate::abi::{FilterBit, FrontendKey, FrontendValue, local_address};
use crate::addr::Addr;
use crate::be::Be16;

/// Meaning of an address and port on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A frontend of a Service.
    Frontend(FrontendValue),
    /// Active clusterIP, but no Service port has this port and protocol.
    UnusedPort,
    /// Address inside a ServiceCIDR that neither a Service nor this host has. (NodeLocal DNSCache gives the
    /// host the address of a Service that is left to it.)
    InactiveAddress,
    /// Not ours.
    Other,
    /// The element was reused during the lookup, twice in a row.
    Retry,
}

/// Looks up the exact frontend, then the nodePort if this node serves nodePorts at the address, then the
/// active clusterIPs and the ServiceCIDRs.
#[inline(always)]
pub fn find(tables: &impl Tables, addr: &Addr, port: Be16, proto: u8) -> Target {
    if !may_be_ours(tables, addr) {
        return Target::Other;
    }
    let exact = FrontendKey::exact(*addr, port, proto);
    let found = frontend(tables, &exact);
    if !matches!(found, Target::Other) {
        return found;
    }
    if tables.local_address(addr) & local_address::NODEPORT != 0 {
        return frontend(tables, &FrontendKey::node_port(addr.unspecified(), port, proto));
    }
    // An active clusterIP is recognized also without a known ServiceCIDR.
    let unused = if tables.frontend(&FrontendKey::address(*addr)).is_some() {
        Target::UnusedPort
    } else if tables.in_service_cidr(addr) && tables.local_address(addr) & local_address::HOST == 0 {
        Target::InactiveAddress
    } else {
        return Target::Other;
    };
    // A lookup may miss a key whose element is replaced and reused while the lookup walks the bucket. So one
    // miss alone refuses nobody. (Where a miss means "not ours", there is no second lookup: a wrong miss
    // costs one connection its translation, whereas a second lookup would cost every other connection time.)
    let found = frontend(tables, &exact);
    if matches!(found, Target::Other) { unused } else { found }
}

/// Returns whether `FILTER` leaves open that the address is a VIP, serves nodePorts, or lies in a
/// ServiceCIDR.
#[inline(always)]
pub fn may_be_ours(tables: &impl Tables, addr: &Addr) -> bool {
    let set = |bit: FilterBit| tables.filter(bit.word) & bit.mask != 0;
    set(FilterBit::of_block(addr)) || set(FilterBit::of_address(addr))
}

/// Returns whether `FILTER` leaves open that the address is a backend's.
#[inline(always)]
pub fn may_be_backend(tables: &impl Tables, addr: &Addr) -> bool {
    let bit = FilterBit::of_backend(addr);
    tables.filter(bit.word) & bit.mask != 0
}

#[inline(always)]
fn frontend(tables: &impl Tables, key: &FrontendKey) -> Target {
    // The kernel may reuse the element between its lookup and our load. The check bits show this, and a
    // second try decides.
    for _ in 0..2 {
        match tables.frontend(key) {
            Some(value) if value.is_for(key) => return Target::Frontend(value),
            Some(_) => {}
            None => return Target::Other,
        }
    }
    Target::Retry
}
