//! The agent's knowledge of the kernel maps: built by reading the pinned maps back, advanced by each plan.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use proxy_common::abi::frontend::FrontendKind;
use proxy_common::abi::frontend::flags::{EXTERNAL, LOAD_BALANCER};
use proxy_common::abi::local_address::NODEPORT;
use proxy_common::abi::service::NAME_LEN;
use proxy_common::abi::{
    Backend, BackendId, BackendState, CgroupId, FrontendKey, FrontendValue, NetnsCookie, Service, ServiceId,
    ServiceName, SlotRange,
};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::PortKey;
use crate::reconcile::ids::{IdPool, SlotPool};
use crate::reconcile::store::{Capacity, Contents};

/// A backend that has an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortBackend {
    /// Address that the endpoint listens on.
    pub(crate) addr: Addr,
    /// Port that the endpoint listens on.
    pub(crate) port: Be16,
    /// Index into `BACKENDS`.
    pub id: BackendId,
    /// Flags and generation.
    pub(crate) state: BackendState,
}

impl PortBackend {
    /// Returns the element of `BACKENDS`.
    pub(crate) fn element(&self, service: ServiceId) -> Backend {
        Backend { addr: self.addr, port: self.port, pad: [0; 2], service, state: self.state }
    }
}

/// A Service port that has an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Index into `SERVICES`.
    pub id: ServiceId,
    /// The element of `SERVICES`.
    pub(crate) service: Service,
    /// Backends, sorted by address and port.
    pub backends: Vec<PortBackend>,
    /// Ranges that the kernel's element names and that do not hold what they should, after a crash. BPF programs read
    /// them until the element has been rewritten.
    pub(crate) replaced: Vec<SlotRange>,
    /// Frontends that the Service port claims, by key, with the flags that it wants. Empty after a restart until the
    /// source has delivered the Service.
    pub(crate) claims: Vec<(FrontendKey, u16)>,
}

impl Port {
    /// Returns every slot range that BPF programs may read.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = SlotRange> {
        let sets = [self.service.cluster, self.service.local].into_iter().filter(|range| !range.is_empty());
        sets.chain(self.replaced.iter().copied())
    }

    /// Returns the ids of the backends in a set, in slot order.
    pub(crate) fn members(&self, set: u32) -> impl Iterator<Item = BackendId> {
        members(&self.backends, set)
    }
}

/// Returns the ids of the backends that carry the flag of a set, in slot order.
pub(crate) fn members(backends: &[PortBackend], set: u32) -> impl Iterator<Item = BackendId> {
    backends.iter().filter(move |b| b.state.flags & set != 0).map(|b| b.id)
}

/// Reason why a Service has an address, best first: the more parties had a say in it, the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Title {
    /// The API server allocated the address to this Service alone.
    ClusterIp,
    /// A load balancer allocated the address.
    LoadBalancer,
    /// The API server allocated the port.
    NodePort,
    /// The author of the Service wrote the address.
    ExternalIp,
}

impl Title {
    /// Returns the title of a frontend with this key and these flags.
    pub(crate) const fn of(key: &FrontendKey, flags: u16) -> Self {
        if key.kind == FrontendKind::NodePort as u8 {
            Self::NodePort
        } else if flags & EXTERNAL == 0 {
            Self::ClusterIp
        } else if flags & LOAD_BALANCER != 0 {
            Self::LoadBalancer
        } else {
            Self::ExternalIp
        }
    }

    /// Returns the title in the words of the API.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "clusterIP",
            Self::LoadBalancer => "load-balancer address",
            Self::NodePort => "nodePort",
            Self::ExternalIp => "externalIP",
        }
    }
}

/// A Service port's claim to a frontend. The best title wins. Between equal titles the oldest Service wins, and
/// between equal ages the first name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    /// Reason for the claim.
    pub(crate) title: Title,
    /// Creation time of the Service, seconds since 1970.
    pub(crate) created: i64,
    /// Service port that claims the frontend.
    pub(crate) port: Arc<PortKey>,
}

