//! The packet edge's flow maps for the agent: hashes that can be large, walked some elements at a time.

use std::io;

use aya::maps::{HashMap, IterableMap as _, Map, MapData, MapError};
use proxy_common::abi::maps;
use proxy_common::abi::{Flow, FlowKey, FlowRef};

use super::pins::OpenError;
use super::pins::PinDir;
use super::sys::lookup_batch;

/// Number of elements that one step of a walk asks for. A bucket with more of them makes the next step larger.
const STEP: usize = 1024;
/// `BPF_NOEXIST` of linux/bpf.h.
const NO_EXIST: u64 = 1;

/// The four flow maps.
#[derive(Debug)]
pub struct FlowMaps {
    /// `FLOWS`.
    pub flows: Table<Flow>,
    /// `FLOW_INDEX`.
    pub index: Table<FlowRef>,
    /// `NEW_FLOWS`.
    pub new_flows: Table<Flow>,
    /// `NEW_FLOW_INDEX`.
    pub new_index: Table<FlowRef>,
}

impl FlowMaps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the pin.
    pub fn open(pins: &PinDir) -> Result<Self, OpenError> {
        Ok(Self {
            flows: Table::open(pins, maps::FLOWS)?,
            index: Table::open(pins, maps::FLOW_INDEX)?,
            new_flows: Table::open(pins, maps::NEW_FLOWS)?,
            new_index: Table::open(pins, maps::NEW_FLOW_INDEX)?,
        })
    }
}

/// Type that can be a key or a value of a [`Table`].
pub trait Element: aya::Pod + bytemuck::Pod {}

impl<T: aya::Pod + bytemuck::Pod> Element for T {}

/// One of the flow maps, or another hash that can be as large.
#[derive(Debug)]
pub struct Table<V: Element, K: Element = FlowKey> {
    map: HashMap<MapData, K, V>,
}

impl<V: Element, K: Element> Table<V, K> {
    /// Opens the map of this name.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the pin.
    pub(crate) fn open(pins: &PinDir, name: &str) -> Result<Self, OpenError> {
        let path = pins.map(name);
        let map = MapData::from_pin(&path).and_then(|map| HashMap::try_from(Map::HashMap(map)));
        Ok(Self { map: map.map_err(|source| OpenError::Pin { path, source })? })
    }

    /// Returns the value of a key.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds an element, unless there is one with this key.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error: EEXIST when there is one.
    pub fn add(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.map.insert(key, value, NO_EXIST)
    }

    /// Removes an element, if there is one.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn remove(&mut self, key: &K) -> Result<(), MapError> {
        match self.map.remove(key) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Returns the number of elements that the map can hold.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn capacity(&self) -> Result<u64, MapError> {
        Ok(self.map.map().info()?.max_entries().into())
    }

    /// Returns the number of elements. Walks over all of them: a fraction of a second if there are hundreds of
    /// thousands.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn count(&self) -> io::Result<u64> {
        count::<V, K>(self.map.map())
    }

    /// Calls `look` with every element.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn for_each(&self, look: impl FnMut((K, V))) -> io::Result<()> {
        let (mut walk, mut look) = (Walk::default(), look);
        while let Some(elements) = walk.step(self)? {
            elements.for_each(&mut look);
        }
        Ok(())
    }
}

/// Returns the number of elements of a hash. Walks a thousand elements at a time: a system call for each would take ten
/// times as long.
///
/// # Errors
///
/// Returns the kernel's error.
pub(crate) fn count<V: Element, K: Element>(map: &MapData) -> io::Result<u64> {
    let (mut walk, mut count) = (Walk::<V, K>::default(), 0);
    while let Some(elements) = walk.step_on(map)? {
        count += elements.count() as u64;
    }
    Ok(count)
}

/// A walk over a table, some elements at a time. It meets every element that is there from its beginning to its end. It
/// may or may not meet an element that comes or goes meanwhile.
#[derive(Debug)]
pub(crate) struct Walk<V, K = FlowKey> {
    next: Next,
    keys: Vec<K>,
    values: Vec<V>,
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Begin,
    From(u32),
    End,
}

impl<V, K> Default for Walk<V, K> {
    fn default() -> Self {
        Self { next: Next::Begin, keys: Vec::new(), values: Vec::new() }
    }
}

impl<V: Element, K: Element> Walk<V, K> {
    /// Returns the next elements; `None` after the last.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub(crate) fn step(
        &mut self,
        table: &Table<V, K>,
    ) -> io::Result<Option<impl Iterator<Item = (K, V)> + use<'_, V, K>>> {
        self.step_on(table.map.map())
    }

    fn step_on(&mut self, map: &MapData) -> io::Result<Option<impl Iterator<Item = (K, V)> + use<'_, V, K>>> {
        let from = match self.next {
            Next::Begin => None,
            Next::From(bucket) => Some(bucket),
            Next::End => return Ok(None),
        };
        if self.keys.is_empty() {
            self.resize(STEP);
        }
        let (count, next) = loop {
            match lookup_batch(map, from, &mut self.keys, &mut self.values) {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => self.resize(2 * self.keys.len()),
                done => break done?,
            }
        };
        self.next = next.map_or(Next::End, Next::From);
        Ok(Some(self.keys.iter().copied().zip(self.values.iter().copied()).take(count)))
    }

    fn resize(&mut self, len: usize) {
        self.keys.resize(len, bytemuck::Zeroable::zeroed());
        self.values.resize(len, bytemuck::Zeroable::zeroed());
    }
}
