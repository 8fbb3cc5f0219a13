//! `SERVICES`, `SLOTS` and `NAMES`: the Service ports, each in one family.
//!
//! `SERVICES` is an mmapable array. The agent writes each 64-bit word of an element with one aligned release store; a
//! reader loads each word once. No word is ever half old and half new.

use bytemuck::{Pod, Zeroable};

use super::ids::Slot;

/// A range of `SLOTS`; loaded and stored as one aligned 64-bit word.
///
/// A range with `len` 0 is empty, and `base` holds the verdict: [`SlotRange::REJECT`] or [`SlotRange::DROP`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SlotRange {
    /// First slot.
    pub base: u32,
    /// Number of slots.
    pub len: u32,
}

impl SlotRange {
    /// Empty range: the client is refused.
    pub const REJECT: Self = Self { base: 1, len: 0 };
    /// Empty range: the client's packets are dropped without an answer.
    pub const DROP: Self = Self { base: 2, len: 0 };

    /// Returns whether there is no slot.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the slot at an offset, which is below `len`.
    #[inline(always)]
    pub const fn slot(self, offset: u32) -> Slot {
        Slot(self.base.wrapping_add(offset))
    }
}

/// Session affinity of a Service port; loaded and stored as one aligned 64-bit word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Affinity {
    /// Time for which a client is remembered after its last connection; 0 for no affinity.
    pub seconds: u32,
    /// Epoch of valid entries. Entries of another epoch are ignored, so a new epoch forgets every client.
    pub epoch: u32,
}

/// Element of `SERVICES`: one Service port in one family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Service {
    /// The set of the endpoints of the whole cluster.
    pub cluster: SlotRange,
    /// The set of this node's endpoints.
    pub local: SlotRange,
    /// Session affinity.
    pub affinity: Affinity,
}

const _: () = assert!(size_of::<Service>() == 24);

/// Longest namespace, Service name or port name (RFC 1123 label).
pub const NAME_LEN: usize = 63;

/// Value of `NAMES`: name of the Service port that a service id stands for. Strings are NUL-padded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: [u8; NAME_LEN + 1],
    /// Service name.
    pub name: [u8; NAME_LEN + 1],
    /// Port name; empty for an unnamed port.
    pub port_name: [u8; NAME_LEN + 1],
    /// IP protocol number.
    pub proto: u8,
    /// IP family: 4 or 6.
    pub family: u8,
    /// Zero.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<ServiceName>() == 196);
