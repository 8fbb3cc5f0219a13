//! Writes `DEVICES`, and attaches the programs to the chosen devices.
//!
//! A pass looks at what is attached and mends what differs; a pass with nothing to do changes nothing. A failure
//! affects only its own device, and is tried again with the next pass.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use aya::maps::{HashMap, Map, MapData, MapError};
use proxy_common::abi;
use proxy_common::abi::IfIndex;
use proxy_common::abi::device::flags::{NEAR, POD, POD_BRIDGE};
use proxy_common::abi::maps;
use proxy_common::addr::Addr;
use proxy_common::datapath::edge::Role;

use super::choice::{Choice, Choices};
use super::snapshot::Layer;
use super::sources::Sources;
use crate::bpf::device::LoadError;
use crate::bpf::device::{AttachError, Device, Direction};
use crate::bpf::others::{Looking, Other};
use crate::bpf::pins::OpenError;
use crate::bpf::pins::PinDir;
use crate::bpf::tc::{self, Mechanism, PROGRAMS, TcPrograms, remove_links};
use crate::bpf::{Refused, clsact};

/// Number of times in a row that a program is put back to its place. After that, the place is left to the program that
/// took it.
const PATIENCE: u32 = 3;

/// Reason why the packet edge cannot be set up at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttacherError {
    /// Failure of the BPF object or its maps.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Failure to open `DEVICES`.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// The programs and what they are attached to.
#[derive(Debug)]
pub(crate) struct Attacher {
    pins: PinDir,
    mechanism: Mechanism,
    l2: TcPrograms,
    /// Programs for devices without MAC headers; most nodes have no such device.
    l3: Option<TcPrograms>,
    devices: HashMap<MapData, IfIndex, abi::Device>,
    /// Devices that may still have clsact filters of ours that are not wanted; at the start, all devices.
    filtered: BTreeMap<IfIndex, String>,
    /// Number of times in a row that a program was put back to its place, by program and device.
    overtaken: BTreeMap<(&'static str, IfIndex), u32>,
}

/// Result of a pass for a device.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Mechanism by which the programs are attached; on failure, the reason why they are not (or not as they should
    /// be).
    pub(crate) attached: Result<Mechanism, String>,
    /// Whether the failure keeps a starting node from being ready.
    pub(crate) holds: bool,
    /// Programs and filters of others on the device.
    pub(crate) others: Vec<Other>,
}

impl Attacher {
    /// Opens the pinned maps; loads and attaches nothing yet. `present` lists the devices that may carry clsact filters
    /// of an earlier agent, by index.
    ///
    /// # Errors
    ///
    /// [`AttacherError`].
    pub(crate) fn new(
        pins: PinDir,
        mechanism: Mechanism,
        present: BTreeMap<IfIndex, String>,
    ) -> Result<Self, AttacherError> {
        let l2 = TcPrograms::open(&pins, false)?;
        Self::with(l2, pins, mechanism, present)
    }

    /// Does the same as [`Attacher::new`] with programs that are open already.
    pub(crate) fn with(
        l2: TcPrograms,
        pins: PinDir,
        mechanism: Mechanism,
        present: BTreeMap<IfIndex, String>,
    ) -> Result<Self, AttacherError> {
        let path = pins.map(maps::DEVICES);
        let failed = |source| OpenError::Pin { path: path.clone(), source };
        let devices = MapData::from_pin(&path).map_err(failed)?;
        let devices = HashMap::try_from(Map::HashMap(devices)).map_err(failed)?;
        Ok(Self { pins, mechanism, l2, l3: None, devices, filtered: present, overtaken: BTreeMap::new() })
    }

    /// Returns the number of verified instructions per program, where the kernel tells.
    pub(crate) fn verified(&self) -> Vec<(&'static str, Option<u32>)> {
        self.l2.verified()
    }

    /// Returns the programs that the kernel has refused.
    pub(crate) fn refused(&self) -> Refused {
        let mut refused = self.l2.refused();
        refused.extend(self.l3.iter().flat_map(TcPrograms::refused));
        refused
    }

