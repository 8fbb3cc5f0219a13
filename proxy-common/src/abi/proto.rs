//! IP protocol numbers.

/// Transmission Control Protocol.
pub const TCP: u8 = 6;
/// User Datagram Protocol.
pub const UDP: u8 = 17;
/// Stream Control Transmission Protocol.
pub const SCTP: u8 = 132;
/// Internet Control Message Protocol (RFC 792).
pub const ICMP: u8 = 1;
/// ICMP for IPv6 (RFC 4443).
pub const ICMPV6: u8 = 58;

/// Name of a transport protocol as Kubernetes writes it.
pub const fn name(proto: u8) -> &'static str {
    match proto {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        _ => "?",
    }
}
