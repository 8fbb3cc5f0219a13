//! Client sockets with options that `std::net` lacks: a family different from the target's, source, protocol, time
//! limits.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use clap::Args;
use proxy_tests::lab::{Attempt, Proto};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_reuseaddr, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

/// Target of a client, and options of its socket.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// Address and port to connect to.
    pub(crate) target: SocketAddr,
    /// Protocol of the socket.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) proto: Proto,
    /// Use an AF_INET6 socket, with a v4-mapped address for an IPv4 target.
    #[arg(long)]
    v6_socket: bool,
    /// Bind to this address (and port) first.
    #[arg(long, value_parser = parse_source)]
    bind: Option<SocketAddr>,
    /// Time limit of each attempt.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
}

impl Target {
    /// Returns the time by which an attempt that begins now has to end.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.timeout_ms)
    }

    /// Returns the target in the form of the socket's family.
    pub(crate) fn address(&self) -> SocketAddr {
        self.in_family(self.target)
    }

    /// Opens a socket, bound if asked for, not yet connected.
    pub(crate) fn open(&self) -> Result<OwnedFd, Failure> {
        let v6 = self.address().is_ipv6();
        let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let (kind, protocol) = socket_type(self.proto, v6);
        let open = || {
            let socket = socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
            if let Some(source) = self.bind {
                set_socket_reuseaddr(&socket, true)?;
                bind(&socket, &self.in_family(source))?;
            }
            Ok(socket)
        };
        open().map_err(|error: Errno| Failure::new("socket", &error.into()))
    }

    /// Connects `socket` by `deadline`.
    pub(crate) fn connect(&self, socket: &OwnedFd, deadline: Instant) -> Result<(), Failure> {
        // The time limit of sending also applies to connect(), which then returns EINPROGRESS.
        let connected =
            limit(socket, Timeout::Send, deadline).and_then(|()| Ok(connect(socket, &self.address())?));
        connected.map_err(|error| Failure::new("connect", &error))
    }

    fn in_family(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(v4) if self.v6_socket || self.target.is_ipv6() => {
                (v4.to_ipv6_mapped(), address.port()).into()
            }
            IpAddr::V4(_) | IpAddr::V6(_) => address,
        }
    }
}

fn socket_type(proto: Proto, v6: bool) -> (SocketType, Option<Protocol>) {
    match proto {
        Proto::Tcp | Proto::Http | Proto::Redis => (SocketType::STREAM, None),
        Proto::Mptcp => (SocketType::STREAM, Some(ipproto::MPTCP)),
        Proto::Sctp => (SocketType::STREAM, Some(ipproto::SCTP)),
        Proto::Udp | Proto::UdpUnconnected => (SocketType::DGRAM, None),
        Proto::Ping if v6 => (SocketType::DGRAM, Some(ipproto::ICMPV6)),
        Proto::Ping => (SocketType::DGRAM, Some(ipproto::ICMP)),
    }
}

/// Makes the next call on `socket` end by `deadline`.
pub(crate) fn limit(socket: impl AsFd, which: Timeout, deadline: Instant) -> io::Result<()> {
    // Zero would mean no limit, and less than a microsecond is rounded to zero.
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    Ok(set_socket_timeout(socket, which, Some(left))?)
}

fn parse_source(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, 0).into()));
    address.map_err(|error| format!("{error} (expected ADDRESS or ADDRESS:PORT)"))
}

/// A call that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    stage: &'static str,
    error: String,
}

impl Failure {
    /// Returns a failure of the call `stage` with `error`.
    pub(crate) fn new(stage: &'static str, error: &io::Error) -> Self {
        Self { stage, error: error_name(error) }
    }

    /// Returns whether the socket was destroyed.
    pub(crate) fn is_of_destroyed(&self) -> bool {
        matches!(self.error.as_str(), "ECONNABORTED" | "EDESTADDRREQ" | "EINVAL")
    }

    /// Records the failure in `attempt`.
    pub(crate) fn report(self, attempt: &mut Attempt) {
        attempt.ok = false;
        attempt.stage = Some(self.stage.to_owned());
        attempt.error = Some(self.error);
    }
}

/// Returns the name of an error as in C. Every timeout is `ETIMEDOUT`, a closed connection is `EOF`.
fn error_name(error: &io::Error) -> String {
    let Some(errno) = Errno::from_io_error(error) else {
        let names = [(io::ErrorKind::UnexpectedEof, "EOF"), (io::ErrorKind::TimedOut, "ETIMEDOUT")];
        let name = names.iter().find(|(kind, _)| *kind == error.kind());
        return name.map_or_else(|| error.to_string(), |(_, name)| (*name).to_owned());
    };
    let name = match errno {
        Errno::TIMEDOUT | Errno::AGAIN | Errno::INPROGRESS => "ETIMEDOUT",
        Errno::CONNREFUSED => "ECONNREFUSED",
        Errno::CONNRESET => "ECONNRESET",
        Errno::CONNABORTED => "ECONNABORTED",
        Errno::PERM => "EPERM",
        Errno::ACCESS => "EACCES",
        Errno::PIPE => "EPIPE",
        Errno::HOSTUNREACH => "EHOSTUNREACH",
        Errno::NETUNREACH => "ENETUNREACH",
        Errno::ADDRNOTAVAIL => "EADDRNOTAVAIL",
        Errno::ADDRINUSE => "EADDRINUSE",
        Errno::INVAL => "EINVAL",
        Errno::NOTCONN => "ENOTCONN",
        Errno::DESTADDRREQ => "EDESTADDRREQ",
        Errno::PROTONOSUPPORT => "EPROTONOSUPPORT",
        Errno::NOBUFS => "ENOBUFS",
        Errno::MSGSIZE => "EMSGSIZE",
        Errno::PROTO => "EPROTO",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        _ => return format!("errno {}", errno.raw_os_error()),
    };
    name.to_owned()
}
