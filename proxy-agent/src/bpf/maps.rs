//! The pinned maps, to read.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Acquire;

use aya::maps::{HashMap, IterableMap as _, LpmTrie, Map, MapData, MapError, PerCpuArray, lpm_trie};
use proxy_common::abi::maps;
use proxy_common::abi::{
    Backend, BackendId, CgroupId, Counter, Device, FrontendKey, FrontendValue, IfIndex, NetnsCookie, Service,
    ServiceCounters, ServiceId, ServiceName, SourceRangeKey,
};
use proxy_common::addr::{Addr, Family, Prefix};

use super::flow_maps::{FlowMaps, Table, count};
use super::pins::{OpenError, PinDir};
use super::sys::Mapping;
use crate::reconcile::store::{Capacity, Contents};

/// The maps that hold Services and the node's own facts.
pub struct KernelMaps {
    pub(super) frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    pub(super) names: HashMap<MapData, ServiceId, ServiceName>,
    pub(super) source_ranges: LpmTrie<MapData, SourceRange, u32>,
    pub(super) local_addresses: HashMap<MapData, Addr, u32>,
    pub(super) service_cidrs: LpmTrie<MapData, Addr, u32>,
    pub(super) pod_sources: LpmTrie<MapData, Addr, u32>,
    pub(super) opt_out: HashMap<MapData, CgroupId, u32>,
    pub(super) sandboxes: HashMap<MapData, NetnsCookie, CgroupId>,
    pub(super) counters: PerCpuArray<MapData, u64>,
    pub(super) service_counters: PerCpuArray<MapData, ServiceCounters>,
    pub(super) flow_maps: FlowMaps,
    pub(super) devices: Table<Device, IfIndex>,
    pub(super) filter: Mapping,
    pub(super) services: Mapping,
    pub(super) slots: Mapping,
    pub(super) backends: Mapping,
    pub(super) node: Mapping,
    pub(super) capacity: Capacity,
}

/// Part of a [`SourceRangeKey`] behind the length.
pub(super) type SourceRange = [u8; 20];

