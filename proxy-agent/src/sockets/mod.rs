//! Ends sockets that are still connected over UDP, *through us*, to a backend that has left.
//!
//! A connected UDP socket keeps the address that the socket edge gave it and would talk to nobody for ever.
//! Destroying it makes the application's next call fail with ECONNABORTED; it connects again and gets a backend
//! that lives. Whether a socket went through us is told by our own record in its socket storage (`SOCKETS`), which
//! sock_diag can list; a socket without a record, or one that has since been connected elsewhere, is left alone.
//! TCP is not touched.
//!
//! Sockets are found in every network namespace of the host, so the agent has to see the host's processes
//! (`hostPID`), and needs CAP_SYS_ADMIN, CAP_SYS_PTRACE (to open other users' namespaces), CAP_NET_ADMIN and
//! CAP_BPF.
//!
//! Kernel: socket storage in sock_diag (5.7) and `CONFIG_INET_DIAG_DESTROY`; [`SocketSweeper::new`] finds out.

mod diag;
mod message;
mod namespaces;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::path::PathBuf;

use proxy_common::abi::SocketRecord;
use proxy_common::addr::Addr;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::diag::Diag;
use self::message::Found;
pub use self::namespaces::Places;

/// Why sockets cannot be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// The kernel ignores the request for socket storage.
    #[error(
        "this kernel's sock_diag cannot list socket storage (it can since Linux 5.7): UDP sockets connected to a \
         Service stay connected to a backend that has left, until the application connects again"
    )]
    NoStorageListing,
    /// The kernel refuses SOCK_DESTROY.
    #[error(
        "this kernel is built without CONFIG_INET_DIAG_DESTROY: UDP sockets connected to a Service stay connected \
         to a backend that has left, until the application connects again"
    )]
    NoDestroy,
    /// The sock_diag socket failed.
    #[error("sock_diag, {what}: {source}")]
    Diag {
        /// What was asked of it.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel sent something that is no answer to the question.
    #[error("sock_diag, {what}: the kernel's answer cannot be read: {reason}")]
    Answer {
        /// What was asked of it.
        what: &'static str,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The host's processes cannot be listed.
    #[error("cannot read {path} to find the network namespaces of this host: {source}")]
    Processes {
        /// Where they are looked for.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Namespaces that may not be opened.
    #[error(
        "{count} processes do not let us open their network namespace (CAP_SYS_PTRACE is needed): \
         sockets there are left as they are"
    )]
    Hidden {
        /// How many processes.
        count: usize,
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
    /// Sockets destroyed.
    pub destroyed: usize,
    /// What could not be done; the rest was.
    pub errors: Vec<SocketsError>,
}

/// Finds and destroys sockets; made once, when the kernel is known to be able to.
#[derive(Debug)]
pub struct SocketSweeper {
    places: Places,
}

impl SocketSweeper {
    /// Asks the kernel whether it can do what is needed, without listing or destroying anything.
    ///
    /// # Errors
    ///
    /// [`SocketsError::NoStorageListing`] and [`SocketsError::NoDestroy`] say what will not work on this kernel;
    /// other errors say which permission or facility is missing.
    pub fn new(places: Places) -> Result<Self, SocketsError> {
        Diag::open()?.probe()?;
        Ok(Self { places })
    }

    /// Destroys every UDP socket of this host whose record in the socket storage map `sockets` is stale and that is
    /// still connected where the record says. Blocking: a few system calls per network namespace.
    ///
    /// # Errors
    ///
    /// When nothing could be done at all. What failed in one namespace only is in [`Report::errors`].
    pub fn destroy_stale(
        &self,
        sockets: BorrowedFd<'_>,
        is_stale: impl Fn(&SocketRecord) -> bool + Sync,
    ) -> Result<Report, SocketsError> {
        sweep(&self.places, Some(sockets.as_raw_fd()), &|found| {
            found.record.as_ref().is_some_and(|record| connected_by(found, record) && is_stale(record))
        })
    }
}

/// Whether the socket is still connected where its record says.
fn connected_by(found: &Found, record: &SocketRecord) -> bool {
    Addr::from(found.id.destination_address) == record.backend_addr
        && found.id.destination_port == record.backend_port.get()
}

/// Destroys what `condemned` says, in every namespace. A namespace is entered by a thread that serves no other
/// purpose and ends here, so that no other code ever runs in the wrong one.
fn sweep(
    places: &Places,
    storage: Option<RawFd>,
    condemned: &(dyn Fn(&Found) -> bool + Sync),
) -> Result<Report, SocketsError> {
    let found = namespaces::find(places)?;
    let work = || {
        let mut report = Report::default();
        if found.hidden > 0 {
            report.errors.push(SocketsError::Hidden { count: found.hidden });
        }
        for namespace in &found.namespaces {
            let name = || namespace.path.display().to_string();
            if let Err(error) =
                move_into_link_name_space(namespace.fd.as_fd(), Some(LinkNameSpaceType::Network))
            {
                report.errors.push(SocketsError::Enter { name: name(), source: error.into() });
                continue;
            }
            report.namespaces += 1;
            if let Err(error) = sweep_here(storage, condemned, &mut report) {
                report.errors.push(SocketsError::Within { name: name(), source: Box::new(error) });
            }
        }
        report
    };
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("sockets".to_owned());
        let thread = builder.spawn_scoped(scope, work).map_err(SocketsError::Thread)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Destroys what `condemned` says in the namespace of the calling thread.
fn sweep_here(
    storage: Option<RawFd>,
    condemned: &dyn Fn(&Found) -> bool,
    report: &mut Report,
) -> Result<(), SocketsError> {
    let diag = Diag::open()?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut stale = Vec::new();
        diag.list(family as u8, storage, |found| {
            report.examined += 1;
            if condemned(&found) {
                stale.push(found);
            }
        })?;
        for found in stale {
            report.destroyed += usize::from(diag.destroy(&found)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
