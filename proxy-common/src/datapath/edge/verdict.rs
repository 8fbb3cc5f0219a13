//! Kinds of devices, and decisions on packets.

use crate::abi::{IfIndex, Origin};

/// Kind of device that a program runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Device that leads to other machines.
    External,
    /// Host side of a pod's interface.
    Pod,
}

impl Edge {
    /// Returns the origin of the flows that a packet on a device of this kind can belong to.
    #[inline(always)]
    pub(super) const fn origin(self, ifindex: IfIndex) -> Origin {
        match self {
            Self::External => Origin::OUTSIDE,
            Self::Pod => Origin::pod(ifindex),
        }
    }
}

/// Decision on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on unchanged.
    Pass,
    /// Goes on, translated.
    Translated,
    /// Is dropped.
    Drop,
    /// Has been turned into a reset or an ICMP error: goes back where it came from.
    Reply,
    /// Goes on, translated, by another device than the one that routing chose.
    Elsewhere,
}
