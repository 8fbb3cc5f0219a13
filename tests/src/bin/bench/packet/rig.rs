//! Runs BPF programs on frames and times them: those that the agent has loaded, on its maps, and the benchmark's own.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, MapData, MapInfo, ProgramArray};
use aya::programs::{ProgramFd, TestRun as _, loaded_programs};
use aya::{Ebpf, TestRunOptions};
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::maps;
use proxy_common::abi::{
    Backend, BackendId, Flow, FlowKey, FlowKind, FrontendKey, FrontendValue, Origin, Service, ServiceId,
    SlotRange, proto,
};
use proxy_common::be::Be16;
use proxy_tests::lab::Netns;

use super::frame::Frame;
use crate::programs::{classifier, map, own_programs};

/// `TC_ACT_UNSPEC`: the programs' verdict for a packet that goes on.
pub(super) const GOES_ON: i32 = -1;

/// A program that can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Program {
    EdgeIngress,
    EdgeEgress,
    PodIngress,
    PodEgress,
    /// Program that returns at once.
    Empty,
    /// Fixed program for comparison: the least that a translation costs.
    Reference,
}

impl Program {
    /// The programs of the packet edge.
    pub(super) const EDGE: [Self; 4] =
        [Self::EdgeIngress, Self::EdgeEgress, Self::PodIngress, Self::PodEgress];
    const OWN: [Self; 2] = [Self::Empty, Self::Reference];

    /// Returns the program's name in the kernel.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::EdgeIngress => "edge_ingress",
            Self::EdgeEgress => "edge_egress",
            Self::PodIngress => "pod_ingress",
            Self::PodEgress => "pod_egress",
            Self::Empty => "empty",
            Self::Reference => "reference",
        }
    }
}

/// A program that writes the headers of a frame and jumps to the program that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wrapper {
    /// The same headers each time.
    Same,
    /// Another client each time.
    Fresh,
}

impl Wrapper {
    fn name(self) -> &'static str {
        match self {
            Self::Same => "restore",
            Self::Fresh => "restore_fresh",
        }
    }
}

/// Interface indexes of the devices that a packet is on and came by.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Devices {
    /// Index of the device that the program runs on; 0 for the loopback device.
    pub(super) on: u32,
    /// Index of the device that the packet entered the host by; 0 for none.
    pub(super) entered_by: u32,
}

impl Devices {
    /// Returns the beginning of `struct __sk_buff`, up to the last field that is not zero.
    fn context(self) -> [u8; 44] {
        let mut context = [0; 44];
        context[36..40].copy_from_slice(&self.entered_by.to_ne_bytes());
        context[40..44].copy_from_slice(&self.on.to_ne_bytes());
        context
    }
}

/// A program of the agent, as loaded in the kernel.
#[derive(Clone, Debug)]
pub(super) struct Verified {
    pub(super) name: String,
    pub(super) instructions: Option<u32>,
}

/// Everything that is needed to run programs.
pub(super) struct Rig {
    programs: Ebpf,
    measured: ProgramArray<MapData>,
    template: Array<MapData, [u64; 11]>,
    targets: BTreeMap<Program, ProgramFd>,
    /// Namespace of the interface indexes.
    net: Netns,
    /// Every program that uses the agent's maps.
    pub(super) verified: Vec<Verified>,
}

impl Rig {
    /// Loads the benchmark's object and finds the programs that use the maps below `pins`.
    ///
    /// # Errors
    /// If the object is missing, or the agent has not loaded its programs.
    pub(super) fn new(pins: &PinDir, net: &Netns) -> Result<Self> {
        let mut programs = own_programs()?;
        let mut targets = BTreeMap::new();
        for name in [Wrapper::Same.name(), Wrapper::Fresh.name()] {
            classifier(&mut programs, name)?.load()?;
        }
        for program in Program::OWN {
            let classifier = classifier(&mut programs, program.name())?;
            classifier.load()?;
            targets.insert(program, classifier.fd()?.try_clone()?);
        }
        let verified = find(pins, &mut targets)?;
        for program in Program::EDGE {
            let found = targets.contains_key(&program);
            ensure!(found, "the agent has not loaded {}", program.name());
        }
        let mut take =
            |name| programs.take_map(name).with_context(|| format!("the object has no map {name}"));
        let measured = ProgramArray::try_from(take("MEASURED")?)?;
        let template = Array::try_from(take("TEMPLATE")?)?;
        Ok(Self { programs, measured, template, targets, net: net.clone(), verified })
    }

