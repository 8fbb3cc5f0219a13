//! Addresses, prefixes and ports in the notation of Kubernetes objects.
//!
//! Objects from before Kubernetes' strict validation may hold leading zeros (`010.000.000.001`, decimal) and CIDRs
//! with host bits. Both are accepted and canonicalised.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_common::abi::proto;
use proxy_common::addr::{Addr, Family, Prefix};

/// Parses an address. An IPv4-mapped IPv6 address becomes IPv4.
///
/// # Errors
/// A statement about the text, to be read after the quoted text.
pub(crate) fn addr(text: &str) -> Result<Addr, &'static str> {
    let addr = parse(text).ok_or("is not an IP address")?;
    if addr.to_ip().is_unspecified() { Err("is the unspecified address") } else { Ok(addr) }
}

/// Returns the kind of an address that no endpoint can have, with its article (Kubernetes: `ValidateEndpointIP`).
pub(crate) fn special(addr: Addr) -> Option<&'static str> {
    let (loopback, link_local, multicast) = match addr.to_ip() {
        IpAddr::V4(ip) => (ip.is_loopback(), ip.is_link_local(), ip.is_multicast()),
        IpAddr::V6(ip) => (ip.is_loopback(), ip.is_unicast_link_local(), ip.is_multicast()),
    };
    match (loopback, link_local, multicast) {
        (true, ..) => Some("a loopback"),
        (_, true, _) => Some("a link-local"),
        (.., true) => Some("a multicast"),
        _ => None,
    }
}

/// Parses a CIDR and masks off host bits.
///
/// # Errors
/// A statement about the text, to be read after the quoted text.
pub(crate) fn prefix(text: &str) -> Result<Prefix, &'static str> {
    const NOT_A_CIDR: &str = "is not a CIDR";
    let (addr, len) = text.split_once('/').ok_or(NOT_A_CIDR)?;
    let len = decimal(len).ok_or(NOT_A_CIDR)?;
    let parsed = parse(addr).ok_or(NOT_A_CIDR)?;
    // `::ffff:10.0.0.0/104` counts its bits in the IPv6 form, but is otherwise an IPv4 prefix.
    let mapped = addr.contains(':') && parsed.family() == Family::V4;
    let len = if mapped { len.checked_sub(96).ok_or(NOT_A_CIDR)? } else { len };
    Prefix::new(parsed, len).ok_or(NOT_A_CIDR)
}

/// Parses a protocol name; absent or empty means TCP.
pub(crate) fn protocol(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or_default() {
        "" | "TCP" => Some(proto::TCP),
        "UDP" => Some(proto::UDP),
        "SCTP" => Some(proto::SCTP),
        _ => None,
    }
}

/// Returns a port number if it is in 1..=65535.
pub(crate) fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port != 0)
}

fn parse(text: &str) -> Option<Addr> {
    if !text.contains(':') {
        return v4(text).map(Addr::from);
    }
    // The dotted tail of an IPv6 address may have leading zeros too.
    let (head, tail) = text.rsplit_once(':')?;
    if tail.contains('.') {
        return format!("{head}:{}", v4(tail)?).parse::<Ipv6Addr>().ok().map(Addr::from);
    }
    text.parse::<Ipv6Addr>().ok().map(Addr::from)
}

fn v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?)?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// Parses digits only, because the standard parser also accepts a sign.
fn decimal(text: &str) -> Option<u8> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_where_no_endpoint_can_be() {
        for (text, want) in [
            ("127.0.0.1", Some("a loopback")),
            ("127.255.0.1", Some("a loopback")),
            ("::1", Some("a loopback")),
            ("::ffff:127.0.0.1", Some("a loopback")),
            ("169.254.169.254", Some("a link-local")),
            ("fe80::1", Some("a link-local")),
            ("febf::1", Some("a link-local")),
            ("224.0.0.1", Some("a multicast")),
            ("239.1.1.1", Some("a multicast")),
            ("ff02::1", Some("a multicast")),
            ("10.64.1.1", None),
            ("192.0.2.10", None),
            ("fd00::1", None),
            ("fec0::1", None),
        ] {
            assert_eq!(special(addr(text).unwrap()), want, "{text}");
        }
    }

    #[test]
    fn addresses() {
        for (text, want) in [
            ("10.96.0.10", Some("10.96.0.10")),
            ("010.096.000.010", Some("10.96.0.10")),
            ("0000000010.1.1.1", Some("10.1.1.1")),
            ("FD00:0064::0A", Some("fd00:64::a")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:010.000.0.01", Some("10.0.0.1")),
            ("", None),
            ("10.96.0", None),
            ("10.96.0.10.1", None),
            ("10.96.0.", None),
            ("10.96.0.256", None),
            ("10.96.0.+1", None),
            ("10.96.0.0x1", None),
            (" 10.96.0.10", None),
            ("fe80::1%eth0", None),
            ("10.0.0.0/8", None),
            ("not-an-ip", None),
            ("0.0.0.0", None),
            ("::", None),
        ] {
            assert_eq!(addr(text).ok().map(|addr| addr.to_string()).as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn prefixes() {
        for (text, want) in [
            ("203.0.113.9/25", Some("203.0.113.0/25")),
            ("010.0.0.1/08", Some("10.0.0.0/8")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("::/0", Some("::/0")),
            ("fd00:64::1/48", Some("fd00:64::/48")),
            ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
            ("::ffff:10.1.2.3/64", None),
            ("10.0.0.0/33", None),
            ("fd00::/129", None),
            ("fd00::/300", None),
            ("10.0.0.0", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/8/8", None),
            ("/8", None),
        ] {
            assert_eq!(prefix(text).ok().map(|prefix| prefix.to_string()).as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn ports_and_protocols() {
        assert_eq!([-1, 0, 1, 65535, 65536, 65616].map(port), [None, None, Some(1), Some(65535), None, None]);
        for (name, want) in [
            (None, Some(6)),
            (Some(""), Some(6)),
            (Some("TCP"), Some(6)),
            (Some("UDP"), Some(17)),
            (Some("SCTP"), Some(132)),
            (Some("udp"), None),
            (Some("ICMP"), None),
        ] {
            assert_eq!(protocol(name), want, "{name:?}");
        }
    }
}
