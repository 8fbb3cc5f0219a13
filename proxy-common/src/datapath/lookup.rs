//! Whose address is it? One hash lookup for a clusterIP, externalIP or load-balancer address.

use super::tables::Tables;
use crate::abi::{FilterBit, FrontendKey, FrontendValue, local_address};
use crate::addr::Addr;
use crate::be::Be16;

/// What an address and port mean on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A frontend of a Service.
    Frontend(FrontendValue),
    /// An active clusterIP, but no Service port has this port and protocol.
    UnusedPort,
    /// Inside a ServiceCIDR, but no Service has the address, nor has this host: NodeLocal DNSCache takes one of a Service that is
    /// left to it.
    InactiveAddress,
    /// Not ours.
    Other,
    /// The element was reused under the reader twice in a row.
    Retry,
}

/// Exact frontend, then nodePort on this node's addresses, then what remains of clusterIPs and ServiceCIDRs.
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
    // Without a known ServiceCIDR an active clusterIP is still one.
    let unused = if tables.frontend(&FrontendKey::address(*addr)).is_some() {
        Target::UnusedPort
    } else if tables.in_service_cidr(addr) && tables.local_address(addr) & local_address::HOST == 0 {
        Target::InactiveAddress
    } else {
        return Target::Other;
    };
    // A lookup may miss a key whose element is replaced and reused while it walks the bucket, so nobody is refused by
    // one miss. (Where a miss means "not ours" it costs one connection its translation, and every other one nothing.)
    let found = frontend(tables, &exact);
    if matches!(found, Target::Other) { unused } else { found }
}

/// Whether `FILTER` leaves open that the address is a VIP, serves nodePorts, or lies in a ServiceCIDR.
#[inline(always)]
pub fn may_be_ours(tables: &impl Tables, addr: &Addr) -> bool {
    let set = |bit: FilterBit| tables.filter(bit.word) & bit.mask != 0;
    set(FilterBit::of_block(addr)) || set(FilterBit::of_address(addr))
}

/// Whether `FILTER` leaves open that the address is a backend's.
#[inline(always)]
pub fn may_be_backend(tables: &impl Tables, addr: &Addr) -> bool {
    let bit = FilterBit::of_backend(addr);
    tables.filter(bit.word) & bit.mask != 0
}

#[inline(always)]
fn frontend(tables: &impl Tables, key: &FrontendKey) -> Target {
    // The kernel may reuse the element between its lookup and our load: the check bits tell, a second try decides.
    for _ in 0..2 {
        match tables.frontend(key) {
            Some(value) if value.is_for(key) => return Target::Frontend(value),
            Some(_) => {}
            None => return Target::Other,
        }
    }
    Target::Retry
}
