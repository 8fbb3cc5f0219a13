//! Role of a device.

use crate::abi::{IfIndex, Origin};

/// Role of a device that the packet edge's programs run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Leads to clients and to other nodes.
    External,
    /// Leads to pods of this node: the host's side of their interfaces.
    Pod,
}

impl Role {
    /// Returns the role in one word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::Pod => "pod",
        }
    }

    /// Returns the origin of the flows that a packet on a device of this role can belong to.
    #[inline(always)]
    pub(super) const fn origin(self, ifindex: IfIndex) -> Origin {
        match self {
            Self::External => Origin::OUTSIDE,
            Self::Pod => Origin::pod(ifindex),
        }
    }
}
