//! `DEVICES`: what the packet edge must know of the device it runs on. Written by the agent.

use bytemuck::{Pod, Zeroable};

use crate::addr::Addr;

/// Value of `DEVICES`; the key is the interface index.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Device {
    /// Source for IPv4 packets to other nodes' pods through this device; zero for none.
    pub snat_v4: Addr,
    /// The same for IPv6.
    pub snat_v6: Addr,
    /// Bits of [`flags`].
    pub flags: u32,
}

/// Bits of [`Device::flags`].
pub mod flags {
    /// Packets from here are local pod traffic, whatever their source (detect-local by interface).
    pub const NEAR: u32 = 1 << 0;
    /// The host's side of a pod's interface: whom the kernel's routes lead to by it is that pod.
    pub const POD: u32 = 1 << 1;
    /// The network stack sees packets of this node's pods enter through it: it is the bridge of their interfaces.
    pub const POD_BRIDGE: u32 = 1 << 2;
}

/// Key of the `SOURCE_RANGES` LPM trie, in the layout that `struct bpf_lpm_trie_key` demands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct SourceRangeKey {
    /// Bits that count: 32 for the service and those of the prefix in the 128-bit form.
    pub len: u32,
    /// Service id.
    pub service: u32,
    /// The first address of the prefix.
    pub addr: Addr,
}

const _: () = assert!(size_of::<Device>() == 36);
const _: () = assert!(size_of::<SourceRangeKey>() == 24);