/// Numbers that nothing refers to any more, but that a BPF program may still hold: free after a grace period.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Service ids with their last affinity epoch.
    pub(crate) services: Vec<(ServiceId, u32)>,
    /// Backend ids with their last generation.
    pub(crate) backends: Vec<(BackendId, u32)>,
    /// Slot ranges.
    pub(crate) ranges: Vec<SlotRange>,
    /// Whether elements of `FRONTENDS` or `SOURCE_RANGES` have been removed. Their room needs no grace period, and a
    /// Service that was refused may now fit.
    pub(crate) room: bool,
}

impl Freed {
    /// Returns whether there is no number to give back and no new room.
    pub(crate) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.backends.is_empty() && self.ranges.is_empty() && !self.room
    }

    /// Adds the contents of `other`.
    pub fn append(&mut self, mut other: Self) {
        self.services.append(&mut other.services);
        self.backends.append(&mut other.backends);
        self.ranges.append(&mut other.ranges);
        self.room |= other.room;
    }
}

/// The agent's knowledge of the maps.
#[derive(Clone, Debug)]
pub struct Model {
    /// Service ports, by name.
    pub ports: BTreeMap<Arc<PortKey>, Port>,
    /// Claims to each frontend, the winner first.
    pub(crate) claims: BTreeMap<FrontendKey, Vec<Claim>>,
    /// Claimed frontends at addresses that serve nodePorts, by protocol and port. Each of them may shadow a nodePort.
    pub(crate) beside_node_ports: BTreeSet<(u8, Be16, Addr)>,
    /// Claimed frontends whose holder may differ from `frontends`: there was no room, or addresses of the node
    /// appeared or disappeared. The Services that claim them are planned again.
    pub(crate) unsettled: BTreeSet<FrontendKey>,
    /// `FRONTENDS`.
    pub frontends: BTreeMap<FrontendKey, FrontendValue>,
    /// `SOURCE_RANGES`: service ids with their prefixes.
    pub(crate) source_ranges: BTreeSet<(ServiceId, Prefix)>,
    /// `LOCAL_ADDRESSES`.
    pub(crate) local_addresses: BTreeMap<Addr, u32>,
    /// `SERVICE_CIDRS`.
    pub(crate) service_cidrs: BTreeSet<Prefix>,
    /// `POD_SOURCES`.
    pub(crate) pod_sources: BTreeSet<Prefix>,
    /// `OPT_OUT`: ids of cgroups, with the part of each cgroup that the socket edge leaves alone.
    pub(crate) opt_out: BTreeMap<CgroupId, u32>,
    /// `SANDBOXES`: cookies of network namespaces, with the cgroups of their pods.
    pub(crate) sandboxes: BTreeMap<NetnsCookie, CgroupId>,
    /// `NODE`: the flags.
    pub(crate) node_flags: u64,
    /// Sizes of the maps.
    pub(crate) capacity: Capacity,
    /// Free service ids.
    pub(crate) service_ids: IdPool<ServiceId>,
    /// Free backend ids.
    pub backend_ids: IdPool<BackendId>,
    /// Free slots.
    pub slots: SlotPool,
    /// Service ids (with their epochs) that the maps hold and that no Service port has: cleared by the next full
    /// plan.
    pub(crate) orphans: Vec<(ServiceId, u32)>,
}

impl Model {
    /// Returns the model of empty maps.
    pub fn new(capacity: Capacity) -> Self {
        Self::restore(capacity, &Contents::default())
    }

