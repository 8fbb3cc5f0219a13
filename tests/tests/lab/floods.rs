//! The packet edge under floods and with full tables: established flows stay, and refused ones are counted.
//!
//! Connections are real ones, of a client outside through a nodePort, and carry data all the time. Floods are SYNs
//! from invented addresses, as fast as this machine sends them. The pod that they go to listens, and answers them
//! into a black hole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_common::abi::{Counter, FlowKey};
use proxy_common::datapath::edge::parsed::tcp;
use proxy_tests::floods::{
    Backend, CROWD_ADDRESS, Crowd, Flood, Ground, NODE_ADDRESS, Outcome, Senders, Sent, Way,
};
use proxy_tests::scenarios::until;

/// Packets of a flood that counts: thirty times the room of the table of new flows.
const PACKETS: u64 = 2_000_000;
/// Connections that must survive.
const CONNECTIONS: usize = 1000;
/// Clients that come during a flood.
const LATE: usize = 50;

/// Takes a turn: tests that are threads of one process would each want the whole machine.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ground with connections on it that are safe from eviction.
struct Scene {
    // Dropped first.
    crowd: Crowd,
    ground: Ground,
}

impl Scene {
    fn new(backend: Backend) -> Result<Self> {
        let ground = Ground::new(&[])?;
        let crowd = Crowd::open(&ground.client(), Ground::target(backend), Way::Tcp, CONNECTIONS)?;
        let scene = Self { crowd, ground };
        scene.unharmed()?;
        assert_eq!(scene.assured()?.len(), CONNECTIONS);
        Ok(scene)
    }

    /// Checks that every connection carries data.
    fn unharmed(&self) -> Result<Outcome> {
        self.crowd.go_on(1)?;
        let outcome = self.crowd.outcome();
        assert_eq!((outcome.alive, &outcome.broken), (CONNECTIONS, &BTreeMap::new()));
        Ok(outcome)
    }

    /// Returns the flows that are never evicted.
    fn assured(&self) -> Result<BTreeSet<FlowKey>> {
        let mut keys = BTreeSet::new();
        self.ground.maps()?.flow_maps().flows.for_each(|(key, _)| _ = keys.insert(key))?;
        Ok(keys)
    }

    /// Sends a flood, with `meanwhile` beside it. Returns its result, after a check that it has arrived.
    fn flood(&mut self, flood: Flood, meanwhile: impl FnOnce(&mut Ground) -> Result<()>) -> Result<Flooded> {
        let assured = self.assured()?;
        let before = Counts::read(&self.ground)?;
        let attacker = self.ground.attacker();
        let sent = thread::scope(|scope| {
            let sending = scope.spawn(|| flood.send(&attacker));
            meanwhile(&mut self.ground)?;
            sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let after = Counts::read(&self.ground)?;
        let outcome = self.unharmed()?;
        assert_eq!(assured.difference(&self.assured()?).count(), 0, "flows are gone");
        let flooded = Flooded { sent, outcome, before, after };
        eprintln!("{flooded}");
        assert!(flooded.outcome.fewest >= flooded.sent.took.as_secs() / 2, "some have waited for long");
        Ok(flooded)
    }
}

/// Counters of the datapath.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Flows that were begun, those of them that got no source port, and those for which there was no room at all.
    flows: u64,
    no_port: u64,
    no_room: u64,
    /// Packets of the pods to their clients.
    answers: u64,
    /// Elements of `NEW_FLOWS`, and its capacity.
    new: u64,
    new_capacity: u64,
}

impl Counts {
    fn read(ground: &Ground) -> Result<Self> {
        let maps = ground.maps()?;
        let new_flows = &maps.flow_maps().new_flows;
        Ok(Self {
            flows: maps.counter(Counter::Flow)?,
            no_port: maps.counter(Counter::RejectNoPort)?,
            no_room: maps.counter(Counter::DropFlowTable)?,
            answers: ground.answers()?,
            new: new_flows.count()?,
            new_capacity: new_flows.capacity()?,
        })
    }
}

/// Result of a flood.
struct Flooded {
    sent: Sent,
    outcome: Outcome,
    before: Counts,
    after: Counts,
}

impl std::fmt::Display for Flooded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sent, outcome, before, after } = self;
        let (packets, took, rate) = (sent.packets, sent.took, sent.rate());
        write!(f, "{packets} packets in {took:.1?} ({rate:.0}/s); {before:?} became {after:?}; {outcome:?}")
    }
}

