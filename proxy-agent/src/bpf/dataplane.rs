//! Creates or takes over the pinned maps, loads the programs onto them and attaches them to the cgroup.
//!
//! Everything is pinned: the dataplane outlives the agent. A restart replaces the programs one by one, each in one
//! step, on the same maps; no connection notices.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, ProgramError, ProgramType};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfError, EbpfLoader};
use proxy_common::abi::CgroupId;
use proxy_common::abi::maps;

use super::load::{Refused, chain, describe, log_level, reason, timed};
use super::maps::KernelMaps;
use super::pins::{Found, PinDir, PinError};
use super::sys;
use super::writable::{GrowError, WritableMaps};
use crate::bpf::pins::OpenError;
use crate::host::cgroups::{CONTAINERS_MAX, PODS_MAX};
use crate::host::sockets::SocketMaps;
use crate::reconcile::plan::{LOCAL_ADDRESS_ENTRIES, PREFIX_ENTRIES};
use crate::reconcile::store::Capacity;

/// Programs, in the order in which they are attached: those of the reply direction first, so that no request is
/// translated whose reply would not be.
pub const PROGRAMS: [&str; 9] = [
    "sock_release",
    "getpeername4",
    "getpeername6",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
    "connect4",
    "connect6",
];

/// Programs that are only attached together: one alone would make half translations.
const PAIRS: [[&str; 2]; 2] = [["recvmsg4", "sendmsg4"], ["recvmsg6", "sendmsg6"]];

/// The program without which nothing is served at sockets, the self-test's connection included.
const NEEDED: &str = "connect4";

/// Oldest kernel with everything that the programs need.
const KERNEL_FLOOR: (u32, u32) = (5, 10);

/// Number of elements of `AFFINITY` and of `NEW_AFFINITY`: clients remembered, over all Services with session affinity.
const AFFINITY_ENTRIES: u32 = 65_536;
/// Number of elements of `UDP_FLOWS`: two for each unconnected socket and VIP.
const UDP_FLOW_ENTRIES: u32 = 65_536;
/// Number of elements of `OPT_OUT`: the cgroups of [`PODS_MAX`] pods and their containers, twice, because old and new
/// ones exist together during a change.
///
/// [`PODS_MAX`]: crate::host::cgroups::PODS_MAX
const OPT_OUT_ENTRIES: u32 = (2 * PODS_MAX * (CONTAINERS_MAX + 1)) as u32;
/// Number of elements of `SANDBOXES`: one for each of [`PODS_MAX`] pods, twice for the same reason.
const SANDBOX_ENTRIES: u32 = 2 * PODS_MAX as u32;
/// Default number of elements of `FLOWS`; memory is taken as elements are used.
pub const FLOW_ENTRIES: u32 = 262_144;
/// Number of elements of `NEW_FLOWS`: flows whose client has not gone on after a reply.
const NEW_FLOW_ENTRIES: u32 = 65_536;
const FRAGMENT_ENTRIES: u32 = 8_192;
const DEVICE_ENTRIES: u32 = 4_096;

