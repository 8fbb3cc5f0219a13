//! The servers for probes and for metrics: their ports, their addresses, and the reaction when one cannot be bound.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Port of the health server when `--healthz-bind-address` has no port.
pub const HEALTH_PORT: u16 = 10256;

/// Port of the metrics server when `--metrics-bind-address` has no port.
pub const METRICS_PORT: u16 = 10249;

/// Pause between attempts to bind.
pub(crate) const BIND_RETRY: Duration = Duration::from_secs(5);

/// Reaction when the address cannot be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnBindFailure {
    /// Log and try again after this time, for ever.
    Retry(Duration),
    /// Return the error (`bindAddressHardFail`).
    Fail,
}

/// A text that is not the address of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be IP:port, an IP address, or empty (which switches the server off)")]
pub(crate) struct NotAnAddress;

/// Parses a bind address: `IP:port`, or an IP alone, which gets `default_port`. Returns `None` for an empty text: no
/// server.
///
/// # Errors
///
/// [`NotAnAddress`]; port 0 counts as no port.
pub(crate) fn bind_address(value: &str, default_port: u16) -> Result<Option<SocketAddr>, NotAnAddress> {
    if value.is_empty() {
        return Ok(None);
    }
    let address = value.parse::<SocketAddr>().ok().or_else(|| {
        let ip = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(value);
        Some(SocketAddr::new(ip.parse::<IpAddr>().ok()?, default_port))
    });
    match address {
        Some(address) if address.port() != 0 => Ok(Some(address)),
        _ => Err(NotAnAddress),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bind_addresses() {
        for (value, want) in [
            ("", None),
            ("0.0.0.0:10256", Some("0.0.0.0:10256")),
            ("192.0.2.10", Some("192.0.2.10:1234")),
            ("::", Some("[::]:1234")),
            ("[::1]", Some("[::1]:1234")),
            ("[::1]:99", Some("[::1]:99")),
        ] {
            let got = bind_address(value, 1234).unwrap();
            assert_eq!(got, want.map(|want| want.parse().unwrap()), "{value}");
        }
        for value in ["localhost:80", "10256", "0.0.0.0:0", "0.0.0.0:65536", "[::1", " "] {
            assert_eq!(bind_address(value, 1234), Err(NotAnAddress), "{value}");
        }
    }
}