impl std::fmt::Debug for KernelMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelMaps").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl KernelMaps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the pin.
    pub fn open(pins: &PinDir) -> Result<Self, OpenError> {
        Self::mapped(pins, false)
    }

    /// Opens the pinned maps. Without `writable`, a store to a mapped array would end the process.
    pub(super) fn mapped(pins: &PinDir, writable: bool) -> Result<Self, OpenError> {
        let data = |name: &str| {
            let path = pins.map(name);
            MapData::from_pin(&path).map_err(|source| OpenError::Pin { path, source })
        };
        let bad = |name: &str| {
            let path = pins.map(name);
            |source| OpenError::Pin { path, source }
        };
        let mapping = |name: &str, value_size: usize| {
            let map = data(name)?;
            let len = map.info().map_err(bad(name))?.max_entries();
            let mapping = Mapping::new(std::os::fd::AsFd::as_fd(&map.fd()), len, value_size, writable);
            mapping.map_err(|source| OpenError::Mmap { path: pins.map(name), source })
        };
        let services = mapping(maps::SERVICES, size_of::<Service>())?;
        let slots = mapping(maps::SLOTS, size_of::<u32>())?;
        let backends = mapping(maps::BACKENDS, size_of::<Backend>())?;
        let (frontends, source_ranges) = (data(maps::FRONTENDS)?, data(maps::SOURCE_RANGES)?);
        let capacity = Capacity {
            frontends: frontends.info().map_err(bad(maps::FRONTENDS))?.max_entries(),
            services: services.len(),
            slots: slots.len(),
            backends: backends.len(),
            source_ranges: source_ranges.info().map_err(bad(maps::SOURCE_RANGES))?.max_entries(),
        };
        let service_counters = Map::PerCpuArray(data(maps::SERVICE_COUNTERS)?);
        Ok(Self {
            frontends: typed(Map::HashMap(frontends)).map_err(bad(maps::FRONTENDS))?,
            names: typed(Map::HashMap(data(maps::NAMES)?)).map_err(bad(maps::NAMES))?,
            source_ranges: typed(Map::LpmTrie(source_ranges)).map_err(bad(maps::SOURCE_RANGES))?,
            local_addresses: typed(Map::HashMap(data(maps::LOCAL_ADDRESSES)?))
                .map_err(bad(maps::LOCAL_ADDRESSES))?,
            service_cidrs: typed(Map::LpmTrie(data(maps::SERVICE_CIDRS)?))
                .map_err(bad(maps::SERVICE_CIDRS))?,
            pod_sources: typed(Map::LpmTrie(data(maps::POD_SOURCES)?)).map_err(bad(maps::POD_SOURCES))?,
            opt_out: typed(Map::HashMap(data(maps::OPT_OUT)?)).map_err(bad(maps::OPT_OUT))?,
            sandboxes: typed(Map::HashMap(data(maps::SANDBOXES)?)).map_err(bad(maps::SANDBOXES))?,
            counters: typed(Map::PerCpuArray(data(maps::COUNTERS)?)).map_err(bad(maps::COUNTERS))?,
            service_counters: typed(service_counters).map_err(bad(maps::SERVICE_COUNTERS))?,
            flow_maps: FlowMaps::open(pins)?,
            devices: Table::open(pins, maps::DEVICES)?,
            filter: mapping(maps::FILTER, size_of::<u64>())?,
            services,
            slots,
            backends,
            node: mapping(maps::NODE, size_of::<proxy_common::abi::Node>())?,
            capacity,
        })
    }

    /// Returns the sizes of the maps.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Returns the cookie of the host's network namespace; 0 while it is unknown.
    pub(crate) fn host_netns(&self) -> NetnsCookie {
        NetnsCookie(self.node.word(0, 0).map_or(0, |word| word.load(Acquire)))
    }

    /// Returns bits of [`proxy_common::abi::node`].
    pub(crate) fn node_flags(&self) -> u64 {
        self.node.word(0, 1).map_or(0, |word| word.load(Acquire))
    }

    /// Returns a counter, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn counter(&self, counter: Counter) -> Result<u64, MapError> {
        Ok(self.counters.get(&(counter as u32), 0)?.iter().sum())
    }

    /// Returns the packet edge's counters of a Service port, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn service_counters(&self, id: ServiceId) -> Result<ServiceCounters, MapError> {
        let by_cpu = self.service_counters.get(&id.0, 0)?;
        Ok(by_cpu.iter().fold(ServiceCounters::default(), |sum, cpu| ServiceCounters {
            connections: sum.connections.wrapping_add(cpu.connections),
            request_packets: sum.request_packets.wrapping_add(cpu.request_packets),
            request_bytes: sum.request_bytes.wrapping_add(cpu.request_bytes),
            reply_packets: sum.reply_packets.wrapping_add(cpu.reply_packets),
            reply_bytes: sum.reply_bytes.wrapping_add(cpu.reply_bytes),
        }))
    }

    /// Returns the packet edge's flow maps.
    pub fn flow_maps(&self) -> &FlowMaps {
        &self.flow_maps
    }

    /// Returns elements in use and capacity of each map that the agent writes. The maps that the programs fill have too
    /// many elements to count here.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error about a hash map that it cannot walk.
    pub fn usage(&self) -> Result<Vec<(&'static str, u64, u64)>, MapError> {
        let frontends =
            count::<FrontendValue, FrontendKey>(self.frontends.map()).map_err(MapError::IoError)?;
        let services = count::<ServiceName, ServiceId>(self.names.map()).map_err(MapError::IoError)?;
        let backends = (0..self.capacity.backends)
            .filter(|id| self.backend(BackendId(*id)).is_some_and(|backend| backend.state.flags != 0))
            .count() as u64;
        let source_ranges = self.source_ranges.keys().count() as u64;
        let devices = self.devices.count().map_err(MapError::IoError)?;
        Ok(vec![
            (maps::FRONTENDS, frontends, self.capacity.frontends.into()),
            (maps::SERVICES, services, self.capacity.services.into()),
            (maps::SLOTS, self.slots_in_use(), self.capacity.slots.into()),
            (maps::BACKENDS, backends, self.capacity.backends.into()),
            (maps::SOURCE_RANGES, source_ranges, self.capacity.source_ranges.into()),
            (
                maps::LOCAL_ADDRESSES,
                self.local_addresses.keys().count() as u64,
                capacity(self.local_addresses.map())?,
            ),
            (
                maps::SERVICE_CIDRS,
                self.service_cidrs.keys().count() as u64,
                capacity(self.service_cidrs.map())?,
            ),
            (maps::POD_SOURCES, self.pod_sources.keys().count() as u64, capacity(self.pod_sources.map())?),
            (maps::DEVICES, devices, self.devices.capacity()?),
        ])
    }

    /// Returns the number of slots that are in some Service's set. The two sets of a Service may share slots.
    fn slots_in_use(&self) -> u64 {
        let sets = (0..self.capacity.services).filter_map(|id| self.service(ServiceId(id)));
        let sets = sets.flat_map(|service| [service.cluster, service.local]).filter(|set| !set.is_empty());
        let distinct: BTreeMap<u32, u32> = sets.map(|set| (set.base, set.len)).collect();
        distinct.values().copied().map(u64::from).sum()
    }

    /// Returns the value in `FRONTENDS` for a key.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendValue>, MapError> {
        match self.frontends.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns `FILTER`, from word 0.
    pub fn filter(&self) -> Vec<u64> {
        array(&self.filter, |word| load::<1>(&self.filter, word).map(|[bits]| bits))
    }

    /// Returns an element of `SERVICES`.
    pub fn service(&self, id: ServiceId) -> Option<Service> {
        load::<3>(&self.services, id.0).map(bytemuck::cast)
    }

    /// Returns an element of `BACKENDS`.
    pub(crate) fn backend(&self, id: BackendId) -> Option<Backend> {
        load::<4>(&self.backends, id.0).map(bytemuck::cast)
    }

    /// Reads the elements of all maps of [`Contents`].
    ///
    /// # Errors
    ///
    /// Returns the kernel's error about a hash map that it cannot walk.
    pub fn contents(&self) -> Result<Contents, MapError> {
        let ranges = self.source_ranges.keys().collect::<Result<Vec<_>, _>>()?;
        Ok(Contents {
            names: self.names.iter().collect::<Result<_, _>>()?,
            frontends: self.frontends.iter().collect::<Result<_, _>>()?,
            services: array(&self.services, |index| self.service(ServiceId(index))),
            slots: array(&self.slots, |index| {
                load::<1>(&self.slots, index).map(|[word]| BackendId(word as u32))
            }),
            backends: array(&self.backends, |index| self.backend(BackendId(index))),
            source_ranges: ranges.iter().filter_map(source_range).collect(),
            local_addresses: self.local_addresses.iter().collect::<Result<_, _>>()?,
            service_cidrs: prefixes(&self.service_cidrs)?,
            pod_sources: prefixes(&self.pod_sources)?,
            opt_out: self.opt_out.iter().collect::<Result<_, _>>()?,
            sandboxes: self.sandboxes.iter().collect::<Result<_, _>>()?,
            node_flags: self.node_flags(),
        })
    }
}

