//! Changes while the agent runs: from the API server's socket to the map.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::{ApiServer, Resource};

use super::view::View;
use crate::objects::World;
use crate::sys::Count;

/// Time limit for a change.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two changes, so that the agent's work after one does not always delay the next.
const PAUSE: Duration = Duration::from_millis(1);

/// Removes the first endpoint of Services and adds it again, one Service after the other; returns the time that each
/// change took to reach the map.
///
/// # Errors
/// If a change does not arrive.
pub(super) fn single(api: &ApiServer, view: &View, world: World, count: usize) -> Result<Vec<Duration>> {
    let mut took = Vec::with_capacity(count);
    // Two changes of each Service.
    for change in 0..count {
        let index = change / 2 % world.services;
        let ready = change % 2 == 1;
        let id = view.id(index)?.with_context(|| format!("Service {index} is not programmed"))?;
        api.apply(world.slice(index, 0, ready))?;
        let endpoints = world.endpoints - usize::from(!ready);
        let arrived = view.spin_until(id, endpoints, Instant::now() + PATIENCE)?;
        took.push(since_sent(api, arrived)?);
        thread::sleep(PAUSE);
    }
    Ok(took)
}

/// Does the same as [`single`] and returns the number of events that `counter` counted meanwhile, per change.
///
/// # Errors
/// If a change does not arrive, or the counter cannot be read.
pub(super) fn counted(
    api: &ApiServer,
    view: &View,
    world: World,
    count: usize,
    counter: &mut Count,
) -> Result<f64> {
    // Pause after which the agent's work after the last change is done.
    const SETTLE: Duration = Duration::from_millis(500);
    let before = counter.read()?;
    single(api, view, world, count)?;
    thread::sleep(SETTLE);
    Ok((counter.read()? - before) as f64 / count as f64)
}

/// Makes new Services after those of the world; returns the time that each took until its clusterIP worked.
///
/// # Errors
/// If a Service does not arrive.
pub(super) fn new_services(
    api: &ApiServer,
    view: &View,
    world: World,
    count: usize,
) -> Result<Vec<Duration>> {
    let mut took = Vec::with_capacity(count);
    for index in world.services..world.services + count {
        api.apply_all(world.service_and_slices(index))?;
        let deadline = Instant::now() + PATIENCE;
        let id = loop {
            if let Some(id) = view.id(index)? {
                break id;
            }
            ensure!(Instant::now() < deadline, "Service {index} never had a frontend");
            thread::yield_now();
        };
        let arrived = view.spin_until(id, world.endpoints, deadline)?;
        took.push(since_sent(api, arrived)?);
        thread::sleep(PAUSE);
    }
    Ok(took)
}

/// Removes the first endpoint of many Services at once, then adds them again; returns the time that each change took to
/// reach the map, both times.
///
/// # Errors
/// If a change does not arrive.
pub(super) fn burst(api: &ApiServer, view: &View, world: World, count: usize) -> Result<Vec<Duration>> {
    let ids = (0..count)
        .map(|index| view.id(index)?.with_context(|| format!("Service {index} is not programmed")))
        .collect::<Result<Vec<_>>>()?;
    let mut took = Vec::new();
    for ready in [false, true] {
        api.hold_events(Resource::EndpointSlices);
        for index in 0..count {
            api.apply(world.slice(index, 0, ready))?;
        }
        let began = Instant::now();
        api.release_events(Resource::EndpointSlices);
        let endpoints = world.endpoints - usize::from(!ready);
        let mut arrived = began;
        for id in &ids {
            arrived = view.spin_until(*id, endpoints, began + PATIENCE)?;
        }
        took.push(arrived - began);
    }
    Ok(took)
}

/// Returns the time since the server sent the last event of a slice.
fn since_sent(api: &ApiServer, arrived: Instant) -> Result<Duration> {
    let sent = api.event_sent(Resource::EndpointSlices).context("no event was sent")?;
    Ok(arrived.saturating_duration_since(sent))
}