    /// Attaches the programs to the chosen devices, external ones first, and detaches them from all others.
    pub(crate) fn apply(
        &mut self,
        choices: &Choices,
        sources: &BTreeMap<IfIndex, Sources>,
    ) -> BTreeMap<IfIndex, Outcome> {
        let start = Instant::now();
        if choices.values().any(|choice| choice.layer == Layer::L2) {
            self.l2.load(&PROGRAMS);
        }
        let loading = start.elapsed();
        for &bridge in &pod_bridges(choices) {
            let value = abi::Device { flags: POD_BRIDGE, ..abi::Device::default() };
            if let Err(error) = self.describe(bridge, value) {
                tracing::warn!(%error, index = bridge.0, "a bridge of pods is taken for a way in from outside");
            }
        }
        let mut order: Vec<(&IfIndex, &Choice)> = choices.iter().collect();
        order.sort_by_key(|(index, choice)| (choice.role, **index));
        let mut outcomes = BTreeMap::new();
        let mut spare = None;
        for (&index, choice) in order {
            let of_device = sources.get(&index).copied().unwrap_or_default();
            let attached = self.attach(index, choice, of_device, &mut spare);
            let holds = attached.as_ref().is_err_and(|error| error.holds(choice.role));
            let attached = attached.map(|()| self.mechanism).map_err(|error| error.to_string());
            outcomes.insert(index, Outcome { attached, holds, others: Vec::new() });
        }
        self.detach_others(choices);
        if let Err(error) = self.find_others(choices, &mut outcomes) {
            tracing::warn!(%error, "what others run on the devices cannot be told");
        }
        let (took, mechanism) = (start.elapsed(), self.mechanism.name());
        tracing::debug!(?took, ?loading, devices = choices.len(), mechanism, "pass over the devices");
        outcomes
    }

    fn attach(
        &mut self,
        index: IfIndex,
        choice: &Choice,
        sources: Sources,
        spare: &mut Option<TcPrograms>,
    ) -> Result<(), DeviceError> {
        let [snat_v4, snat_v6] = sources;
        let near = if choice.near { NEAR } else { 0 };
        let pod = if choice.role == Role::Pod { POD } else { 0 };
        let value = abi::Device { snat_v4, snat_v6, flags: near | pod };
        // The programs read this entry, so it has to be there before they run.
        self.describe(index, value).map_err(DeviceError::Map)?;
        let device = Device { index, name: &choice.name };
        let pins = self.pins.clone();
        if let Err(refused) = self.programs(choice)?.check(choice.role) {
            // Programs of an earlier agent would go on with maps that nobody writes any more.
            self.detach(index, &choice.name);
            return Err(refused.into());
        }
        for direction in Direction::ALL {
            let program = tc::program(choice.role, direction);
            match self.mechanism {
                Mechanism::Clsact => {
                    self.programs(choice)?.attach_clsact(&pins, &device, program, direction)?;
                }
                Mechanism::Tcx => {
                    if self.programs(choice)?.attach_tcx(&pins, &device, program, direction)? {
                        self.overtaken.remove(&(program, index));
                        continue;
                    }
                    let times = self.overtaken.entry((program, index)).or_default();
                    if *times >= PATIENCE {
                        return Err(AttachError::Rival { program }.into());
                    }
                    *times += 1;
                    tracing::info!(device = device.name, program, "putting the program back to its place");
                    // A program cannot be attached twice, so putting it back takes another copy.
                    let mut copy = match spare.take().filter(|_| choice.layer == Layer::L2) {
                        Some(copy) => copy,
                        None => {
                            TcPrograms::open(&pins, choice.layer == Layer::L3).map_err(AttachError::from)?
                        }
                    };
                    copy.overtake_tcx(&pins, &device, program, direction)?;
                    *spare = Some(copy).filter(|_| choice.layer == Layer::L2);
                }
            }
        }
        Ok(())
    }

    /// Finds the programs and filters of others beside ours.
    fn find_others(
        &self,
        choices: &Choices,
        outcomes: &mut BTreeMap<IfIndex, Outcome>,
    ) -> std::io::Result<()> {
        let looking = Looking::begin()?;
        for (&index, outcome) in outcomes {
            if let Some(choice) = choices.get(&index) {
                outcome.others = looking.others(&self.pins, index, choice.role)?;
            }
        }
        Ok(())
    }

    /// Writes the entry of a device in `DEVICES`, unless it is there already.
    fn describe(&mut self, index: IfIndex, value: abi::Device) -> Result<(), MapError> {
        if self.devices.get(&index, 0).ok() == Some(value) {
            Ok(())
        } else {
            self.devices.insert(index, value, 0)
        }
    }

