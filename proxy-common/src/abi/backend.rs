//! `BACKENDS`: mmapable array, from id to one endpoint of one Service port. Id 0 is never used.
//!
//! `addr`, `port` and `service` never change while the id is published; `state` is one aligned word.

use bytemuck::{Pod, Zeroable};

use super::ids::ServiceId;
use crate::{addr::Addr, be::Be16};

/// Flags and generation of a backend; loaded and stored as one aligned 64-bit word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct BackendState {
    /// Bits of [`flags`].
    pub flags: u32,
    /// Number that grows each time the id is given out anew and each time the endpoint enters a set again.
    pub generation: u32,
}

/// Bits of [`BackendState::flags`].
pub mod flags {
    /// The endpoint is in the cluster set of its Service port.
    pub const IN_CLUSTER: u32 = 1 << 0;
    /// The endpoint is in the local set of its Service port.
    pub const IN_LOCAL: u32 = 1 << 1;
    /// The endpoint is serving: UDP flows to it may go on.
    pub const SERVING: u32 = 1 << 2;
    /// The endpoint runs on this node.
    pub const ON_THIS_NODE: u32 = 1 << 3;
}

/// Element of `BACKENDS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Backend {
    /// Address of the endpoint.
    pub addr: Addr,
    /// Port of the endpoint.
    pub port: Be16,
    /// Zero.
    pub pad: [u8; 2],
    /// Id of the Service port that the endpoint belongs to; 0 for a free id.
    pub service: ServiceId,
    /// Flags and generation.
    pub state: BackendState,
}

const _: () = assert!(size_of::<Backend>() == 32);
const _: () = assert!(core::mem::offset_of!(Backend, state) == 24);
