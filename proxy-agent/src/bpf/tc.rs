//! The packet edge's programs, and attaching them to network devices.
//!
//! On kernels with TCX (6.6) each attachment is a link, pinned as `<pin-dir>/links/<program>-<interface index>`: first
//! on ingress, last on egress, and replaced in place. On older kernels it is a clsact filter with our own priority and
//! handle. Every function here asks the kernel for the current state and changes only the differences, so it can be
//! repeated at any time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkOrder};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError};
use aya::programs::{Program, ProgramError, ProgramType, SchedClassifier};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use proxy_common::abi::IfIndex;
use proxy_common::abi::maps;
use proxy_common::datapath::edge::Role;

use super::clsact::{HANDLE, make_clsact, priority};
use super::dataplane::{OBJECT, kernel};
use super::device::{AttachError, Device, Direction, LoadError};
use super::load::chain;
use super::load::{Refused, describe, log_level, timed};
use super::notes::Notes;
use super::pins::PinDir;
use super::sys;

/// Returns the name of the program that runs on devices of this role, in this direction.
pub(crate) const fn program(role: Role, direction: Direction) -> &'static str {
    match (role, direction) {
        (Role::External, Direction::Ingress) => "edge_ingress",
        (Role::External, Direction::Egress) => "edge_egress",
        (Role::Pod, Direction::Ingress) => "pod_ingress",
        (Role::Pod, Direction::Egress) => "pod_egress",
    }
}

/// Every program of the packet edge.
pub const PROGRAMS: [&str; 4] = ["edge_ingress", "edge_egress", "pod_ingress", "pod_egress"];

/// Mechanism by which programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    /// Links (kernel 6.6).
    Tcx,
    /// Filters of a clsact queueing discipline.
    Clsact,
}

impl Mechanism {
    /// Returns the mechanism in one word.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    /// Returns the mechanism of the running kernel.
    pub(crate) fn of_kernel() -> Self {
        match sys::tcx_programs(LOOPBACK, true) {
            Ok(_) => Self::Tcx,
            Err(error) => {
                tracing::debug!(%error, "no TCX; attaching clsact filters");
                Self::Clsact
            }
        }
    }
}

/// First kernel whose IPv4 and IPv6 tunnels leave no header of the outer packet in front of the inner one (commit
/// 7ad136fd288c, "ipip: allow redirecting ipip and mplsip packets to eth devices", and those beside it).
const TUNNELS_MEND_HEADERS: (u32, u32) = (5, 14);

/// Index of the loopback device of every network namespace.
const LOOPBACK: IfIndex = IfIndex(1);

/// Time after which a refused program is loaded again. The kernel refuses the same program again and needs seconds for
/// it, so that is not done with every pass.
const RELOAD: Duration = Duration::from_secs(300);

/// The four programs on the pinned maps. Each is loaded when it is first needed.
#[derive(Debug)]
pub struct TcPrograms {
    programs: Ebpf,
    /// Programs that the kernel has refused, each with the time and the reason.
    refused: BTreeMap<&'static str, (Instant, String)>,
}

