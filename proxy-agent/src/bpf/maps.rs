//! The pinned maps as the agent and its inspection commands see them.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Acquire, Release};

use aya::maps::{HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie};
use proxy_common::abi::{Backend, Counter, FrontendKey, FrontendValue, Service, ServiceName};
use proxy_common::addr::{Addr, Prefix};

use super::pins::PinDir;
use super::sys::Mapping;
use crate::store::{Capacity, Contents, MapStore, Op, StoreError, filter_bits, filter_words};

/// Why the pinned maps cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such pin, or no permission to open it.
    #[error("{path}: {source}; is the agent running on this pin directory, and are you root?")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// What aya said.
        source: MapError,
    },
    /// The map cannot be mapped into memory.
    #[error("{path}: mmap: {source}")]
    Mmap {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The maps that hold Services and the node's own facts.
pub struct KernelMaps {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    names: HashMap<MapData, u32, ServiceName>,
    local_addresses: HashMap<MapData, Addr, u32>,
    service_cidrs: LpmTrie<MapData, Addr, u32>,
    counters: PerCpuArray<MapData, u64>,
    filter: Mapping,
    services: Mapping,
    slots: Mapping,
    backends: Mapping,
    node: Mapping,
    capacity: Capacity,
}

impl std::fmt::Debug for KernelMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelMaps").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl KernelMaps {
    /// Opens what is pinned. Without `writable`, an [`Op`] on a mapped array would end the process.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the pin.
    pub fn open(pins: &PinDir, writable: bool) -> Result<Self, OpenError> {
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
        let services = mapping("SERVICES", size_of::<Service>())?;
        let slots = mapping("SLOTS", size_of::<u32>())?;
        let backends = mapping("BACKENDS", size_of::<Backend>())?;
        let frontends = data("FRONTENDS")?;
        let capacity = Capacity {
            frontends: frontends.info().map_err(bad("FRONTENDS"))?.max_entries(),
            services: services.len(),
            slots: slots.len(),
            backends: backends.len(),
        };
        Ok(Self {
            frontends: typed(aya::maps::Map::HashMap(frontends)).map_err(bad("FRONTENDS"))?,
            names: typed(aya::maps::Map::HashMap(data("NAMES")?)).map_err(bad("NAMES"))?,
            local_addresses: typed(aya::maps::Map::HashMap(data("LOCAL_ADDRESSES")?))
                .map_err(bad("LOCAL_ADDRESSES"))?,
            service_cidrs: typed(aya::maps::Map::LpmTrie(data("SERVICE_CIDRS")?))
                .map_err(bad("SERVICE_CIDRS"))?,
            counters: typed(aya::maps::Map::PerCpuArray(data("COUNTERS")?)).map_err(bad("COUNTERS"))?,
            filter: mapping("FILTER", size_of::<u64>())?,
            services,
            slots,
            backends,
            node: mapping("NODE", size_of::<proxy_common::abi::Node>())?,
            capacity,
        })
    }

    /// Sizes of the maps.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Cookie of the host's network namespace; 0 while unknown.
    pub fn host_netns(&self) -> u64 {
        self.node.word(0, 0).map_or(0, |word| word.load(Acquire))
    }

    /// A counter, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn counter(&self, counter: Counter) -> Result<u64, MapError> {
        Ok(self.counters.get(&(counter as u32), 0)?.iter().sum())
    }

    /// Elements in use and capacity, by map.
    ///
    /// # Errors
    ///
    /// What the kernel says about a hash map that it cannot walk.
    pub fn usage(&self) -> Result<[(&'static str, u64, u64); 3], MapError> {
        let frontends = self.frontends.keys().count() as u64;
        let services = self.names.keys().count() as u64;
        let used = |id: &u32| self.backend(*id).is_some_and(|backend| backend.state.flags != 0);
        let backends = (0..self.capacity.backends).filter(used).count() as u64;
        Ok([
            ("FRONTENDS", frontends, self.capacity.frontends.into()),
            ("SERVICES", services, self.capacity.services.into()),
            ("BACKENDS", backends, self.capacity.backends.into()),
        ])
    }

    /// What `FRONTENDS` holds for a key.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendValue>, MapError> {
        match self.frontends.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An element of `SERVICES`.
    pub fn service(&self, id: u32) -> Option<Service> {
        load::<3>(&self.services, id).map(bytemuck::cast)
    }

    /// An element of `BACKENDS`.
    pub fn backend(&self, id: u32) -> Option<Backend> {
        load::<4>(&self.backends, id).map(bytemuck::cast)
    }

    /// Reads everything back.
    ///
    /// # Errors
    ///
    /// What the kernel says about a hash map that it cannot walk.
    pub fn contents(&self) -> Result<Contents, MapError> {
        let cidr = |key: lpm_trie::Key<Addr>| {
            let addr = key.data();
            let bits = if addr.family() == proxy_common::addr::Family::V4 { 96 } else { 0 };
            Prefix::new(addr, u8::try_from(key.prefix_len().saturating_sub(bits)).unwrap_or(u8::MAX))
        };
        let cidrs = self.service_cidrs.keys().collect::<Result<Vec<_>, _>>()?;
        Ok(Contents {
            names: self.names.iter().collect::<Result<_, _>>()?,
            frontends: self.frontends.iter().collect::<Result<_, _>>()?,
            services: array(&self.services, |index| self.service(index)),
            slots: array(&self.slots, |index| load::<1>(&self.slots, index).map(|[word]| word as u32)),
            backends: array(&self.backends, |index| self.backend(index)),
            local_addresses: self.local_addresses.iter().collect::<Result<_, _>>()?,
            service_cidrs: cidrs.into_iter().filter_map(cidr).collect(),
        })
    }
}

