//! Readers beside writers in a real kernel: sockets connect while the maps are rewritten as fast as possible.
//!
//! The kernel's hash reuses elements without waiting for readers, and numbers of the arrays are reused all the time.
//! Whatever a connect() reads in between, it must end at a backend of the Service that has the address, at the first
//! try. The client is this test run once more, in a process of its own in the node's cgroup. It reads the record that
//! the programs have left in its sockets' storage.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData, MapError, SkStorage};
use proxy_agent::bpf::dataplane::{Dataplane, FLOW_ENTRIES, Sizes};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::sys;
use proxy_agent::bpf::writable::WritableMaps;
use proxy_agent::reconcile::cluster::ObjectKey;
use proxy_agent::reconcile::desired::{DesiredBackend, DesiredPort, DesiredService, PortKey};
use proxy_agent::reconcile::model::{Freed, Model};
use proxy_agent::reconcile::plan::{Wanted, plan};
use proxy_agent::reconcile::store::{Capacity, MapStore as _, Op};
use proxy_common::abi::backend::flags::{IN_CLUSTER, SERVING};
use proxy_common::abi::frontend::flags::EXTERNAL;
use proxy_common::abi::maps;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{
    Affinity, BackendId, Counter, FrontendKey, FrontendValue, Service, ServiceId, SlotRange, SocketRecord,
};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;
use proxy_tests::lab::{Lab, LabSpec, NodeSpec};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity, set_current_timer_slack};

const TIME: Duration = Duration::from_secs(4);
/// Variable with the client's path to the pins; it makes the process the client.
const CLIENT: &str = "VIPR_TORN_CLIENT";
/// Ranges that the steady Service's set is written to, one after the other.
const RING: u32 = 8192;
/// Number of threads that only sleep for a moment. Their timers interrupt the reader between any two of its loads,
/// for long enough that a writer on another CPU can free and reuse the element that the reader is about to read.
const SLEEPERS: usize = 3;

/// VIP whose set changes all the time, and whose frontend stays.
const STEADY: Vip = Vip { addr: Ipv4Addr::new(10, 96, 0, 1), services: &["steady"] };
/// VIP whose frontend is replaced all the time, and belongs to one of two Services.
const MOVING: Vip = Vip { addr: Ipv4Addr::new(10, 96, 0, 2), services: &["left", "right"] };
/// Number of frontends that are added, changed and removed, at an address that can be reached without them.
const DECOYS: u16 = 3000;
const DECOY: Ipv4Addr = Ipv4Addr::new(127, 97, 0, 1);

/// Backends of each Service: four addresses below a prefix, each on one port. Those of `steady` belong to one of two
/// sets.
const SETS: [(&str, [u8; 2], u16); 5] = [
    ("steady", [127, 1], 8001),
    ("steady", [127, 2], 8002),
    ("left", [127, 3], 8003),
    ("right", [127, 4], 8004),
    ("decoy", [127, 9], 8009),
];

/// Capacity so small, except for the ring, that every number is reused many times.
const CAPACITY: Capacity =
    Capacity { frontends: 4096, services: 8, slots: 64 + 4 * RING, backends: 64, source_ranges: 64 };

struct Vip {
    addr: Ipv4Addr,
    services: &'static [&'static str],
}

#[test]
fn no_reader_is_misled_by_a_writer() -> Result<()> {
    if let Some(pins) = std::env::var_os(CLIENT) {
        return client(Path::new(&pins));
    }
    let node = NodeSpec::new("n1", &["192.0.2.10"], &["10.64.1.0/24"])?;
    let lab =
        Lab::build(LabSpec { cluster_cidr: "10.64.0.0/16".to_owned(), ..LabSpec::default() }.node(node))?;
    let node = lab.node("n1");
    let pins = PinDir::new(node.pin_dir());
    pins.create()?;
    let mut dataplane =
        Dataplane::open(pins, Sizes { least: CAPACITY, want: CAPACITY, flows: FLOW_ENTRIES }, drop)?;
    stay_on(0)?;
    let mut writer = Writer::new(&mut dataplane.maps)?;
    dataplane.attach(node.cgroup())?;

    // On a busy machine a grace period may take seconds, and without grace periods no number is reused.
    for _ in 0..3 {
        let mut client = node.host().command(std::env::current_exe()?);
        client
            .args(["--exact", "torn::no_reader_is_misled_by_a_writer", "--nocapture"])
            .env(CLIENT, node.pin_dir());
        let client = thread::spawn(move || client.output());
        while !client.is_finished() {
            writer.round(&mut dataplane.maps)?;
        }
        let output = client.join().expect("the client's thread")?;
        let retries = dataplane.maps.counter(Counter::DropRetry)?;
        eprintln!("{}{writer}, {retries} drops by retry", String::from_utf8_lossy(&output.stdout));
        ensure!(output.status.success(), "the client: {}", String::from_utf8_lossy(&output.stderr));
        if writer.has_done_enough() {
            return Ok(());
        }
    }
    anyhow::bail!("too little to prove anything: {writer}")
}