fn prefixes(trie: &LpmTrie<MapData, Addr, u32>) -> Result<Vec<Prefix>, MapError> {
    let keys = trie.keys().collect::<Result<Vec<_>, _>>()?;
    Ok(keys.into_iter().filter_map(|key| prefix(key.data(), key.prefix_len())).collect())
}

fn capacity(map: &MapData) -> Result<u64, MapError> {
    Ok(map.info()?.max_entries().into())
}

pub(super) fn prefix_key(prefix: Prefix) -> lpm_trie::Key<Addr> {
    lpm_trie::Key::new(u32::from(prefix.mapped_len()), prefix.addr())
}

/// Returns a prefix from its length in the 128-bit form; `None` for a length that is never written.
fn prefix(addr: Addr, mapped_len: u32) -> Option<Prefix> {
    let len = match addr.family() {
        Family::V4 => mapped_len.checked_sub(96)?,
        Family::V6 => mapped_len,
    };
    Prefix::new(addr, u8::try_from(len).ok()?)
}

pub(super) fn source_range_key(service: ServiceId, range: Prefix) -> lpm_trie::Key<SourceRange> {
    let len = 32 + u32::from(range.mapped_len());
    let key = SourceRangeKey { len, service, addr: range.addr() };
    let [_, _, _, _, data @ ..]: [u8; size_of::<SourceRangeKey>()] = bytemuck::cast(key);
    lpm_trie::Key::new(len, data)
}

/// Reads [`source_range_key`] back; `None` for a key that it never writes.
fn source_range(key: &lpm_trie::Key<SourceRange>) -> Option<(ServiceId, Prefix)> {
    let mut bytes = [0; size_of::<SourceRangeKey>()];
    let [_, _, _, _, data @ ..] = &mut bytes;
    *data = key.data();
    let SourceRangeKey { service, addr, .. } = bytemuck::cast(bytes);
    Some((service, prefix(addr, key.prefix_len().checked_sub(32)?)?))
}

fn typed<T: TryFrom<Map, Error = MapError>>(map: Map) -> Result<T, MapError> {
    T::try_from(map)
}

/// Returns the words of an element, each loaded once.
fn load<const N: usize>(mapping: &Mapping, index: u32) -> Option<[u64; N]> {
    let mut words = [0; N];
    for (word, value) in words.iter_mut().enumerate() {
        *value = mapping.word(index, word)?.load(Acquire);
    }
    Some(words)
}

/// Returns all elements up to the last one that is not zero.
fn array<T>(mapping: &Mapping, get: impl Fn(u32) -> Option<T>) -> Vec<T> {
    let len = (0..mapping.len())
        .rev()
        .find(|index| (0..).map_while(|word| mapping.word(*index, word)).any(|word| word.load(Acquire) != 0))
        .map_or(0, |last| last + 1);
    (0..len).map_while(get).collect()
}
