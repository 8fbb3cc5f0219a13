//! Real connections, and the checks of each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use proxy_tests::cases::masquerade::{self, Edge, Seen};
use proxy_tests::cases::{Connect, Dest, Endpoint, Expect, Pace, Proto, Sender, Target};
use proxy_tests::lab::{self, Attempt, Held, Place};
use proxy_tests::scenarios::denial;

use super::world::World;

/// Connections for each endpoint that they may go to, if the case gives no number and there are several endpoints.
const PER_TARGET: usize = 100;
/// Deviation allowed in each endpoint's share of them: more than six standard deviations.
const UNEVEN: usize = PER_TARGET / 2;
/// Number of connections if all outcomes are alike.
const SOME: usize = 10;
/// Time that silence has to last.
const SILENCE: Duration = Duration::from_millis(500);
/// Time during which a client tries for the endpoint that it wants.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the connections of a check, by every kind of socket for its protocol.
pub(super) fn check(world: &World, connect: &Connect) -> Result<()> {
    let edge = world.edge(connect.sender);
    for &way in ways(connect, edge) {
        let mut servers = BTreeMap::<SocketAddr, usize>::new();
        let clients = world.clients(connect.sender);
        for (place, own) in &clients {
            let client = Client { world, sender: connect.sender, edge, way, own };
            let own = judge(&client, connect, &attempts(place, connect, &client)?)?;
            if let Expect::Sticky(..) = connect.expect {
                ensure!(own.len() == 1, "{way:?}: {} does not stay: {own:?}", place.name());
            }
            for (server, count) in own {
                *servers.entry(server).or_default() += count;
            }
        }
        spread(connect, clients.len(), &servers)?;
    }
    Ok(())
}

/// A kept socket.
pub(super) struct Kept {
    held: Held,
    connect: Connect,
}

/// Opens sockets until one is connected to an endpoint of the check. A UDP socket sends one datagram to find out.
pub(super) fn open(world: &World, connect: &Connect) -> Result<Kept> {
    let way = match connect.dest.proto {
        Proto::Udp => lab::Proto::Udp,
        Proto::Tcp | Proto::Sctp | Proto::Ping => lab::Proto::Tcp,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (place, _) = world.clients(connect.sender).swap_remove(0);
        let held = place.hold(connect.dest.addr).proto(way).open()?;
        let mut kept = Kept { held, connect: connect.clone() };
        let first = if way == lab::Proto::Udp { kept.held.say("first")? } else { kept.held.opened().clone() };
        match kept.judge(world, &first, &connect.expect) {
            Ok(()) => return Ok(kept),
            // The socket got another endpoint, by chance.
            Err(_) if first.ok && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
}

impl Kept {
    /// Sends data, and compares the outcome.
    pub(super) fn say(&mut self, world: &World, expect: &Expect) -> Result<()> {
        let mut attempt = self.held.say("are you there?")?;
        if self.connect.dest.proto == Proto::Tcp && attempt.ok {
            // A TCP connection keeps its endpoint.
            let opened = self.held.opened();
            attempt.server.clone_from(&opened.server);
            (attempt.peer, attempt.endpoint) = (opened.peer, opened.endpoint);
        }
        self.judge(world, &attempt, expect)
    }

    fn judge(&self, world: &World, attempt: &Attempt, expect: &Expect) -> Result<()> {
        let sender = self.connect.sender;
        let (_, own) = world.clients(sender).swap_remove(0);
        let way = if self.connect.dest.proto == Proto::Udp { lab::Proto::Udp } else { lab::Proto::Tcp };
        let client = Client { world, sender, edge: world.edge(sender), way, own: &own };
        ensure!(client.fine(self.connect.dest, expect, attempt), "{expect:?}: {attempt:?}");
        Ok(())
    }
}

/// Returns the kinds of sockets to try.
fn ways(connect: &Connect, edge: Edge) -> &'static [lab::Proto] {
    use lab::Proto as Way;
    match connect.dest.proto {
        Proto::Tcp => &[Way::Tcp],
        // An unconnected socket is not told of an ICMP error.
        Proto::Udp if edge != Edge::Socket && connect.expect == Expect::Reject => &[Way::Udp],
        Proto::Udp => &[Way::Udp, Way::UdpUnconnected],
        Proto::Sctp => &[],
        Proto::Ping => &[Way::Ping],
    }
}

/// Makes the connections of one client.
fn attempts(place: &Place, connect: &Connect, who: &Client<'_>) -> Result<Vec<Attempt>> {
    let client = place.connect(connect.dest.addr).proto(who.way);
    match (&connect.expect, connect.pace) {
        (Expect::Drop, _) if !who.is_host() => client.timeout(SILENCE).times(2).run(),
        // With pauses: until every endpoint was reached, with at most as many connections as the case says.
        (Expect::Spread(targets, _), Some(Pace { connections, pause })) if !pause.is_zero() => {
            let mut flow = client.pace(pause).start()?;
            for _ in 0..connections {
                flow.wait_for(1)?;
                let seen: BTreeSet<_> =
                    flow.so_far()?.iter().filter_map(|attempt| attempt.endpoint).collect();
                if seen.len() >= targets.len() {
                    break;
                }
            }
            flow.stop()
        }
        (_, Some(Pace { connections, pause })) => {
            client.times(usize::try_from(connections)?).pace(pause).run()
        }
        (Expect::Spread(targets, _), None) if targets.len() > 1 => {
            client.times(targets.len() * PER_TARGET).run()
        }
        (_, None) => client.times(SOME).run(),
    }
}

/// Checks every attempt by itself. Returns the number of answers by endpoint.
fn judge(
    client: &Client<'_>,
    connect: &Connect,
    attempts: &[Attempt],
) -> Result<BTreeMap<SocketAddr, usize>> {
    let mut servers = BTreeMap::new();
    for attempt in attempts {
        ensure!(client.fine(connect.dest, &connect.expect, attempt), "{:?}: {attempt:?}", client.way);
        if let Some(endpoint) = attempt.endpoint {
            *servers.entry(endpoint).or_default() += 1;
        }
    }
    Ok(servers)
}

/// Client of an attempt, and its way.
struct Client<'a> {
    world: &'a World,
    sender: Sender,
    edge: Edge,
    way: lab::Proto,
    /// The client's own addresses.
    own: &'a [IpAddr],
}