/// Changes the maps by the agent's own plans, and the decoys by single operations.
struct Writer {
    model: Model,
    /// The steady Service: its id, its backends and its current range.
    steady: (ServiceId, Vec<BackendId>, SlotRange),
    /// Ranges of the ring: those that no reader can have, those that wait for the current grace period, and those
    /// that were left since it began.
    ring: Vec<SlotRange>,
    ring_waiting: Vec<SlotRange>,
    left: Vec<SlotRange>,
    freed: Freed,
    /// Numbers that wait for a grace period, which runs beside the writer, as in the agent.
    waiting: Option<Freed>,
    grace: (Sender<()>, Receiver<io::Result<Duration>>),
    /// Counters for the turns of decoys and plans.
    turn: u16,
    round: u16,
    ops: u64,
    flips: u64,
    backends: u64,
    graces: u64,
    longest_grace: Duration,
}

impl Writer {
    fn new(maps: &mut WritableMaps) -> Result<Self> {
        let (begin, wanted) = mpsc::channel();
        let (over, done) = mpsc::channel();
        thread::spawn(move || {
            wanted.iter().try_for_each(|()| {
                let start = Instant::now();
                over.send(sys::grace_period().map(|()| start.elapsed()))
            })
        });
        let mut writer = Self {
            model: Model::new(CAPACITY),
            steady: (ServiceId::NONE, Vec::new(), SlotRange::default()),
            ring: Vec::new(),
            ring_waiting: Vec::new(),
            left: Vec::new(),
            freed: Freed::default(),
            waiting: None,
            grace: (begin, done),
            turn: 0,
            round: 0,
            ops: 0,
            flips: 0,
            backends: 0,
            graces: 0,
            longest_grace: Duration::ZERO,
        };
        let cidr = Prefix::new(Addr::v4([10, 96, 0, 0]), 16).context("a prefix")?;
        writer.carry_out(maps, &[Op::ServiceCidr(cidr, true)])?;
        let mut steady = wanted_service("steady", 0, 4, &[key(STEADY.addr, 80)]);
        let both = wanted_service("steady", 1, 4, &[]).desired.ports.remove(0).backends;
        steady.desired.ports[0].backends.extend(both);
        let decoy = wanted_service("decoy", 4, 4, &[decoy_key(0)]);
        let services = BTreeMap::from([(service("steady"), Some(steady)), (service("decoy"), Some(decoy))]);
        let ops = plan(&mut writer.model, &services, false).ops;
        writer.carry_out(maps, &ops)?;
        let ops = writer.plan();
        writer.carry_out(maps, &ops)?;

        let (id, steady) = writer.port("steady")?;
        writer.steady = (id, steady, writer.model.slots.take(4).context("slots")?);
        let ring = (1..RING).map(|_| writer.model.slots.take(4).context("slots"));
        writer.ring = ring.collect::<Result<_>>()?;
        writer.flip(maps)?;
        Ok(writer)
    }

    /// Returns the id and backends of a Service.
    fn port(&self, name: &str) -> Result<(ServiceId, Vec<BackendId>)> {
        let mut ports = self.model.ports.iter().filter(|(key, _)| &*key.service.name == name);
        let (_, port) = ports.next().context("an unknown Service")?;
        Ok((port.id, port.backends.iter().map(|backend| backend.id).collect()))
    }

    /// Gives the steady Service its other set, in another range, as long as there are ranges.
    fn flip(&mut self, maps: &mut WritableMaps) -> Result<()> {
        while let Some(next) = self.ring.pop() {
            let (id, backends, range) = &mut self.steady;
            let set = backends.chunks(4).nth(self.ring.len() % 2).context("two sets")?.to_vec();
            let old = std::mem::replace(range, next);
            let service = Service { cluster: next, local: SlotRange::REJECT, affinity: Affinity::default() };
            let ops = [Op::Slots(next.base, set), Op::Service(*id, service)];
            self.carry_out(maps, &ops)?;
            self.left.push(old);
        }
        Ok(())
    }

    fn round(&mut self, maps: &mut WritableMaps) -> Result<()> {
        let ops = self.plan();
        self.carry_out(maps, &ops)?;
        self.flip(maps)?;
        self.wait_beside(maps)?;

        // An element that has just been freed is taken at once by an update of another key, and by a new key.
        let (id, moving) = (self.port("decoy")?.0, key(MOVING.addr, 80));
        let owner = self.model.frontends.get(&moving).context("the moving frontend")?.service;
        self.turn = (self.turn + 1) % (DECOYS - 1);
        let (first, second) = (1 + self.turn, 1 + (self.turn + DECOYS / 2) % (DECOYS - 1));
        let ops = [
            lead(moving, owner, EXTERNAL),
            lead(decoy_key(0), id, 0),
            lead(moving, owner, 0),
            lead(decoy_key(first), id, 0),
            Op::Frontend(decoy_key(second), None),
            lead(decoy_key(0), id, EXTERNAL),
        ];
        (0..64).try_for_each(|_| self.carry_out(maps, &ops))
    }

