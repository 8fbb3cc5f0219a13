//! Ends sockets that are still connected over UDP, *through us*, to a backend that has left.
//!
//! A connected UDP socket keeps the address that the socket edge gave it and would talk to nobody for ever.
//! Destroying it makes the application's next call fail: one that receives with ECONNABORTED (also one that waits
//! already), one that sends with EDESTADDRREQ. It connects again and gets a backend that lives. Whether a socket went
//! through us is told by our own record in its socket storage (`SOCKETS`). A socket without a record, or one that has
//! since been connected elsewhere, is left alone. TCP is not touched.
//!
//! Three steps, because no kernel lists the storage of UDP sockets by sock_diag (up to 6.18 it does so for TCP only):
//! sock_diag lists the connected UDP sockets of every network namespace (`diag`); a copy of each is taken from
//! the process that owns it (`owners`), since socket storage is read by descriptor; and the stale ones are destroyed
//! by sock_diag, which goes by cookie, so that never another socket is hit.
//!
//! The agent has to see the host's processes (`hostPID`), and needs CAP_SYS_ADMIN (to enter namespaces),
//! CAP_SYS_PTRACE (to open other processes' namespaces and sockets), CAP_NET_ADMIN and CAP_BPF.
//!
//! Kernel: `pidfd_getfd` (5.6) and `CONFIG_INET_DIAG_DESTROY`; [`SocketSweeper::new`] finds out.

mod diag;
mod namespaces;
mod owners;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use aya::maps::{Map, MapData, MapError, SkStorage};
use netlink_packet_sock_diag::inet::SocketId;
use proxy_common::abi::SocketRecord;
use proxy_common::addr::Addr;
use rustix::net::sockopt::socket_cookie;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::diag::{Diag, cookie};
pub use self::namespaces::Places;

/// Why sockets cannot be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// The kernel refuses SOCK_DESTROY.
    #[error(
        "this kernel is built without CONFIG_INET_DIAG_DESTROY: UDP sockets connected to a Service stay connected \
         to a backend that has left, until the application connects again"
    )]
    NoDestroy,
    /// The map of records cannot be used.
    #[error("the socket storage map SOCKETS cannot be read: {0}")]
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
    /// Sockets destroyed.
    pub destroyed: usize,
    /// The same, by [`proxy_common::addr::Family::index`] of the backend.
    pub destroyed_by_family: [usize; 2],
    /// What could not be done; the rest was.
    pub errors: Vec<SocketsError>,
}

/// Finds and destroys sockets; made once, when the kernel is known to be able to.
#[derive(Debug)]
pub struct SocketSweeper {
    places: Places,
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
        Ok(Self { places })
    }

    /// Destroys every UDP socket of this host whose record in the socket storage map `sockets` is stale and that is
    /// still connected where the record says. Blocking: a few system calls per network namespace and, if there is
    /// any connected UDP socket, one per descriptor of every process.
    ///
    /// # Errors
    ///
    /// When nothing could be done at all. What failed in one namespace only is in [`Report::errors`].
    pub fn destroy_stale(
        &self,
        sockets: BorrowedFd<'_>,
        is_stale: impl Fn(&SocketRecord) -> bool + Sync,
    ) -> Result<Report, SocketsError> {
        let records = records(sockets).map_err(SocketsError::Storage)?;
        sweep(&self.places, &|id, socket| match records.get(&socket, 0) {
            Ok(record) => Ok(connected_by(id, &record) && is_stale(&record)),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(SocketsError::Storage(error)),
        })
    }
}

fn records(sockets: BorrowedFd<'_>) -> Result<SkStorage<MapData, SocketRecord>, MapError> {
    Map::from_map_data(MapData::from_fd(sockets.try_clone_to_owned()?)?)?.try_into()
}

/// Whether the socket is still connected where its record says.
fn connected_by(id: &SocketId, record: &SocketRecord) -> bool {
    Addr::from(id.destination_address) == record.backend_addr
        && id.destination_port == record.backend_port.get()
}

/// Judges a socket by its identity and a copy of its descriptor.
type Condemn<'a> = dyn Fn(&SocketId, OwnedFd) -> Result<bool, SocketsError> + Sync + 'a;

/// Destroys what `condemned` says, in every namespace. Namespaces are entered by a thread that serves no other
/// purpose and ends here, so that no other code ever runs in the wrong one.
fn sweep(places: &Places, condemned: &Condemn<'_>) -> Result<Report, SocketsError> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("sockets".to_owned());
        let thread =
            builder.spawn_scoped(scope, || sweep_here(places, condemned)).map_err(SocketsError::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A listed socket; `diag` belongs to its namespace.
struct Candidate {
    diag: usize,
    family: u8,
    id: SocketId,
}

fn sweep_here(places: &Places, condemned: &Condemn<'_>) -> Result<Report, SocketsError> {
    let found = namespaces::find(places)?;
    let mut report = Report { hidden: found.hidden, ..Report::default() };
    let mut diags = Vec::new();
    let mut candidates = BTreeMap::new();
    for namespace in found.namespaces {
        let name = || namespace.path.display().to_string();
        if let Err(error) = move_into_link_name_space(namespace.fd.as_fd(), Some(LinkNameSpaceType::Network))
        {
            report.errors.push(SocketsError::Enter { name: name(), source: error.into() });
            continue;
        }
        report.namespaces += 1;
        let listed = Diag::open().and_then(|diag| {
            diag.list(|socket| {
                let candidate = Candidate { diag: diags.len(), family: socket.family, id: socket.socket_id };
                candidates.insert(socket.inode, candidate);
            })?;
            Ok(diag)
        });
        match listed {
            Ok(diag) => diags.push((diag, name())),
            Err(error) => {
                candidates.retain(|_, candidate| candidate.diag < diags.len());
                report.errors.push(SocketsError::Within { name: name(), source: Box::new(error) });
            }
        }
    }

    report.examined = candidates.len();
    let mut stale = Vec::new();
    let looked = owners::visit(&places.proc, &mut candidates, |candidate, copy| {
        if socket_cookie(&copy).ok() != Some(cookie(&candidate.id)) {
            return false;
        }
        match condemned(&candidate.id, copy) {
            Ok(true) => stale.push((candidate.diag, candidate.family, candidate.id.clone())),
            Ok(false) => {}
            Err(error) => report.errors.push(error),
        }
        true
    });
    let hidden = looked.map_err(|source| SocketsError::Processes { path: places.proc.clone(), source })?;
    report.hidden = report.hidden.max(hidden);
    report.ownerless = candidates.len();

    for (diag, family, id) in stale {
        let Some((diag, name)) = diags.get(diag) else { continue };
        let of_backend = Addr::from(id.destination_address).family().index();
        match diag.destroy(family, id) {
            Ok(destroyed) => {
                report.destroyed += usize::from(destroyed);
                report.destroyed_by_family[of_backend] += usize::from(destroyed);
            }
            Err(error) => {
                report.errors.push(SocketsError::Within { name: name.clone(), source: Box::new(error) });
            }
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests;
