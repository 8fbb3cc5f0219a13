//! Clients: sockets of this node, which meet the real socket edge, and packets from elsewhere.
//!
//! For packets, every decision before their translation is checked: the owner of the address ([`lookup::find`]), the
//! set for a far or near client, the pick, and affinity by the client's address ([`select`]). Source ranges of
//! packets are compared here. The packet edge does the same by a table that is filled from the same Service; the test
//! checks that the frontend says to look there. A connection that a pod's socket leaves alone goes on as a packet, if
//! packets of pods are judged.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};
use proxy_agent::reconcile::sim::SimSocket;
use proxy_common::abi::frontend::flags::SOURCE_RANGES;
use proxy_common::abi::node::PODS_IN_PACKETS;
use proxy_common::abi::{FrontendValue, NetnsCookie, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::lookup;
use proxy_common::datapath::select::{Client as Origin, Selection, select};
use proxy_common::datapath::socket::{self, Verdict};
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::cases::{Dest, Proto, Sender};

use super::agent::{Agent, abi_port};
use super::show;

/// Cookie of the host's network namespace. Those of pods follow.
pub(crate) const HOST_NETNS: u64 = 1;

/// Outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// At an endpoint.
    To(SocketAddr),
    /// Refused.
    Reject,
    /// In silence; at a socket without a packet edge behind it, with an error.
    Drop,
    /// At the destination that the client named.
    Pass,
}

/// Use of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// connect().
    Connect,
    /// sendmsg() with an address.
    Datagram,
}

/// One client.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Client {
    /// A process in the network namespace with this cookie. `pod` is its address, if it is in a pod.
    Socket { netns: u64, pod: Option<IpAddr> },
    /// A machine with this address.
    Packets { source: IpAddr, origin: Origin },
}

/// Returns the clients that `sender` stands for.
pub(crate) fn of(sender: Sender, agent: &Agent) -> Vec<Client> {
    match sender {
        Sender::H => vec![Client::Socket { netns: HOST_NETNS, pod: None }],
        // One pod with two addresses.
        Sender::P | Sender::P6 => pods(sender, HOST_NETNS + 1),
        Sender::L1 => pods(sender, HOST_NETNS + 2),
        Sender::Pods => pods(sender, HOST_NETNS + 3),
        Sender::Q | Sender::X | Sender::Y | Sender::X6 => sender
            .addresses()
            .into_iter()
            .map(|source: IpAddr| {
                let origin = if agent.is_near(source.into()) { Origin::Near } else { Origin::Far };
                Client::Packets { source, origin }
            })
            .collect(),
    }
}

fn pods(sender: Sender, first: u64) -> Vec<Client> {
    let pods = (first..).zip(sender.addresses());
    pods.map(|(netns, address)| Client::Socket { netns, pod: Some(address) }).collect()
}

impl Client {
    /// Makes a new connection (or sends the first datagram of a new socket).
    pub(crate) fn connect(&self, agent: &Agent, dest: &Dest, way: Way) -> Result<Fate> {
        match *self {
            Self::Socket { netns, pod } => match (at_socket(agent, netns, dest, way)?, pod) {
                (Fate::Pass, Some(pod)) if agent.maps().node().flags & PODS_IN_PACKETS != 0 => {
                    let origin = if agent.is_near_pod(pod.into()) { Origin::Near } else { Origin::Far };
                    as_packet(agent, pod.into(), origin, dest)
                }
                // connect() of UDP reports no refusal: the datagrams are refused where they leave.
                (Fate::Pass, _) if way == Way::Connect && dest.proto == Proto::Udp => {
                    at_socket(agent, netns, dest, Way::Datagram)
                }
                (fate, _) => Ok(fate),
            },
            Self::Packets { source, origin } => as_packet(agent, source.into(), origin, dest),
        }
    }
}