    /// Builds the model from the contents of the maps. Leaves out whatever is inconsistent, so that the next full
    /// plan writes it anew.
    pub fn restore(capacity: Capacity, contents: &Contents) -> Self {
        let (mut ports, orphans) = restore_ports(contents);
        let slots = restore_slots(capacity, &mut ports);
        let used = ports.values().map(|p| p.id).chain(orphans.iter().map(|(id, _)| *id)).collect();
        let service_ids = IdPool::restore(ServiceId, capacity.services, &used, |id| {
            contents.services.get(id.0 as usize).map_or(0, |s| s.affinity.epoch)
        });
        let used = ports.values().flat_map(|p| p.backends.iter().map(|b| b.id)).collect();
        let backend_ids = IdPool::restore(BackendId, capacity.backends, &used, |id| {
            contents.backends.get(id.0 as usize).map_or(0, |b| b.state.generation)
        });
        Self {
            ports,
            claims: BTreeMap::new(),
            beside_node_ports: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            frontends: contents.frontends.iter().copied().collect(),
            source_ranges: contents.source_ranges.iter().copied().collect(),
            local_addresses: contents.local_addresses.iter().copied().collect(),
            service_cidrs: contents.service_cidrs.iter().copied().collect(),
            pod_sources: contents.pod_sources.iter().copied().collect(),
            opt_out: contents.opt_out.iter().copied().collect(),
            sandboxes: contents.sandboxes.iter().copied().collect(),
            node_flags: contents.node_flags,
            capacity,
            service_ids,
            backend_ids,
            slots,
            orphans,
        }
    }

