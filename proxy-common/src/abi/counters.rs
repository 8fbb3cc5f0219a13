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
    /// Failed with ENOMEM: the socket's record could not be written.
    FailRecord = 8,
    /// A client was sent to the backend that session affinity remembers.
    AffinityHit = 9,
    /// A remembered backend was not usable any more.
    AffinityStale = 10,
    /// A UDP flow moved to another backend because its own stopped serving.
    UdpRepick = 11,
}

impl Counter {
    /// Every counter, in index order.
    pub const ALL: [Self; 12] = [
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
        }
    }
}
