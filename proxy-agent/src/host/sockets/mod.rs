//! Leads connected UDP sockets to the backend that their VIP leads to now, and destroys sockets that cannot be led.
//!
//! A connected UDP socket keeps the address that connect() gave it, and would send to a backend that is gone for ever.
//! The agent connects the socket to its VIP again, by an order that the hook on connect() carries out
//! (`proxy_common::datapath::socket`). The socket keeps its port, and the application notices nothing. Hook and
//! connect() are two steps in the kernel, and the owner may connect the socket elsewhere in between, so the socket has
//! to show the VIP afterwards. A socket is destroyed if it does not show the VIP, or if it would send from an address
//! that replies do not reach. The application's next call then fails: receiving with ECONNABORTED (also in a call that
//! waits already), sending with EDESTADDRREQ. Then the application connects again. TCP is not touched.
//!
//! The work takes three steps, because no kernel lists the storage of UDP sockets by sock_diag (up to 6.18 sock_diag
//! lists that of TCP only):
//!
//! 1. sock_diag lists the connected UDP sockets of every network namespace (`diag`).
//! 2. A copy of each socket is taken from the process that owns it (`owners`), since socket storage is read and written
//!    by descriptor. The copy is led if necessary (`lead`).
//! 3. sock_diag destroys the sockets that could not be led. It identifies them by cookie, so that it never hits another
//!    socket.
//!
//! The agent has to see the host's processes (`hostPID`), and needs CAP_SYS_ADMIN (to enter namespaces), CAP_SYS_PTRACE
//! (to open other processes' namespaces and sockets), CAP_NET_ADMIN and CAP_BPF.
//!
//! The kernel needs `pidfd_getfd` (5.6) and `CONFIG_INET_DIAG_DESTROY`; [`SocketSweeper::new`] checks the latter.

mod diag;
mod error;
mod held;
mod lead;
mod left;
mod maps;
mod namespaces;
mod owners;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use netlink_packet_sock_diag::inet::SocketId;
use proxy_common::abi::SocketRecord;
use proxy_common::abi::socket::Order;
use proxy_common::addr::Addr;
use rustix::net::sockopt::socket_cookie;

use self::diag::{Diag, cookie};
pub(crate) use self::error::SocketsError;
use self::held::{Fate, Held};
pub(crate) use self::maps::SocketMaps;
pub(crate) use self::namespaces::Places;
use self::namespaces::apart;
use crate::reconcile::stale::Connected;

/// Number of errors about single sockets that a sweep reports.
const ERRORS: usize = 16;

/// Results of one sweep.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Number of network namespaces examined.
    pub(crate) namespaces: usize,
    /// Number of connected UDP sockets seen, ours or not.
    pub(crate) examined: usize,
    /// Number of these sockets that have no visible owner: closed meanwhile, or owned by a process that the agent
    /// cannot see. They are left alone.
    pub(crate) ownerless: usize,
    /// Number of processes whose namespace or sockets may not be examined (CAP_SYS_PTRACE is needed).
    pub(crate) hidden: usize,
    /// Number of sockets led to the backend that their VIP leads to now.
    pub(crate) led: usize,
    /// Number of sockets destroyed, because they could not be led.
    pub(crate) destroyed: usize,
    /// Number of sockets led or destroyed, by [`proxy_common::addr::Family::index`] of the peer.
    pub(crate) by_family: [usize; 2],
    /// CPU time of the sweep.
    pub(crate) cpu: Duration,
    /// Failures in parts of the sweep; the rest was done.
    pub(crate) errors: Vec<SocketsError>,
}

/// Finds sockets, and leads or destroys them. Made once, after a check that the kernel can destroy sockets.
#[derive(Debug)]
pub(crate) struct SocketSweeper {
    places: Places,
    left: left::Left,
}

impl SocketSweeper {
    /// Checks that the kernel can destroy sockets, without destroying any.
    ///
    /// # Errors
    ///
    /// [`SocketsError::NoDestroy`] says what will not work on this kernel; other errors say which permission or
    /// facility is missing.
    pub(crate) fn new(places: Places) -> Result<Self, SocketsError> {
        Diag::open()?.probe()?;
        Ok(Self { places, left: left::Left::default() })
    }

    /// Carries out the result of `order` for every connected UDP socket of this host, except those of the pods with the
    /// uids `opted_out`. Blocking: a few system calls per network namespace and, if there is any connected UDP socket,
    /// one per descriptor of every process.
    ///
    /// # Errors
    ///
    /// Returns an error if nothing could be done at all. Failures in single namespaces are in [`Report::errors`].
    pub(crate) fn follow(
        &self,
        storage: &SocketMaps,
        order: impl Fn(&Connected) -> Option<Order> + Sync,
        opted_out: &BTreeSet<Arc<str>>,
    ) -> Result<Report, SocketsError> {
        let storage = lead::Storage::open(storage).map_err(SocketsError::Storage)?;
        sweep(&self.places, &|socket| storage.treat(socket, &order, opted_out))
    }

    /// Frees the elements of `STREAMS` whose record may be judged and whose sockets are gone. Returns the number of
    /// freed elements and the CPU time used. Blocking.
    ///
    /// # Errors
    ///
    /// Returns an error if a namespace cannot be examined. Then nothing is freed.
    pub(crate) fn free_streams(
        &self,
        maps: &SocketMaps,
        may_be_judged: impl Fn(&SocketRecord) -> bool + Send,
    ) -> Result<(usize, Duration), SocketsError> {
        let (freed, cpu) = apart(|| self.left.free(&self.places, maps, may_be_judged))?;
        Ok((freed?, cpu))
    }
}

/// Decides the fate of a socket, and leads it if that is its fate.
type Treat<'a> = dyn Fn(&Held<'_>) -> Result<Fate, SocketsError> + Sync + 'a;

/// Treats every socket in every namespace, and destroys the doomed ones.
fn sweep(places: &Places, treat: &Treat<'_>) -> Result<Report, SocketsError> {
    let (report, cpu) = apart(|| sweep_here(places, treat))?;
    Ok(Report { cpu, ..report? })
}

/// A listed socket. `diag` is the index of its namespace's sock_diag socket.
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
                let name = namespace.path.display().to_string();
                report.errors.push(SocketsError::Within { name, source: Box::new(error) });
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
            // There may be as many errors as sockets.
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

/// Destroys sockets by their current peers, because the kernel finds a socket by its addresses.
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

/// Returns the index of the peer's family.
fn family_of(id: &SocketId) -> usize {
    Addr::from(id.destination_address).family().index()
}

#[cfg(test)]
mod tests;