    /// Returns the programs for a device, loaded unless the kernel has refused them.
    fn programs(&mut self, choice: &Choice) -> Result<&mut TcPrograms, DeviceError> {
        if choice.layer == Layer::L2 {
            return Ok(&mut self.l2);
        }
        let l3 = match self.l3.take() {
            Some(programs) => programs,
            None => TcPrograms::open(&self.pins, true).map_err(AttachError::from)?,
        };
        let l3 = self.l3.insert(l3);
        l3.load(&Direction::ALL.map(|direction| tc::program(choice.role, direction)));
        Ok(l3)
    }

    /// Detaches our programs from a device.
    fn detach(&self, index: IfIndex, name: &str) {
        if let Err(error) = remove_links(&self.pins, |_, other| other != index) {
            tracing::warn!(%error, path = %self.pins.links().display(), "links that are not needed any more stay");
        }
        self.detach_filters(index, name);
    }

    /// Removes our filters from a device, and logs a failure.
    fn detach_filters(&self, index: IfIndex, name: &str) {
        if let Err(error) = clsact::detach(&self.pins, index) {
            tracing::warn!(device = name, %error, "filters that are not needed any more stay");
        }
    }

    fn detach_others(&mut self, choices: &Choices) {
        let removed = remove_links(&self.pins, |program, index| {
            self.mechanism == Mechanism::Tcx
                && choices.get(&index).is_some_and(|choice| {
                    Direction::ALL.iter().any(|direction| tc::program(choice.role, *direction) == program)
                })
        });
        if let Err(error) = removed {
            tracing::warn!(%error, path = %self.pins.links().display(), "links that are not needed any more stay");
        }
        for (index, name) in std::mem::take(&mut self.filtered) {
            if self.mechanism == Mechanism::Tcx || !choices.contains_key(&index) {
                self.detach_filters(index, &name);
            }
        }
        if self.mechanism == Mechanism::Clsact {
            self.filtered = choices.iter().map(|(index, choice)| (*index, choice.name.clone())).collect();
        }
        let known: BTreeSet<IfIndex> = self.devices.keys().filter_map(Result::ok).collect();
        let bridges = pod_bridges(choices);
        for index in
            known.into_iter().filter(|index| !choices.contains_key(index) && !bridges.contains(index))
        {
            // The entry may be gone already.
            let _ = self.devices.remove(&index);
        }
        self.overtaken.retain(|(_, index), _| choices.contains_key(index));
    }
}

/// Returns the bridges of pods' interfaces, except those that are chosen devices themselves.
fn pod_bridges(choices: &Choices) -> BTreeSet<IfIndex> {
    let pods = choices.values().filter(|choice| choice.role == Role::Pod);
    pods.filter_map(|choice| choice.owner).filter(|owner| !choices.contains_key(owner)).collect()
}

/// Reason why a device is not served.
#[derive(Debug, thiserror::Error)]
enum DeviceError {
    /// The programs cannot be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// `DEVICES` cannot be written.
    #[error("map DEVICES: {0}")]
    Map(MapError),
}

impl DeviceError {
    /// Returns whether the failure keeps a starting node from being ready. Without an external device, clients outside
    /// are not served. At pods' interfaces only programs that cannot be loaded or that the kernel refuses count: they
    /// are missing at all pods. Any other failure affects one pod, which may be gone by now.
    fn holds(&self, role: Role) -> bool {
        match self {
            // The program runs, but behind another one.
            Self::Attach(AttachError::Rival { .. }) => false,
            Self::Attach(AttachError::Refused { .. } | AttachError::Load(_)) => true,
            Self::Attach(
                AttachError::Program { .. }
                | AttachError::Pin { .. }
                | AttachError::Order { .. }
                | AttachError::Moved { .. }
                | AttachError::Ingress { .. },
            )
            | Self::Map(_) => role == Role::External,
        }
    }
}

/// Returns an address as `status` shows it; empty for none.
pub(super) fn shown(addr: Addr) -> String {
    if addr == Addr::ZERO { String::new() } else { addr.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_node_from_being_ready() {
        let program = "edge_ingress";
        let refused = AttachError::Refused { program, reason: "no such helper".to_owned() };
        let gone = AttachError::Order { program, source: std::io::Error::from_raw_os_error(libc::ENODEV) };
        let full = DeviceError::Map(MapError::OutOfBounds { index: 1, max_entries: 1 });
        for (error, external, pod) in [
            (DeviceError::from(refused), true, true),
            (gone.into(), true, false),
            (AttachError::Moved { program }.into(), true, false),
            (AttachError::Rival { program }.into(), false, false),
            (full, true, false),
        ] {
            assert_eq!([Role::External, Role::Pod].map(|role| error.holds(role)), [external, pod], "{error}");
        }
    }
}
