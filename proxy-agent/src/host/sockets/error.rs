//! Reasons why sockets cannot be listed, led or destroyed.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;

/// Reason why sockets cannot be listed, led or destroyed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketsError {
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
        /// The request that failed.
        what: &'static str,
        /// The kernel's error, or the reason why its answer cannot be read.
        source: io::Error,
    },
    /// The host's processes cannot be listed.
    #[error("cannot read {path} to find the network namespaces and sockets of this host: {source}")]
    Processes {
        /// The procfs.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A network namespace cannot be entered.
    #[error("cannot enter the network namespace {name} (CAP_SYS_ADMIN is needed): {source}")]
    Enter {
        /// A path that leads to the namespace.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another error, inside one namespace.
    #[error("in the network namespace {name}: {source}")]
    Within {
        /// A path that leads to the namespace.
        name: String,
        /// The error.
        source: Box<Self>,
    },
    /// No thread could be started.
    #[error("cannot start a thread to enter network namespaces: {0}")]
    Thread(#[source] io::Error),
}
