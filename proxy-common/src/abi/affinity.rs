//! `AFFINITY` and `NEW_AFFINITY`: LRU hashes of the backend that each client of a Service port had last
//! (`sessionAffinity: ClientIP`). Clients known from packets are in `NEW_AFFINITY` until they have gone on after a
//! reply, because anybody can write their addresses into a packet.
//!
//! Written and read by the edges only. An entry proves nothing by itself: it is used only if epoch and generation match
//! and the backend is in the set chosen for this connection.

use bytemuck::{Pod, Zeroable};

use super::ids::{BackendId, Nanos, NetnsCookie, ServiceId};
use crate::addr::Addr;

/// Key of both maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client's address; at the socket edge [`AffinityKey::netns_client`].
    pub client: Addr,
    /// Service id.
    pub service: ServiceId,
}

impl AffinityKey {
    /// Returns the address that stands for a network namespace (a pod, or the host) as a client. It lies in `100::/64`,
    /// the discard prefix (RFC 6666), so it is never a real client's address.
    #[inline(always)]
    pub const fn netns_client(cookie: NetnsCookie) -> Addr {
        let [a, b, c, d, e, f, g, h] = cookie.0.to_be_bytes();
        Addr { bytes: [1, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h] }
    }
}

/// Value of both maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct AffinityValue {
    /// Backend id.
    pub backend: BackendId,
    /// The backend's generation when the entry was written.
    pub generation: u32,
    /// The Service port's affinity epoch when the entry was written.
    pub epoch: u32,
    /// Zero.
    pub pad: u32,
    /// Time of the client's last connection.
    pub last_seen: Nanos,
}

const _: () = assert!(size_of::<AffinityKey>() == 20);
const _: () = assert!(size_of::<AffinityValue>() == 24);