    /// Gives the moving frontend to its other owner, and adds or removes an endpoint of each owner. A number that one
    /// owner frees could go to the other.
    fn plan(&mut self) -> Vec<Op> {
        // The plan needs room for two sets of four, beside the old ones, whose numbers return with the next grace
        // period.
        if self.model.slots.available().min(self.model.backend_ids.available()) < 8 {
            return Vec::new();
        }
        self.round = self.round.wrapping_add(1);
        let moving = [key(MOVING.addr, 80)];
        let (left, right): (&[_], &[_]) =
            if self.round.is_multiple_of(2) { (&moving, &[]) } else { (&[], &moving) };
        let size = 4 - u8::from(self.round % 4 < 2);
        let services = BTreeMap::from([
            (service("left"), Some(wanted_service("left", 2, size, left))),
            (service("right"), Some(wanted_service("right", 3, size, right))),
        ]);
        let plan = plan(&mut self.model, &services, false);
        self.freed.append(plan.freed);
        plan.ops
    }

    /// Gives back numbers whose grace period is over, and begins the next grace period.
    fn wait_beside(&mut self, maps: &mut WritableMaps) -> Result<()> {
        match (&self.waiting, self.grace.1.try_recv()) {
            (Some(_), Ok(done)) => {
                self.longest_grace = self.longest_grace.max(done.context("a grace period")?);
                self.graces += 1;
                self.model.release(self.waiting.take().unwrap_or_default());
                self.reuse(maps)?;
            }
            (None, _) => {
                self.waiting = Some(std::mem::take(&mut self.freed));
                self.ring_waiting.append(&mut self.left);
                self.grace.0.send(())?;
            }
            (Some(_), Err(_)) => {}
        }
        Ok(())
    }

    /// Gives the ranges to another Service for a moment: a reader that still had them would be sent to that Service.
    fn reuse(&mut self, maps: &mut WritableMaps) -> Result<()> {
        let (_, decoys) = self.port("decoy")?;
        for range in std::mem::take(&mut self.ring_waiting) {
            self.carry_out(maps, &[Op::Slots(range.base, decoys.clone())])?;
            self.ring.push(range);
        }
        Ok(())
    }

    /// Returns whether every number has been used several times.
    fn has_done_enough(&self) -> bool {
        self.graces >= 4 && self.backends > 2 * u64::from(CAPACITY.backends)
    }

    fn carry_out(&mut self, maps: &mut WritableMaps, ops: &[Op]) -> Result<()> {
        for op in ops {
            maps.apply(op)?;
            self.ops += 1;
            self.flips += u64::from(matches!(op, Op::Service(..)));
            self.backends += u64::from(matches!(op, Op::Backend(..)));
        }
        Ok(())
    }
}

impl std::fmt::Display for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ops, flips, backends, graces, longest_grace, .. } = self;
        write!(
            f,
            "writer: {ops} operations, {flips} sets flipped, {backends} backends, {graces} grace periods \
             (up to {longest_grace:?})"
        )
    }
}

/// Results of the client.
#[derive(Debug, Default)]
struct Seen {
    connects: u64,
    decoys: u64,
    decoys_missed: u64,
    failed: Vec<String>,
    wrong: Vec<String>,
    backends: BTreeSet<(Addr, Be16)>,
}

fn client(pins: &Path) -> Result<()> {
    let ids: BTreeMap<String, ServiceId> = {
        let maps = KernelMaps::open(&PinDir::new(pins))?;
        ids(&Model::restore(maps.capacity(), &maps.contents()?))
    };
    // The client's threads are on one CPU, the writer on another (if there is one).
    stay_on(1)?;
    let end = Instant::now() + TIME;
    let seen = thread::scope(|scope| {
        for _ in 0..SLEEPERS {
            scope.spawn(|| {
                let _ = set_current_timer_slack(NonZeroU64::new(1));
                while Instant::now() < end {
                    thread::sleep(Duration::from_micros(50));
                }
            });
        }
        connect_until(end, pins, &ids)
    })?;
    let Seen { connects, decoys, decoys_missed, failed, wrong, backends } = seen;
    println!(
        "client: {connects} connects to Services, {decoys} to decoys ({decoys_missed} were gone), \
         {} backends, {} failed, {} wrong",
        backends.len(),
        failed.len(),
        wrong.len()
    );
    ensure!(connects > 10_000, "too few connections to prove anything");
    ensure!(wrong.is_empty(), "misled: {:#?}", &wrong[..wrong.len().min(10)]);
    ensure!(failed.is_empty(), "failed: {:#?}", &failed[..failed.len().min(10)]);
    Ok(())
}

