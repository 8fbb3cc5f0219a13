//! Proof that the socket edge works, by a datagram of the agent's own.
//!
//! A probe frontend leads to a socket of the agent. If a datagram sent to the probe address arrives at that socket, the
//! programs run for processes of this cgroup and translate. On the way the socket edge learns the host's network
//! namespace: the one that the agent runs in. If another process sends to the probe address meanwhile, by the port that
//! only the kernel and the agent know, the socket edge learns that process's namespace instead. So if the kernel tells
//! the agent its own namespace (5.14), the agent corrects the map ([`settle`]).
//!
//! Whether the socket edge serves other processes as well depends on the cgroup ([`reach`]).

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_common::abi::frontend::flags::PROBE;
use proxy_common::abi::{Affinity, Backend, BackendState, FrontendKey, FrontendValue, Service, SlotRange};
use proxy_common::abi::{BackendId, ServiceId, backend, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;

use crate::bpf::sys;
use crate::bpf::writable::WritableMaps;
use crate::host::sys::netns_cookie;
use crate::reconcile::store::{MapStore, Op, StoreError};

/// The IPv4 dummy address (RFC 7600): never a real destination.
const PROBE_ADDR: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
const TIMEOUT: Duration = Duration::from_secs(1);
/// The cgroups of this process, by the paths that its cgroup namespace shows (cgroup_namespaces(7)).
const OWN_CGROUP: &str = "/proc/self/cgroup";

/// Reason why the self-test failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SelfTestError {
    /// The probe frontend could not be written.
    #[error("self-test: {0}")]
    Store(#[from] StoreError),
    /// No socket could be opened on the loopback address.
    #[error("self-test: a UDP socket on 127.0.0.1: {0}; is the loopback interface up?")]
    Socket(io::Error),
    /// The datagram was not translated.
    #[error(
        "self-test: a datagram of this process to a Service address was not translated ({0}): the agent does not run \
         below the cgroup that the programs are attached to; give the root of the host's cgroup v2 hierarchy with \
         --cgroup-path (in a container: mount the host's /sys/fs/cgroup)"
    )]
    NotTranslated(String),
    /// No process except this one would be served.
    #[error(
        "self-test: {0} is the cgroup of this process itself, and not the root of the cgroup v2 hierarchy: no other process would \
         be served; give the root of the host's with --cgroup-path (in a container, which may see its own part of the \
         hierarchy only: mount the host's /sys/fs/cgroup)"
    )]
    OwnCgroup(PathBuf),
    /// The reach of the cgroup cannot be determined.
    #[error("self-test: {path}: {source}")]
    Cgroup {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Processes that are served by programs attached to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Every process of the host: the cgroup is the root of the hierarchy.
    Host,
    /// Processes in and below this cgroup, with its id. This process is not the only one.
    Below(u64),
}

/// Returns which processes are served by programs attached to `cgroup`. Programs attached to a cgroup run for all
/// processes below it. So once a datagram of this process is translated ([`run`]), others are served too, unless
/// `cgroup` is the cgroup of this process itself and the root of its cgroup namespace. A container that sees only its
/// own part of the hierarchy has such a cgroup: the self-test passes, and no pod is served.
///
/// # Errors
///
/// [`SelfTestError::OwnCgroup`]; [`SelfTestError::Cgroup`] if the cgroup cannot be read.
pub(crate) fn reach(cgroup: &Path) -> Result<Reach, SelfTestError> {
    use std::os::unix::fs::MetadataExt as _;
    let failed = |path: &Path, source| SelfTestError::Cgroup { path: path.to_path_buf(), source };
    // The id of a cgroup is its inode number; the root always has the first one.
    let id = std::fs::metadata(cgroup).map_err(|error| failed(cgroup, error))?.ino();
    if id == 1 {
        return Ok(Reach::Host);
    }
    // Otherwise the rest of the host's hierarchy is visible, or this process is not in the visible part.
    let own = std::fs::read_to_string(OWN_CGROUP).map_err(|error| failed(Path::new(OWN_CGROUP), error))?;
    if !own.lines().any(|line| line == "0::/") {
        return Ok(Reach::Below(id));
    }
    let members = cgroup.join("cgroup.procs");
    let own = std::process::id().to_string();
    match std::fs::read_to_string(&members) {
        Ok(pids) if pids.lines().any(|pid| pid == own) => Err(SelfTestError::OwnCgroup(cgroup.to_path_buf())),
        Ok(_) => Ok(Reach::Below(id)),
        // A threaded cgroup has no list of processes. Its processes belong to the nearest cgroup above that is not
        // threaded.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Reach::Below(id)),
        Err(error) => Err(failed(&members, error)),
    }
}