impl TcPrograms {
    /// Reads the object and opens the maps, which have to be pinned. With `l3`, packets start with their IP header.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn open(pins: &PinDir, l3: bool) -> Result<Self, LoadError> {
        Self::open_object(OBJECT, pins, l3)
    }

    /// Does the same as [`TcPrograms::open`], with the programs of another object.
    pub(super) fn open_object(object: &[u8], pins: &PinDir, l3: bool) -> Result<Self, LoadError> {
        let mut loader = EbpfLoader::new();
        let l3 = u8::from(l3);
        let coarse =
            is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_ktime_get_coarse_ns);
        let coarse = u8::from(coarse.unwrap_or(false));
        loader.btf(None).verifier_log_level(log_level());
        let outer_headers = u8::from(kernel().0 < TUNNELS_MEND_HEADERS);
        loader
            .override_global("L3_DEVICE", &l3, true)
            .override_global("COARSE_CLOCK", &coarse, true)
            .override_global("KEEPS_OUTER_HEADERS", &outer_headers, true);
        let paths: Vec<_> = maps::ALL.iter().map(|map| (map.name, pins.map(map.name))).collect();
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        Ok(Self { programs: loader.load(object)?, refused: BTreeMap::new() })
    }

    /// Loads programs in parallel: the verifier is slow, and uses a CPU for each program. A program that the kernel
    /// refuses does not stop the others.
    pub fn load(&mut self, names: &[&'static str]) {
        self.refused.retain(|_, (when, _)| when.elapsed() < RELOAD);
        let refused = std::thread::scope(|scope| {
            let wanted = names.iter().filter(|name| !self.refused.contains_key(**name));
            let programs = self.programs.programs_mut().filter_map(|(found, program)| {
                let name = *wanted.clone().find(|name| **name == found)?;
                Some((name, program))
            });
            let loading: Vec<_> = programs
                .map(|(name, program)| (name, scope.spawn(move || loaded(name, program).map(drop))))
                .collect();
            let refused = loading.into_iter().filter_map(|(program, loading)| {
                let result = loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                Some((program, (Instant::now(), describe(program, &result.err()?))))
            });
            refused.collect::<Vec<_>>()
        });
        self.refused.extend(refused);
        #[cfg(feature = "debug-log")]
        super::debug_log::follow(&mut self.programs);
    }

    /// Returns the programs that the kernel has refused.
    pub fn refused(&self) -> Refused {
        self.refused.iter().map(|(program, (_, reason))| (*program, reason.clone())).collect()
    }

    /// Checks that both programs of a role can be attached: one alone would make half translations.
    ///
    /// # Errors
    ///
    /// [`AttachError::Refused`].
    pub(crate) fn check(&self, role: Role) -> Result<(), AttachError> {
        let programs = Direction::ALL.map(|direction| program(role, direction));
        match programs.into_iter().find_map(|program| Some((program, self.refused.get(program)?))) {
            Some((program, (_, reason))) => Err(AttachError::Refused { program, reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Returns the number of verified instructions of each loaded program, if the kernel reports it (5.16).
    pub fn verified(&self) -> Vec<(&'static str, Option<u32>)> {
        PROGRAMS
            .into_iter()
            .filter_map(|name| {
                let program: &SchedClassifier = self.programs.program(name)?.try_into().ok()?;
                Some((name, program.info().ok()?.verified_instruction_count()))
            })
            .collect()
    }

    /// Returns the program id that a link reports if it runs `program`.
    fn id(&mut self, program: &'static str) -> Result<u32, AttachError> {
        let classifier = classifier(&mut self.programs, program).map_err(failed(program))?;
        Ok(classifier.info().map_err(failed(program))?.id())
    }

    /// Makes the pinned link of `program` to `device` run the loaded program, or makes the link. Returns whether
    /// packets meet the program at the right place: first on ingress, last on egress.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; the former attachment stays.
    pub(crate) fn attach_tcx(
        &mut self,
        pins: &PinDir,
        device: &Device<'_>,
        program: &'static str,
        direction: Direction,
    ) -> Result<bool, AttachError> {
        let pin = link_pin(pins, program, device.index);
        let own = self.id(program)?;
        match device_link(&pin)? {
            Some((link, info)) if info.device == device.index => {
                if info.program_id != own {
                    let classifier = classifier(&mut self.programs, program).map_err(failed(program))?;
                    let fd = classifier.fd().map_err(failed(program))?;
                    sys::update_link(link.as_fd(), fd.as_fd()).map_err(|error| not_pinned(&pin, error))?;
                    tracing::debug!(device = device.name, program, "program replaced in place");
                }
            }
            // The link's device is gone, or has left this namespace.
            Some(_) => {
                remove_pin(&pin)?;
                self.new_link(device, program, direction, &pin)?;
            }
            None => self.new_link(device, program, direction, &pin)?,
        }
        let programs = sys::tcx_programs(device.index, direction == Direction::Ingress)
            .map_err(|source| AttachError::Order { program, source })?;
        let there = match direction {
            Direction::Ingress => programs.first(),
            Direction::Egress => programs.last(),
        };
        Ok(there == Some(&own))
    }

    /// Attaches the program a second time, at the right place, and then removes the former link. Only for programs that
    /// were loaded for this: the kernel attaches no program twice.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; the former attachment stays.
    pub(crate) fn overtake_tcx(
        &mut self,
        pins: &PinDir,
        device: &Device<'_>,
        program: &'static str,
        direction: Direction,
    ) -> Result<(), AttachError> {
        let pin = link_pin(pins, program, device.index);
        let beside = link_pin(pins, &format!("{program}-new"), device.index);
        remove_pin(&beside)?;
        self.new_link(device, program, direction, &beside)?;
        std::fs::rename(&beside, &pin).map_err(|error| not_pinned(&pin, error))
    }

    fn new_link(
        &mut self,
        device: &Device<'_>,
        program: &'static str,
        direction: Direction,
        pin: &Path,
    ) -> Result<(), AttachError> {
        let order = match direction {
            Direction::Ingress => LinkOrder::first(),
            Direction::Egress => LinkOrder::last(),
        };
        let classifier = classifier(&mut self.programs, program).map_err(failed(program))?;
        let id = classifier
            .attach_with_options(device.name, direction.attach_type(), TcAttachOptions::TcxOrder(order))
            .map_err(failed(program))?;
        let link = classifier.take_link(id).map_err(failed(program))?;
        let link =
            FdLink::try_from(link).map_err(|error| not_pinned(pin, io::Error::other(chain(&error))))?;
        link.pin(pin).map_err(|error| not_pinned(pin, io::Error::other(chain(&error))))?;
        // aya attaches by name, and the name may have led to another device.
        match device_link(pin)? {
            Some((_, info)) if info.device == device.index => Ok(()),
            _ => {
                remove_pin(pin)?;
                Err(AttachError::Moved { program })
            }
        }
    }

    /// Adds a clsact filter with `program`, or replaces the program of our filter that is there.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; the former attachment stays.
    pub(crate) fn attach_clsact(
        &mut self,
        pins: &PinDir,
        device: &Device<'_>,
        program: &'static str,
        direction: Direction,
    ) -> Result<(), AttachError> {
        let attach_type = direction.attach_type();
        let classifier = classifier(&mut self.programs, program).map_err(failed(program))?;
        let there =
            filter(device.name, direction).map_err(|error| failed(program)(TcError::from(error).into()))?;
        let id = match classifier.attach_to_link(there) {
            Ok(id) => id,
            // There is no filter of ours yet.
            Err(_) => {
                make_clsact(&Notes::of(pins), device, program)?;
                let options = NlOptions { priority: priority(direction), handle: HANDLE, classid: None };
                classifier
                    .attach_with_options(device.name, attach_type, TcAttachOptions::Netlink(options))
                    .map_err(failed(program))?
            }
        };
        // Dropping the link would remove the filter, which has to outlive this process.
        std::mem::forget(classifier.take_link(id).map_err(failed(program))?);
        Ok(())
    }
}

/// Removes the pinned links for which `keep` is false, by program and interface index. A link that cannot be removed is
/// logged; the next call finds it again.
///
/// # Errors
///
/// Returns the error of reading the directory.
pub(crate) fn remove_links(pins: &PinDir, keep: impl Fn(&str, IfIndex) -> bool) -> io::Result<()> {
    for entry in std::fs::read_dir(pins.links())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some((program, device)) = name.rsplit_once('-') else { continue };
        let Ok(index) = device.parse().map(IfIndex) else { continue };
        if PROGRAMS.contains(&program.strip_suffix("-new").unwrap_or(program)) && !keep(program, index) {
            match remove_pin(&path) {
                Ok(()) => tracing::debug!(link = %name, "detached"),
                Err(error) => tracing::warn!(%error, "a link that is not needed any more stays attached"),
            }
        }
    }
    Ok(())
}

fn filter(device: &str, direction: Direction) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(device, direction.attach_type(), priority(direction), HANDLE, None)
}

pub(super) fn link_pin(pins: &PinDir, program: &str, index: IfIndex) -> PathBuf {
    pins.link(&format!("{program}-{index}"))
}

/// Returns the pinned link and its device; `None` without a pin.
pub(super) fn device_link(
    pin: &Path,
) -> Result<Option<(std::os::fd::OwnedFd, sys::TcxLinkInfo)>, AttachError> {
    match sys::open_link(pin) {
        Ok(link) => {
            let info = sys::tcx_link_info(link.as_fd()).map_err(|error| not_pinned(pin, error))?;
            Ok(Some((link, info)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(not_pinned(pin, error)),
    }
}

fn not_pinned(pin: &Path, source: io::Error) -> AttachError {
    AttachError::Pin { path: pin.to_path_buf(), source }
}

fn failed(program: &'static str) -> impl FnOnce(ProgramError) -> AttachError {
    move |source| AttachError::Program { program, source }
}

fn remove_pin(pin: &Path) -> Result<(), AttachError> {
    match std::fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(not_pinned(pin, error)),
        _ => Ok(()),
    }
}

fn classifier<'a>(
    programs: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, ProgramError> {
    loaded(name, programs.program_mut(name).ok_or(ProgramError::UnexpectedProgramType)?)
}

fn loaded<'a>(name: &'static str, program: &'a mut Program) -> Result<&'a mut SchedClassifier, ProgramError> {
    let classifier: &mut SchedClassifier = program.try_into()?;
    if classifier.fd().is_err() {
        timed(name, || classifier.load())?;
    }
    Ok(classifier)
}
