//! Real connections under fire: a pod with NET_RAW, or a sender outside, sends packets in the names of all their
//! ends, as fast as its kernel takes them, while the connections go on and new ones are made.
//!
//! Variables: `VIPR_FUZZ_SECONDS` is the time of each run, with an agent and without one; `VIPR_VICTIMS` is the number
//! of connections; `VIPR_SEED` chooses the packets. The bar of docs/security.md:
//! `VIPR_FUZZ_SECONDS=60 VIPR_VICTIMS=1000 cargo xtask test lab h021 --no-capture`.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastrand::Rng;
use proxy_common::abi::proto::UDP;
use proxy_common::datapath::edge::parsed::tcp::{ACK, FIN, PSH, RST, SYN};
use proxy_tests::floods::{Crowd, Way, allow_open_files};
use proxy_tests::lab::{Place, Proto};
use proxy_tests::packets::{Body, Packet, Trouble};

use super::histories::asked_for;
use super::world::{HERE, NODE, THERE, Victim, World, socket_addr};

/// Number of different packets of one phase.
const PACKETS: usize = 20_000;
/// Time for a new connection: a SYN that is lost twice costs three seconds.
const CONNECT: Duration = Duration::from_secs(10);
/// Time after which a resolver asks again, and the number of its tries.
const RESOLVER: (Duration, u32) = (Duration::from_secs(1), 5);
/// Pause between two new connections.
const PAUSE: Duration = Duration::from_millis(5);

/// The ends of one conversation.
struct Ends {
    client: SocketAddr,
    pod: SocketAddr,
    vip: SocketAddr,
    /// Our own source, if the pod sees one.
    own: Option<SocketAddr>,
    udp: bool,
}

/// Returns the ends of all conversations.
fn ends(world: &World, victims: &[Victim]) -> Result<Vec<Ends>> {
    let mut all = Vec::new();
    for (key, flow) in world.flows()? {
        all.push(Ends {
            client: socket_addr(key.source, key.source_port),
            pod: socket_addr(key.destination, key.destination_port),
            vip: socket_addr(flow.vip, flow.vip_port),
            own: (flow.snat_port.get() != 0).then(|| socket_addr(flow.snat, flow.snat_port)),
            udp: key.proto == UDP,
        });
    }
    for victim in victims {
        let pod = victim.service.endpoint(victim.local.is_ipv6())?;
        all.push(Ends { client: victim.local, pod, vip: victim.target, own: None, udp: false });
    }
    Ok(all)
}

/// Returns a packet in the name of one of the ends.
fn forged(all: &[Ends], random: &mut Rng) -> Packet {
    let ends = &all[random.usize(..all.len())];
    let Ends { client, pod, vip, udp, .. } = *ends;
    let own = ends.own.unwrap_or(client);
    let v6 = client.is_ipv6();
    let node = NODE[usize::from(v6)].parse().unwrap_or(client.ip());
    // Another port of the same client, which may be the next one that the client uses.
    let another = SocketAddr::new(client.ip(), random.u16(32_768..61_000));
    let ours = SocketAddr::new(node, random.u16(10_000..30_000));
    let (from, to) = match random.u8(..12) {
        0..=2 => (client, vip),
        3 => (client, pod),
        4 => (another, vip),
        5 => (another, pod),
        6 => (pod, client),
        7 => (vip, client),
        8 => (pod, own),
        9 => (pod, ours),
        10 => (own, pod),
        _ => (own, vip),
    };
    let flags = [SYN, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK];
    let flags = flags[random.usize(..flags.len())];
    let data = if flags & PSH == 0 { Vec::new() } else { b"forged".to_vec() };
    let segment = Body::Tcp { flags, seq: random.u32(..), ack: random.u32(..), data };
    let datagram = Body::Udp { data: b"forged".to_vec(), checksum: true };
    // Some packets have the other protocol.
    let packet = Packet::new(from, to, if udp == (random.u8(..8) > 0) { datagram } else { segment });
    if random.u8(..10) > 0 {
        return packet;
    }
    // A datagram has no sequence number. Even without a proxy, a kernel believes an error from anybody that the port
    // is unreachable, or that the datagram was too large.
    let troubles = [Trouble::TimeExceeded, Trouble::TooBig, Trouble::PortUnreachable];
    let known = if matches!(packet.body, Body::Udp { .. }) { 1 } else { 3 };
    Packet::error(pod.ip(), troubles[random.usize(..known)], &packet.bytes(), if v6 { 548 } else { 28 })
}

/// Results of the clients' visits.
#[derive(Debug, Default)]
struct Visits {
    served: u64,
    /// Reasons of failures, with their numbers.
    failed: BTreeMap<String, u64>,
    /// Datagrams that had to be sent again.
    again: u64,
    slowest: Duration,
}

impl Visits {
    fn add(&mut self, other: Self) {
        self.served += other.served;
        self.again += other.again;
        self.slowest = self.slowest.max(other.slowest);
        for (why, count) in other.failed {
            *self.failed.entry(why).or_default() += count;
        }
    }