/// Reason why the dataplane cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel is too old.
    #[error("kernel {0} is too old: Vipr needs 5.10 or newer")]
    Kernel(String),
    /// The pin directory cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The pinned maps cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Maps that are too small cannot be copied into larger ones.
    #[error("making maps larger: {0}")]
    Grow(#[from] GrowError),
    /// The process has no permission.
    #[error(
        "the kernel does not allow BPF here: {0}; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )]
    Permission(io::Error),
    /// The maps could not be made or the object could not be read.
    #[error("creating the BPF maps: {0}")]
    Load(#[from] EbpfError),
    /// The verifier or the kernel refused a program.
    #[error("BPF program {program}: {}", reason(source))]
    Program {
        /// Name of the program.
        program: &'static str,
        /// Error of aya or the verifier.
        source: ProgramError,
    },
    /// Loading has panicked; the panic has been printed.
    #[error("loading the BPF programs: {0}")]
    Panic(tokio::task::JoinError),
    /// A link could not be made, pinned or updated.
    #[error("attaching {program} to {cgroup}: {reason}")]
    Attach {
        /// Name of the program.
        program: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// Reason of the failure.
        reason: String,
    },
    /// The cgroup cannot be opened.
    #[error("cgroup {path}: {source}; name the root of the cgroup v2 hierarchy with --cgroup-path")]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Sizes that the maps have to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Least capacity: pinned maps below this are replaced by larger ones with the same elements.
    pub least: Capacity,
    /// Capacity of new maps.
    pub want: Capacity,
    /// Number of elements of `FLOWS`, if it has to be made. An existing `FLOWS` is kept at any size, because it holds
    /// connections.
    pub flows: u32,
}

/// Programs and maps of this node.
#[derive(Debug)]
pub struct Dataplane {
    /// The maps.
    pub maps: WritableMaps,
    /// Whether the maps existed already, with the elements that an earlier agent had written.
    pub resumed: bool,
    /// Verified instructions per program, if the kernel reports them (5.16).
    pub(crate) verified: Vec<(&'static str, Option<u32>)>,
    /// Programs that are not attached.
    pub(crate) refused: Refused,
    /// Whether the kernel lets programs choose the errno of a refusal (5.18).
    pub(crate) set_retval: bool,
    pins: PinDir,
    programs: Ebpf,
}

impl Dataplane {
    /// Creates or takes over the maps, makes them larger if necessary, and loads the programs; `loading` is called with
    /// the name of each. Nothing is attached yet: programs that are attached already serve on, from the maps as they
    /// were. A program that the kernel refuses is left out, together with the program that is useless without it.
    ///
    /// # Errors
    ///
    /// [`DataplaneError`] says what is missing and what to do.
    pub fn open(pins: PinDir, sizes: Sizes, loading: impl Fn(&'static str)) -> Result<Self, DataplaneError> {
        Self::open_object(OBJECT, pins, sizes, loading)
    }

    /// Does the same as [`Dataplane::open`], with the programs of another object.
    pub(super) fn open_object(
        object: &[u8],
        pins: PinDir,
        sizes: Sizes,
        loading: impl Fn(&'static str),
    ) -> Result<Self, DataplaneError> {
        check_kernel()?;
        // Kernels before 5.11 charge maps against this limit.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        if let Err(errno) = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited) {
            tracing::debug!(%errno, "RLIMIT_MEMLOCK could not be raised");
        }
        let Found { resumed, too_small } = pins.drop_unusable(|map| entries(map, sizes.least, 1))?;
        let larger = pins.with_larger(too_small.clone());

        let set_retval =
            is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false);
        let has_set_retval = u8::from(set_retval);
        let mut loader = EbpfLoader::new();
        loader.btf(None).verifier_log_level(log_level());
        loader.override_global("HAS_SET_RETVAL", &has_set_retval, true);
        let maps: Vec<(&str, PathBuf, u32)> = maps::ALL
            .iter()
            .map(|spec| (spec.name, larger.map(spec.name), entries(spec.name, sizes.want, sizes.flows)))
            .collect();
        for (name, pin, entries) in &maps {
            // With zero, the object's own number is used.
            if *entries > 0 {
                loader.map_max_entries(name, *entries);
            }
            loader.map_pin_path(name, pin.as_path());
        }
        let mut programs = loader.load(object).map_err(permission)?;
        let mut verified = Vec::new();
        let mut refused = Refused::new();
        for name in PROGRAMS {
            loading(name);
            let program = program(&mut programs, name)?;
            match timed(name, || load(program)) {
                Ok(instructions) => verified.push((name, instructions)),
                Err(source) if name == NEEDED || is_permission(&source) => return Err(failed(name, source)),
                Err(source) => {
                    refused.insert(name, describe(name, &source));
                }
            }
        }
        leave_out_halves(&mut refused);
        #[cfg(feature = "debug-log")]
        super::debug_log::follow(&mut programs);
        let mut maps = WritableMaps::open(&larger)?;
        if !too_small.is_empty() {
            maps.copy_from(&KernelMaps::open(&pins)?, &too_small)?;
            tracing::info!(maps = ?too_small, "maps have been made larger");
        }
        let pins = larger.replace_by_larger()?;
        let flows = maps.flow_maps().flows.capacity().ok();
        tracing::info!(resumed, set_retval, capacity = ?maps.capacity(), flows, "BPF programs loaded");
        if flows.is_some_and(|there| there != u64::from(sizes.flows)) {
            tracing::warn!(
                flows,
                wanted = sizes.flows,
                "the flow table keeps its size, and its connections; another --flow-table-size counts after \
                 `proxy-agent cleanup` or a reboot"
            );
        }
        Ok(Self { maps, resumed, verified, refused, set_retval, pins, programs })
    }

    /// Attaches the programs to `cgroup`, or replaces those that are attached there.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Attach`]; the former attachments stay.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), DataplaneError> {
        let no_cgroup = |source| DataplaneError::Cgroup { path: cgroup.to_path_buf(), source };
        let dir = File::open(cgroup).map_err(no_cgroup)?;
        let cgroup_id = CgroupId(dir.metadata().map_err(no_cgroup)?.ino());
        for name in PROGRAMS {
            let failed = |reason: String| DataplaneError::Attach {
                program: name,
                cgroup: cgroup.to_path_buf(),
                reason,
            };
            let pin = self.pins.link(name);
            if self.refused.contains_key(name) {
                // The program of an earlier agent would go on with maps that nobody writes any more.
                match std::fs::remove_file(&pin) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(failed(format!("{}: {error}", pin.display())));
                    }
                    _ => continue,
                }
            }
            let program = program(&mut self.programs, name)?;
            let old = match sys::open_link(&pin) {
                Ok(link) => Some(link),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(failed(format!("{}: {error}", pin.display()))),
            };
            if let Some(link) = &old
                && sys::cgroup_link_info(link.as_fd()).is_ok_and(|info| info.cgroup_id == cgroup_id)
            {
                let fd = program.fd().map_err(|error| failed(error.to_string()))?;
                sys::update_link(link.as_fd(), fd.as_fd()).map_err(|error| failed(error.to_string()))?;
                continue;
            }
            // The cgroup has changed, or this is the first time: attach to this cgroup, then remove the old link.
            let link = attach(program, &dir).map_err(|error| failed(chain(&*error)))?;
            if old.is_some() {
                std::fs::remove_file(&pin).map_err(|error| failed(error.to_string()))?;
            }
            link.pin(&pin).map_err(|error| failed(chain(&error)))?;
        }
        self.pins.drop_other_versions()?;
        Ok(())
    }

    /// Returns the programs that `cgroup` does not run any more: somebody has detached or replaced them, or the cgroup
    /// has been removed and made again.
    pub(crate) fn detached(&self, cgroup: &Path) -> Vec<&'static str> {
        let cgroup_id = std::fs::metadata(cgroup).ok().map(|dir| CgroupId(dir.ino()));
        PROGRAMS
            .into_iter()
            .filter(|name| !self.refused.contains_key(name) && !self.is_attached(name, cgroup_id))
            .collect()
    }

    /// Returns whether the link of `program` is at this cgroup and runs the program that was loaded here.
    fn is_attached(&self, program: &str, cgroup_id: Option<CgroupId>) -> bool {
        let link =
            sys::open_link(&self.pins.link(program)).and_then(|link| sys::cgroup_link_info(link.as_fd()));
        let own = self.programs.program(program).and_then(|program| Some(program.info().ok()?.id()));
        link.is_ok_and(|link| Some(link.cgroup_id) == cgroup_id && Some(link.program_id) == own)
    }

    /// Returns the maps about sockets.
    ///
    /// # Errors
    ///
    /// [`DataplaneError::Open`] when a pin is gone.
    pub(crate) fn sockets(&self) -> Result<SocketMaps, DataplaneError> {
        Ok(SocketMaps {
            records: self.descriptor(maps::SOCKETS)?,
            orders: self.descriptor(maps::ORDERS)?,
            streams: self.descriptor(maps::STREAMS)?,
        })
    }

    /// Opens a pinned map.
    fn descriptor(&self, name: &str) -> Result<OwnedFd, OpenError> {
        let path = self.pins.map(name);
        let map = MapData::from_pin(&path).map_err(|source| OpenError::Pin { path: path.clone(), source })?;
        let fd = map.fd().as_fd().try_clone_to_owned();
        fd.map_err(|source| OpenError::Mmap { path, source })
    }
}