    /// Returns the names of a Service's ports, in order.
    pub(crate) fn ports_of<'a>(
        &'a self,
        service: &ObjectKey,
    ) -> impl Iterator<Item = &'a Arc<PortKey>> + use<'a> {
        self.of_service(service).map(|(key, _)| key)
    }

    /// Returns the ports of a Service, by name.
    pub(crate) fn of_service<'a>(
        &'a self,
        service: &ObjectKey,
    ) -> impl Iterator<Item = (&'a Arc<PortKey>, &'a Port)> + use<'a> {
        let first =
            PortKey { service: service.clone(), port_name: Arc::from(""), proto: 0, family: Family::V4 };
        let service = service.clone();
        self.ports.range(first..).take_while(move |(key, _)| key.service == service)
    }

    /// Returns the addresses that serve nodePorts.
    pub(crate) fn node_port_addresses(&self) -> BTreeSet<Addr> {
        let serving = self.local_addresses.iter().filter(|(_, bits)| *bits & NODEPORT != 0);
        serving.map(|(addr, _)| *addr).collect()
    }

    /// Replaces the addresses of this host. Returns the Services that claim frontends at addresses where nodePorts
    /// have become or ceased to be served.
    pub(crate) fn take_local_addresses(&mut self, addresses: BTreeMap<Addr, u32>) -> BTreeSet<ObjectKey> {
        let before = self.node_port_addresses();
        self.local_addresses = addresses;
        let after = self.node_port_addresses();
        let mut concerned = BTreeSet::new();
        for addr in before.symmetric_difference(&after) {
            let from = FrontendKey { addr: *addr, port: Be16::new(0), proto: 0, kind: 0 };
            for (key, claims) in self.claims.range(from..).take_while(|(key, _)| key.addr == *addr) {
                if key.kind == FrontendKind::Exact as u8 {
                    concerned.extend(claims.iter().map(|claim| claim.port.service.clone()));
                    self.unsettled.insert(*key);
                    let place = (key.proto, key.port, key.addr);
                    if after.contains(addr) {
                        self.beside_node_ports.insert(place);
                    } else {
                        self.beside_node_ports.remove(&place);
                    }
                }
            }
        }
        concerned
    }

    /// Adds a claim.
    pub(crate) fn claim(&mut self, frontend: FrontendKey, claim: Claim) {
        if self.beside_node_port(&frontend).is_some() {
            self.beside_node_ports.insert((frontend.proto, frontend.port, frontend.addr));
        }
        let claims = self.claims.entry(frontend).or_default();
        if let Err(place) = claims.binary_search(&claim) {
            // A frontend rarely has a second claim.
            claims.reserve_exact(1);
            claims.insert(place, claim);
        }
    }

    /// Removes the claim of a Service port.
    pub(crate) fn disclaim(&mut self, frontend: &FrontendKey, port: &PortKey) {
        let Some(claims) = self.claims.get_mut(frontend) else { return };
        claims.retain(|claim| *claim.port != *port);
        if claims.is_empty() {
            self.claims.remove(frontend);
            self.beside_node_ports.remove(&(frontend.proto, frontend.port, frontend.addr));
        }
    }

    /// Returns the claim that wins a frontend: the best of its claims, or the claim to the nodePort that the frontend
    /// would shadow, if another Service has that nodePort by a better title. At an address that serves nodePorts, an
    /// externalIP therefore ranks below the nodePort, and every other title ranks above it: the lookup by address and
    /// port comes first.
    pub(crate) fn holder(&self, frontend: &FrontendKey) -> Option<&Claim> {
        let first = self.claims.get(frontend)?.first()?;
        let node_port = self.beside_node_port(frontend).and_then(|key| self.claims.get(&key)?.first());
        let better =
            node_port.filter(|other| other.title < first.title && other.port.service != first.port.service);
        Some(better.unwrap_or(first))
    }

    /// Returns the nodePort that a frontend by address and port would shadow, or `None` if its address serves no
    /// nodePorts.
    pub(crate) fn beside_node_port(&self, frontend: &FrontendKey) -> Option<FrontendKey> {
        let bits = self.local_addresses.get(&frontend.addr)?;
        let beside = frontend.kind == FrontendKind::Exact as u8 && bits & NODEPORT != 0;
        beside.then(|| FrontendKey::node_port(frontend.addr.unspecified(), frontend.port, frontend.proto))
    }

    /// Returns the claimed frontends that would shadow a nodePort.
    pub(crate) fn in_the_way_of(&self, node_port: &FrontendKey) -> impl Iterator<Item = FrontendKey> {
        let FrontendKey { addr, port, proto, kind } = *node_port;
        let here = (kind == FrontendKind::NodePort as u8).then_some((proto, port, Addr::ZERO));
        let places = here.into_iter().flat_map(|from| self.beside_node_ports.range(from..));
        places
            .take_while(move |(p, n, _)| (*p, *n) == (proto, port))
            .filter(move |(.., at)| at.family() == addr.family())
            .map(move |(.., at)| FrontendKey::exact(*at, port, proto))
    }

    /// Returns the prefixes that `SOURCE_RANGES` holds for a service id, in order.
    pub(crate) fn source_ranges_of(&self, service: ServiceId) -> impl Iterator<Item = Prefix> {
        // The lowest of all prefixes.
        let from = Prefix::new(Addr::ZERO, 0).map(|prefix| (service, prefix));
        let ranges = from.into_iter().flat_map(|from| self.source_ranges.range(from..));
        ranges.take_while(move |(id, _)| *id == service).map(|(_, prefix)| *prefix)
    }

    /// Returns whether less than an eighth is free in any map whose size follows the cluster.
    pub(crate) fn is_tight(&self) -> bool {
        let left =
            |capacity: u32, used: usize| capacity.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX));
        let Capacity { frontends, services, slots, backends, source_ranges } = self.capacity;
        [
            (frontends, left(frontends, self.frontends.len())),
            (services, self.service_ids.available()),
            (slots, self.slots.available()),
            (backends, self.backend_ids.available()),
            (source_ranges, left(source_ranges, self.source_ranges.len())),
        ]
        .iter()
        .any(|(capacity, left)| *left < capacity / 8)
    }

    /// Gives numbers back. The caller has waited for a grace period.
    pub fn release(&mut self, freed: Freed) {
        for (id, epoch) in freed.services {
            self.service_ids.give_back(id, epoch);
        }
        for (id, generation) in freed.backends {
            self.backend_ids.give_back(id, generation);
        }
        for range in freed.ranges {
            self.slots.give_back(range);
        }
    }
}

/// A range that differs from every real range: it makes the next plan write the set anew.
pub(crate) const UNKNOWN: SlotRange = SlotRange { base: 0, len: 0 };

type Ports = BTreeMap<Arc<PortKey>, Port>;

