//! Errors that keep a source from starting.

use std::path::PathBuf;

use thiserror::Error;

use super::api::kubeconfig::Wrong;

/// Reason why a source cannot start. Later errors do not end a source: the failed operations are retried.
#[derive(Debug, Error)]
pub enum SourceError {
    /// `--manifests` names something that cannot be read as a directory.
    #[error("cannot read the manifest directory {path}")]
    Directory {
        /// The directory as given.
        path: PathBuf,
        /// Error that the kernel returned.
        source: std::io::Error,
    },
    /// The kernel does not provide an inotify instance.
    #[error("cannot watch directories; if too many files are open, raise fs.inotify.max_user_instances")]
    Inotify {
        /// Error that the kernel returned.
        source: std::io::Error,
    },
    /// The kubeconfig cannot be read or is invalid.
    #[error("cannot use the kubeconfig {path}")]
    Kubeconfig {
        /// The file as given.
        path: PathBuf,
        /// Reason why the kubeconfig cannot be used.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The proxy named by the environment is not a valid URL.
    #[error("cannot use the proxy in front of the API server")]
    Proxy(#[source] Wrong),
    /// No kubeconfig was given and this is not a pod with a ServiceAccount.
    #[error("cannot use the ServiceAccount of this pod; outside a cluster give --kubeconfig FILE")]
    InCluster {
        /// Part that is missing or cannot be read.
        source: Box<kube::config::InClusterError>,
    },
    /// The credentials or certificates in the configuration cannot be used.
    #[error("cannot set up a connection to the API server {server}")]
    Client {
        /// Address of the API server.
        server: String,
        /// Reason why the client cannot be made.
        source: Box<kube::Error>,
    },
}
