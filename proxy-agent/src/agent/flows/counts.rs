//! Number of elements in the maps that the programs fill, as of the last look, for readers that cannot take the time to
//! count.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapError;
use proxy_common::abi::maps;
use proxy_common::abi::{
    AffinityKey, AffinityValue, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, UdpFlow, UdpFlowKey,
};

use crate::bpf::flow_maps::{Element, Table};
use crate::bpf::pins::OpenError;
use crate::bpf::pins::PinDir;

/// Reason why a collection ended early. The next one starts afresh.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The maps cannot be walked.
    #[error("walking the flow maps: {0}")]
    Walk(#[from] io::Error),
    /// An element cannot be looked up or removed.
    #[error("removing an expired flow: {0}")]
    Remove(#[from] MapError),
    /// A step panicked.
    #[error("a step of the collection panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// The maps that are counted.
const MAPS: [&str; 8] = [
    maps::FLOWS,
    maps::FLOW_INDEX,
    maps::NEW_FLOWS,
    maps::NEW_FLOW_INDEX,
    maps::AFFINITY,
    maps::NEW_AFFINITY,
    maps::UDP_FLOWS,
    maps::FRAGMENTS,
];

/// The numbers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(Arc<[AtomicU64; MAPS.len()]>);

impl Counts {
    /// Returns the number of elements of each map; 0 before the first look.
    pub(crate) fn get(&self) -> impl Iterator<Item = (&'static str, u64)> {
        MAPS.into_iter().zip(&*self.0).map(|(map, count)| (map, count.load(Ordering::Relaxed)))
    }

    pub(super) fn set(&self, map: &str, elements: u64) {
        for (_, count) in MAPS.iter().zip(&*self.0).filter(|(name, _)| **name == map) {
            count.store(elements, Ordering::Relaxed);
        }
    }
}

/// Maps that evict, and that are walked only to count them: 65536 elements or twice as many, which takes some ten
/// milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Other {
    NewFlows,
    NewFlowIndex,
    Affinity,
    NewAffinity,
    UdpFlows,
    Fragments,
}

impl Other {
    pub(super) const ALL: [Self; 6] = [
        Self::NewFlows,
        Self::NewFlowIndex,
        Self::Affinity,
        Self::NewAffinity,
        Self::UdpFlows,
        Self::Fragments,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::NewFlows => maps::NEW_FLOWS,
            Self::NewFlowIndex => maps::NEW_FLOW_INDEX,
            Self::Affinity => maps::AFFINITY,
            Self::NewAffinity => maps::NEW_AFFINITY,
            Self::UdpFlows => maps::UDP_FLOWS,
            Self::Fragments => maps::FRAGMENTS,
        }
    }

    pub(super) fn count(self, pins: &PinDir) -> Result<u64, CollectError> {
        fn of<K: Element, V: Element>(pins: &PinDir, map: &str) -> Result<u64, CollectError> {
            Ok(Table::<V, K>::open(pins, map)?.count()?)
        }
        match self {
            Self::NewFlows => of::<FlowKey, Flow>(pins, self.name()),
            Self::NewFlowIndex => of::<FlowKey, FlowRef>(pins, self.name()),
            Self::Affinity | Self::NewAffinity => of::<AffinityKey, AffinityValue>(pins, self.name()),
            Self::UdpFlows => of::<UdpFlowKey, UdpFlow>(pins, self.name()),
            Self::Fragments => of::<FragmentKey, FragmentPorts>(pins, self.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_has_its_place() {
        let counts = Counts::default();
        for (number, map) in MAPS.iter().enumerate() {
            counts.set(map, number as u64 + 1);
        }
        counts.set(maps::SERVICES, 99);
        assert!(counts.get().eq(MAPS.into_iter().zip(1..)));
        assert!(Other::ALL.iter().all(|other| MAPS.contains(&other.name())));
    }
}
