//! Output of `lab-pod` that the lab reads: one JSON object per line.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Prefix of a line for `lab-pod hold` that is sent as a datagram without waiting for the answer.
pub const SEND_ONLY: &str = "send only: ";
/// Prefix of a line for `lab-pod hold`: the rest is a datagram that was sent before and whose answer is awaited.
pub const HEAR: &str = "hear ";

/// Protocol of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Proto {
    /// Connects and reads the server's greeting.
    #[default]
    Tcp,
    /// As [`Self::Tcp`], over a socket of protocol IPPROTO_MPTCP.
    Mptcp,
    /// As [`Self::Tcp`], over one-to-one SCTP.
    Sctp,
    /// One HTTP/1.1 request per connection.
    Http,
    /// Redis: PING on each connection; on a held connection each line is a command.
    Redis,
    /// UDP by connect, send, recv.
    Udp,
    /// UDP by sendto, recvfrom.
    UdpUnconnected,
    /// ICMP(v6) echo by a connected ping socket; the port is ignored.
    Ping,
}

impl Proto {
    /// Returns the protocol's name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Mptcp => "mptcp",
            Self::Sctp => "sctp",
            Self::Http => "http",
            Self::Redis => "redis",
            Self::Udp => "udp",
            Self::UdpUnconnected => "udp-unconnected",
            Self::Ping => "ping",
        }
    }
}

/// One line of output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
#[expect(clippy::large_enum_variant, reason = "nearly every line is an attempt")]
pub enum Line {
    /// A server listens on all its addresses.
    Ready,
    /// One connection, datagram or request.
    Attempt(Attempt),
    /// The last line of a client.
    Summary(Summary),
}

/// Result of one connection, datagram or request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Whether a server answered.
    pub ok: bool,
    /// Name of the server.
    pub server: Option<String>,
    /// The client's address, as the server saw it.
    pub peer: Option<SocketAddr>,
    /// The server's own address, as the server saw it.
    pub endpoint: Option<SocketAddr>,
    /// Result of getpeername() for the client (connected sockets).
    pub peername: Option<SocketAddr>,
    /// Result of getsockname() for the client.
    pub local: Option<SocketAddr>,
    /// The source address of the answer (unconnected UDP).
    pub from: Option<SocketAddr>,
    /// The answer's text, if the client sent some.
    pub text: Option<String>,
    /// Error: a name such as `ECONNREFUSED`; `ETIMEDOUT` for every timeout; `EOF` if the server closed.
    pub error: Option<String>,
    /// The call that failed: `connect`, `send` or `recv`.
    pub stage: Option<String>,
    /// Time of its beginning, in microseconds since the client started.
    pub at_us: u64,
    /// Duration, in microseconds.
    pub elapsed_us: u64,
}

/// Totals of a list of attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of attempts.
    pub total: usize,
    /// Number of attempts that were answered.
    pub ok: usize,
    /// Number of attempts that each server answered.
    pub by_server: BTreeMap<String, usize>,
    /// Number of attempts that failed, by error.
    pub by_error: BTreeMap<String, usize>,
}

impl Summary {
    /// Counts `attempts`.
    pub fn of<'a>(attempts: impl IntoIterator<Item = &'a Attempt>) -> Self {
        let mut summary = Self::default();
        attempts.into_iter().for_each(|attempt| summary.add(attempt));
        summary
    }

    /// Counts one more attempt.
    pub fn add(&mut self, attempt: &Attempt) {
        self.total += 1;
        self.ok += usize::from(attempt.ok);
        if let Some(server) = &attempt.server {
            *self.by_server.entry(server.clone()).or_default() += 1;
        }
        if let Some(error) = &attempt.error {
            *self.by_error.entry(error.clone()).or_default() += 1;
        }
    }

    /// Returns the names of the servers that answered, in order.
    pub fn servers(&self) -> Vec<&str> {
        self.by_server.keys().map(String::as_str).collect()
    }
}
