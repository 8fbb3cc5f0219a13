//! `AFFINITY` and `NEW_AFFINITY`: LRU hashes, which backend a client of a Service port had last (`sessionAffinity: ClientIP`).
//! Clients of packets, whose addresses anybody can write, are in the second one until they have gone on after an answer.
//!
//! Written and read by the edges only. An entry proves nothing by itself: it counts when epoch and generation
//! match and the backend is in the set chosen for this connection.

use bytemuck::{Pod, Zeroable};

use crate::addr::Addr;

/// Key of both.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client's address; at the socket edge [`AffinityKey::netns_client`].
    pub client: Addr,
    /// Service id.
    pub service: u32,
}

impl AffinityKey {
    /// A network namespace as a client: a pod, or the host. The bytes lie in `100::/64`, the discard prefix
    /// (RFC 6666), so they are never an address.
    #[inline(always)]
    pub const fn netns_client(cookie: u64) -> Addr {
        let [a, b, c, d, e, f, g, h] = cookie.to_be_bytes();
        Addr { bytes: [1, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h] }
    }
}

/// Value of both.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct AffinityValue {
    /// Backend id.
    pub backend: u32,
    /// The backend's generation when it was remembered.
    pub generation: u32,
    /// The Service port's affinity epoch when it was remembered.
    pub epoch: u32,
    /// Zero.
    pub pad: u32,
    /// When the client last connected: nanoseconds of the monotonic clock.
    pub last_seen: u64,
}

const _: () = assert!(size_of::<AffinityKey>() == 20);
const _: () = assert!(size_of::<AffinityValue>() == 24);
