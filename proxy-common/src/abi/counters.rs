//! `COUNTERS`: per-CPU array, one `u64` per [`Counter`]. Written by the edges, read by the agent and bpftool.

/// What the datapath counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Counter {
    /// connect() to a frontend, translated.
    Connected = 0,
    /// Datagram from an unconnected socket to a frontend, translated.
    Datagram = 1,
    /// Refused: the frontend has no usable endpoint anywhere.
    RejectNoEndpoint = 2,
    /// Refused: no such port on an active clusterIP.
    RejectUnusedPort = 3,
    /// Dropped: endpoints exist, but none on this node where the policy is Local.
    DropNoLocalEndpoint = 4,
    /// Dropped: an address inside a ServiceCIDR that no Service has.
    DropInactiveAddress = 5,
    /// Dropped: the source ranges of the frontend exclude the client.
    DropSourceRange = 6,
    /// Dropped: a map element was being reused twice in a row. Harmless when rare.
    DropRetry = 7,
    /// Failed with ENOBUFS: the socket's record could not be written.
    FailRecord = 8,
    /// A client was sent to the backend that session affinity remembers.
    AffinityHit = 9,
    /// A remembered backend was not usable any more.
    AffinityStale = 10,
    /// A UDP flow moved to another backend because its own stopped serving.
    UdpRepick = 11,
    /// packet edge: a new flow.
    Flow = 12,
    /// packet edge: an ICMP error was translated.
    IcmpError = 13,
    /// `FLOWS` is full: a flow stays where a flood may evict it, until there is room.
    FlowsFull = 14,
    /// Dropped: no room for a new flow, or no free tuple.
    DropFlowTable = 15,
    /// Dropped, or refused if this host has begun it: a packet would have left for a frontend that nobody has translated.
    DropNoFlow = 16,
    /// Dropped: the device has no address that packets to another node could come from.
    DropNoSource = 17,
    /// Refused: all ports that were tried as a source are taken.
    RejectNoPort = 18,
    /// Dropped: a fragment that came before its first one, or could not be remembered.
    DropFragment = 19,
    /// Dropped: broken headers, sent to a VIP.
    DropMalformed = 20,
    /// Dropped: the packet could not be rewritten.
    DropUnwritable = 21,
    /// Dropped: an ICMP redirect about a translated packet.
    DropRedirect = 22,
    /// Dropped: it came from elsewhere with an address of this host as its source.
    DropOwnSource = 23,
    /// connect() to an address of ours, or a datagram for one, that a pod's socket was not told about: the packet edge
    /// serves or judges what follows.
    LeftToPackets = 24,
    /// Dropped: by the kernel's routes its source is behind another pod's interface than the one that it came through.
    DropForeignSource = 25,
}

impl Counter {
    /// Every counter, in index order.
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

    /// Name in metrics and `status`.
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
