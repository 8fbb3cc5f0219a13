//! Reports of the sync loop to [`crate::observe::metrics`]: the way of changes from their arrival to the kernel's maps.
//!
//! The loop calls [`Telemetry`] at each step; nothing here decides anything. Values that only the kernel knows are read
//! at each scrape, by [`readers`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aya::maps::MapInfo;
use proxy_common::abi::backend::flags::IN_LOCAL;
use proxy_common::abi::frontend::flags::{EXTERNAL, FAR_LOCAL};
use proxy_common::abi::maps;
use proxy_common::abi::{Counter, FrontendKind, SlotRange};
use proxy_common::addr::Family;

use crate::agent::flows::Counts;
use crate::bpf::maps::KernelMaps;
use crate::bpf::pins::PinDir;
use crate::observe::metrics::{MapUsage, Metrics, PolicyKind, ReadError, Readers, Stage, SyncResult};
use crate::reconcile::cluster::{Change, ObjectKey, Scope};
use crate::reconcile::desired::DesiredService;
use crate::reconcile::store::Op;

/// Numbers of ports without local endpoints, by policy (index: as [`PolicyKind::ALL`]) and [`Family::index`].
type Remote = [[usize; 2]; 2];

/// Measurements between the arrival of a change and the end of its sync.
#[derive(Debug)]
pub(crate) struct Telemetry {
    metrics: Arc<Metrics>,
    families: Vec<Family>,
    /// Numbers of changes that wait: of slices, of Services.
    waiting: [usize; 2],
    /// Arrival of the oldest change that waits.
    oldest: Option<Instant>,
    trigger_times: Vec<(Family, i64)>,
    /// Services with ports whose policy is Local and whose endpoints are all elsewhere.
    remote: BTreeMap<ObjectKey, Remote>,
    sync: Running,
}

/// The running sync.
#[derive(Debug)]
struct Running {
    started: Instant,
    full: bool,
    writing: Duration,
    operations: BTreeMap<&'static str, u64>,
}

/// A change on its way into the cluster's state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    kind: Option<Kind>,
    trigger_time: Option<(Family, i64)>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Slice,
    Service,
}

impl Arrival {
    /// Returns the arrival of `change`.
    pub(crate) fn of(change: &Change) -> Self {
        let (kind, trigger_time) = match change {
            Change::Service(_) | Change::ServiceGone(_) => (Some(Kind::Service), None),
            Change::Slice(slice) => (Some(Kind::Slice), slice.trigger_time.map(|time| (slice.family, time))),
            Change::SliceGone(_) => (Some(Kind::Slice), None),
            Change::Node(_)
            | Change::ServiceCidr(..)
            | Change::ServiceCidrGone(_)
            | Change::Pod(_)
            | Change::PodGone(_) => (None, None),
        };
        Self { kind, trigger_time }
    }
}

impl Telemetry {
    /// Makes the telemetry of an agent that serves these families.
    pub(crate) fn new(metrics: Arc<Metrics>, families: Vec<Family>) -> Self {
        let sync = Running {
            started: Instant::now(),
            full: false,
            writing: Duration::ZERO,
            operations: BTreeMap::new(),
        };
        Self {
            metrics,
            families,
            waiting: [0; 2],
            oldest: None,
            trigger_times: Vec::new(),
            remote: BTreeMap::new(),
            sync,
        }
    }

    /// Returns the metrics that are told.
    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Notes that a change has arrived and touched `scope`. In the first list (`first_list`) trigger times do not
    /// count: nobody waits for what was there before the start.
    pub(crate) fn arrived(&mut self, arrival: Arrival, scope: Scope, first_list: bool) {
        match arrival.kind {
            Some(Kind::Slice) => self.metrics.endpoint_change(),
            Some(Kind::Service) => self.metrics.service_change(),
            None => {}
        }
        // A Pod that opts out is written when its cgroup is found.
        if matches!(scope, Scope::Nothing | Scope::Pods) {
            return;
        }
        match arrival.kind {
            Some(Kind::Slice) => self.waiting[0] += 1,
            Some(Kind::Service) => self.waiting[1] += 1,
            None => {}
        }
        self.oldest.get_or_insert_with(Instant::now);
        self.trigger_times.extend(arrival.trigger_time.filter(|_| !first_list));
        self.tell_waiting();
        for &family in &self.families {
            self.metrics.sync_queued(family);
        }
    }

    fn tell_waiting(&self) {
        let [slices, services] = self.waiting;
        self.metrics.pending(slices, services);
    }

    /// Notes that a sync begins. A `full` sync tells of every Service.
    pub(crate) fn sync_begins(&mut self, full: bool) {
        if full {
            self.remote.clear();
        }
        let operations = std::mem::take(&mut self.sync.operations);
        self.sync = Running { started: Instant::now(), full, writing: Duration::ZERO, operations };
    }

