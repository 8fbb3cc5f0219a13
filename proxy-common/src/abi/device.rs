//! `DEVICES`: facts that the packet edge needs about the device that it runs on. Written by the agent.

use bytemuck::{Pod, Zeroable};

use super::ids::ServiceId;
use crate::addr::Addr;

/// Value of `DEVICES`; the key is the interface index.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Device {
    /// Source for IPv4 packets to other nodes' pods through this device; zero for none.
    pub snat_v4: Addr,
    /// Source for IPv6 packets to other nodes' pods through this device; zero for none.
    pub snat_v6: Addr,
    /// Bits of [`flags`].
    pub flags: u32,
}

/// Bits of [`Device::flags`].
pub mod flags {
    /// Packets that enter here are local pod traffic, whatever their source (detect-local by interface).
    pub const NEAR: u32 = 1 << 0;
    /// The device is the host's side of a pod's interface: an address that the kernel routes to this device is that
    /// pod's.
    pub const POD: u32 = 1 << 1;
    /// The device is the bridge of the interfaces of this node's pods: the network stack sees their packets enter
    /// through it.
    pub const POD_BRIDGE: u32 = 1 << 2;
}

/// Key of the `SOURCE_RANGES` LPM trie, in the layout that `struct bpf_lpm_trie_key` demands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct SourceRangeKey {
    /// Number of bits that are compared: 32 for the service, and those of the prefix in the 128-bit form.
    pub len: u32,
    /// Service id.
    pub service: ServiceId,
    /// First address of the prefix.
    pub addr: Addr,
}

const _: () = assert!(size_of::<Device>() == 36);
const _: () = assert!(size_of::<SourceRangeKey>() == 24);