/// Sends a datagram through the socket edge and removes every trace of it.
///
/// # Errors
///
/// [`SelfTestError`] says what to check.
pub(crate) fn run(maps: &mut impl MapStore) -> Result<(), SelfTestError> {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(SelfTestError::Socket)?;
    let to = receiver.local_addr().map_err(SelfTestError::Socket)?;
    let key = FrontendKey::exact(Addr::from(PROBE_ADDR), Be16::new(to.port()), proto::UDP);
    // The port is the kernel's random choice, so that no pod that connects to the probe address can be taken for the
    // host. Id 0 of every array is reserved for this frontend.
    let state = BackendState { flags: backend::flags::IN_CLUSTER | backend::flags::IN_LOCAL, generation: 0 };
    let target = Backend {
        addr: to.ip().into(),
        port: Be16::new(to.port()),
        pad: [0; 2],
        service: ServiceId::NONE,
        state,
    };
    let range = SlotRange { base: 0, len: 1 };
    let service = Service { cluster: range, local: range, affinity: Affinity::default() };
    let setup = [
        Op::Backend(BackendId::NONE, target),
        Op::Slots(0, vec![BackendId::NONE]),
        Op::Service(ServiceId::NONE, service),
        Op::Frontend(key, Some(FrontendValue::new(&key, ServiceId::NONE, PROBE))),
    ];
    let teardown = [
        Op::Frontend(key, None),
        Op::Service(
            ServiceId::NONE,
            Service { cluster: SlotRange::REJECT, local: SlotRange::REJECT, ..service },
        ),
        Op::Backend(BackendId::NONE, Backend::default()),
    ];
    for op in &setup {
        maps.apply(op)?;
    }
    let proof = exchange(&receiver, to);
    for op in &teardown {
        maps.apply(op)?;
    }
    proof
}

/// Writes our own network namespace as the host's, if a pod has taught the socket edge another one while the probe was
/// there.
///
/// # Errors
///
/// [`SelfTestError::Store`].
pub(crate) fn settle(maps: &WritableMaps) -> Result<(), SelfTestError> {
    // Programs that have seen the probe's frontend may still write the namespace.
    let _ = sys::grace_period();
    let learned = maps.host_netns();
    let Some(own) = netns_cookie().filter(|own| *own != learned) else { return Ok(()) };
    tracing::warn!(
        learned = learned.0,
        own = own.0,
        "another network namespace has been taken for the host's; it is not any more"
    );
    Ok(maps.set_host_netns(own)?)
}

fn exchange(receiver: &UdpSocket, to: SocketAddr) -> Result<(), SelfTestError> {
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(SelfTestError::Socket)?;
    receiver.set_read_timeout(Some(TIMEOUT)).map_err(SelfTestError::Socket)?;
    // The kernel refuses to route a packet from a loopback source to the probe address, so nothing can leave the host.
    sender.connect((PROBE_ADDR, to.port())).map_err(not_translated)?;
    let token = to.port().to_be_bytes();
    sender.send(&token).map_err(not_translated)?;
    let mut buffer = [0; 16];
    let len = receiver.recv(&mut buffer).map_err(not_translated)?;
    if buffer.get(..len) == Some(&token) {
        Ok(())
    } else {
        Err(SelfTestError::NotTranslated("something else arrived".to_owned()))
    }
}

fn not_translated(error: io::Error) -> SelfTestError {
    SelfTestError::NotTranslated(error.to_string())
}
