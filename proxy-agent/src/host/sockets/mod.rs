//! Leads connected UDP sockets to where their VIP leads now, and ends those that cannot be led.
//!
//! A connected UDP socket keeps the address that connect() gave it and would talk to nobody for ever. The agent connects it to its VIP
//! once more, by an order that the hook on connect() carries out (`proxy_common::datapath::socket`): the socket keeps its port, and the
//! program notices nothing. Hook and connect() are two steps in the kernel, and the owner may connect the socket elsewhere in between;
//! so the socket has to show the VIP afterwards. One that does not, or that would send from an address that leads nowhere, is
//! destroyed: the application's next call fails, one that receives with ECONNABORTED (also one that waits already), one that sends
//! with EDESTADDRREQ. Then it connects again. TCP is not touched.
//!
//! Three steps, because no kernel lists the storage of UDP sockets by sock_diag (up to 6.18 it does so for TCP only):
//! sock_diag lists the connected UDP sockets of every network namespace (`diag`); a copy of each is taken from
//! the process that owns it (`owners`), since socket storage is read and written by descriptor, and is led if need be (`lead`); and
//! those that could not be led are destroyed by sock_diag, which goes by cookie, so that never another socket is hit.
//!
//! The agent has to see the host's processes (`hostPID`), and needs CAP_SYS_ADMIN (to enter namespaces),
//! CAP_SYS_PTRACE (to open other processes' namespaces and sockets), CAP_NET_ADMIN and CAP_BPF.
//!
//! Kernel: `pidfd_getfd` (5.6) and `CONFIG_INET_DIAG_DESTROY`; [`SocketSweeper::new`] finds out.

mod diag;
mod lead;
mod left;
mod namespaces;
mod owners;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{Map, MapData, MapError};
use netlink_packet_sock_diag::inet::SocketId;
use proxy_common::abi::socket::Order;
use proxy_common::addr::Addr;
use rustix::net::sockopt::socket_cookie;
use rustix::time::{ClockId, clock_gettime};

use self::diag::{Diag, cookie};
use self::namespaces::Namespace;
pub use self::namespaces::Places;
use crate::reconcile::stale::Connected;

/// Why sockets cannot be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// The kernel refuses SOCK_DESTROY.
    #[error(
        "this kernel is built without CONFIG_INET_DIAG_DESTROY: UDP sockets connected to a Service stay connected \
         to a backend that has left, until the application connects again"
    )]
    NoDestroy,
    /// The maps of records and orders cannot be used.
    #[error("the maps SOCKETS, ORDERS and STREAMS cannot be used: {0}")]
    Storage(#[source] MapError),
    /// The sock_diag socket failed.
    #[error("sock_diag, {what}: {source}")]
    Diag {
        /// What was asked of it.
        what: &'static str,
        /// The kernel's answer, or why it cannot be read.
        source: io::Error,
    },
    /// The host's processes cannot be listed.
    #[error("cannot read {path} to find the network namespaces and sockets of this host: {source}")]
    Processes {
        /// Where they are looked for.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A namespace that cannot be entered.
    #[error("cannot enter the network namespace {name} (CAP_SYS_ADMIN is needed): {source}")]
    Enter {
        /// A path that leads to it.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// Something else, inside one namespace.
    #[error("in the network namespace {name}: {source}")]
    Within {
        /// A path that leads to it.
        name: String,
        /// What happened.
        source: Box<Self>,
    },
    /// No thread to work in.
    #[error("cannot start a thread to enter network namespaces: {0}")]
    Thread(#[source] io::Error),
}

/// Errors that a sweep tells of single sockets.
const ERRORS: usize = 16;

/// What one sweep did.
#[derive(Debug, Default)]
pub struct Report {
    /// Network namespaces looked into.
    pub namespaces: usize,
    /// Connected UDP sockets seen, ours or not.
    pub examined: usize,
    /// Those of them that no process seems to own: closed meanwhile, or owned by a process that the agent cannot
    /// see. They are left alone.
    pub ownerless: usize,
    /// Processes that do not let us look at their namespace or their sockets (CAP_SYS_PTRACE is needed).
    pub hidden: usize,
    /// Sockets led to where their VIP leads now.
    pub led: usize,
    /// Sockets destroyed, because they could not be led.
    pub destroyed: usize,
    /// Both, by [`proxy_common::addr::Family::index`] of where they were connected.
    pub by_family: [usize; 2],
    /// CPU time that it took.
    pub cpu: Duration,
    /// What could not be done; the rest was.
    pub errors: Vec<SocketsError>,
}

/// Finds sockets, and leads or destroys them; made once, when the kernel is known to be able to.
#[derive(Debug)]
pub struct SocketSweeper {
    places: Places,
    left: left::Left,
}

impl SocketSweeper {
    /// Asks the kernel whether it can destroy sockets, without destroying any.
    ///
    /// # Errors
    ///
    /// [`SocketsError::NoDestroy`] says what will not work on this kernel; other errors say which permission or
    /// facility is missing.
    pub fn new(places: Places) -> Result<Self, SocketsError> {
        Diag::open()?.probe()?;
        Ok(Self { places, left: left::Left::default() })
    }

    /// Carries out what `order` says of every connected UDP socket of this host, those of the pods with the uids `opted_out` excepted. Blocking: a few system calls per network namespace and,
    /// if there is any connected UDP socket, one per descriptor of every process.
    ///
    /// # Errors
    ///
    /// When nothing could be done at all. What failed in one namespace only is in [`Report::errors`].
    pub fn follow(
        &self,
        storage: &SocketMaps,
        order: impl Fn(&Connected) -> Option<Order> + Sync,
        opted_out: &BTreeSet<Arc<str>>,
    ) -> Result<Report, SocketsError> {
        let storage = lead::Storage::open(storage).map_err(SocketsError::Storage)?;
        sweep(&self.places, &|socket| storage.treat(socket, &order, opted_out))
    }
}

/// What the socket edge and the agent share about sockets.
#[derive(Debug)]
pub struct SocketMaps {
    /// `SOCKETS`.
    pub records: OwnedFd,
    /// `ORDERS`.
    pub orders: OwnedFd,
    /// `STREAMS`.
    pub streams: OwnedFd,
}

fn map(fd: &OwnedFd) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_fd(fd.try_clone()?)?)
}

/// What becomes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is where it should be, or its owner has connected it elsewhere.
    Left,
    /// It has been led elsewhere.
    Led,
    /// It has to be destroyed.
    Doomed,
}

