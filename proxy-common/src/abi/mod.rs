//! The map ABI: every type that lives in a BPF map, with its size asserted.
//!
//! All types are `#[repr(C)]`, without implicit padding, and any bit pattern is a valid value: enums are
//! integers with constants. Addresses and ports are in network byte order ([`crate::addr::Addr`],
//! [`crate::be::Be16`]), everything else in host order. Changing a size, an offset or a meaning here needs a new
//! [`ABI_VERSION`]: the agent pins maps below a directory that carries it.

pub mod affinity;
pub mod backend;
pub mod counters;
pub mod device;
pub mod event;
pub mod filter;
pub mod flow;
pub mod frontend;
pub mod ids;
pub mod maps;
#[cfg(feature = "user")]
mod pod;
pub mod proto;
pub mod service;
pub mod socket;

pub use affinity::{AffinityKey, AffinityValue};
pub use backend::{Backend, BackendState};
pub use counters::Counter;
pub use device::{Device, SourceRangeKey};
pub use event::{Event, Trace};
pub use filter::{FILTER_WORDS, FilterBit};
pub use flow::{Flow, FlowKey, FlowKind, FlowRef, FragmentKey, FragmentPorts, Origin};
pub use frontend::{FrontendKey, FrontendKind, FrontendValue};
pub use ids::{BackendId, CgroupId, IfIndex, Nanos, NetnsCookie, ServiceId, Slot, StreamSlot};
pub use service::{Affinity, Service, ServiceName, SlotRange};
pub use socket::{FlowDirection, Order, SocketRecord, StreamRecord, UdpFlow, UdpFlowKey};

/// Version of everything in this module. Maps are pinned below `<pin-dir>/v<ABI_VERSION>/`.
pub const ABI_VERSION: u32 = 3;

/// `NODE`: one element, facts about this node that the socket edge needs. Each word is stored and loaded separately.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Node {
    /// Cookie of the host's network namespace (`bpf_get_netns_cookie`); 0 until it is known. Written by the socket edge
    /// when it sees the agent's own probe connection.
    pub host_netns: NetnsCookie,
    /// Bits of [`node`]. Written by the agent.
    pub flags: u64,
}

/// Bits of [`Node::flags`].
pub mod node {
    /// The packet edge is attached to interfaces of pods and judges their packets. Where a pod's packets would be
    /// dropped without an answer, the socket edge therefore leaves the socket alone.
    pub const PODS_IN_PACKETS: u64 = 1 << 0;
    /// `OPT_OUT` has cgroups whose sockets are all left alone.
    pub const OPTED_OUT: u64 = 1 << 1;
    /// A socket cannot be given the reason why it is refused (before 5.18), and packets of this host to a clusterIP
    /// leave by a device with programs. The packet edge resets the SYN of a process of the host there.
    pub const HOST_IN_PACKETS: u64 = 1 << 2;
    /// `SANDBOXES` has the network namespaces of pods, and `OPT_OUT` has the cgroups of their containers.
    pub const SANDBOXES_KNOWN: u64 = 1 << 3;
}

/// Values of `OPT_OUT`: the sockets that are left alone, of processes in a cgroup.
pub mod opt_out {
    /// All sockets.
    pub const EVERYTHING: u32 = 1;
    /// Sockets in network namespaces that are no pod's. The namespace of this cgroup's pod is known, so such a
    /// namespace is inside the pod.
    pub const INSIDE: u32 = 2;
}

/// Work of the packet edge for one Service port, on one CPU: value of `SERVICE_COUNTERS`, by service id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ServiceCounters {
    /// New flows.
    pub connections: u64,
    /// Packets from clients.
    pub request_packets: u64,
    /// Bytes of `request_packets`, with IP headers.
    pub request_bytes: u64,
    /// Packets from backends.
    pub reply_packets: u64,
    /// Bytes of `reply_packets`, with IP headers.
    pub reply_bytes: u64,
}

/// Key of the `SERVICE_CIDRS` and `POD_SOURCES` LPM tries, in the layout that `struct bpf_lpm_trie_key` demands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PrefixKey {
    /// Bits of `addr` that count, in the 128-bit form (an IPv4 /16 is 112).
    pub len: u32,
    /// First address of the prefix.
    pub addr: crate::addr::Addr,
}

/// Bits of a `LOCAL_ADDRESSES` value.
pub mod local_address {
    /// The address is configured on an interface of this host.
    pub const HOST: u32 = 1;
    /// nodePorts are served on it.
    pub const NODEPORT: u32 = 2;
}

const _: () = assert!(size_of::<Node>() == 16);
const _: () = assert!(size_of::<PrefixKey>() == 20);