/// Binds this thread, and those that it starts, to one of the CPUs that it may use.
fn stay_on(which: usize) -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let mut one = CpuSet::new();
    one.set(cpus[which % cpus.len()]);
    sched_setaffinity(None, &one)?;
    Ok(())
}

fn connect_until(end: Instant, pins: &Path, ids: &BTreeMap<String, ServiceId>) -> Result<Seen> {
    let map = MapData::from_pin(PinDir::new(pins).map(maps::SOCKETS))?;
    let storage: SkStorage<_, SocketRecord> = Map::SkStorage(map).try_into()?;
    let mut seen = Seen::default();
    let mut random = 1_u64;
    while Instant::now() < end {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for i in 0..64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (to, services): (SocketAddrV4, &[&str]) = match i % 4 {
                0 => (SocketAddrV4::new(STEADY.addr, 80), STEADY.services),
                1 | 2 => (SocketAddrV4::new(MOVING.addr, 80), MOVING.services),
                _ => {
                    let number = u16::try_from((random >> 33) % u64::from(DECOYS))?;
                    (SocketAddrV4::new(DECOY, 1000 + number), &["decoy"])
                }
            };
            let connected = socket.connect(to);
            let record = match storage.get(&socket, 0) {
                Ok(record) => Some(record),
                Err(MapError::KeyNotFound) => None,
                Err(error) => return Err(error.into()),
            };
            let vip = (Addr::from(*to.ip()), Be16::new(to.port()));
            let ours = record.filter(|record| (record.vip, record.vip_port) == vip);
            let decoy = services == ["decoy"];
            *(if decoy { &mut seen.decoys } else { &mut seen.connects }) += 1;
            match (connected, ours) {
                (Ok(()), Some(record)) if belongs(&record, services, ids) => {
                    seen.backends.insert((record.backend_addr, record.backend_port));
                }
                (Ok(()), Some(record)) => seen.wrong.push(format!("{to}: {record:?}")),
                // A decoy that does not exist at the moment is an address like any other.
                (Ok(()), None) if decoy => seen.decoys_missed += 1,
                // After a failure, the record belongs to the previous connection.
                (result, _) => seen.failed.push(format!("{to}: {result:?}")),
            }
        }
    }
    Ok(seen)
}

/// Returns whether a record is whole and names a backend of one of `services`.
fn belongs(record: &SocketRecord, services: &[&str], ids: &BTreeMap<String, ServiceId>) -> bool {
    let [a, b, c, d] = record.backend_addr.v4_octets();
    SETS.iter().any(|(service, prefix, port)| {
        services.contains(service)
            && ids.get(*service) == Some(&record.service)
            && ([a, b], c) == (*prefix, 0)
            && (1..=4).contains(&d)
            && record.backend_port.get() == *port
            && (1..CAPACITY.backends).contains(&record.backend.0)
    })
}

fn ids(model: &Model) -> BTreeMap<String, ServiceId> {
    model.ports.iter().map(|(key, port)| (key.service.name.to_string(), port.id)).collect()
}

fn service(name: &str) -> ObjectKey {
    ObjectKey::new("torn", name)
}

fn key(addr: Ipv4Addr, port: u16) -> FrontendKey {
    FrontendKey::exact(addr.into(), Be16::new(port), UDP)
}

fn decoy_key(number: u16) -> FrontendKey {
    key(DECOY, 1000 + number)
}

fn lead(key: FrontendKey, id: ServiceId, flags: u16) -> Op {
    Op::Frontend(key, Some(FrontendValue::new(&key, id, flags)))
}

/// Returns the Service `name` with `size` backends of set number `set`, and `frontends`.
fn wanted_service(name: &str, set: usize, size: u8, frontends: &[FrontendKey]) -> Wanted {
    let (_, [a, b], port) = SETS[set];
    let port = DesiredPort {
        key: PortKey { service: service(name), port_name: "".into(), proto: UDP, family: Family::V4 },
        frontends: frontends.iter().map(|key| (*key, 0)).collect(),
        backends: (1..=size)
            .map(|d| DesiredBackend {
                addr: Addr::v4([a, b, 0, d]),
                port: Be16::new(port),
                flags: IN_CLUSTER | SERVING,
            })
            .collect(),
        empty_local: SlotRange::REJECT,
        affinity_seconds: 0,
        source_ranges: Vec::new(),
    };
    Wanted { created: 0, desired: DesiredService { ports: vec![port], problems: Vec::new() } }
}
