//! The last stage: single map operations, and the trait of the stores that carry them out.
//!
//! [`crate::reconcile::plan`] writes the operations in an order of which any prefix is safe. [`crate::bpf`] carries
//! them out on kernel maps, [`crate::reconcile::sim`] on ordered maps. `FILTER` follows from the other maps, so
//! stores maintain it themselves, and no plan mentions it.

use proxy_common::abi::maps;
use proxy_common::abi::{
    Backend, BackendId, BackendState, CgroupId, FILTER_WORDS, FilterBit, FrontendKey, FrontendKind,
    FrontendValue, NetnsCookie, Service, ServiceId, ServiceName, proto,
};
use proxy_common::addr::{Addr, Prefix};
use proxy_common::be::Be16;

/// One write to one map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// `NAMES`: assigns a name to a service id (`Some`), or removes the name. The owner of an id starts with
    /// `SERVICE_COUNTERS` at zero.
    Name(ServiceId, Option<Box<ServiceName>>),
    /// `BACKENDS`: a whole element, at an id that nothing refers to.
    Backend(BackendId, Backend),
    /// `BACKENDS`: the state word of an element in use.
    BackendState(BackendId, BackendState),
    /// `SLOTS`: backend ids, beginning at a base, in a range that nothing refers to.
    Slots(u32, Vec<BackendId>),
    /// `SERVICES`: the words of one element; each word is flipped by one store.
    Service(ServiceId, Service),
    /// `SOURCE_RANGES`: adds or removes a prefix from which a Service may be reached.
    SourceRange(ServiceId, Prefix, bool),
    /// `FRONTENDS`: adds or replaces (`Some`), or removes.
    Frontend(FrontendKey, Option<FrontendValue>),
    /// `LOCAL_ADDRESSES`: adds or replaces (`Some`), or removes.
    LocalAddress(Addr, Option<u32>),
    /// `SERVICE_CIDRS`: adds or removes.
    ServiceCidr(Prefix, bool),
    /// `POD_SOURCES`: adds or removes.
    PodSource(Prefix, bool),
    /// `OPT_OUT`: adds a cgroup with the part of it that the socket edge leaves alone (`Some`), or removes it.
    OptOut(CgroupId, Option<u32>),
    /// `SANDBOXES`: adds a network namespace with the cgroup of its pod (`Some`), or removes it.
    Sandbox(NetnsCookie, Option<CgroupId>),
    /// `NODE`: the flags.
    NodeFlags(u64),
}

impl Op {
    /// Returns the name of the map that the operation writes to.
    pub(crate) const fn map(&self) -> &'static str {
        match self {
            Self::Name(..) => maps::NAMES,
            Self::Backend(..) | Self::BackendState(..) => maps::BACKENDS,
            Self::Slots(..) => maps::SLOTS,
            Self::Service(..) => maps::SERVICES,
            Self::SourceRange(..) => maps::SOURCE_RANGES,
            Self::Frontend(..) => maps::FRONTENDS,
            Self::LocalAddress(..) => maps::LOCAL_ADDRESSES,
            Self::ServiceCidr(..) => maps::SERVICE_CIDRS,
            Self::PodSource(..) => maps::POD_SOURCES,
            Self::OptOut(..) => maps::OPT_OUT,
            Self::Sandbox(..) => maps::SANDBOXES,
            Self::NodeFlags(..) => maps::NODE,
        }
    }
}

/// Reason why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The kernel refused a map operation.
    #[error("map {map}: {source}; the agent reads the maps again and retries")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// Error of the kernel.
        source: std::io::Error,
    },
    /// An index lies outside the mapped array: the plan and the map disagree about its size.
    #[error("map {map}: index {index} is outside of its {len} elements")]
    Range {
        /// Name of the map.
        map: &'static str,
        /// The index.
        index: u32,
        /// Elements of the map.
        len: u32,
    },
}

/// A store that carries operations out, one by one, in order.
pub trait MapStore {
    /// Carries out one operation.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the operation then had no effect.
    fn apply(&mut self, op: &Op) -> Result<(), StoreError>;
}

/// Returns the bits of `FILTER` that have to be set before `op` is carried out.
pub(crate) fn filter_bits(op: &Op) -> Vec<FilterBit> {
    match op {
        Op::Frontend(key, Some(_)) => frontend_bits(key).collect(),
        Op::LocalAddress(addr, Some(bits)) => address_bit(addr, *bits).into_iter().collect(),
        Op::Backend(_, backend) => backend_bits(&backend.addr, backend.port).into(),
        Op::ServiceCidr(cidr, true) => FilterBit::of_prefix(*cidr).collect(),
        Op::Frontend(_, None)
        | Op::LocalAddress(_, None)
        | Op::ServiceCidr(_, false)
        | Op::Name(..)
        | Op::BackendState(..)
        | Op::Slots(..)
        | Op::Service(..)
        | Op::SourceRange(..)
        | Op::PodSource(..)
        | Op::OptOut(..)
        | Op::Sandbox(..)
        | Op::NodeFlags(..) => Vec::new(),
    }
}

