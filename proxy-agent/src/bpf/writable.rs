//! The pinned maps, for the agent, which writes them.

use std::collections::BTreeSet;
use std::io;
use std::ops::Deref;
use std::sync::atomic::Ordering::{Acquire, Release};

use aya::maps::{LpmTrie, MapData, MapError, PerCpuValues, lpm_trie};
use proxy_common::abi::maps;
use proxy_common::abi::{Backend, FilterBit, FlowKind, NetnsCookie, Service, ServiceCounters};

use super::maps::{KernelMaps, prefix_key, source_range_key};
use super::pins::{OpenError, PinDir};
use super::sys::Mapping;
use crate::reconcile::store::{Contents, MapStore, Op, StoreError, backend_bits, filter_bits, filter_words};

/// Reason why the elements of a map could not be copied into a larger one.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The elements cannot be read.
    #[error("reading what there is: {0}")]
    Read(#[from] MapError),
    /// The elements cannot be written.
    #[error(transparent)]
    Write(#[from] StoreError),
}

/// The maps of [`KernelMaps`], opened so that they can be written.
#[derive(Debug)]
pub struct WritableMaps(KernelMaps);

impl Deref for WritableMaps {
    type Target = KernelMaps;

    fn deref(&self) -> &KernelMaps {
        &self.0
    }
}

impl WritableMaps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the pin.
    pub fn open(pins: &PinDir) -> Result<Self, OpenError> {
        KernelMaps::mapped(pins, true).map(Self)
    }

    /// Replaces the cookie of the host's network namespace.
    ///
    /// # Errors
    ///
    /// Never fails: the map has room for the cookie.
    pub(crate) fn set_host_netns(&self, cookie: NetnsCookie) -> Result<(), StoreError> {
        store(maps::NODE, &self.node, 0, 0, cookie.0)
    }

    /// Copies the elements of `old` for each of `maps`, which are empty here, at the same numbers.
    ///
    /// # Errors
    ///
    /// [`GrowError`].
    pub(crate) fn copy_from(&mut self, old: &KernelMaps, maps: &BTreeSet<&str>) -> Result<(), GrowError> {
        let contents = old.contents()?;
        contents.elements().filter(|op| maps.contains(op.map())).try_for_each(|op| self.apply(&op))?;
        if maps.contains(maps::SERVICE_COUNTERS) {
            for (id, _) in &contents.names {
                let counted = old.service_counters.get(&id.0, 0)?;
                self.0.service_counters.set(id.0, counted, 0)?;
            }
        }
        Ok(())
    }

    /// Makes `FILTER` match the other maps: sets missing bits, clears stale bits. Flows go on after their backend has
    /// left its Service, so the bits of their backends are set as well.
    ///
    /// # Errors
    ///
    /// [`StoreError::Range`] if the map is too small, [`StoreError::Map`] if the flows cannot be walked.
    pub fn refresh_filter(&self, contents: &Contents) -> Result<(), StoreError> {
        let mut words = filter_words(contents);
        for (map, table) in
            [(maps::FLOWS, &self.flow_maps.flows), (maps::NEW_FLOWS, &self.flow_maps.new_flows)]
        {
            table
                .for_each(|(key, _)| {
                    if key.kind != FlowKind::Record as u8 {
                        return;
                    }
                    for FilterBit { word, mask } in backend_bits(&key.destination, key.destination_port) {
                        if let Some(word) = words.get_mut(word as usize) {
                            *word |= mask;
                        }
                    }
                })
                .map_err(|source| StoreError::Map { map, source })?;
        }
        (0..).zip(words).try_for_each(|(word, bits)| store(maps::FILTER, &self.filter, word, 0, bits))
    }
}