/// Returns the Service ports that have a name of their own, and ids with epochs of names that nothing else belongs to.
fn restore_ports(contents: &Contents) -> (Ports, Vec<(ServiceId, u32)>) {
    let mut ports: BTreeMap<Arc<PortKey>, Port> = BTreeMap::new();
    let mut orphans = Vec::new();
    let mut by_service: BTreeMap<ServiceId, Vec<PortBackend>> = BTreeMap::new();
    for (id, b) in (0..).map(BackendId).zip(&contents.backends).skip(1) {
        if b.state.flags != 0 {
            let backend = PortBackend { addr: b.addr, port: b.port, id, state: b.state };
            by_service.entry(b.service).or_default().push(backend);
        }
    }
    let mut names = contents.names.clone();
    names.sort_by_key(|(id, _)| *id);
    for (id, name) in &names {
        // The name is written first, so a crash may have left nothing else.
        let service = contents.services.get(id.0 as usize).copied().unwrap_or_default();
        let Some(key) = parse_name(name).filter(|key| !ports.contains_key(key)) else {
            orphans.push((*id, service.affinity.epoch));
            continue;
        };
        let mut backends = by_service.remove(id).unwrap_or_default();
        backends.sort_by_key(|b| (b.addr, b.port, b.id));
        backends.dedup_by_key(|b| (b.addr, b.port));
        let mut port = Port { id: *id, service, backends, replaced: Vec::new(), claims: Vec::new() };
        port.service.cluster = intact(contents, &port, service.cluster, IN_CLUSTER);
        port.service.local = intact(contents, &port, service.local, IN_LOCAL);
        let pairs = [(service.cluster, port.service.cluster), (service.local, port.service.local)];
        let replaced = pairs.into_iter().filter(|(names, keeps)| names != keeps && !names.is_empty());
        port.replaced = replaced.map(|(names, _)| names).collect();
        ports.insert(Arc::new(key), port);
    }
    (ports, orphans)
}

/// Returns the slots that no set has. Sets that overlap another one, or do not fit, become unknown.
fn restore_slots(capacity: Capacity, ports: &mut Ports) -> SlotPool {
    loop {
        let ranges = ports.values().flat_map(Port::ranges);
        match SlotPool::restore(capacity.slots, ranges.collect()) {
            Ok(pool) => return pool,
            Err(bad) => {
                for port in ports.values_mut() {
                    for range in [&mut port.service.cluster, &mut port.service.local] {
                        if *range == bad {
                            *range = UNKNOWN;
                        }
                    }
                    port.replaced.retain(|range| *range != bad);
                }
            }
        }
    }
}

/// Returns `range` if `SLOTS` holds there the backends that carry the flag of `set`, else [`UNKNOWN`].
fn intact(contents: &Contents, port: &Port, range: SlotRange, set: u32) -> SlotRange {
    if range.is_empty() {
        return if port.members(set).next().is_none() { range } else { UNKNOWN };
    }
    let (base, len) = (range.base as usize, range.len as usize);
    match base.checked_add(len).and_then(|end| contents.slots.get(base..end)) {
        Some(slots) if slots.iter().copied().eq(port.members(set)) => range,
        _ => UNKNOWN,
    }
}

/// Returns the value of `NAMES` for a Service port. Names longer than a DNS label are cut (conversion refuses them).
pub fn service_name(key: &PortKey) -> ServiceName {
    let family = match key.family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    ServiceName {
        namespace: pad(&key.service.namespace),
        name: pad(&key.service.name),
        port_name: pad(&key.port_name),
        proto: key.proto,
        family,
        pad: [0; 2],
    }
}

/// Parses what [`service_name`] writes. Returns `None` for any other value.
pub(crate) fn parse_name(name: &ServiceName) -> Option<PortKey> {
    let family = match name.family {
        4 => Family::V4,
        6 => Family::V6,
        _ => return None,
    };
    let service = ObjectKey::new(unpad(&name.namespace)?, unpad(&name.name)?);
    Some(PortKey { service, port_name: unpad(&name.port_name)?.into(), proto: name.proto, family })
}

fn pad(text: &str) -> [u8; NAME_LEN + 1] {
    let mut padded = [0; NAME_LEN + 1];
    for (to, from) in padded.iter_mut().take(NAME_LEN).zip(text.bytes()) {
        *to = from;
    }
    padded
}

fn unpad(padded: &[u8; NAME_LEN + 1]) -> Option<&str> {
    std::ffi::CStr::from_bytes_until_nul(padded).ok()?.to_str().ok()
}
