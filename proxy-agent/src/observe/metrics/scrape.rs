//! Metrics that are read at each scrape: counters and sizes of BPF maps.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Reason why a reader could not read.
pub(crate) type ReadError = Box<dyn std::error::Error + Send + Sync>;

type Read<T> = Box<dyn Fn() -> Result<Vec<T>, ReadError> + Send + Sync>;
type Failures = Labelled<[(&'static str, &'static str); 1], Counter>;

/// Usage of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapUsage {
    /// The map's name.
    pub(crate) map: &'static str,
    /// Number of elements in use; `None` where it cannot be told.
    pub(crate) entries: Option<u64>,
    /// Number of elements that the map can hold.
    pub(crate) capacity: u64,
}

/// Readers that run at each scrape, on a thread beside the sync loop. The failure of a reader is logged and counted,
/// and its metrics are missing from that scrape.
pub(crate) struct Readers {
    /// The datapath's counters, by [`proxy_common::abi::Counter::name`], summed over CPUs.
    pub(crate) verdicts: Read<(&'static str, u64)>,
    /// Usage of the maps.
    pub(crate) maps: Read<MapUsage>,
}

impl Default for Readers {
    /// Returns readers that read nothing.
    fn default() -> Self {
        Self { verdicts: Box::new(|| Ok(Vec::new())), maps: Box::new(|| Ok(Vec::new())) }
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn register(self, registry: &mut Registry) {
        let failures = Failures::default();
        for source in [VERDICTS, MAPS] {
            drop(failures.get_or_create(&[("source", source)]));
        }
        let help = "Scrapes from which metrics are missing because the kernel's maps could not be read";
        registry.register("scrape_errors", help, failures.clone());
        registry.register_collector(Box::new(AtScrape { readers: self, failures }));
    }
}

const VERDICTS: &str = "verdicts";
const MAPS: &str = "maps";

#[derive(Debug)]
struct AtScrape {
    readers: Readers,
    failures: Failures,
}

impl AtScrape {
    fn read<T>(&self, source: &'static str, reader: &Read<T>) -> Vec<T> {
        reader().unwrap_or_else(|error| {
            tracing::warn!(source, %error, "metrics cannot be read from the kernel's maps");
            self.failures.get_or_create(&[("source", source)]).inc();
            Vec::new()
        })
    }
}

impl Collector for AtScrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let verdicts = self.read(VERDICTS, &self.readers.verdicts);
        let help = "What the datapath did, by verdict.";
        let mut family = encoder.encode_descriptor("verdicts", help, None, MetricType::Counter)?;
        for (verdict, count) in verdicts {
            ConstCounter::new(count).encode(family.encode_family(&[("verdict", verdict)])?)?;
        }

        let maps = self.read(MAPS, &self.readers.maps);
        let entries = maps.iter().filter_map(|usage| Some((usage.map, usage.entries?)));
        encode_by_map(&mut encoder, "map_entries", "Elements in use in a BPF map.", entries)?;
        let capacities = maps.iter().map(|usage| (usage.map, usage.capacity));
        encode_by_map(&mut encoder, "map_capacity", "Elements that a BPF map can hold.", capacities)
    }
}

fn encode_by_map(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'static str, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (map, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&[("map", map)])?)?;
    }
    Ok(())
}