/// Returns the words that `FILTER` must have, without any stale bit.
pub fn filter_words(contents: &Contents) -> Vec<u64> {
    let frontends = contents.frontends.iter().flat_map(|(key, _)| frontend_bits(key));
    let addresses = contents.local_addresses.iter().filter_map(|(addr, bits)| address_bit(addr, *bits));
    let cidrs = contents.service_cidrs.iter().flat_map(|cidr| FilterBit::of_prefix(*cidr));
    let live = contents.backends.iter().filter(|backend| backend.state.flags != 0);
    let backends = live.flat_map(|backend| backend_bits(&backend.addr, backend.port));
    let mut words = vec![0; FILTER_WORDS as usize];
    for bit in frontends.chain(addresses).chain(cidrs).chain(backends) {
        if let Some(word) = words.get_mut(bit.word as usize) {
            *word |= bit.mask;
        }
    }
    words
}

/// Returns the bits of a backend: its address for replies, and its port for requests that reach it past its Service.
pub(crate) fn backend_bits(addr: &Addr, port: Be16) -> [FilterBit; 2] {
    [FilterBit::of_backend(addr), FilterBit::of_backend_port(port)]
}

/// Returns the bits of a frontend. A nodePort has no address bit, because its lookup goes by the addresses that serve
/// nodePorts. The port bit of a UDP or SCTP frontend tells quickly whether an outgoing datagram may come from a
/// frontend.
fn frontend_bits(key: &FrontendKey) -> impl Iterator<Item = FilterBit> {
    let address = (key.kind != FrontendKind::NodePort as u8).then(|| FilterBit::of_address(&key.addr));
    let port = matches!(key.proto, proto::UDP | proto::SCTP).then(|| FilterBit::of_port(key.proto, key.port));
    address.into_iter().chain(port)
}

/// Returns the bit of an address of this host. Any such address may be the source of packets to other nodes, so
/// replies may be sent to it.
fn address_bit(addr: &Addr, bits: u32) -> Option<FilterBit> {
    (bits != 0 && !addr.is_loopback()).then(|| FilterBit::of_address(addr))
}

/// Sizes of the maps whose numbers the agent allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Elements of `FRONTENDS`.
    pub frontends: u32,
    /// Elements of `SERVICES` (and `NAMES`).
    pub services: u32,
    /// Elements of `SLOTS`.
    pub slots: u32,
    /// Elements of `BACKENDS`.
    pub backends: u32,
    /// Elements of `SOURCE_RANGES`.
    pub source_ranges: u32,
}

impl Capacity {
    /// Returns whether no size is larger than in `other`.
    pub(crate) const fn fits_into(&self, other: Self) -> bool {
        self.frontends <= other.frontends
            && self.services <= other.services
            && self.slots <= other.slots
            && self.backends <= other.backends
            && self.source_ranges <= other.source_ranges
    }
}

/// Contents of the maps, read back from them.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// `NAMES`.
    pub names: Vec<(ServiceId, ServiceName)>,
    /// `FRONTENDS`.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// `SERVICES`, from index 0.
    pub services: Vec<Service>,
    /// `SLOTS`, from index 0.
    pub slots: Vec<BackendId>,
    /// `BACKENDS`, from index 0.
    pub backends: Vec<Backend>,
    /// `SOURCE_RANGES`: service ids with their prefixes.
    pub source_ranges: Vec<(ServiceId, Prefix)>,
    /// `LOCAL_ADDRESSES`.
    pub(crate) local_addresses: Vec<(Addr, u32)>,
    /// `SERVICE_CIDRS`.
    pub service_cidrs: Vec<Prefix>,
    /// `POD_SOURCES`.
    pub pod_sources: Vec<Prefix>,
    /// `OPT_OUT`.
    pub opt_out: Vec<(CgroupId, u32)>,
    /// `SANDBOXES`.
    pub sandboxes: Vec<(NetnsCookie, CgroupId)>,
    /// `NODE`: the flags.
    pub(crate) node_flags: u64,
}

impl Contents {
    /// Returns the writes of all elements of the maps whose size follows the cluster. Their order is not safe for
    /// maps in use.
    pub(crate) fn elements(&self) -> impl Iterator<Item = Op> {
        let names = self.names.iter().map(|(id, name)| Op::Name(*id, Some(Box::new(*name))));
        let backends =
            (0..).map(BackendId).zip(&self.backends).filter(|(_, backend)| **backend != Backend::default());
        let backends = backends.map(|(id, backend)| Op::Backend(id, *backend));
        let services =
            (0..).map(ServiceId).zip(&self.services).map(|(id, service)| Op::Service(id, *service));
        let ranges = self.source_ranges.iter().map(|(id, range)| Op::SourceRange(*id, *range, true));
        let frontends = self.frontends.iter().map(|(key, value)| Op::Frontend(*key, Some(*value)));
        let slots = [Op::Slots(0, self.slots.clone())];
        names.chain(backends).chain(slots).chain(services).chain(ranges).chain(frontends)
    }
}