/// Object file with the programs and the layout of the maps.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("VIPR_EBPF_OBJECT"));

fn program<'a>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, DataplaneError> {
    let missing = DataplaneError::Program { program: name, source: ProgramError::UnexpectedProgramType };
    programs.program_mut(name).ok_or(missing)
}

/// Loads a program of the socket edge. Returns its verified instructions, if the kernel reports them.
fn load(program: &mut Program) -> Result<Option<u32>, ProgramError> {
    if let Program::CgroupSock(program) = program {
        program.load()?;
    } else {
        <&mut CgroupSockAddr>::try_from(&mut *program)?.load()?;
    }
    Ok(program.info()?.verified_instruction_count())
}

/// Leaves out programs whose counterpart is refused.
fn leave_out_halves(refused: &mut Refused) {
    for [one, other] in PAIRS {
        for (missing, left_out) in [(one, other), (other, one)] {
            if refused.contains_key(missing) {
                refused.entry(left_out).or_insert_with(|| format!("is not attached without {missing}"));
            }
        }
    }
}

/// Returns whether permission is missing. (A verdict of the verifier is EACCES.)
fn is_permission(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM))
}

fn failed(program: &'static str, source: ProgramError) -> DataplaneError {
    if is_permission(&source) {
        return DataplaneError::Permission(io::Error::from_raw_os_error(libc::EPERM));
    }
    DataplaneError::Program { program, source }
}

