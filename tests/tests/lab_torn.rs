//! Readers beside writers in a real kernel: sockets connect while the maps are rewritten as fast as that goes.
//!
//! The kernel's hash reuses elements without waiting for readers, and numbers of the arrays come back all the time.
//! Whatever a connect() reads in between, it has to end at a backend of the very Service that has the address, at
//! the first try. The client is this test once more, in a process of its own in the node's cgroup; it looks at the
//! record that the programs have left in its sockets' storage.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData, MapError, SkStorage};
use proxy_agent::bpf::dataplane::Dataplane;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::sys;
use proxy_agent::cluster::ObjectKey;
use proxy_agent::desired::{DesiredBackend, DesiredPort, DesiredService, PortKey};
use proxy_agent::model::{Freed, Model};
use proxy_agent::plan::{Wanted, plan};
use proxy_agent::store::{Capacity, MapStore as _, Op};
use proxy_common::abi::backend::flags::{IN_CLUSTER, SERVING};
use proxy_common::abi::frontend::flags::EXTERNAL;
use proxy_common::abi::proto::UDP;
use proxy_common::abi::{Counter, FrontendKey, FrontendValue, SlotRange, SocketRecord};
use proxy_common::addr::{Addr, Family};
use proxy_common::be::Be16;
use proxy_tests::lab::{Lab, LabSpec, NodeSpec};

const TIME: Duration = Duration::from_secs(4);
/// Where the client finds the pins; what makes it the client.
const CLIENT: &str = "VIPR_TORN_CLIENT";
const THREADS: u64 = 3;

/// Its set changes all the time; its frontend stays.
const STEADY: Vip = Vip { addr: Ipv4Addr::new(10, 96, 0, 1), services: &["steady"] };
/// Its frontend belongs to one Service or another, and is replaced all the time.
const MOVING: Vip = Vip { addr: Ipv4Addr::new(10, 96, 0, 2), services: &["left", "right"] };
/// Thousands of frontends that come, change and go, at an address that can be reached without them.
const DECOYS: u16 = 3000;
const DECOY: Ipv4Addr = Ipv4Addr::new(127, 97, 0, 1);

/// The backends of each Service: four addresses below a prefix, each on one port. Those of `steady` are of either set.
const SETS: [(&str, [u8; 2], u16); 5] = [
    ("steady", [127, 1], 8001),
    ("steady", [127, 2], 8002),
    ("left", [127, 3], 8003),
    ("right", [127, 4], 8004),
    ("decoy", [127, 9], 8009),
];

/// Small enough for every number to come back many times.
const CAPACITY: Capacity = Capacity { frontends: 4096, services: 8, slots: 256, backends: 256 };

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
    let mut dataplane = Dataplane::open(pins, CAPACITY)?;
    let mut writer = Writer::new(&mut dataplane.maps)?;
    dataplane.attach(node.cgroup())?;

    let mut client = node.host().command(std::env::current_exe()?);
    client.args(["--exact", "no_reader_is_misled_by_a_writer", "--nocapture"]).env(CLIENT, node.pin_dir());
    let client = thread::spawn(move || client.output());
    while !client.is_finished() {
        writer.round(&mut dataplane.maps)?;
    }
    let output = client.join().expect("the client's thread")?;
    let retries = dataplane.maps.counter(Counter::DropRetry)?;
    eprintln!("{}{writer}, {retries} drops by retry", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "the client: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(dataplane.maps.counter(Counter::Connected)? > 10_000, "too few connections to prove anything");
    ensure!(writer.flips > 100, "too few sets to prove anything: {writer}");
    ensure!(writer.backends > u64::from(CAPACITY.backends), "no number was used twice: {writer}");
    Ok(())
}