impl KernelMaps {
    /// Brings `FILTER` to what the other maps hold: sets what is missing, clears what has become stale.
    ///
    /// # Errors
    ///
    /// [`StoreError::Range`] if the map is too small.
    pub fn refresh_filter(&self, contents: &Contents) -> Result<(), StoreError> {
        (0..)
            .zip(filter_words(contents))
            .try_for_each(|(word, bits)| store("FILTER", &self.filter, word, 0, bits))
    }
}

impl MapStore for KernelMaps {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        for bit in filter_bits(op) {
            let word = self.filter.word(bit.word, 0).map_or(0, |word| word.load(Acquire));
            store("FILTER", &self.filter, bit.word, 0, word | bit.mask)?;
        }
        match op {
            Op::Name(id, Some(name)) => self.names.insert(id, **name, 0).map_err(failed("NAMES")),
            Op::Name(id, None) => absent_is_fine(self.names.remove(id)).map_err(failed("NAMES")),
            Op::Backend(id, backend) => {
                let [a, b, c, state] = bytemuck::cast::<Backend, [u64; 4]>(*backend);
                // The state makes the element valid, so it comes last.
                [(0, a), (1, b), (2, c), (3, state)]
                    .into_iter()
                    .try_for_each(|(word, value)| store("BACKENDS", &self.backends, *id, word, value))
            }
            Op::BackendState(id, state) => store("BACKENDS", &self.backends, *id, 3, bytemuck::cast(*state)),
            Op::Slots(base, ids) => (*base..)
                .zip(ids)
                .try_for_each(|(slot, id)| store("SLOTS", &self.slots, slot, 0, u64::from(*id))),
            Op::Service(id, service) => {
                let [cluster, local, affinity] = bytemuck::cast::<Service, [u64; 3]>(*service);
                [(2, affinity), (1, local), (0, cluster)]
                    .into_iter()
                    .try_for_each(|(word, value)| store("SERVICES", &self.services, *id, word, value))
            }
            Op::Frontend(key, Some(value)) => {
                self.frontends.insert(key, value, 0).map_err(failed("FRONTENDS"))
            }
            Op::Frontend(key, None) => {
                absent_is_fine(self.frontends.remove(key)).map_err(failed("FRONTENDS"))
            }
            Op::LocalAddress(addr, Some(bits)) => {
                self.local_addresses.insert(addr, bits, 0).map_err(failed("LOCAL_ADDRESSES"))
            }
            Op::LocalAddress(addr, None) => {
                absent_is_fine(self.local_addresses.remove(addr)).map_err(failed("LOCAL_ADDRESSES"))
            }
            Op::ServiceCidr(cidr, present) => {
                let key = lpm_trie::Key::new(u32::from(cidr.mapped_len()), cidr.addr());
                let done = if *present {
                    self.service_cidrs.insert(&key, 1, 0)
                } else {
                    absent_is_fine(self.service_cidrs.remove(&key))
                };
                done.map_err(failed("SERVICE_CIDRS"))
            }
        }
    }
}

fn typed<T: TryFrom<aya::maps::Map, Error = MapError>>(map: aya::maps::Map) -> Result<T, MapError> {
    T::try_from(map)
}

/// The words of an element, each loaded once.
fn load<const N: usize>(mapping: &Mapping, index: u32) -> Option<[u64; N]> {
    let mut words = [0; N];
    for (word, value) in words.iter_mut().enumerate() {
        *value = mapping.word(index, word)?.load(Acquire);
    }
    Some(words)
}

/// All elements up to the last one that is not zero.
fn array<T>(mapping: &Mapping, get: impl Fn(u32) -> Option<T>) -> Vec<T> {
    let used =
        |index: &u32| (0..).map_while(|word| mapping.word(*index, word)).any(|word| word.load(Acquire) != 0);
    let len = (0..mapping.len()).rev().find(used).map_or(0, |last| last + 1);
    (0..len).map_while(get).collect()
}

fn store(
    map: &'static str,
    mapping: &Mapping,
    index: u32,
    word: usize,
    value: u64,
) -> Result<(), StoreError> {
    let len = mapping.len();
    mapping.word(index, word).ok_or(StoreError::Range { map, index, len })?.store(value, Release);
    Ok(())
}

fn failed(map: &'static str) -> impl FnOnce(MapError) -> StoreError {
    move |error| {
        let source =
            if let MapError::SyscallError(error) = error { error.io_error } else { io::Error::other(error) };
        StoreError::Map { map, source }
    }
}

/// Removing what somebody else has removed already is success.
fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