impl Client<'_> {
    /// Returns whether an attempt ended as expected.
    fn fine(&self, dest: Dest, expect: &Expect, attempt: &Attempt) -> bool {
        match expect {
            Expect::Spread(targets, _) | Expect::Sticky(targets, _) => {
                targets.iter().any(|target| {
                    answered_by(attempt, target) && self.seen_as_it_should(attempt, &target.endpoint)
                }) && self.sees(attempt, dest)
            }
            Expect::Reject => self.refused(attempt),
            Expect::Drop => self.dropped(attempt),
            Expect::Pass if self.way == lab::Proto::Ping => attempt.ok,
            Expect::Pass => {
                attempt.endpoint == Some(dest.addr) && seen_as(attempt, self.own) && self.sees(attempt, dest)
            }
        }
    }

    /// Returns whether the endpoint sees the client, or the node, as [`masquerade::seen`] says.
    fn seen_as_it_should(&self, attempt: &Attempt, endpoint: &Endpoint) -> bool {
        match masquerade::seen(endpoint, self.sender, self.edge) {
            Seen::Client => seen_as(attempt, self.own),
            Seen::Node => seen_as(attempt, self.world.node().host().addresses()),
        }
    }

    /// Returns whether the client sees the address that it asked for.
    fn sees(&self, attempt: &Attempt, dest: Dest) -> bool {
        let asked = Some(dest.addr);
        let peer = if self.way == lab::Proto::UdpUnconnected { attempt.from } else { attempt.peername };
        let answer = if self.way == lab::Proto::Udp { attempt.from } else { asked };
        attempt.ok && peer == asked && answer == asked
    }

    /// Returns whether the attempt was refused. At a socket, the call that names the destination fails, not a later
    /// one. For lack of endpoints, connect() of UDP succeeds, and the next call reports the refusal to a datagram's
    /// sender.
    fn refused(&self, attempt: &Attempt) -> bool {
        let stages: &[&str] = match (self.edge, self.way) {
            (Edge::Socket, lab::Proto::UdpUnconnected) => &["send"],
            (Edge::Socket, lab::Proto::Udp) => &["connect", "send", "recv"],
            (Edge::Socket, way) if way != lab::Proto::Ping => &["connect"],
            (_, lab::Proto::Tcp) => &["connect"],
            _ => &["send", "recv"],
        };
        failed(attempt, stages, "ECONNREFUSED")
    }

    /// Returns whether the attempt was dropped. The host's call fails. A pod's socket leaves the address alone, and
    /// the pod's packets are dropped.
    fn dropped(&self, attempt: &Attempt) -> bool {
        match (self.is_host(), self.way) {
            (true, lab::Proto::UdpUnconnected) => failed(attempt, &["send"], denial()),
            // For lack of endpoints, the refusal comes as a packet.
            (true, lab::Proto::Udp) => {
                failed(attempt, &["connect"], denial()) || failed(attempt, &["send", "recv"], "ECONNREFUSED")
            }
            (true, _) => failed(attempt, &["connect"], denial()),
            (false, lab::Proto::Tcp) => failed(attempt, &["connect"], "ETIMEDOUT"),
            (false, _) => failed(attempt, &["recv"], "ETIMEDOUT"),
        }
    }

    fn is_host(&self) -> bool {
        self.sender == Sender::H
    }
}

fn answered_by(attempt: &Attempt, target: &Target) -> bool {
    attempt.server.as_deref() == Some(target.endpoint.name)
        && attempt.endpoint == Some(SocketAddr::new(target.endpoint.ip, target.port))
}

fn seen_as(attempt: &Attempt, addresses: &[IpAddr]) -> bool {
    attempt.peer.is_some_and(|peer| addresses.contains(&peer.ip()))
}

fn failed(attempt: &Attempt, stages: &[&str], error: &str) -> bool {
    let stage = attempt.stage.as_deref().unwrap_or_default();
    attempt.error.as_deref() == Some(error) && stages.contains(&stage)
}

/// Checks that every endpoint was reached, about equally often.
fn spread(connect: &Connect, clients: usize, servers: &BTreeMap<SocketAddr, usize>) -> Result<()> {
    let targets = match &connect.expect {
        Expect::Spread(targets, _) => targets,
        Expect::Sticky(targets, _) if clients > 1 => targets,
        Expect::Sticky(..) | Expect::Reject | Expect::Drop | Expect::Pass => return Ok(()),
    };
    ensure!(servers.len() == targets.len(), "not all endpoints were reached: {servers:?}");
    if connect.pace.is_none() && targets.len() > 1 {
        let uneven = servers.values().find(|count| count.abs_diff(PER_TARGET) > UNEVEN);
        ensure!(uneven.is_none(), "the spread is uneven: {servers:?}");
    }
    Ok(())
}
