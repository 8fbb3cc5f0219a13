//! Reasons why the agent ends other than by a signal.

use std::path::PathBuf;

use proxy_common::addr::Addr;

use crate::agent::first_wait::FOR_POD_CIDRS;
use crate::bpf::dataplane::DataplaneError;
use crate::bpf::self_test::SelfTestError;
use crate::host::FollowError;
use crate::observe::http::HttpError;
use crate::sources::SourceError;

/// Reason why the agent ends other than by a signal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The dataplane cannot be set up.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The host's addresses or devices cannot be read.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// A server cannot serve.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The socket edge does not work.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// The maps cannot be read back or written.
    #[error("reading the pinned maps back: {0}")]
    ReadBack(#[from] aya::maps::MapError),
    /// The source has ended, which it never should.
    #[error("the source of objects has ended; restart the agent")]
    SourceEnded,
    /// The configuration file differs from the one at the start.
    #[error("the configuration file {0} has changed; the agent ends, to be started again with it")]
    FileChanged(PathBuf),
    /// Changes of the configuration file cannot be noticed.
    #[error("the configuration file {path} cannot be watched: {source}")]
    FileWatch {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// A thread cannot be started.
    #[error("a thread for probes and metrics: {0}; raise the limit of processes or open files")]
    Thread(std::io::Error),
    /// The node's primary IP, whose family most packets would use, is of a family that this host does not have.
    #[error("the node's primary IP {0} is IPv6, which is switched off on this host")]
    PrimaryFamily(Addr),
    /// Pods are recognized by the Node's podCIDRs, which do not come.
    #[error(
        "--detect-local-mode NodeCIDR: the Node has no podCIDRs after {FOR_POD_CIDRS:?}; let the control plane allocate \
         them, or choose another mode"
    )]
    NoPodCidrs,
    /// None of the Node's podCIDRs is of a family that this host has.
    #[error("--detect-local-mode NodeCIDR: this host has no family of the Node's podCIDRs {0}")]
    PodCidrFamily(String),
    /// The Node's podCIDRs differ from those at the start.
    #[error(
        "the Node's podCIDRs have changed from {before} to {after}; the agent ends, to be started again with them"
    )]
    PodCidrsChanged {
        /// The podCIDRs at the start.
        before: String,
        /// The podCIDRs now.
        after: String,
    },
}