impl Flooded {
    fn begun(&self) -> u64 {
        self.after.flows - self.before.flows
    }

    /// Checks that the packets have reached the datapath and the pod, and have evicted each other from the table of
    /// new flows.
    fn arrived(&self) {
        let Self { sent, before, after, .. } = self;
        assert!(self.begun() >= sent.packets / 100 * 99, "{self}");
        // The pod does not answer all: its own queue overflows now and then.
        assert!(after.answers - before.answers >= sent.packets / 2, "{self}");
        // Each CPU keeps a few free elements.
        assert!(after.new >= after.new_capacity / 100 * 95, "{self}");
        assert!(self.begun() - after.new >= 10 * after.new_capacity, "{self}");
        assert_eq!(after.no_room, 0, "{self}");
    }
}

fn spoofed(backend: Backend, packets: u64) -> Flood {
    Flood { target: backend.node_port(), senders: Senders::Anybody, flags: tcp::SYN, packets }
}

#[test]
fn a_flood_breaks_no_established_connection() -> Result<()> {
    let _turn = alone();
    let mut scene = Scene::new(Backend::Local)?;
    scene.flood(spoofed(Backend::Local, PACKETS), |_| Ok(()))?.arrived();
    assert_eq!(scene.ground.agent().get("/readyz")?.0, 200);
    Ok(())
}

#[test]
fn a_flood_breaks_no_established_connection_while_no_agent_runs() -> Result<()> {
    let _turn = alone();
    let mut scene = Scene::new(Backend::Local)?;
    scene.ground.agent().kill9()?;
    scene.flood(spoofed(Backend::Local, PACKETS), |_| Ok(()))?.arrived();
    Ok(())
}

/// Each flow to another node needs a port of ours as its source, and there are fewer ports than new flows. Meanwhile
/// the agent is killed and another one takes over, and clients come.
#[test]
fn a_flood_towards_another_node_leaves_ports_to_clients() -> Result<()> {
    let _turn = alone();
    let mut scene = Scene::new(Backend::Remote)?;
    let (begun, mut late) = (CONNECTIONS as u64, None);
    let flooded = scene.flood(spoofed(Backend::Remote, PACKETS / 2), |ground| {
        until("the flood", || Ok((ground.counted(Counter::Flow)? > begun + 100_000).then_some(())))?;
        ground.agent().kill9()?;
        late = Some(Crowd::open(&ground.client(), Ground::target(Backend::Remote), Way::Tcp, LATE)?);
        ground.agent().start_ready()
    })?;
    flooded.arrived();
    assert!(flooded.after.no_port <= flooded.begun() / 1000, "{flooded}");
    let outcome = late.context("nobody came")?.outcome();
    assert_eq!((outcome.alive, outcome.broken), (LATE, BTreeMap::new()), "those who came during the flood");
    Ok(())
}

/// Packets that pretend to come from the node itself, by all of its ports. They must not be taken for the node's own
/// connections to the pod, which look the same between the edges.
#[test]
fn nobody_comes_with_the_nodes_own_address() -> Result<()> {
    let _turn = alone();
    for backend in [Backend::Remote, Backend::Local] {
        let mut scene = Scene::new(backend)?;
        let host = scene.ground.node().host().clone();
        let own = Crowd::open(&host, backend.pod().into(), Way::Tcp, CONNECTIONS / 5)?;
        let flood = Flood { senders: Senders::One(NODE_ADDRESS), ..spoofed(backend, 100_000) };
        let flooded = scene.flood(flood, |_| Ok(()))?;
        own.go_on(1)?;
        let outcome = own.outcome();
        assert_eq!((outcome.alive, outcome.broken), (CONNECTIONS / 5, BTreeMap::new()), "the node's own");
        assert_eq!((flooded.begun(), scene.ground.counted(Counter::DropOwnSource)?), (0, flood.packets));
    }
    Ok(())
}