/// Changes the maps by the agent's own plans, and the decoys by single operations.
struct Writer {
    model: Model,
    freed: Freed,
    /// A grace period is waited for beside the writer, as in the agent.
    waiting: Option<Freed>,
    grace: (Sender<()>, Receiver<io::Result<()>>),
    round: u16,
    ops: u64,
    flips: u64,
    backends: u64,
    graces: u64,
}

impl Writer {
    fn new(maps: &mut KernelMaps) -> Result<Self> {
        let (begin, wanted) = mpsc::channel();
        let (over, done) = mpsc::channel();
        thread::spawn(move || wanted.iter().try_for_each(|()| over.send(sys::grace_period())));
        let mut writer = Self {
            model: Model::new(CAPACITY),
            freed: Freed::default(),
            waiting: None,
            grace: (begin, done),
            round: 0,
            ops: 0,
            flips: 0,
            backends: 0,
            graces: 0,
        };
        let decoy = BTreeMap::from([(service("decoy"), Some(wanted_service("decoy", 4, &[decoy_key(0)])))]);
        let first = plan(&mut writer.model, &decoy, false);
        writer.carry_out(maps, &first.ops)?;
        writer.plan(maps)?;
        Ok(writer)
    }

    fn round(&mut self, maps: &mut KernelMaps) -> Result<()> {
        self.round = self.round.wrapping_add(1);
        self.plan(maps)?;
        // Elements that have just been freed are taken again at once: by an update of another key, and by a new one.
        let ids = ids(&self.model);
        let moving = key(MOVING.addr, 80);
        let owner = self.model.frontends.get(&moving).context("the moving frontend")?.service;
        for i in 0..32 {
            let flags = if i % 2 == 0 { EXTERNAL } else { 0 };
            let number = 1 + self.round.wrapping_mul(32).wrapping_add(i) % (DECOYS - 1);
            let decoy = decoy_key(number);
            let old = decoy_key(1 + (number + DECOYS / 2) % (DECOYS - 1));
            let lead =
                |key: FrontendKey, id: u32| Op::Frontend(key, Some(FrontendValue::new(&key, id, flags)));
            let ops = [
                lead(moving, owner),
                lead(decoy, ids["decoy"]),
                lead(decoy_key(0), ids["decoy"]),
                Op::Frontend(old, None),
                lead(decoy, ids["decoy"]),
            ];
            self.carry_out(maps, &ops)?;
        }
        Ok(())
    }

    /// The steady Service gets its other set, the moving frontend its other owner.
    fn plan(&mut self, maps: &mut KernelMaps) -> Result<()> {
        let odd = usize::from(self.round % 2);
        let at = [key(STEADY.addr, 80)];
        let moving = [key(MOVING.addr, 80)];
        let (left, right): (&[_], &[_]) = if odd == 0 { (&moving, &[]) } else { (&[], &moving) };
        let services = BTreeMap::from([
            (service("steady"), Some(wanted_service("steady", odd, &at))),
            (service("left"), Some(wanted_service("left", 2, left))),
            (service("right"), Some(wanted_service("right", 3, right))),
        ]);
        let plan = plan(&mut self.model, &services, false);
        self.carry_out(maps, &plan.ops)?;
        self.freed.append(plan.freed);
        match (&self.waiting, self.grace.1.try_recv()) {
            (Some(_), Ok(done)) => {
                done.context("a grace period")?;
                self.model.release(self.waiting.take().unwrap_or_default());
                self.graces += 1;
            }
            (None, _) if !self.freed.is_empty() => {
                self.waiting = Some(std::mem::take(&mut self.freed));
                self.grace.0.send(())?;
            }
            _ => {}
        }
        Ok(())
    }

    fn carry_out(&mut self, maps: &mut KernelMaps, ops: &[Op]) -> Result<()> {
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
        let Self { ops, flips, backends, graces, .. } = self;
        write!(
            f,
            "writer: {ops} operations, {flips} sets flipped, {backends} backends, {graces} grace periods"
        )
    }
}

