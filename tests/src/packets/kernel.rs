//! The packet edge's programs in the kernel, on single frames (BPF_PROG_TEST_RUN) and maps of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData, MapInfo};
use aya::programs::{ProgramFd, loaded_programs};
use proxy_agent::bpf::dataplane::{Dataplane, FLOW_ENTRIES, Sizes};
use proxy_agent::bpf::flow_maps::{FlowMaps, Table};
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::tc::{PROGRAMS, TcPrograms};
use proxy_agent::reconcile::store::{Capacity, MapStore as _};
use proxy_common::abi::maps;
use proxy_common::abi::{
    Counter, Device, Flow, FlowKey, FlowRef, FragmentKey, FragmentPorts, IfIndex, Nanos, ServiceCounters,
    ServiceId,
};
use proxy_common::datapath::edge::{Role, Verdict};

use super::sys::test_run;
use super::world::{BARE, NEAR, NIC, Net, OVERLAY, POD, role_of};
use crate::lab::{self, Lab, LabSpec, Netns, NodeSpec};

const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;

/// Number of instructions after which the verifier gives up.
pub const VERIFIER_LIMIT: u32 = 1_000_000;

/// The four flow maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flows {
    /// `FLOWS` and `NEW_FLOWS`.
    pub records: [BTreeMap<FlowKey, Flow>; 2],
    /// `FLOW_INDEX` and `NEW_FLOW_INDEX`.
    pub index: [BTreeMap<FlowKey, FlowRef>; 2],
}

/// Kernel's action for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The packet goes on, as it came or translated.
    GoesOn,
    /// The packet is dropped.
    Dropped,
    /// The packet is sent back.
    Redirected,
}

/// Form in which a packet arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As plain bytes.
    Plain,
    /// With the sum over its bytes, as from a network card. The sum has to be right in the end.
    Summed,
    /// As a train of packets that are still in one buffer (GSO).
    Train,
}

/// Result of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ran {
    /// The program's action, and the resulting frame.
    Done(Action, Vec<u8>),
    /// The kernel's sum over the bytes does not match them any more.
    WrongSum,
    /// The kernel does not pass such a frame to programs: the frame has not even an IP header.
    Refused,
}

impl Action {
    /// Returns the action of the programs for a verdict.
    pub const fn of(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass | Verdict::Translated => Self::GoesOn,
            Verdict::Drop => Self::Dropped,
            Verdict::Reply | Verdict::Elsewhere => Self::Redirected,
        }
    }
}

/// Programs, the maps of the world, and devices with its numbers.
pub struct Kernel {
    programs: BTreeMap<String, ProgramFd>,
    flows: FlowMaps,
    fragments: HashMap<MapData, FragmentKey, FragmentPorts>,
    dataplane: Dataplane,
    /// Instructions that the verifier processed, by program.
    pub verified: Vec<(&'static str, Option<u32>)>,
    net: Netns,
    // Last: dropping the lab removes the pins.
    _lab: Lab,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("verified", &self.verified).finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads the programs and fills the maps with the world of both families.
    ///
    /// # Errors
    /// Without root, or if the kernel refuses a program.
    pub fn new() -> Result<Self> {
        let lab = Lab::build(LabSpec::default().node(NodeSpec::new("node", &[], &[])?))?;
        let pins = PinDir::new(lab.node("node").pin_dir());
        pins.create()?;
        let capacity =
            Capacity { frontends: 1024, services: 256, slots: 1024, backends: 256, source_ranges: 64 };
        let mut dataplane = Dataplane::open(
            pins.clone(),
            Sizes { least: capacity, want: capacity, flows: FLOW_ENTRIES },
            drop,
        )?;
        let mut programs = TcPrograms::open(&pins, false)?;
        programs.load(&PROGRAMS);
        ensure!(programs.refused().is_empty(), "the kernel refuses {:?}", programs.refused());
        let verified = programs.verified();
        let programs = descriptors(&pins)?;
        for op in Net::ALL.into_iter().flat_map(Net::ops) {
            dataplane.maps.apply(&op)?;
        }
        let mut devices: HashMap<_, IfIndex, Device> = HashMap::try_from(open(&pins, maps::DEVICES)?)?;
        for (index, device) in Net::devices() {
            devices.insert(index, device, 0)?;
        }
        let net = Netns::new(lab::Role::Leaf)?;
        let links = [NIC, OVERLAY, POD, BARE, NEAR]
            .map(|index| format!("link add d{index} index {index} type bridge\n"));
        net.ip(&links.concat())?;
        let (flows, fragments) = (FlowMaps::open(&pins)?, HashMap::try_from(open(&pins, maps::FRAGMENTS)?)?);
        Ok(Self { programs, flows, fragments, dataplane, verified, net, _lab: lab })
    }

    /// Runs `work` in the namespace of the devices.
    ///
    /// # Errors
    /// If the namespace cannot be entered, and those of `work`.
    pub fn inside<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> Result<T> + Send) -> Result<T> {
        let net = self.net.clone();
        net.enter(|| work(self))?
    }