fn at_socket(agent: &Agent, netns: u64, dest: &Dest, way: Way) -> Result<Fate> {
    thread_local! {
        static COOKIES: Cell<u64> = const { Cell::new(0) };
    }
    let cookie = COOKIES.replace(COOKIES.get() + 1);
    let (addr, port) = (Addr::from(dest.addr.ip()), abi_port(dest));
    let protocol = u32::from(number_of(dest));
    let mut socket = SimSocket {
        addr,
        port,
        peer: (Addr::ZERO, Be16::new(0)),
        protocol,
        cookie,
        netns: NetnsCookie(netns),
        cgroups: &[],
        record: None,
        order: None,
        storage_fails: false,
    };
    let verdict = match way {
        Way::Connect => socket::connect(&mut socket, agent.maps()),
        Way::Datagram => socket::sendmsg(&mut socket, agent.maps()),
    };
    let now = SocketAddr::new(socket.addr.to_ip(), socket.port.get());
    if verdict == Verdict::Translated {
        back(agent, socket, way, (addr, port))?;
        return Ok(Fate::To(now));
    }
    ensure!(now == dest.addr && socket.record.is_none(), "{verdict:?}, but it left {socket:?}");
    Ok(match verdict {
        Verdict::Reject => Fate::Reject,
        Verdict::Drop => Fate::Drop,
        Verdict::Pass => Fate::Pass,
        Verdict::Translated | Verdict::Fail => bail!("{verdict:?}"),
    })
}

/// Checks that the application sees the destination that it asked for.
fn back(agent: &Agent, mut socket: SimSocket<'_>, way: Way, asked: (Addr, Be16)) -> Result<()> {
    let seen = match way {
        Way::Connect => socket::peername(&mut socket, agent.maps()),
        Way::Datagram => socket::recvmsg(&mut socket, agent.maps()),
    };
    ensure!(
        seen == Verdict::Translated && (socket.addr, socket.port) == asked,
        "the application asked for {asked:?} and sees {socket:?}"
    );
    Ok(())
}

fn as_packet(agent: &Agent, source: Addr, origin: Origin, dest: &Dest) -> Result<Fate> {
    let frontend = match lookup::find(agent.maps(), &dest.addr.ip().into(), abi_port(dest), number_of(dest)) {
        lookup::Target::Frontend(frontend) => frontend,
        lookup::Target::UnusedPort => return Ok(Fate::Reject),
        lookup::Target::InactiveAddress => return Ok(Fate::Drop),
        lookup::Target::Other => return Ok(Fate::Pass),
        lookup::Target::Retry => bail!("{} has the value of another frontend", show(dest)),
    };
    if !in_range(agent, frontend, source) {
        return Ok(Fate::Drop);
    }
    Ok(match select(agent.maps(), frontend, origin, source) {
        Selection::Backend(_, backend) => Fate::To(SocketAddr::new(backend.addr.to_ip(), backend.port.get())),
        Selection::Reject(_) => Fate::Reject,
        Selection::Drop(_) => Fate::Drop,
    })
}

fn in_range(agent: &Agent, frontend: FrontendValue, source: Addr) -> bool {
    let ranges = agent.object_of(frontend.service).map_or(&[][..], |service| &service.source_ranges);
    frontend.flags & SOURCE_RANGES == 0 || ranges.iter().any(|range| range.contains(source))
}

/// Returns the IP protocol number.
pub(crate) fn number_of(dest: &Dest) -> u8 {
    match dest.proto {
        Proto::Tcp => proto::TCP,
        Proto::Udp => proto::UDP,
        Proto::Sctp => proto::SCTP,
        Proto::Ping if dest.addr.is_ipv4() => 1,
        Proto::Ping => 58,
    }
}

/// Returns the protocol of a number, if a Service can have it: the reverse of [`number_of`].
pub(crate) fn proto_of(number: u8) -> Option<Proto> {
    [(proto::TCP, Proto::Tcp), (proto::UDP, Proto::Udp), (proto::SCTP, Proto::Sctp)]
        .into_iter()
        .find_map(|(known, proto)| (known == number).then_some(proto))
}
