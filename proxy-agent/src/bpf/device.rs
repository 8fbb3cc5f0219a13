//! A device to attach programs to, in one direction, and the reasons why that fails.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::programs::{ProgramError, TcAttachType};
use proxy_common::abi::IfIndex;
use serde::{Deserialize, Serialize};

use super::load::reason;
use crate::bpf::chain;

/// Direction of packets, seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Direction {
    /// Out of the host.
    Egress,
    /// Into the host.
    Ingress,
}

impl Direction {
    /// Both directions, in the order in which programs are attached: the reply direction first, so that no request is
    /// translated whose reply would not be.
    pub(crate) const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Egress => TcAttachType::Egress,
            Self::Ingress => TcAttachType::Ingress,
        }
    }
}

/// Reason why a program is not attached to a device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    /// aya or the kernel refused.
    #[error("{program}: {}", reason(source))]
    Program {
        /// The program.
        program: &'static str,
        /// Error of aya or the kernel.
        source: ProgramError,
    },
    /// A pin could not be made, read or replaced.
    #[error("{path}: {source}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The programs of the device cannot be listed.
    #[error("{program}: listing the programs of the device: {source}")]
    Order {
        /// The program.
        program: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The name now belongs to another device than a moment ago.
    #[error("{program}: the device was renamed or replaced meanwhile")]
    Moved {
        /// The program.
        program: &'static str,
    },
    /// Another program takes our place again and again.
    #[error(
        "{program}: another program takes its place at this device whenever it is put back; see `bpftool net`"
    )]
    Rival {
        /// The program.
        program: &'static str,
    },
    /// Another queueing discipline has the place of clsact.
    #[error(
        "{program}: the device has a queueing discipline of the kind `ingress`, which has no place for filters on the way out; \
         put clsact in its place"
    )]
    Ingress {
        /// The program.
        program: &'static str,
    },
    /// The object for this kind of device cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The kernel has refused to load the program.
    #[error("{program}: {reason}")]
    Refused {
        /// The program.
        program: &'static str,
        /// The verifier's reason, and the loss.
        reason: String,
    },
}

/// A device to attach to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device<'a> {
    /// Interface index.
    pub(crate) index: IfIndex,
    /// Interface name.
    pub(crate) name: &'a str,
}

/// Reason why the object or its maps cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("loading the packet edge: {}", chain(.0))]
pub struct LoadError(#[from] EbpfError);