    /// Fills the tables of [`Program::Reference`], so that it translates `frame` to `backend`.
    ///
    /// # Errors
    /// If a map cannot be written.
    pub(super) fn prepare_reference(&mut self, frame: &Frame, to: &Frame) -> Result<()> {
        let (id, service) = (1, 1);
        let (vip, port) = (frame.destination.ip().into(), Be16::new(frame.destination.port()));
        let key = FrontendKey::exact(vip, port, proto::TCP);
        let mut frontends = HashMap::try_from(map(&mut self.programs, "REFERENCE_FRONTENDS")?)?;
        frontends.insert(key, FrontendValue::new(&key, ServiceId(service), 0), 0)?;
        let mut services = Array::try_from(map(&mut self.programs, "REFERENCE_SERVICES")?)?;
        let cluster = SlotRange { base: id, len: 1 };
        services.set(service, Service { cluster, ..Service::default() }, 0)?;
        let mut backends = Array::try_from(map(&mut self.programs, "REFERENCE_BACKENDS")?)?;
        let (addr, to_port) = (to.destination.ip().into(), Be16::new(to.destination.port()));
        backends.set(id, Backend { addr, port: to_port, ..Backend::default() }, 0)?;
        let mut flows = HashMap::try_from(map(&mut self.programs, "REFERENCE_FLOWS")?)?;
        let flow = FlowKey {
            source: frame.source.ip().into(),
            destination: vip,
            source_port: Be16::new(frame.source.port()),
            destination_port: port,
            origin: Origin::OUTSIDE,
            proto: proto::TCP,
            kind: FlowKind::Vip as u8,
            pad: 0,
            pad_end: 0,
        };
        flows.insert(flow, Flow { backend: BackendId(id), ..Flow::default() }, 0)?;
        Ok(())
    }

    /// Runs a program once; returns its verdict and the resulting frame.
    ///
    /// # Errors
    /// If the kernel refuses, or the result is no TCP segment with right checksums.
    pub(super) fn feed(&mut self, program: Program, devices: Devices, frame: &Frame) -> Result<(i32, Frame)> {
        let mut out = vec![0; 4096];
        let run = self.run(program, Wrapper::Same, devices, frame, 1, Some(&mut out));
        let (verdict, length, _) = run.with_context(|| format!("{}: {frame:?}", program.name()))?;
        let translated = Frame::parse(out.get(..length).unwrap_or_default())
            .with_context(|| format!("what {} has made of {frame:?}", program.name()))?;
        Ok((verdict, translated))
    }

    /// Runs a program `repeat` times; returns the nanoseconds that one run took on average.
    ///
    /// # Errors
    /// If the kernel refuses, or the last run did not let the packet go on.
    pub(super) fn time(
        &mut self,
        program: Program,
        wrapper: Wrapper,
        devices: Devices,
        frame: &Frame,
        repeat: u32,
    ) -> Result<f64> {
        let (verdict, _, nanos) = self.run(program, wrapper, devices, frame, repeat, None)?;
        ensure!(verdict == GOES_ON, "{} on {frame:?}: verdict {verdict}", program.name());
        Ok(nanos)
    }

    /// Runs a program; returns verdict, length of the resulting frame in bytes, and nanoseconds.
    fn run(
        &mut self,
        program: Program,
        wrapper: Wrapper,
        devices: Devices,
        frame: &Frame,
        repeat: u32,
        data_out: Option<&mut [u8]>,
    ) -> Result<(i32, usize, f64)> {
        let data = frame.bytes()?;
        let mut template = self.template.get(&0, 0)?;
        for (word, bytes) in template.iter_mut().zip(data.as_chunks().0).take(10) {
            *word = u64::from_ne_bytes(*bytes);
        }
        self.template.set(0, template, 0)?;
        let target = self.targets.get(&program).with_context(|| format!("no program {}", program.name()))?;
        self.measured.set(0, target, 0)?;
        let context = devices.context();
        let options = TestRunOptions {
            data_in: Some(&data),
            data_out,
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let wrapper = classifier(&mut self.programs, wrapper.name())?;
        let result = self.net.enter(|| wrapper.test_run(options))??;
        let verdict = result.return_value.cast_signed();
        Ok((verdict, result.data_size_out as usize, result.duration.as_nanos() as f64))
    }
}

/// Finds the programs that use the pinned maps; of two with the same name, the newer one.
fn find(pins: &PinDir, targets: &mut BTreeMap<Program, ProgramFd>) -> Result<Vec<Verified>> {
    let pinned = maps::ALL.iter().map(|spec| MapInfo::from_pin(pins.map(spec.name)));
    let maps: BTreeSet<u32> = pinned.map(|info| Ok(info?.id())).collect::<Result<_>>()?;
    let mut found = BTreeMap::new();
    for info in loaded_programs() {
        // Programs may be unloaded meanwhile.
        let Ok(info) = info else { continue };
        let Ok(Some(ids)) = info.map_ids() else { continue };
        if !ids.iter().any(|id| maps.contains(id)) {
            continue;
        }
        let name = info.name_as_str().unwrap_or_default().to_owned();
        if let Some(program) = Program::EDGE.into_iter().find(|program| program.name() == name) {
            targets.insert(program, info.fd()?);
        }
        found.insert(name, info.verified_instruction_count());
    }
    Ok(found.into_iter().map(|(name, instructions)| Verified { name, instructions }).collect())
}
