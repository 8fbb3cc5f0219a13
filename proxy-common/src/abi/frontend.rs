//! `FRONTENDS`: addresses and ports at which Services can be reached. Hash of [`FrontendKey`] to [`FrontendValue`], one
//! aligned word.
//!
//! Written by the agent, read by every edge. A value never changes in place. The kernel's hash reuses elements without
//! waiting for readers, so a reader may see the value of another key. The check bits tell the reader.

use bytemuck::{Pod, Zeroable};

use super::ids::ServiceId;
use crate::{addr::Addr, be::Be16};

/// Kind of frontend that a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FrontendKind {
    /// A clusterIP, externalIP or load-balancer address with its port.
    Exact = 1,
    /// A nodePort on every address that `LOCAL_ADDRESSES` marks for nodePorts; `addr` is the unspecified address of the
    /// family.
    NodePort = 2,
    /// An active clusterIP with any port and protocol: connections that match no exact frontend are refused there.
    Address = 3,
}

/// Key of `FRONTENDS`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct FrontendKey {
    /// The VIP; the unspecified address of the family for [`FrontendKind::NodePort`].
    pub addr: Addr,
    /// The port; zero for [`FrontendKind::Address`].
    pub port: Be16,
    /// IP protocol number; zero for [`FrontendKind::Address`].
    pub proto: u8,
    /// A [`FrontendKind`].
    pub kind: u8,
}

const _: () = assert!(size_of::<FrontendKey>() == 20);

impl FrontendKey {
    /// Returns the key of a clusterIP, externalIP or load-balancer address.
    #[inline(always)]
    pub const fn exact(addr: Addr, port: Be16, proto: u8) -> Self {
        Self { addr, port, proto, kind: FrontendKind::Exact as u8 }
    }

    /// Returns the key of a nodePort. `any` is the unspecified address of the family: it keeps the IPv4 and the IPv6
    /// Service port apart.
    #[inline(always)]
    pub const fn node_port(any: Addr, port: Be16, proto: u8) -> Self {
        Self { addr: any, port, proto, kind: FrontendKind::NodePort as u8 }
    }

    /// Returns the key of an active clusterIP.
    #[inline(always)]
    pub const fn address(addr: Addr) -> Self {
        Self { addr, port: Be16 { bytes: [0; 2] }, proto: 0, kind: FrontendKind::Address as u8 }
    }

    /// Returns 16 bits that depend on every byte of the key.
    #[inline(always)]
    pub fn check(&self) -> u16 {
        let bytes: &[u8; 20] = bytemuck::cast_ref(self);
        let (words, _) = bytes.as_chunks::<4>();
        let mut hash = 0x9e37_79b9_u32;
        for word in words {
            hash = (hash ^ u32::from_ne_bytes(*word)).wrapping_mul(0x85eb_ca6b).rotate_left(13);
        }
        (hash ^ (hash >> 16)) as u16
    }
}

/// Value of `FRONTENDS`; loaded and stored as one aligned 64-bit word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FrontendValue {
    /// Index into `SERVICES`; 0 for [`FrontendKind::Address`].
    pub service: ServiceId,
    /// Bits of [`flags`].
    pub flags: u16,
    /// [`FrontendKey::check`] of the key that the value was written for.
    pub check: u16,
}

const _: () = assert!(size_of::<FrontendValue>() == 8);

/// Bits of [`FrontendValue::flags`]. The local set of a Service is its endpoints on this node, instead of the
/// cluster's.
pub mod flags {
    /// Near clients (the host, and pods where detect-local is configured) get the local set.
    pub const NEAR_LOCAL: u16 = 1 << 0;
    /// Far clients get the local set.
    pub const FAR_LOCAL: u16 = 1 << 1;
    /// A pod's socket gets the local set: a pod is near only where detect-local is configured.
    pub const POD_LOCAL: u16 = 1 << 2;
    /// Source ranges are configured: the packet edge consults `SOURCE_RANGES`.
    pub const SOURCE_RANGES: u16 = 1 << 3;
    /// Source ranges exclude this host.
    pub const DENY_HOST: u16 = 1 << 4;
    /// Source ranges do not include every pod. A socket has no source address yet, so pods are not served at their
    /// sockets.
    pub const DENY_POD: u16 = 1 << 5;
    /// An externalIP, load-balancer address or nodePort, as opposed to a clusterIP.
    pub const EXTERNAL: u16 = 1 << 6;
    /// A load balancer has given the address to the Service. Read by the agent only.
    pub const LOAD_BALANCER: u16 = 1 << 8;
    /// Frontend of the agent's own self-test: the socket edge notes the caller's network namespace as the host's.
    pub const PROBE: u16 = 1 << 7;
}

impl FrontendValue {
    /// Returns the value to store for `key`.
    #[inline(always)]
    pub fn new(key: &FrontendKey, service: ServiceId, flags: u16) -> Self {
        Self { service, flags, check: key.check() }
    }

    /// Returns whether this value was written for `key`, and not for another key whose element was reused under the
    /// reader.
    #[inline(always)]
    pub fn is_for(&self, key: &FrontendKey) -> bool {
        self.check == key.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_readable_only_under_its_own_key() {
        let key = FrontendKey::exact(Addr::v4([10, 96, 0, 10]), Be16::new(80), 6);
        let value = FrontendValue::new(&key, ServiceId(0xdead_beef), flags::NEAR_LOCAL | flags::PROBE);
        assert!(value.is_for(&key));
        let mut readable = 0;
        for port in 0..=u16::MAX {
            let other = FrontendKey::exact(Addr::v4([10, 96, 0, 11]), Be16::new(port), 6);
            readable += u32::from(value.is_for(&other));
        }
        assert!(readable <= 8, "{readable} of 65536 other keys collide");
    }
}