    /// Runs the program for a packet that enters or leaves through a device; returns the result.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn packet(&self, device: IfIndex, egress: bool, bytes: &[u8], form: Form) -> Result<Ran> {
        let name = match (role_of(device), egress) {
            (Role::External, false) => "edge_ingress",
            (Role::External, true) => "edge_egress",
            (Role::Pod, false) => "pod_ingress",
            (Role::Pod, true) => "pod_egress",
        };
        // The beginning of `struct __sk_buff`: `ingress_ifindex`, `ifindex` and `gso_size` are words of it.
        let mut context = [0_u32; 45];
        (context[9], context[10]) = (device.0, device.0);
        if form == Form::Train {
            context[44] = 8;
        }
        let complete = form == Form::Summed;
        let program = self.programs.get(name).with_context(|| format!("no program {name}"))?;
        let (action, out) = match test_run(program.as_fd(), bytes, bytemuck::cast_slice(&context), complete) {
            Ok(done) => done,
            Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => return Ok(Ran::WrongSum),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Ran::Refused),
            Err(error) => return Err(error).with_context(|| format!("{name}, {} bytes", bytes.len())),
        };
        let action = match action {
            TC_ACT_UNSPEC => Action::GoesOn,
            TC_ACT_SHOT => Action::Dropped,
            TC_ACT_REDIRECT => Action::Redirected,
            other => bail!("{name} returns {other}"),
        };
        Ok(Ran::Done(action, out))
    }

    /// Returns the contents of the flow maps.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn flows(&self) -> Result<Flows> {
        let FlowMaps { flows, index, new_flows, new_index } = &self.flows;
        Ok(Flows { records: [all(flows)?, all(new_flows)?], index: [all(index)?, all(new_index)?] })
    }

    /// Empties the maps that the packet edge has written.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn forget(&mut self) -> Result<()> {
        let Flows { records: [flows, new_flows], index: [index, new_index] } = self.flows()?;
        flows.keys().try_for_each(|key| self.flows.flows.remove(key))?;
        new_flows.keys().try_for_each(|key| self.flows.new_flows.remove(key))?;
        index.keys().try_for_each(|key| self.flows.index.remove(key))?;
        new_index.keys().try_for_each(|key| self.flows.new_index.remove(key))?;
        let fragments: Vec<_> = self.fragments.keys().collect::<Result<_, _>>()?;
        fragments.iter().try_for_each(|key| self.fragments.remove(key))?;
        Ok(())
    }

    /// Makes every flow older, as if time had passed.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn age(&mut self, nanos: u64) -> Result<()> {
        let Flows { records, .. } = self.flows()?;
        for (records, table) in records.into_iter().zip([&mut self.flows.flows, &mut self.flows.new_flows]) {
            for (key, flow) in records {
                // The time may then be before the machine's start.
                table.remove(&key)?;
                table.add(&key, &Flow { last_seen: Nanos(flow.last_seen.0.wrapping_sub(nanos)), ..flow })?;
            }
        }
        Ok(())
    }

    /// Returns every counter.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn counts(&self) -> Result<Vec<u64>> {
        Counter::ALL.into_iter().map(|counter| Ok(self.dataplane.maps.counter(counter)?)).collect()
    }

    /// Returns the counters of a Service.
    ///
    /// # Errors
    /// With the kernel's error.
    pub fn service_counters(&self, id: u32) -> Result<ServiceCounters> {
        Ok(self.dataplane.maps.service_counters(ServiceId(id))?)
    }
}

fn open(pins: &PinDir, name: &str) -> Result<Map> {
    let data = MapData::from_pin(pins.map(name)).with_context(|| format!("the map {name}"))?;
    Ok(if name == maps::FRAGMENTS { Map::LruHashMap(data) } else { Map::HashMap(data) })
}

fn all<V: aya::Pod + bytemuck::Pod>(table: &Table<V>) -> Result<BTreeMap<FlowKey, V>> {
    let mut elements = BTreeMap::new();
    table.for_each(|(key, value)| _ = elements.insert(key, value))?;
    Ok(elements)
}

/// Returns the programs that use the pinned maps.
fn descriptors(pins: &PinDir) -> Result<BTreeMap<String, ProgramFd>> {
    let pinned = maps::ALL.iter().map(|spec| MapInfo::from_pin(pins.map(spec.name)));
    let maps: BTreeSet<u32> = pinned.map(|info| Ok(info?.id())).collect::<Result<_>>()?;
    let mut found = BTreeMap::new();
    for info in loaded_programs() {
        // Programs may be unloaded meanwhile.
        let Ok(info) = info else { continue };
        let Ok(Some(ids)) = info.map_ids() else { continue };
        let name = info.name_as_str().unwrap_or_default().to_owned();
        if PROGRAMS.contains(&name.as_str()) && ids.iter().any(|id| maps.contains(id)) {
            found.insert(name, info.fd()?);
        }
    }
    ensure!(found.len() == PROGRAMS.len(), "not all programs are there: {:?}", found.keys());
    Ok(found)
}