/// A socket in our hands.
struct Held<'a> {
    id: &'a SocketId,
    copy: OwnedFd,
    namespace: &'a Namespace,
    /// The directory of a process that has it, in procfs.
    process: &'a Path,
}

/// Says what becomes of a socket, and leads it.
type Treat<'a> = dyn Fn(&Held<'_>) -> Result<Fate, SocketsError> + Sync + 'a;

/// Treats every socket in every namespace, and destroys the doomed ones.
fn sweep(places: &Places, treat: &Treat<'_>) -> Result<Report, SocketsError> {
    let (report, cpu) = apart(|| sweep_here(places, treat))?;
    Ok(Report { cpu, ..report? })
}

/// Does work that enters namespaces, by a thread that serves no other purpose and ends here, so that no other code ever runs in the wrong
/// one. Returns also the CPU time that it took.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> Result<(T, Duration), SocketsError> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("sockets".to_owned());
        let work = || {
            let done = work();
            let cpu = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
            (done, cpu)
        };
        let thread = builder.spawn_scoped(scope, work).map_err(SocketsError::Thread)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// A listed socket; `diag` belongs to its namespace.
struct Candidate {
    diag: usize,
    id: SocketId,
}

fn sweep_here(places: &Places, treat: &Treat<'_>) -> Result<Report, SocketsError> {
    let found = namespaces::find(places)?;
    let mut report = Report { hidden: found.hidden, ..Report::default() };
    let mut diags = Vec::new();
    let mut candidates = BTreeMap::new();
    for namespace in found.namespaces {
        let name = || namespace.path.display().to_string();
        if let Err(error) = namespace.enter() {
            report.errors.push(error);
            continue;
        }
        report.namespaces += 1;
        let listed = Diag::open().and_then(|diag| {
            diag.list(|socket| {
                let candidate = Candidate { diag: diags.len(), id: socket.socket_id };
                candidates.insert(socket.inode, candidate);
            })?;
            Ok(diag)
        });
        match listed {
            Ok(diag) => diags.push((diag, namespace)),
            Err(error) => {
                candidates.retain(|_, candidate| candidate.diag < diags.len());
                report.errors.push(SocketsError::Within { name: name(), source: Box::new(error) });
            }
        }
    }

    report.examined = candidates.len();
    let mut doomed: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
    let looked = owners::visit(&places.proc, &mut candidates, |candidate, copy, process| {
        let Some((_, namespace)) = diags.get(candidate.diag) else { return true };
        if socket_cookie(&copy).ok() != Some(cookie(&candidate.id)) {
            return false;
        }
        match treat(&Held { id: &candidate.id, copy, namespace, process }) {
            Ok(Fate::Left) => {}
            Ok(Fate::Led) => {
                report.led += 1;
                report.by_family[family_of(&candidate.id)] += 1;
            }
            Ok(Fate::Doomed) => {
                doomed.entry(candidate.diag).or_default().insert(cookie(&candidate.id));
            }
            // There may be as many as there are sockets.
            Err(error) if report.errors.len() < ERRORS => report.errors.push(error),
            Err(_) => {}
        }
        true
    });
    let hidden = looked.map_err(|source| SocketsError::Processes { path: places.proc.clone(), source })?;
    report.hidden = report.hidden.max(hidden);
    report.ownerless = candidates.len();

    for (diag, cookies) in doomed {
        let Some((diag, namespace)) = diags.get(diag) else { continue };
        if let Err(error) = destroy(diag, &cookies, &mut report) {
            let name = namespace.path.display().to_string();
            report.errors.push(SocketsError::Within { name, source: Box::new(error) });
        }
    }
    Ok(report)
}

/// Destroys sockets by what they are connected to by now: the kernel finds them by that.
fn destroy(diag: &Diag, cookies: &BTreeSet<u64>, report: &mut Report) -> Result<(), SocketsError> {
    let mut found = Vec::new();
    diag.list(|socket| {
        if cookies.contains(&cookie(&socket.socket_id)) {
            found.push((socket.family, socket.socket_id));
        }
    })?;
    for (family, id) in found {
        let of_peer = family_of(&id);
        let destroyed = usize::from(diag.destroy(family, id)?);
        report.destroyed += destroyed;
        report.by_family[of_peer] += destroyed;
    }
    Ok(())
}

/// Index of the family of the peer.
fn family_of(id: &SocketId) -> usize {
    Addr::from(id.destination_address).family().index()
}

#[cfg(test)]
mod tests;