impl MapStore for WritableMaps {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        for bit in filter_bits(op) {
            let word = self.filter.word(bit.word, 0).map_or(0, |word| word.load(Acquire));
            store(maps::FILTER, &self.filter, bit.word, 0, word | bit.mask)?;
        }
        match op {
            Op::Name(id, Some(name)) => {
                let cpus = aya::util::nr_cpus().map_err(|(_, source)| source);
                let zero =
                    cpus.and_then(|cpus| PerCpuValues::try_from(vec![ServiceCounters::default(); cpus]));
                zero.map_err(MapError::from)
                    .and_then(|zero| self.0.service_counters.set(id.0, zero, 0))
                    .map_err(failed(maps::SERVICE_COUNTERS))?;
                self.0.names.insert(id, **name, 0).map_err(failed(maps::NAMES))
            }
            Op::Name(id, None) => absent_is_fine(self.0.names.remove(id)).map_err(failed(maps::NAMES)),
            Op::Backend(id, backend) => {
                let [a, b, c, state] = bytemuck::cast::<Backend, [u64; 4]>(*backend);
                // The state makes the element valid, so it comes last.
                [(0, a), (1, b), (2, c), (3, state)]
                    .into_iter()
                    .try_for_each(|(word, value)| store(maps::BACKENDS, &self.backends, id.0, word, value))
            }
            Op::BackendState(id, state) => {
                store(maps::BACKENDS, &self.backends, id.0, 3, bytemuck::cast(*state))
            }
            Op::Slots(base, ids) => (*base..)
                .zip(ids)
                .try_for_each(|(slot, id)| store(maps::SLOTS, &self.slots, slot, 0, u64::from(id.0))),
            Op::Service(id, service) => {
                let [cluster, local, affinity] = bytemuck::cast::<Service, [u64; 3]>(*service);
                [(2, affinity), (1, local), (0, cluster)]
                    .into_iter()
                    .try_for_each(|(word, value)| store(maps::SERVICES, &self.services, id.0, word, value))
            }
            Op::Frontend(key, Some(value)) => {
                self.0.frontends.insert(key, value, 0).map_err(failed(maps::FRONTENDS))
            }
            Op::Frontend(key, None) => {
                absent_is_fine(self.0.frontends.remove(key)).map_err(failed(maps::FRONTENDS))
            }
            Op::LocalAddress(addr, Some(bits)) => {
                self.0.local_addresses.insert(addr, bits, 0).map_err(failed(maps::LOCAL_ADDRESSES))
            }
            Op::LocalAddress(addr, None) => {
                absent_is_fine(self.0.local_addresses.remove(addr)).map_err(failed(maps::LOCAL_ADDRESSES))
            }
            Op::SourceRange(service, range, present) => {
                put(&mut self.0.source_ranges, &source_range_key(*service, *range), *present)
                    .map_err(failed(maps::SOURCE_RANGES))
            }
            Op::ServiceCidr(cidr, present) => put(&mut self.0.service_cidrs, &prefix_key(*cidr), *present)
                .map_err(failed(maps::SERVICE_CIDRS)),
            Op::PodSource(pods, present) => {
                put(&mut self.0.pod_sources, &prefix_key(*pods), *present).map_err(failed(maps::POD_SOURCES))
            }
            Op::OptOut(cgroup, Some(what)) => {
                self.0.opt_out.insert(cgroup, what, 0).map_err(failed(maps::OPT_OUT))
            }
            Op::OptOut(cgroup, None) => {
                absent_is_fine(self.0.opt_out.remove(cgroup)).map_err(failed(maps::OPT_OUT))
            }
            Op::Sandbox(netns, Some(cgroup)) => {
                self.0.sandboxes.insert(netns, cgroup, 0).map_err(failed(maps::SANDBOXES))
            }
            Op::Sandbox(netns, None) => {
                absent_is_fine(self.0.sandboxes.remove(netns)).map_err(failed(maps::SANDBOXES))
            }
            Op::NodeFlags(flags) => store(maps::NODE, &self.node, 0, 1, *flags),
        }
    }
}

/// Adds or removes an element of a trie that is used as a set of keys.
fn put<K: aya::Pod>(
    trie: &mut LpmTrie<MapData, K, u32>,
    key: &lpm_trie::Key<K>,
    present: bool,
) -> Result<(), MapError> {
    if present { trie.insert(key, 1, 0) } else { absent_is_fine(trie.remove(key)) }
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

/// Makes removing an absent element a success.
fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
