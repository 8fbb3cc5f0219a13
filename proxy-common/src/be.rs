//! Network byte order as a type: no `u16` in this project ever holds a big-endian value.

use bytemuck::{Pod, Zeroable};

/// A 16-bit number in network byte order (a port as it stands in a packet or a `sockaddr`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Be16 {
    /// The two bytes in wire order.
    pub bytes: [u8; 2],
}

impl Be16 {
    /// Returns a host-order number in network byte order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self { bytes: host.to_be_bytes() }
    }

    /// Returns the number in host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.bytes)
    }
}

impl core::fmt::Display for Be16 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}