    /// Carries operations out by `write`, and measures the time.
    ///
    /// # Errors
    ///
    /// Those of `write`.
    pub(crate) fn writing<E>(
        &mut self,
        ops: &[Op],
        write: impl FnOnce(&[Op]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = Instant::now();
        let result = write(ops);
        self.sync.writing += start.elapsed();
        for op in ops {
            *self.sync.operations.entry(op.map()).or_default() += 1;
        }
        result
    }

    /// Notes the desired state of a Service; `None` if it is gone.
    pub(crate) fn desired(&mut self, service: &ObjectKey, desired: Option<&DesiredService>) {
        match desired.map(remote) {
            None | Some([[0, 0], [0, 0]]) => self.remote.remove(service),
            Some(remote) => self.remote.insert(service.clone(), remote),
        };
    }

    /// Notes that the sync has ended. Returns the time that it took.
    pub(crate) fn sync_ended(&mut self, ok: bool) -> Duration {
        let Running { started, full, writing, operations } = &mut self.sync;
        let took = started.elapsed();
        self.metrics.synced(&self.families, SyncResult { full: *full, ok, took });
        self.metrics.stage(Stage::Plan, took.saturating_sub(*writing));
        self.metrics.stage(Stage::Write, *writing);
        self.metrics.map_operations(&std::mem::take(operations));
        if !ok {
            return took;
        }
        if let Some(oldest) = self.oldest.take() {
            self.metrics.stage(Stage::Wait, started.saturating_duration_since(oldest));
        }
        self.waiting = [0; 2];
        self.tell_waiting();
        self.tell_remote();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for (family, time) in self.trigger_times.drain(..) {
            let since = Duration::from_nanos(u64::try_from(time).unwrap_or(0));
            self.metrics.network_programmed(family, now.saturating_sub(since));
        }
        took
    }

    fn tell_remote(&self) {
        let mut sum = Remote::default();
        for remote in self.remote.values() {
            for (sum, count) in sum.iter_mut().flatten().zip(remote.iter().flatten()) {
                *sum += count;
            }
        }
        for (policy, by_family) in PolicyKind::ALL.into_iter().zip(sum) {
            for &family in &self.families {
                let count = by_family.get(family.index()).copied().unwrap_or_default();
                self.metrics.no_local_endpoints(policy, family, count);
            }
        }
    }
}

/// Returns the numbers of ports of a Service that have endpoints, but none on this node, where a Local policy counts.
fn remote(desired: &DesiredService) -> Remote {
    let mut remote = Remote::default();
    for port in desired.ports.iter().filter(|port| port.empty_local == SlotRange::DROP) {
        if port.backends.iter().any(|backend| backend.flags & IN_LOCAL != 0) {
            continue;
        }
        for (by_family, external) in remote.iter_mut().zip([0, EXTERNAL]) {
            let is_local = port.frontends.iter().any(|(key, flags)| {
                key.kind != FrontendKind::Address as u8
                    && flags & EXTERNAL == external
                    && flags & FAR_LOCAL != 0
            });
            if let Some(count) = by_family.get_mut(port.key.family.index()) {
                *count += usize::from(is_local);
            }
        }
    }
    remote
}

/// Returns the readers for scrapes. They open the maps for each scrape, because the agent may replace the maps.
pub(crate) fn readers(pins: &PinDir, counts: Counts) -> Readers {
    let (for_counters, pins) = (pins.clone(), pins.clone());
    Readers {
        verdicts: Box::new(move || {
            let maps = KernelMaps::open(&for_counters)?;
            Counter::ALL.into_iter().map(|counter| Ok((counter.name(), maps.counter(counter)?))).collect()
        }),
        maps: Box::new(move || {
            let usage = KernelMaps::open(&pins)?.usage()?.into_iter();
            let mut maps: Vec<MapUsage> = usage
                .map(|(map, entries, capacity)| MapUsage { map, entries: Some(entries), capacity })
                .collect();
            for (map, entries) in counts.get() {
                maps.push(MapUsage { map, entries: Some(entries), capacity: capacity(&pins, map)? });
            }
            // Elements of STREAMS are found by number, so it is unknown which are in use.
            maps.push(MapUsage {
                map: maps::STREAMS,
                entries: None,
                capacity: capacity(&pins, maps::STREAMS)?,
            });
            Ok(maps)
        }),
    }
}

fn capacity(pins: &PinDir, map: &str) -> Result<u64, ReadError> {
    Ok(MapInfo::from_pin(pins.map(map))?.max_entries().into())
}

#[cfg(test)]
mod tests;
