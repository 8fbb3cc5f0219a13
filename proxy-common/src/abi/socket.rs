//! Records that the socket edge keeps for each socket: the address that the application asked for.
//!
//! `SOCKETS` is socket storage (freed with the socket). It is for connected sockets, and for the first VIP that an
//! unconnected UDP socket sends datagrams to: nobody else can evict such a record. `STREAMS` is an array that takes the
//! records of most stream sockets instead, because storage costs a short connection more than all the rest of
//! connect(). `UDP_FLOWS` is a small LRU hash for datagrams to further VIPs. The socket edge writes and reads all
//! three.
//!
//! The agent reads `SOCKETS` and writes `ORDERS` by descriptor, to reconnect connected UDP sockets to the backend that
//! their VIP leads to now (sock_diag lists the storage of TCP sockets only). The agent also frees what closed sockets
//! have left in `STREAMS`.

use bytemuck::{Pod, Zeroable};

use super::ids::{BackendId, Nanos, ServiceId, StreamSlot};
use crate::{addr::Addr, be::Be16};

/// Value of `SOCKETS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SocketRecord {
    /// Address that the application connected to, or sends datagrams to.
    pub vip: Addr,
    /// Address that the socket is actually connected to, or that its datagrams go to.
    pub backend_addr: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `backend_addr`.
    pub backend_port: Be16,
    /// Service id; [`SocketRecord::DATAGRAMS`] or [`SocketRecord::MORE_DATAGRAMS`] if the socket was not connected to `vip`.
    pub service: ServiceId,
    /// Backend id.
    pub backend: BackendId,
}

const _: () = assert!(size_of::<SocketRecord>() == 44);

impl SocketRecord {
    /// [`SocketRecord::service`] of a socket that sends datagrams to `vip`, and to no other VIP.
    pub const DATAGRAMS: ServiceId = ServiceId::NONE;
    /// [`SocketRecord::service`] of a socket that sends datagrams to other VIPs, too. Those VIPs are in `UDP_FLOWS`,
    /// which may also have another VIP that `backend_addr` answers for.
    pub const MORE_DATAGRAMS: ServiceId = ServiceId(u32::MAX);

    /// Record of a socket whose flows are all in `UDP_FLOWS`.
    pub const ALL_IN_UDP_FLOWS: Self = Self {
        vip: Addr::ZERO,
        backend_addr: Addr::ZERO,
        vip_port: Be16 { bytes: [0; 2] },
        backend_port: Be16 { bytes: [0; 2] },
        service: Self::MORE_DATAGRAMS,
        backend: BackendId::NONE,
    };

    /// Returns whether the socket is connected to `vip`.
    #[inline(always)]
    pub const fn is_connected(&self) -> bool {
        self.service.0 != Self::DATAGRAMS.0 && self.service.0 != Self::MORE_DATAGRAMS.0
    }
}

/// Value of `ORDERS`, socket storage: the agent's order to reconnect a connected UDP socket to the backend that its VIP
/// leads to now. Written and removed by the agent, by descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Order {
    /// Address that the application connected to.
    pub vip: Addr,
    /// Address that the socket is connected to: a backend, or `vip` itself.
    pub peer: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `peer`.
    pub peer_port: Be16,
}

const _: () = assert!(size_of::<Order>() == 36);

/// Address and port that the agent connects a socket to, so that the socket edge carries out its order.
pub mod order {
    use crate::addr::Addr;
    use crate::be::Be16;

    /// The IPv4 dummy address (RFC 7600): never a real destination. An IPv6 socket takes its IPv4-mapped form.
    pub const ADDRESS: Addr = Addr::v4([192, 0, 0, 8]);
    /// The discard port (RFC 863).
    pub const PORT: Be16 = Be16::new(9);
}

/// Number of elements of `STREAMS`, a power of two: small enough to stay in a CPU's cache.
pub const STREAM_SLOTS: u32 = 1 << 14;

/// Element of `STREAMS`: the record of the one open stream socket whose cookie leads here ([`StreamRecord::slot`]).
///
/// Cookies are counted up, so sockets that are open together rarely share an element. A socket that finds its element
/// taken uses `SOCKETS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct StreamRecord {
    /// Socket cookie; 0 for a free element.
    pub cookie: u64,
    /// Record of the socket.
    pub record: SocketRecord,
    /// Zero.
    pub pad: u32,
    /// Digest of all fields above. If two sockets take a free element in the same instant, at most one of them finds
    /// its record whole.
    pub check: u64,
}

const _: () = assert!(size_of::<StreamRecord>() == 64);

impl StreamRecord {
    /// Returns the element for a socket's record.
    #[inline(always)]
    pub fn new(cookie: u64, record: SocketRecord) -> Self {
        let unsealed = Self { cookie, record, pad: 0, check: 0 };
        Self { check: unsealed.digest(), ..unsealed }
    }

