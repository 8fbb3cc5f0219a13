//! The maps that the agent writes, read from outside.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::ServiceId;

use crate::objects::{World, frontend};

/// The pinned maps of a node.
pub(super) struct View {
    maps: KernelMaps,
}

impl View {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// If not every map is pinned yet.
    pub(super) fn open(pin_dir: &Path) -> Result<Self> {
        Ok(Self { maps: KernelMaps::open(&PinDir::new(pin_dir))? })
    }

    /// Returns the id of Service `index`.
    pub(super) fn id(&self, index: usize) -> Result<Option<ServiceId>> {
        Ok(self.maps.frontend(&frontend(index))?.map(|value| value.service))
    }

    /// Returns the number of endpoints of the Service with this id.
    pub(super) fn endpoints(&self, id: ServiceId) -> usize {
        self.maps.service(id).map_or(0, |service| service.cluster.len as usize)
    }

    /// Waits until every Service of the world has all its endpoints, and returns that time.
    ///
    /// # Errors
    /// If that does not happen by the deadline, or `alive` fails.
    pub(super) fn wait_for(
        &self,
        world: World,
        deadline: Instant,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Instant> {
        let mut missing = world.services;
        loop {
            // From the last Service down: a Service that was found stays found.
            while missing > 0 && self.id(missing - 1)?.is_some_and(|id| self.endpoints(id) == world.endpoints)
            {
                missing -= 1;
            }
            if missing == 0 {
                return Ok(Instant::now());
            }
            alive()?;
            if Instant::now() > deadline {
                bail!("{missing} of {} Services are not programmed", world.services);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits, without pauses, until the Service with this id has that number of endpoints, and returns that time.
    ///
    /// # Errors
    /// If that does not happen by the deadline.
    pub(super) fn spin_until(&self, id: ServiceId, endpoints: usize, deadline: Instant) -> Result<Instant> {
        loop {
            if self.endpoints(id) == endpoints {
                return Ok(Instant::now());
            }
            ensure!(Instant::now() < deadline, "Service {id} never had {endpoints} endpoints");
            // The API server may share this CPU.
            thread::yield_now();
        }
    }

    /// Returns the ids of Service ports by their names, and of backends by port and address.
    pub(super) fn ids(&self) -> Result<BTreeMap<String, u32>> {
        let contents = self.maps.contents()?;
        let mut ids: BTreeMap<String, u32> = contents
            .names
            .iter()
            .map(|(id, names)| {
                (format!("{}/{}:{}", name(&names.namespace), name(&names.name), names.proto), id.0)
            })
            .collect();
        for (id, backend) in (0..).zip(&contents.backends) {
            if backend.state.flags != 0 {
                let key = format!("{} {}:{}", backend.service, backend.addr, backend.port);
                ensure!(ids.insert(key, id).is_none(), "backend {id} is there twice");
            }
        }
        Ok(ids)
    }
}

fn name(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Opens the maps as soon as they are pinned.
///
/// # Errors
/// If that does not happen by the deadline, or `alive` fails.
pub(super) fn wait_for_maps(
    pin_dir: &Path,
    deadline: Instant,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<View> {
    loop {
        let problem = match View::open(pin_dir) {
            Ok(view) => return Ok(view),
            Err(problem) => problem,
        };
        alive()?;
        if Instant::now() > deadline {
            return Err(problem).context("the maps are not pinned");
        }
        thread::sleep(Duration::from_millis(1));
    }
}
