//! What the socket edge remembers per socket: the address that the application asked for.
//!
//! `SOCKETS` is socket storage (freed with the socket) for connected sockets. `UDP_FLOWS` is a small LRU hash for
//! datagrams sent from unconnected UDP sockets. Both are written and read by the socket edge; the agent
//! reads `SOCKETS` by descriptor to find connected UDP sockets whose backend has left (sock_diag lists the storage of
//! TCP sockets only).

use bytemuck::{Pod, Zeroable};

use crate::{addr::Addr, be::Be16};

/// Value of `SOCKETS`. All zero on a socket that has only sent datagrams to VIPs: it may have entries in `UDP_FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SocketRecord {
    /// What the application connected to.
    pub vip: Addr,
    /// Where the socket is connected in truth.
    pub backend_addr: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `backend_addr`.
    pub backend_port: Be16,
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
}

const _: () = assert!(size_of::<SocketRecord>() == 44);

/// Which way a `UDP_FLOWS` entry translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FlowDirection {
    /// From the VIP that the application sends to, to the backend.
    Original = 0,
    /// From the backend that answers, to the VIP.
    Reply = 1,
}

/// Key of `UDP_FLOWS`. Addresses are canonical (`::ffff:a.b.c.d`): an IPv4 datagram of an AF_INET6 socket leaves
/// through sendmsg4 and its answer arrives through recvmsg6.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct UdpFlowKey {
    /// Socket cookie.
    pub cookie: u64,
    /// VIP or backend, by direction.
    pub addr: Addr,
    /// Its port.
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
    /// Its port.
    pub port: Be16,
    /// Zero.
    pub pad: u16,
    /// Backend id.
    pub backend: u32,
    /// [`UdpFlow::seal`] of key and value: LRU elements are reused under readers, and a datagram must not go
    /// to another flow's address.
    pub check: u64,
}

const _: () = assert!(size_of::<UdpFlowKey>() == 32);
const _: () = assert!(size_of::<UdpFlow>() == 32);

impl UdpFlow {
    /// The value with its `check` filled in for `key`.
    #[inline(always)]
    pub fn seal(mut self, key: &UdpFlowKey) -> Self {
        self.check = self.digest(key);
        self
    }

    /// Whether this value was sealed for `key` and is whole.
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
        let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
        for word in [a, b, c, d, e, f, g] {
            hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        }
        hash
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
        let flow =
            UdpFlow { addr: Addr::v4([10, 64, 1, 11]), port: Be16::new(1053), pad: 0, backend: 3, check: 0 }
                .seal(&key);
        assert!(flow.is_for(&key));
        assert!(!flow.is_for(&UdpFlowKey { cookie: 8, ..key }));
        assert!(!UdpFlow { addr: Addr::v4([10, 64, 1, 12]), ..flow }.is_for(&key));
        assert!(!UdpFlow { backend: 4, ..flow }.is_for(&key));
    }
}
