//! Removes expired flows from `FLOWS`, and index entries that lead nowhere from `FLOW_INDEX`.
//!
//! Index entries are removed first and the record last, and only if the record is still expired at that moment. The
//! kernel cannot remove on a condition. So between the last look and the removal there is a moment in which a client
//! may begin the very same flow anew. Such a record first has to prove itself in `NEW_FLOWS`, which takes far longer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::MapError;
use proxy_common::abi::maps;
use proxy_common::abi::{Flow, FlowKey, FlowKind, FlowRef, Nanos};
use proxy_common::datapath::edge::flows::{has_snat, snat_index, snat_target, vip_index, vip_target};
use proxy_common::datapath::edge::timeouts::expired;

use super::counts::{CollectError, Counts, Other};
use crate::bpf::flow_maps::{FlowMaps, Walk};
use crate::bpf::pins::PinDir;
use crate::host::clock::now;
use crate::observe::metrics::Metrics;

/// Time from the end of a collection to the start of the next.
const PAUSE: Duration = Duration::from_secs(5);
/// Length of the rest after each step, as a multiple of the step: the collection takes no more than a twentieth of one
/// CPU.
const REST: u32 = 19;

/// Counts of a collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Records looked at.
    pub records: u64,
    /// Index entries looked at.
    pub index_entries: u64,
    /// Expired records removed, with their index entries.
    pub expired: u64,
    /// Index entries removed because their record is gone.
    pub dangling: u64,
}

/// One walk over all of `FLOWS` and `FLOW_INDEX`, in steps.
#[derive(Debug)]
pub struct Collection {
    maps: FlowMaps,
    records: Walk<Flow>,
    index: Walk<FlowRef>,
    collected: Collected,
}

impl Collection {
    /// Makes a walk that begins.
    pub fn new(maps: FlowMaps) -> Self {
        Self { maps, records: Walk::default(), index: Walk::default(), collected: Collected::default() }
    }

    /// Looks at some elements, as of `now` on the clock of [`now`](fn@now). Returns `Some` at the end of the walk.
    ///
    /// # Errors
    ///
    /// [`CollectError`]; what has been removed until then stays removed.
    pub fn step(&mut self, now: Nanos) -> Result<Option<Collected>, CollectError> {
        let Self { maps, records, index, collected } = self;
        if let Some(elements) = records.step(&maps.flows)? {
            for (key, flow) in elements {
                collected.records += 1;
                if expired(&flow, key.proto, now) && remove(maps, &key, now)? {
                    collected.expired += 1;
                }
            }
        } else if let Some(elements) = index.step(&maps.index)? {
            for (key, target) in elements {
                collected.index_entries += 1;
                if dangles(maps, &key, &target)? {
                    maps.index.remove(&key)?;
                    collected.dangling += 1;
                }
            }
        } else {
            return Ok(Some(*collected));
        }
        Ok(None)
    }
}

/// Removes a record with the index entries that lead to it, if it has expired. Returns whether it did.
fn remove(maps: &mut FlowMaps, key: &FlowKey, now: Nanos) -> Result<bool, MapError> {
    let Some(flow) = maps.flows.get(key)?.filter(|flow| expired(flow, key.proto, now)) else {
        return Ok(false);
    };
    let vip = Some(vip_index(key, &flow).0);
    let snat = has_snat(&flow).then(|| snat_index(key, &flow.snat, flow.snat_port).0);
    let mut removed = Vec::with_capacity(2);
    for index in [vip, snat].into_iter().flatten() {
        // The client may have begun another flow with the same tuple.
        if let Some(target) = maps.index.get(&index)?
            && record_key(&index, &target) == *key
        {
            maps.index.remove(&index)?;
            removed.push((index, target));
        }
    }
    match maps.flows.get(key)? {
        Some(flow) if !expired(&flow, key.proto, now) => {
            // The flow has come to life again. If the entry is there already, it is the same.
            for (index, target) in removed {
                let _ = maps.index.add(&index, &target);
            }
            Ok(false)
        }
        Some(_) => maps.flows.remove(key).map(|()| true),
        None => Ok(false),
    }
}

/// Returns whether an index entry leads to no record.
fn dangles(maps: &FlowMaps, index: &FlowKey, target: &FlowRef) -> Result<bool, MapError> {
    let key = record_key(index, target);
    // A flow that has ended since the walk met the entry has neither entry nor record; a flow that has begun again has
    // both.
    Ok(is_absent(maps, &key)? && maps.index.get(index)? == Some(*target) && is_absent(maps, &key)?)
}

/// Returns whether there is no such record. A record moves from `NEW_FLOWS` to `FLOWS` and is in both for a moment, so
/// `FLOWS` is looked at again.
fn is_absent(maps: &FlowMaps, key: &FlowKey) -> Result<bool, MapError> {
    Ok(maps.flows.get(key)?.is_none() && maps.new_flows.get(key)?.is_none() && maps.flows.get(key)?.is_none())
}

/// Returns the key of the record that an index entry leads to.
fn record_key(index: &FlowKey, target: &FlowRef) -> FlowKey {
    if index.kind == FlowKind::Snat as u8 { snat_target(index, target) } else { vip_target(index, target) }
}

/// Collects expired flows again and again, with little of one CPU, beside the other tasks of the runtime. Also counts
/// the elements of other maps, which come and go by themselves.
pub(crate) async fn keep_collecting(pins: PinDir, metrics: Arc<Metrics>, counts: Counts) {
    loop {
        match collect(&pins).await {
            Ok(collected) => {
                counts.set(maps::FLOWS, collected.records - collected.expired);
                counts.set(maps::FLOW_INDEX, collected.index_entries - collected.dangling);
                metrics.flows_collected(collected.expired);
                tracing::debug!(?collected, "expired flows collected");
                if let Err(error) = count_others(&pins, &counts).await {
                    tracing::warn!(%error, "the elements of maps could not be counted");
                }
            }
            // Before the first list has been programmed there are no maps.
            Err(CollectError::Open(error)) => tracing::debug!(%error, "no flows to collect"),
            Err(error) => tracing::warn!(%error, "expired flows could not be collected"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Counts the maps of [`Other`], one after the other.
async fn count_others(pins: &PinDir, counts: &Counts) -> Result<(), CollectError> {
    for other in Other::ALL {
        let pins = pins.clone();
        let (count, took) = tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            (other.count(&pins), start.elapsed())
        })
        .await?;
        counts.set(other.name(), count?);
        tokio::time::sleep(took * REST).await;
    }
    Ok(())
}

/// Runs one collection. Each step is short, so that the runtime can end in between.
async fn collect(pins: &PinDir) -> Result<Collected, CollectError> {
    // The maps are opened anew each time, because they may be replaced.
    let mut collection = Collection::new(FlowMaps::open(pins)?);
    loop {
        let step = tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            let done = collection.step(now());
            (collection, done, start.elapsed())
        });
        let (rest_of, done, took) = step.await?;
        if let Some(collected) = done? {
            return Ok(collected);
        }
        collection = rest_of;
        tokio::time::sleep(took * REST).await;
    }
}