    /// Returns the index of the element that a cookie leads to.
    #[inline(always)]
    pub const fn slot(cookie: u64) -> StreamSlot {
        StreamSlot(cookie as u32 & (STREAM_SLOTS - 1))
    }

    /// Returns the record, if it is this socket's and whole.
    #[inline(always)]
    pub fn of(&self, cookie: u64) -> Option<SocketRecord> {
        (self.cookie == cookie && self.check == self.digest()).then_some(self.record)
    }

    #[inline(always)]
    fn digest(&self) -> u64 {
        let [words @ .., _]: &[u64; 8] = bytemuck::cast_ref(self);
        digest(words)
    }
}

/// Mixes words. Not for hostile input: a process that can write the maps needs no collisions.
#[inline(always)]
fn digest<const N: usize>(words: &[u64; N]) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    for word in words {
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
    }
    hash
}

/// Direction in which a `UDP_FLOWS` entry translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FlowDirection {
    /// From the VIP that the application sends to, to the backend.
    Original = 0,
    /// From the backend that answers, to the VIP.
    Reply = 1,
}

/// Key of `UDP_FLOWS`. Addresses are canonical (`::ffff:a.b.c.d`): an IPv4 datagram of an AF_INET6 socket leaves
/// through sendmsg4 and its reply arrives through recvmsg6.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct UdpFlowKey {
    /// Socket cookie.
    pub cookie: u64,
    /// VIP or backend, by direction.
    pub addr: Addr,
    /// Port of `addr`.
    pub port: Be16,
    /// A [`FlowDirection`].
    pub direction: u16,
    /// Zero.
    pub pad: u32,
}

/// Value of `UDP_FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct UdpFlow {
    /// Backend or VIP, by direction.
    pub addr: Addr,
    /// Port of `addr`.
    pub port: Be16,
    /// [`UdpFlow::clock`] of the flow's last datagram, accurate to [`REFRESHED`]. 0 in maps of earlier versions.
    pub used: u16,
    /// Backend id.
    pub backend: BackendId,
    /// [`UdpFlow::seal`] of key and value. LRU elements are reused under readers, and a datagram must not go to another
    /// flow's address.
    pub check: u64,
}

const _: () = assert!(size_of::<UdpFlowKey>() == 32);
const _: () = assert!(size_of::<UdpFlow>() == 32);

/// Age at which an entry of `UDP_FLOWS` that is used gets a new time, in units of [`UdpFlow::clock`]: half a minute.
pub const REFRESHED: u16 = 3;
/// Age from which a reply belongs to no flow any more: two minutes, as connection tracking keeps UDP streams
/// (`nf_conntrack_udp_timeout_stream`).
pub const FORGOTTEN: u16 = 14;

impl UdpFlow {
    /// Returns the time in units of 2^33 nanoseconds (8.6 seconds). The result repeats after six days.
    #[inline(always)]
    pub const fn clock(now: Nanos) -> u16 {
        (now.0 >> 33) as u16
    }

    /// Returns the time since the flow was used, in units of [`UdpFlow::clock`].
    #[inline(always)]
    pub const fn age(&self, now: u16) -> u16 {
        now.wrapping_sub(self.used)
    }

    /// Returns the value with its `check` filled in for `key`.
    #[inline(always)]
    pub fn seal(mut self, key: &UdpFlowKey) -> Self {
        self.check = self.digest(key);
        self
    }

    /// Returns whether this value was sealed for `key` and is whole.
    #[inline(always)]
    pub fn is_for(&self, key: &UdpFlowKey) -> bool {
        self.check == self.digest(key)
    }

    #[inline(always)]
    fn digest(&self, key: &UdpFlowKey) -> u64 {
        let key: &[u64; 4] = bytemuck::cast_ref(key);
        let value: &[u64; 4] = bytemuck::cast_ref(self);
        let [a, b, c, d] = *key;
        let [e, f, g, _] = *value;
        digest(&[a, b, c, d, e, f, g])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_counts_only_whole_and_under_its_own_key() {
        let key = UdpFlowKey {
            cookie: 7,
            addr: Addr::v4([10, 96, 0, 10]),
            port: Be16::new(53),
            direction: FlowDirection::Original as u16,
            pad: 0,
        };
        let flow = UdpFlow {
            addr: Addr::v4([10, 64, 1, 11]),
            port: Be16::new(1053),
            used: 0,
            backend: BackendId(3),
            check: 0,
        }
        .seal(&key);
        assert!(flow.is_for(&key));
        assert!(!flow.is_for(&UdpFlowKey { cookie: 8, ..key }));
        assert!(!UdpFlow { addr: Addr::v4([10, 64, 1, 12]), ..flow }.is_for(&key));
        assert!(!UdpFlow { backend: BackendId(4), ..flow }.is_for(&key));
    }
}