/// Attaches to a cgroup and returns the link, to be pinned.
fn attach(program: &mut Program, cgroup: &File) -> Result<FdLink, Box<dyn std::error::Error>> {
    if let Program::CgroupSock(program) = program {
        let id = program.attach(cgroup, CgroupAttachMode::Single)?;
        return Ok(FdLink::try_from(program.take_link(id)?)?);
    }
    let program: &mut CgroupSockAddr = program.try_into()?;
    let id = program.attach(cgroup, CgroupAttachMode::Single)?;
    Ok(FdLink::try_from(program.take_link(id)?)?)
}

/// Returns the number of elements that a map should have; 0 if the object decides.
fn entries(map: &str, want: Capacity, flows: u32) -> u32 {
    match map {
        maps::FRONTENDS => want.frontends,
        maps::SERVICES | maps::NAMES | maps::SERVICE_COUNTERS => want.services,
        maps::SLOTS => want.slots,
        maps::BACKENDS => want.backends,
        maps::AFFINITY | maps::NEW_AFFINITY => AFFINITY_ENTRIES,
        maps::UDP_FLOWS => UDP_FLOW_ENTRIES,
        maps::FLOWS => flows,
        maps::NEW_FLOWS => NEW_FLOW_ENTRIES,
        // A flow has one or two index entries.
        maps::FLOW_INDEX => flows.saturating_mul(2),
        maps::NEW_FLOW_INDEX => 2 * NEW_FLOW_ENTRIES,
        maps::FRAGMENTS => FRAGMENT_ENTRIES,
        maps::SOURCE_RANGES => want.source_ranges,
        maps::POD_SOURCES | maps::SERVICE_CIDRS => PREFIX_ENTRIES,
        maps::DEVICES => DEVICE_ENTRIES,
        maps::LOCAL_ADDRESSES => LOCAL_ADDRESS_ENTRIES,
        maps::OPT_OUT => OPT_OUT_ENTRIES,
        maps::SANDBOXES => SANDBOX_ENTRIES,
        _ => 0,
    }
}

fn check_kernel() -> Result<(), DataplaneError> {
    let (version, release) = kernel();
    if version < KERNEL_FLOOR { Err(DataplaneError::Kernel(release)) } else { Ok(()) }
}

/// Returns the version of the running kernel, and its whole release.
pub(super) fn kernel() -> ((u32, u32), String) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    drop(numbers);
    (version, release)
}

/// Tells missing permission apart from other failures of the first BPF system calls.
fn permission(error: EbpfError) -> DataplaneError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return DataplaneError::Permission(io::Error::from(io.kind()));
        }
        source = cause.source();
    }
    DataplaneError::Load(error)
}
