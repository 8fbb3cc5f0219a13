//! IP addresses as the whole project sees them: 16 bytes, IPv4 mapped into `::ffff:0:0/96`.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

/// An IP address, network byte order; IPv4 as `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
#[repr(C, align(4))]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Addr {
    /// The bytes in wire order.
    pub bytes: [u8; 16],
}

/// An IP family. Only code that has to write or name a family asks for it; lookups never do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the position in [`Family::ALL`].
    pub const fn index(self) -> usize {
        match self {
            Self::V4 => 0,
            Self::V6 => 1,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl Addr {
    /// The all-zero address: in map keys it stands for "any".
    pub const ZERO: Self = Self { bytes: [0; 16] };

    /// Returns the IPv4 address with these four bytes in wire order.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self { bytes: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] }
    }

    /// Returns the same as [`Addr::v4`], from a word whose bytes lie in memory in wire order. For BPF programs: single
    /// bytes that are read back as words stall the CPU.
    #[inline(always)]
    pub fn v4_in_memory(word: u32) -> Self {
        const PREFIX: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        let shift = if cfg!(target_endian = "little") { 32 } else { 0 };
        bytemuck::cast([0, PREFIX | u64::from(word) << shift])
    }

    /// Returns the address with these sixteen bytes in wire order (an IPv4-mapped address equals its IPv4 address).
    #[inline(always)]
    pub const fn v6(bytes: [u8; 16]) -> Self {
        Self { bytes }
    }

    /// Returns the last four bytes: the whole IPv4 address when [`Addr::family`] is V4.
    #[inline(always)]
    pub const fn v4_octets(&self) -> [u8; 4] {
        let [.., a, b, c, d] = self.bytes;
        [a, b, c, d]
    }

    /// Returns the family that this address belongs to.
    #[inline(always)]
    pub fn family(&self) -> Family {
        let (words, _) = self.bytes.as_chunks::<4>();
        match words {
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0xff, 0xff], _] => Family::V4,
            _ => Family::V6,
        }
    }

    /// Returns `0.0.0.0` or `::`, in the family of this address.
    #[inline(always)]
    pub fn unspecified(&self) -> Self {
        Self::unspecified_of(self.family())
    }

    /// Returns `0.0.0.0` or `::`: the address in the keys of nodePorts.
    #[inline(always)]
    pub const fn unspecified_of(family: Family) -> Self {
        match family {
            Family::V4 => Self::v4([0; 4]),
            Family::V6 => Self::ZERO,
        }
    }

    /// Returns whether the address is in 127.0.0.0/8 or is `::1`.
    pub fn is_loopback(&self) -> bool {
        self.to_ip().is_loopback()
    }

    /// Returns the address in the standard library's type.
    pub fn to_ip(self) -> IpAddr {
        match self.family() {
            Family::V4 => IpAddr::V4(Ipv4Addr::from(self.v4_octets())),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(self.bytes)),
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self::v6(v6.octets()),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        Self::v6(ip.octets())
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

/// A CIDR prefix: host bits are zero, and the length is that of the 128-bit form (an IPv4 /8 is 104).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    addr: Addr,
    len: u8,
}

impl Prefix {
    /// Returns `addr/len`, with `len` in the family's own terms (0..=32 or 0..=128); host bits are masked off. Returns
    /// `None` if `len` does not fit the family.
    pub fn new(addr: Addr, len: u8) -> Option<Self> {
        let len = match addr.family() {
            Family::V4 if len <= 32 => len + 96,
            Family::V6 if len <= 128 => len,
            Family::V4 | Family::V6 => return None,
        };
        Some(Self { addr: Addr { bytes: mask(addr.bytes, len) }, len })
    }

    /// Returns the first address.
    pub const fn addr(&self) -> Addr {
        self.addr
    }

    /// Returns the length in the 128-bit form.
    pub const fn mapped_len(&self) -> u8 {
        self.len
    }

    /// Returns the family of the prefix (`0.0.0.0/0` is IPv4, `::/0` IPv6).
    pub fn family(&self) -> Family {
        self.addr.family()
    }

    /// Returns whether the prefix covers its whole family.
    pub fn matches_all(&self) -> bool {
        match self.family() {
            Family::V4 => self.len == 96,
            Family::V6 => self.len == 0,
        }
    }

    /// Returns whether the prefix contains `addr`. A prefix never contains an address of the other family.
    pub fn contains(&self, addr: Addr) -> bool {
        addr.family() == self.family() && mask(addr.bytes, self.len) == self.addr.bytes
    }

    /// Returns whether every address of `other` is in this prefix.
    pub fn covers(&self, other: &Self) -> bool {
        self.len <= other.len && self.contains(other.addr)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = match self.family() {
            Family::V4 => self.len.saturating_sub(96),
            Family::V6 => self.len,
        };
        write!(f, "{}/{len}", self.addr)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn mask(bytes: [u8; 16], len: u8) -> [u8; 16] {
    let kept = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
    (u128::from_be_bytes(bytes) & kept).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(s: &str) -> Addr {
        s.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn v4_is_mapped_and_printed_as_v4() {
        assert_eq!(addr("10.96.0.10"), addr("::ffff:10.96.0.10"));
        assert_eq!(addr("::ffff:10.96.0.10").to_string(), "10.96.0.10");
        assert_eq!(addr("fd00::1").family(), Family::V6);
    }

    #[test]
    fn prefixes_mask_and_contain_within_their_family() {
        for (prefix, len, inside, outside) in [
            ("10.64.9.9", 12, "10.79.255.255", "10.80.0.0"),
            ("0.0.0.0", 0, "203.0.113.7", "2001:db8::1"),
            ("fd00:64::", 48, "fd00:64:0:1::50", "fd00:65::1"),
            ("::", 0, "2001:db8::1", "192.0.2.1"),
        ] {
            let p = Prefix::new(addr(prefix), len).unwrap();
            assert!(p.contains(addr(inside)), "{p} {inside}");
            assert!(!p.contains(addr(outside)), "{p} {outside}");
        }
        assert_eq!(Prefix::new(addr("10.64.9.9"), 12).unwrap().to_string(), "10.64.0.0/12");
        assert_eq!(Prefix::new(addr("10.0.0.0"), 33), None);
    }
}
