//! Jobs of the benchmark for its clients, and the clients' answers: one JSON object per line.

use std::net::SocketAddr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Operation that a client repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Workload {
    /// Connect, one byte each way, close; the server closes first.
    TcpCrr,
    /// The same, but the client closes first: nothing of the connection stays behind at the server.
    TcpCrrClient,
    /// One byte each way on one connection.
    TcpRr,
    /// Write as fast as the server reads.
    TcpStream,
    /// One byte each way on a connected UDP socket.
    UdpRr,
    /// One byte each way by sendto() and recvfrom().
    UdpUnconnectedRr,
}

impl Workload {
    /// Every workload, in the order in which they are measured.
    pub(crate) const ALL: [Self; 6] =
        [Self::TcpRr, Self::TcpStream, Self::UdpRr, Self::UdpUnconnectedRr, Self::TcpCrr, Self::TcpCrrClient];

    /// Returns the workload's name on the command line and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::TcpCrr => "tcp-crr",
            Self::TcpCrrClient => "tcp-crr-client",
            Self::TcpRr => "tcp-rr",
            Self::TcpStream => "tcp-stream",
            Self::UdpRr => "udp-rr",
            Self::UdpUnconnectedRr => "udp-unconnected-rr",
        }
    }

    /// Returns whether every transaction is a connection.
    pub(crate) fn connects(self) -> bool {
        matches!(self, Self::TcpCrr | Self::TcpCrrClient)
    }

    /// Returns the listener that the workload needs.
    pub(crate) fn listener(self) -> Listener {
        match self {
            Self::TcpCrr => Listener::AnswerAndClose,
            Self::TcpCrrClient => Listener::AnswerAndWait,
            Self::TcpRr => Listener::Echo,
            Self::TcpStream => Listener::Sink,
            Self::UdpRr | Self::UdpUnconnectedRr => Listener::UdpEcho,
        }
    }
}

/// A system call whose duration is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Call {
    /// connect() of a fresh UDP socket: no packet is sent.
    UdpConnect,
    /// connect() of a fresh TCP socket: the handshake with a listening server.
    TcpConnect,
    /// sendto() of a fresh UDP socket.
    FirstSend,
    /// sendto() of a UDP socket that has sent to the same address before.
    NextSend,
}

impl Call {
    /// Every call, in the order in which they are measured.
    pub(crate) const ALL: [Self; 4] = [Self::UdpConnect, Self::TcpConnect, Self::FirstSend, Self::NextSend];

    /// Returns the call's name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::UdpConnect => "connect-udp",
            Self::TcpConnect => "connect-tcp",
            Self::FirstSend => "sendto-first",
            Self::NextSend => "sendto-next",
        }
    }

    /// Returns the listener that the call needs.
    pub(crate) fn listener(self) -> Listener {
        match self {
            Self::TcpConnect => Listener::Accept,
            Self::UdpConnect | Self::FirstSend | Self::NextSend => Listener::UdpHole,
        }
    }
}

/// Listener of a server, in the order of the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listener {
    /// TCP: sends back every byte.
    Echo,
    /// TCP: reads a byte, answers with one and closes.
    AnswerAndClose,
    /// TCP: reads a byte, answers with one and closes after the client has closed.
    AnswerAndWait,
    /// TCP: reads and discards.
    Sink,
    /// TCP: accepts, and closes after the client has closed.
    Accept,
    /// UDP: sends back every datagram.
    UdpEcho,
    /// UDP: never reads. Once its buffer is full, the kernel discards further datagrams.
    UdpHole,
}

impl Listener {
    /// Every listener.
    pub(crate) const ALL: [Self; 7] = [
        Self::Echo,
        Self::AnswerAndClose,
        Self::AnswerAndWait,
        Self::Sink,
        Self::Accept,
        Self::UdpEcho,
        Self::UdpHole,
    ];

    /// Returns the listener's port, for a server whose ports begin at `base`.
    pub(crate) fn port(self, base: u16) -> u16 {
        (base..).zip(Self::ALL).find(|(_, listener)| *listener == self).map_or(base, |(port, _)| port)
    }

    /// Returns the listener's protocol, as Services name it.
    pub(crate) fn protocol(self) -> &'static str {
        match self {
            Self::UdpEcho | Self::UdpHole => "UDP",
            Self::Echo | Self::AnswerAndClose | Self::AnswerAndWait | Self::Sink | Self::Accept => "TCP",
        }
    }
}

/// Job for a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// A workload, for some time. Sockets that it keeps open are kept for the next job.
    Run {
        workload: Workload,
        server: SocketAddr,
        /// Time at the beginning that is not counted.
        warm_up_us: u64,
        measure_us: u64,
    },
    /// A number of single calls.
    Time { call: Call, server: SocketAddr, calls: u32 },
}

/// Answer to a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Result of [`Job::Run`].
    Ran {
        /// Transactions, or bytes of a stream.
        operations: u64,
        nanos: u64,
        /// Datagrams that were not answered in time.
        lost: u64,
    },
    /// Result of [`Job::Time`]: nanoseconds of each call.
    Timed { nanos: Vec<u32> },
    /// The job failed.
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listener_has_a_port() {
        let ports: std::collections::BTreeSet<u16> =
            Listener::ALL.into_iter().map(|listener| listener.port(7000)).collect();
        assert_eq!(ports.len(), Listener::ALL.len());
    }
}