    /// Makes new connections and sends questions from `place`, one after the other, until `stop`.
    fn make(place: &Place, stop: &AtomicBool) -> Result<Self> {
        let outside = place.name() == "client";
        let mut targets = Vec::new();
        for v6 in [false, true] {
            for service in [HERE, THERE] {
                targets.push(service.echo(v6, outside)?);
            }
        }
        place.net().enter(|| {
            let mut visits = Self::default();
            for (target, udp) in targets.iter().flat_map(|target| [(target, false), (target, true)]).cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let start = Instant::now();
                let done = if udp { visits.ask(*target) } else { connect(*target) };
                visits.slowest = visits.slowest.max(start.elapsed());
                match done {
                    Ok(()) => visits.served += 1,
                    Err(error) => {
                        *visits.failed.entry(format!("{target} udp: {udp}: {error}")).or_default() += 1;
                    }
                }
                thread::sleep(PAUSE);
            }
            visits
        })
    }

    fn ask(&mut self, target: SocketAddr) -> io::Result<()> {
        let (patience, times) = RESOLVER;
        let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        let mut heard = [0; 64];
        for time in 0..times {
            let asked = Instant::now();
            socket.send(b"question")?;
            self.again += u64::from(time > 0);
            while let Some(left) = patience.checked_sub(asked.elapsed()).filter(|left| !left.is_zero()) {
                socket.set_read_timeout(Some(left))?;
                match socket.recv(&mut heard) {
                    Ok(length) if heard[..length] == *b"question" => return Ok(()),
                    // The answer to another datagram.
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

fn connect(target: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, CONNECT)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.write_all(b"question")?;
    let mut heard = [0; 8];
    stream.read_exact(&mut heard)?;
    if heard == *b"question" { Ok(()) } else { Err(io::Error::other("another answer")) }
}

/// Runs visitors for this time, with an attacker beside them if there are packets. Returns the visits, and the number
/// of packets sent.
fn phase(world: &World, attacker: &Place, packets: &[Packet], time: Duration) -> Result<(Visits, u64)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = &stop;
        let fire = (!packets.is_empty()).then(|| scope.spawn(move || attacker.flood_raw(packets, stop)));
        let visitors =
            [world.victim(), world.client()].map(|place| scope.spawn(move || Visits::make(&place, stop)));
        let end = Instant::now() + time;
        while Instant::now() < end && fire.as_ref().is_none_or(|fire| !fire.is_finished()) {
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        let mut visits = Visits::default();
        for visitor in visitors {
            visits.add(visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        let sent = fire.map(|fire| fire.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        Ok((visits, sent.transpose()?.unwrap_or(0)))
    })
}

/// Waits for further answers on every connection.
fn all_go_on(crowds: &[Crowd]) -> Result<()> {
    thread::scope(|scope| {
        let all: Vec<_> = crowds.iter().map(|crowd| scope.spawn(|| crowd.go_on(1))).collect();
        all.into_iter()
            .try_for_each(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[test]
fn h021_connections_under_fire_of_a_pod() -> Result<()> {
    under_fire(World::attacker)
}

#[test]
fn h022_connections_under_fire_from_outside() -> Result<()> {
    under_fire(World::forger)
}

/// Holds connections, and makes new ones, with and without forged packets of `attacker`, with an agent and without
/// one.
fn under_fire(attacker: fn(&World) -> Place) -> Result<()> {
    allow_open_files()?;
    let seed = asked_for("VIPR_SEED").unwrap_or(21);
    let time = Duration::from_secs(asked_for("VIPR_FUZZ_SECONDS").unwrap_or(5));
    let count = usize::try_from(asked_for("VIPR_VICTIMS").unwrap_or(160))?;
    let mut random = Rng::with_seed(seed);
    let world = World::start()?;
    let attacker = attacker(&world);
    let mut victims = world.hold()?;
    // Nobody reads from a UDP socket that is only held, so forged datagrams in the name of its peer fill it.
    victims.retain(|victim| victim.proto == Proto::Tcp);
    let mut crowds = Vec::new();
    for place in [world.victim(), world.client()] {
        for v6 in [false, true] {
            for service in [HERE, THERE] {
                let target = service.echo(v6, place.name() == "client")?;
                for way in [Way::Tcp, Way::Udp] {
                    crowds.push(Crowd::open(&place, target, way, count / 16)?);
                }
            }
        }
    }
    for agent in ["alive", "killed"] {
        if agent == "killed" {
            world.agent().kill9()?;
        }
        let all = ends(&world, &victims)?;
        let packets: Vec<_> = (0..PACKETS).map(|_| forged(&all, &mut random)).collect();
        for (fire, packets) in [("calm", &[][..]), ("under fire", &packets[..])] {
            let time = if fire == "calm" { time / 3 } else { time };
            let (visits, sent) = phase(&world, &attacker, packets, time)?;
            all_go_on(&crowds)?;
            let outcomes: Vec<_> = crowds.iter().map(Crowd::outcome).collect();
            let alive: usize = outcomes.iter().map(|outcome| outcome.alive).sum();
            let slowest = outcomes.iter().map(|outcome| outcome.slowest).max().unwrap_or_default();
            eprintln!(
                "VIPR_SEED={seed}, agent {agent}, {fire}, {time:?}: {sent} forged packets ({:.0}/s), {alive} of {} \
                 connections alive, slowest answer {slowest:.2?}; new ones: {visits:?}",
                sent as f64 / time.as_secs_f64(),
                count / 16 * 16,
            );
            let broken: Vec<_> = outcomes.iter().filter(|outcome| !outcome.broken.is_empty()).collect();
            ensure!(broken.is_empty(), "agent {agent}, {fire}: {broken:#?}");
            ensure!(visits.failed.is_empty() && visits.served > 0, "agent {agent}, {fire}: {visits:?}");
            ensure!(packets.is_empty() || sent > 0, "nothing was forged");
            victims.iter_mut().try_for_each(|victim| victim.goes_on("still there"))?;
        }
    }
    Ok(())
}