/// Resets by every port of the client's address, with random sequence numbers. The backend ignores them. A connection
/// that is silent for a while must not lose its flow by them.
#[test]
fn resets_in_the_name_of_a_client_end_nothing() -> Result<()> {
    let _turn = alone();
    let ground = Ground::new(&[])?;
    // A flow that was reset lives for ten seconds.
    let pause = Duration::from_secs(12);
    let target = Ground::target(Backend::Local);
    let crowd = Crowd::with_pause(&ground.client(), target, Way::Tcp, CONNECTIONS, pause)?;
    let resets =
        Flood { senders: Senders::One(CROWD_ADDRESS), flags: tcp::RST, ..spoofed(Backend::Local, 65_535) };
    eprintln!("{:.0}/s", resets.send(&ground.attacker())?.rate());
    crowd.go_on(0)?;
    let outcome = crowd.outcome();
    // One of 65536 resets fits by chance.
    assert!(outcome.alive >= CONNECTIONS - 3, "{outcome:?}");
    Ok(())
}

/// Returns a node with room for [`CONNECTIONS`] flows.
fn small() -> Result<Ground> {
    Ground::new(&[("flow-table-size", &CONNECTIONS.to_string())])
}

fn open(ground: &Ground, way: Way, count: usize) -> Result<Crowd> {
    Crowd::open(&ground.client(), Ground::target(Backend::Local), way, count)
}

/// Checks that every connection is served, that as many as there is room for are safe from eviction, and that the
/// others are counted. Returns the number of the others.
fn served_and_counted(ground: &Ground, crowds: &[&Crowd]) -> Result<u64> {
    let mut opened = 0;
    for crowd in crowds {
        crowd.go_on(2)?;
        let Outcome { alive, broken, .. } = crowd.outcome();
        assert_eq!(broken, BTreeMap::new());
        opened += alive as u64;
    }
    let maps = ground.maps()?;
    let (safe, others) = (maps.flow_maps().flows.count()?, maps.flow_maps().new_flows.count()?);
    eprintln!("{opened} flows: {safe} safe, {others} not");
    // Several CPUs may take the last place at the same time.
    let room = CONNECTIONS as u64;
    assert!((room..room + 8).contains(&safe), "{safe} flows in the table");
    assert_eq!(safe + others, opened);
    assert_eq!(maps.counter(Counter::Flow)?, opened);
    assert_eq!(maps.counter(Counter::FlowsFull)?, others);
    assert_eq!(maps.counter(Counter::DropFlowTable)?, 0);
    Ok(others)
}

#[test]
fn connections_beyond_the_table_are_served_and_counted() -> Result<()> {
    let _turn = alone();
    let ground = small()?;
    let (first, second) =
        (open(&ground, Way::Tcp, CONNECTIONS / 2)?, open(&ground, Way::Tcp, CONNECTIONS / 10 * 6)?);
    served_and_counted(&ground, &[&first, &second])?;
    let late = open(&ground, Way::Tcp, CONNECTIONS / 20)?;
    let others = served_and_counted(&ground, &[&first, &second, &late])?;
    // When some connections have ended, and the agent has collected their flows, there is room for all.
    first.end()?;
    let left = second.outcome().alive + late.outcome().alive;
    until("room for all", || {
        let maps = ground.maps()?;
        let counts = (maps.flow_maps().flows.count()?, maps.flow_maps().new_flows.count()?);
        Ok((counts == (left as u64, 0)).then_some(()))
    })?;
    for crowd in [&second, &late] {
        crowd.go_on(1)?;
        assert_eq!(crowd.outcome().broken, BTreeMap::new());
    }
    assert_eq!(ground.counted(Counter::FlowsFull)?, others);
    Ok(())
}

#[test]
fn datagram_flows_beyond_the_table_are_served_and_counted() -> Result<()> {
    let _turn = alone();
    let ground = small()?;
    let all = open(&ground, Way::Udp, CONNECTIONS / 10 * 11)?;
    served_and_counted(&ground, &[&all])?;
    let late = open(&ground, Way::Udp, CONNECTIONS / 20)?;
    served_and_counted(&ground, &[&all, &late])?;
    Ok(())
}
