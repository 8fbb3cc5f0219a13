//! Where objects come from: the Kubernetes API ([`api`]) or a directory of manifests ([`manifests`]).
//!
//! Both turn Kubernetes objects into [`crate::reconcile::cluster::Change`]s by [`convert`] and send them as [`Update`]s, so
//! that nothing behind this module knows which of the two it is. Neither gives up once it runs: what fails is
//! retried, and the last state that was known stays in force.

use std::path::PathBuf;

use thiserror::Error;

use crate::reconcile::cluster::Change;

pub mod convert;
pub mod objects;
mod share;
mod text;

pub mod api;
pub mod manifests;

/// What a source sends to the agent, in order.
#[derive(Debug)]
pub enum Update {
    /// Changes that belong together; all are applied before anything is programmed.
    Changes(Vec<Change>),
    /// The first full list of every kind has been delivered. Sent once; nothing is programmed or pruned before.
    Synced,
    /// The objects (or files) that cannot be used at present, each with the reason: the whole list, replacing the
    /// one before.
    Problems(Vec<Problem>),
}

/// Something a user has to mend.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// What it is about: `Service ns/name`, or `file.yaml, document 2`.
    pub object: String,
    /// What is wrong, naming the field, and what happens because of it.
    pub reason: String,
}

/// What becomes of an object that cannot be used.
const fn outcome(was_known: bool) -> &'static str {
    if was_known { "its last good state stays in force" } else { "it is ignored" }
}

/// Why a source cannot even start. Everything else heals and is retried.
#[derive(Debug, Error)]
pub enum SourceError {
    /// `--manifests` names something that cannot be read as a directory.
    #[error("cannot read the manifest directory {path}")]
    Directory {
        /// The directory as given.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel gives us no inotify instance.
    #[error("cannot watch directories; if too many files are open, raise fs.inotify.max_user_instances")]
    Inotify {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kubeconfig cannot be read or makes no sense.
    #[error("cannot use the kubeconfig {path}")]
    Kubeconfig {
        /// The file as given.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The proxy in the environment makes no sense.
    #[error("cannot use the proxy in front of the API server")]
    Proxy(#[source] api::Wrong),
    /// No kubeconfig was given and this is not a pod with a ServiceAccount.
    #[error("cannot use the ServiceAccount of this pod; outside a cluster give --kubeconfig FILE")]
    InCluster {
        /// What is missing.
        source: Box<kube::config::InClusterError>,
    },
    /// The credentials or certificates in the configuration cannot be used.
    #[error("cannot set up a connection to the API server {server}")]
    Client {
        /// Address of the API server.
        server: String,
        /// What is wrong.
        source: Box<kube::Error>,
    },
}
