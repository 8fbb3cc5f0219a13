//! `COUNTERS`: per-CPU array, one `u64` per [`Counter`]. Written by the edges, read by the agent and bpftool.

/// Events that the datapath counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Counter {
    /// connect() to a frontend, translated.
    Connected = 0,
    /// Datagram from an unconnected socket to a frontend, translated.
    Datagram = 1,
    /// Refused: the frontend has no usable endpoint on any node.
    RejectNoEndpoint = 2,
    /// Refused: an active clusterIP has no such port.
    RejectUnusedPort = 3,
    /// Dropped: the policy is Local and endpoints exist, but none on this node.
    DropNoLocalEndpoint = 4,
    /// Dropped: the address is inside a ServiceCIDR, and no Service has it.
    DropInactiveAddress = 5,
    /// Dropped: the source ranges of the frontend exclude the client.
    DropSourceRange = 6,
    /// Dropped: a map element was reused during two lookups in a row. Harmless when rare.
    DropRetry = 7,
    /// Failed with ENOBUFS: the socket's record could not be written.
    FailRecord = 8,
    /// A client was sent to the backend that session affinity remembers.
    AffinityHit = 9,
    /// A remembered backend was no longer usable.
    AffinityStale = 10,
    /// A UDP flow moved to another backend because its former backend stopped serving.
    UdpRepick = 11,
    /// The packet edge has begun a new flow.
    Flow = 12,
    /// The packet edge has translated an ICMP error.
    IcmpError = 13,
    /// `FLOWS` is full: a flow stays in the map where a flood may evict it, until there is room.
    FlowsFull = 14,
    /// Dropped: no room for a new flow, or no free tuple.
    DropFlowTable = 15,
    /// Dropped, or refused if this host has begun the flow: a packet to a frontend was about to leave untranslated.
    DropNoFlow = 16,
    /// Dropped: the device has no address that packets to another node could have as their source.
    DropNoSource = 17,
    /// Refused: all ports that were tried as a source are taken.
    RejectNoPort = 18,
    /// Dropped: the fragment came before the first one of its packet, or its ports could not be remembered.
    DropFragment = 19,
    /// Dropped: a packet to a VIP has malformed headers.
    DropMalformed = 20,
    /// Dropped: the packet could not be rewritten.
    DropUnwritable = 21,
    /// Dropped: an ICMP redirect about a translated packet.
    DropRedirect = 22,
    /// Dropped: the packet has entered the host with an address of this host as its source.
    DropOwnSource = 23,
    /// connect() to an address of ours, or a datagram for one, that a pod's socket edge left as it was: the packet edge
    /// serves or judges the packets that follow.
    LeftToPackets = 24,
    /// Dropped: by the kernel's routes, the packet's source is behind another pod's interface than the one that the
    /// packet came through.
    DropForeignSource = 25,
}

impl Counter {
    /// All counters, in index order.
    pub const ALL: [Self; 26] = [
        Self::Connected,
        Self::Datagram,
        Self::RejectNoEndpoint,
        Self::RejectUnusedPort,
        Self::DropNoLocalEndpoint,
        Self::DropInactiveAddress,
        Self::DropSourceRange,
        Self::DropRetry,
        Self::FailRecord,
        Self::AffinityHit,
        Self::AffinityStale,
        Self::UdpRepick,
        Self::Flow,
        Self::IcmpError,
        Self::FlowsFull,
        Self::DropFlowTable,
        Self::DropNoFlow,
        Self::DropNoSource,
        Self::RejectNoPort,
        Self::DropFragment,
        Self::DropMalformed,
        Self::DropUnwritable,
        Self::DropRedirect,
        Self::DropOwnSource,
        Self::LeftToPackets,
        Self::DropForeignSource,
    ];

    /// Returns the name in metrics and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Datagram => "datagram",
            Self::RejectNoEndpoint => "reject_no_endpoint",
            Self::RejectUnusedPort => "reject_unused_port",
            Self::DropNoLocalEndpoint => "drop_no_local_endpoint",
            Self::DropInactiveAddress => "drop_inactive_address",
            Self::DropSourceRange => "drop_source_range",
            Self::DropRetry => "drop_retry",
            Self::FailRecord => "fail_record",
            Self::AffinityHit => "affinity_hit",
            Self::AffinityStale => "affinity_stale",
            Self::UdpRepick => "udp_repick",
            Self::Flow => "flow",
            Self::IcmpError => "icmp_error",
            Self::FlowsFull => "flows_full",
            Self::DropFlowTable => "drop_flow_table",
            Self::DropNoFlow => "drop_no_flow",
            Self::DropNoSource => "drop_no_source",
            Self::RejectNoPort => "reject_no_port",
            Self::DropFragment => "drop_fragment",
            Self::DropMalformed => "drop_malformed",
            Self::DropUnwritable => "drop_unwritable",
            Self::DropRedirect => "drop_redirect",
            Self::DropOwnSource => "drop_own_source",
            Self::LeftToPackets => "left_to_packets",
            Self::DropForeignSource => "drop_foreign_source",
        }
    }
}