/// What the client saw.
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
    let ids: BTreeMap<String, u32> = {
        let maps = KernelMaps::open(&PinDir::new(pins), false)?;
        ids(&Model::restore(maps.capacity(), &maps.contents()?))
    };
    let end = Instant::now() + TIME;
    let seen: Vec<Seen> = thread::scope(|scope| {
        let run = |seed| {
            scope.spawn({
                let ids = &ids;
                move || connect_until(end, seed, pins, ids)
            })
        };
        let threads: Vec<_> = (1..=THREADS).map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client's thread")).collect::<Result<_>>()
    })?;
    let sum = |count: fn(&Seen) -> u64| seen.iter().map(count).sum::<u64>();
    let all = |list: fn(&Seen) -> &Vec<String>| seen.iter().flat_map(list).cloned().collect::<Vec<_>>();
    let (failed, wrong) = (all(|seen| &seen.failed), all(|seen| &seen.wrong));
    let backends: BTreeSet<_> = seen.iter().flat_map(|seen| &seen.backends).collect();
    println!(
        "client: {} connects to Services, {} to decoys ({} were gone), {} backends, {} failed, {} wrong",
        sum(|seen| seen.connects),
        sum(|seen| seen.decoys),
        sum(|seen| seen.decoys_missed),
        backends.len(),
        failed.len(),
        wrong.len()
    );
    ensure!(wrong.is_empty(), "misled: {:#?}", &wrong[..wrong.len().min(10)]);
    ensure!(failed.is_empty(), "failed: {:#?}", &failed[..failed.len().min(10)]);
    ensure!(backends.len() == 4 * SETS.len(), "every backend of every set is met: {backends:?}");
    Ok(())
}

fn connect_until(end: Instant, seed: u64, pins: &Path, ids: &BTreeMap<String, u32>) -> Result<Seen> {
    let map = MapData::from_pin(PinDir::new(pins).map("SOCKETS"))?;
    let storage: SkStorage<_, SocketRecord> = Map::SkStorage(map).try_into()?;
    let mut seen = Seen::default();
    let mut random = seed;
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
                (_, Some(record)) => seen.wrong.push(format!("{to}: {record:?}")),
                // A decoy that is not there just now is an address like any other.
                (Ok(()), None) if decoy => seen.decoys_missed += 1,
                (result, None) => seen.failed.push(format!("{to}: {result:?}")),
            }
        }
    }
    Ok(seen)
}

/// Whether a record is whole and names a backend of one of `services`.
fn belongs(record: &SocketRecord, services: &[&str], ids: &BTreeMap<String, u32>) -> bool {
    let [a, b, c, d] = record.backend_addr.v4_octets();
    SETS.iter().any(|(service, prefix, port)| {
        services.contains(service)
            && ids.get(*service) == Some(&record.service)
            && ([a, b], c) == (*prefix, 0)
            && (1..=4).contains(&d)
            && record.backend_port.get() == *port
            && (1..CAPACITY.backends).contains(&record.backend)
    })
}

fn ids(model: &Model) -> BTreeMap<String, u32> {
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

/// The Service `name` with set number `set` and `frontends`.
fn wanted_service(name: &str, set: usize, frontends: &[FrontendKey]) -> Wanted {
    let (_, [a, b], port) = SETS[set];
    let backend = |d| DesiredBackend {
        addr: Addr::v4([a, b, 0, d]),
        port: Be16::new(port),
        flags: IN_CLUSTER | SERVING,
    };
    let port = DesiredPort {
        key: PortKey { service: service(name), port_name: "".into(), proto: UDP, family: Family::V4 },
        frontends: frontends.iter().map(|key| (*key, 0)).collect(),
        backends: (1..=4).map(backend).collect(),
        empty_local: SlotRange::REJECT,
        affinity_seconds: 0,
    };
    Wanted { created: 0, desired: DesiredService { ports: vec![port], problems: Vec::new() } }
}
