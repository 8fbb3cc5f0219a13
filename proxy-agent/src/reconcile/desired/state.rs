//! The state to program, as values.

use std::sync::Arc;

use proxy_common::abi::{FrontendKey, SlotRange};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use crate::reconcile::cluster::ObjectKey;

/// A Service port in one family: the unit that gets an id in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The Service.
    pub service: ObjectKey,
    /// Port name; empty when unnamed.
    pub port_name: Arc<str>,
    /// IP protocol number.
    pub proto: u8,
    /// Family.
    pub family: Family,
}

/// A backend of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// Address that the endpoint listens on.
    pub addr: Addr,
    /// Port that the endpoint listens on.
    pub port: Be16,
    /// Bits of [`proxy_common::abi::backend::flags`].
    pub flags: u32,
}

/// State to program for one Service port in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPort {
    /// The Service port and family.
    pub key: PortKey,
    /// Frontends with their flags ([`proxy_common::abi::frontend::flags`]), by key, each once. The last port of the
    /// family also carries the frontend of the clusterIP as such, which makes the address active: the clusterIP then
    /// refuses unused ports, so all its used ports must be there first.
    pub frontends: Vec<(FrontendKey, u16)>,
    /// Endpoints that are in a set or serving, by address and port, each once.
    pub backends: Vec<DesiredBackend>,
    /// Verdict while the local set is empty: [`SlotRange::REJECT`] or [`SlotRange::DROP`]. (An empty cluster set
    /// always rejects.)
    pub empty_local: SlotRange,
    /// Session affinity timeout; 0 for none.
    pub affinity_seconds: u32,
    /// Sources that frontends with [`proxy_common::abi::frontend::flags::SOURCE_RANGES`] admit; in order, each once.
    /// Empty when there is no such frontend.
    pub source_ranges: Vec<Prefix>,
}

/// State to program for one Service. Has no ports when there is nothing to proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredService {
    /// Ports, sorted by [`PortKey`].
    pub ports: Vec<DesiredPort>,
    /// Messages for the user: fields of the Service and its slices that were skipped, frontends that cannot be served
    /// everywhere.
    pub problems: Vec<String>,
}
