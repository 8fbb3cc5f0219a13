//! The maps of the packet edge in a real kernel, as the agent writes, reads and clears them. The test itself writes
//! the flows, in every state that the datapath knows.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{LpmTrie, Map, MapData, PerCpuArray, PerCpuValues, lpm_trie};
use proxy_agent::agent::flows::{Collected, Collection};
use proxy_agent::bpf::dataplane::{Dataplane, FLOW_ENTRIES, Sizes};
use proxy_agent::bpf::flow_maps::FlowMaps;
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::writable::WritableMaps;
use proxy_agent::host::clock::now;
use proxy_agent::reconcile::cluster::ObjectKey;
use proxy_agent::reconcile::desired::PortKey;
use proxy_agent::reconcile::model::service_name;
use proxy_agent::reconcile::store::{Capacity, MapStore as _, Op};
use proxy_common::abi::flow::state::{ASSURED, FIN_REPLY, FIN_REQUEST, REPLIED, RESET};
use proxy_common::abi::maps;
use proxy_common::abi::proto::{TCP, UDP};
use proxy_common::abi::{
    Backend, BackendId, BackendState, FilterBit, Flow, FlowKey, FlowKind, FlowRef, IfIndex, Nanos, Origin,
    ServiceCounters, ServiceId, ServiceName, backend,
};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;
use proxy_common::datapath::edge::flows::{snat_index, vip_index};
use proxy_common::datapath::edge::timeouts::lifetime;
use proxy_tests::lab::{Lab, LabSpec, NodeSpec};
use proxy_tests::scenarios::{NODE, World};
use serde_json::{Value, json};

mod maps_of_services;

const SECOND: u64 = 1_000_000_000;
const CAPACITY: Capacity =
    Capacity { frontends: 16, services: 8, slots: 16, backends: 16, source_ranges: 64 };
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// A node with its own maps, which nothing else uses.
struct Bench {
    dataplane: Dataplane,
    pins: PinDir,
    _lab: Lab,
}

impl Bench {
    fn new() -> Result<Self> {
        let node = NodeSpec::new("n1", &["192.0.2.10"], &["10.64.1.0/24"])?;
        let spec = LabSpec { cluster_cidr: "10.64.0.0/16".to_owned(), ..LabSpec::default() };
        let lab = Lab::build(spec.node(node))?;
        let pins = PinDir::new(lab.node("n1").pin_dir());
        pins.create()?;
        let dataplane = Dataplane::open(
            pins.clone(),
            Sizes { least: CAPACITY, want: CAPACITY, flows: FLOW_ENTRIES },
            drop,
        )?;
        Ok(Self { dataplane, pins, _lab: lab })
    }

    fn maps(&mut self) -> &mut WritableMaps {
        &mut self.dataplane.maps
    }

    fn flows(&self) -> Result<FlowMaps> {
        Ok(FlowMaps::open(&self.pins)?)
    }
}

/// Flows of a pod keep their source.
const POD: Origin = Origin::pod(IfIndex(7));
const OUTSIDE: Origin = Origin::OUTSIDE;

/// Returns a record of the client 203.0.113.7 with this port. The backend sees another source if the flow is from
/// outside.
fn record(origin: Origin, proto: u8, client_port: u16, state: u32, last_seen: u64) -> (FlowKey, Flow) {
    let key = FlowKey {
        source: Addr::v4([203, 0, 113, 7]),
        destination: Addr::v4([10, 64, 2, 21]),
        source_port: Be16::new(client_port),
        destination_port: Be16::new(8080),
        origin,
        proto,
        kind: FlowKind::Record as u8,
        pad: 0,
        pad_end: 0,
    };
    let mut flow = Flow {
        vip: VIP.into(),
        vip_port: Be16::new(80),
        client_port: key.source_port,
        service: ServiceId(1),
        backend: BackendId(1),
        state,
        check: key.check(),
        last_seen: Nanos(last_seen),
        ..Flow::default()
    };
    if origin == OUTSIDE {
        (flow.snat, flow.snat_port) =
            (Addr::v4([192, 0, 2, 10]), Be16::new(client_port.wrapping_add(10_000)));
    }
    (key, flow)
}

fn indexes((key, flow): &(FlowKey, Flow)) -> Vec<(FlowKey, FlowRef)> {
    let snat = (key.origin == OUTSIDE).then(|| snat_index(key, &flow.snat, flow.snat_port));
    [vip_index(key, flow)].into_iter().chain(snat).collect()
}

/// Writes records with their index entries into the maps that are not evicted.
fn put(maps: &mut FlowMaps, records: &[(FlowKey, Flow)]) -> Result<()> {
    for record in records {
        maps.flows.add(&record.0, &record.1)?;
        for (index, target) in indexes(record) {
            maps.index.add(&index, &target)?;
        }
    }
    Ok(())
}

/// Returns the keys of both maps.
fn keys(maps: &FlowMaps) -> Result<(BTreeSet<FlowKey>, BTreeSet<FlowKey>)> {
    let (mut records, mut index) = (BTreeSet::new(), BTreeSet::new());
    maps.flows.for_each(|(key, _)| assert!(records.insert(key), "{key:?} was met twice"))?;
    maps.index.for_each(|(key, _)| assert!(index.insert(key), "{key:?} was met twice"))?;
    Ok((records, index))
}

fn keys_of(records: &[(FlowKey, Flow)]) -> (BTreeSet<FlowKey>, BTreeSet<FlowKey>) {
    let index = records.iter().flat_map(indexes).map(|(key, _)| key);
    (records.iter().map(|(key, _)| *key).collect(), index.collect())
}

fn collect(maps: FlowMaps, now: u64) -> Result<Collected> {
    let mut collection = Collection::new(maps);
    loop {
        if let Some(collected) = collection.step(Nanos(now))? {
            return Ok(collected);
        }
    }
}

#[test]
fn what_has_expired_is_collected_and_nothing_else() -> Result<()> {
    let bench = Bench::new()?;
    let mut maps = bench.flows()?;
    let late = 1000 * 86_400 * SECOND;
    let states = [
        (POD, 0),
        (POD, REPLIED),
        (OUTSIDE, REPLIED | ASSURED),
        (POD, FIN_REQUEST | ASSURED),
        (POD, RESET | ASSURED),
    ];
    let closed = (OUTSIDE, FIN_REQUEST | FIN_REPLY | ASSURED);
    let (mut live, mut dead) = (Vec::new(), Vec::new());
    // Enough flows for several steps of the walk.
    for number in 0..1500 {
        for (proto, state) in states.iter().chain([&closed]).flat_map(|state| [(TCP, *state), (UDP, *state)])
        {
            let port = 1 + number * 6 + u16::try_from(states.iter().take_while(|s| **s != state).count())?;
            let (origin, state) = state;
            let edge = late - lifetime(proto, state);
            live.push(record(origin, proto, port, state, edge + 1));
            dead.push(record(origin, proto, port + 20_000, state, edge));
        }
    }
    put(&mut maps, &live)?;
    put(&mut maps, &dead)?;

    // The client has another flow by the tuple of an expired one: another backend, and the index entry.
    let (old, flow) = dead[0];
    let other = FlowKey { destination: Addr::v4([10, 64, 2, 22]), ..old };
    let other = (other, Flow { check: other.check(), last_seen: Nanos(late), ..flow });
    let (index, target) = vip_index(&other.0, &other.1);
    maps.flows.add(&other.0, &other.1)?;
    maps.index.remove(&index)?;
    maps.index.add(&index, &target)?;
    live.push(other);
    // An entry whose record has gone, and an entry whose record is among the evictable ones.
    let (gone, evictable) = (record(OUTSIDE, TCP, 60_001, 0, late), record(OUTSIDE, TCP, 60_002, 0, late));
    for (index, target) in indexes(&gone).into_iter().chain(indexes(&evictable)) {
        maps.index.add(&index, &target)?;
    }
    maps.new_flows.add(&evictable.0, &evictable.1)?;

    let start = Instant::now();
    let collected = collect(bench.flows()?, late)?;
    println!("{collected:?} in {:?}", start.elapsed());
    let (records, mut index) = keys_of(&live);
    index.extend(indexes(&evictable).into_iter().map(|(key, _)| key));
    let (left, left_index) = keys(&maps)?;
    assert_eq!(left, records);
    assert_eq!(left_index, index);
    assert_eq!((collected.expired, collected.dangling), (dead.len() as u64, 2));
    assert_eq!(collected.records, (live.len() + dead.len()) as u64);

    let again = collect(bench.flows()?, late)?;
    assert_eq!((again.expired, again.dangling), (0, 0));
    assert_eq!((again.records, again.index_entries), (records.len() as u64, index.len() as u64));
    Ok(())
}

#[test]
fn flows_that_come_and_go_meanwhile_are_let_alone() -> Result<()> {
    let bench = Bench::new()?;
    let mut maps = bench.flows()?;
    let late = 1000 * 86_400 * SECOND;
    let steady: Vec<_> = (1..=5000).map(|port| record(OUTSIDE, TCP, port, ASSURED, late)).collect();
    put(&mut maps, &steady)?;
    let mut writer = bench.flows()?;
    // Records are added with their index entries, live or expired, and some are removed: during the walk, elements
    // move into and out of its buckets all the time.
    let writing = thread::spawn(move || -> Result<Vec<(FlowKey, Flow)>> {
        let mut stay = Vec::new();
        for port in 10_000..40_000 {
            let age = if port % 3 == 0 { 10 * 86_400 * SECOND } else { 0 };
            let flow = record(POD, UDP, port, ASSURED, late - age);
            put(&mut writer, &[flow])?;
            match port % 3 {
                0 => {}
                1 => stay.push(flow),
                _ => {
                    writer.index.remove(&indexes(&flow)[0].0)?;
                    writer.flows.remove(&flow.0)?;
                }
            }
        }
        Ok(stay)
    });
    let mut passes = 0;
    let (mut expired, mut dangling) = (0, 0);
    while !writing.is_finished() {
        let collected = collect(bench.flows()?, late)?;
        expired += collected.expired;
        dangling += collected.dangling;
        passes += 1;
        // A record that is written expired may be collected before its index entries are written, which then dangle.
        // Otherwise a record is written before its entries and removed after them.
        assert!(
            dangling <= 2 * expired,
            "{dangling} entries without a record, {expired} records have expired"
        );
    }
    let mut live = writing.join().expect("the writer's thread")?;
    expired += collect(bench.flows()?, late)?.expired;
    live.extend(steady);
    assert_eq!(keys(&maps)?, keys_of(&live), "after {passes} passes");
    assert_eq!(expired, 10_000);
    assert!(passes > 1, "the writer was done before the first pass");
    Ok(())
}

#[test]
fn a_table_keeps_its_size_and_its_flows() -> Result<()> {
    let Bench { dataplane, pins, _lab } = Bench::new()?;
    let flow = record(OUTSIDE, TCP, 1, ASSURED, now().0);
    put(&mut FlowMaps::open(&pins)?, &[flow])?;
    drop(dataplane);
    for flows in [2 * FLOW_ENTRIES, FLOW_ENTRIES / 2] {
        let dataplane =
            Dataplane::open(pins.clone(), Sizes { least: CAPACITY, want: CAPACITY, flows }, drop)?;
        let maps = FlowMaps::open(&pins)?;
        assert!(dataplane.resumed);
        assert_eq!(keys(&maps)?, keys_of(&[flow]));
        assert_eq!(maps.flows.capacity()?, u64::from(FLOW_ENTRIES));
    }
    std::fs::remove_file(pins.map(maps::FLOWS))?;
    Dataplane::open(pins.clone(), Sizes { least: CAPACITY, want: CAPACITY, flows: 10 }, drop)?;
    assert_eq!(FlowMaps::open(&pins)?.flows.capacity()?, 10);
    Ok(())
}

#[test]
fn a_running_agent_collects_and_counts_what_is_there() -> Result<()> {
    let mut world = World::start(&["s01-clusterip.yaml"])?;
    let pins = PinDir::new(world.lab().node(NODE).pin_dir());
    let mut maps = FlowMaps::open(&pins)?;
    let long_ago = now().0.wrapping_sub(60 * SECOND);
    let (expired, live) =
        (record(POD, TCP, 1, RESET | ASSURED, long_ago), record(POD, TCP, 2, ASSURED, now().0));
    put(&mut maps, &[expired, live])?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while sample(&mut world, "vipr_flows_collected_total")? == 0 {
        ensure!(Instant::now() < deadline, "nothing was collected");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(keys(&maps)?, keys_of(&[live]));
    assert_eq!(sample(&mut world, "vipr_flows_collected_total")?, 1);
    for (name, want) in [
        ("vipr_map_entries{map=\"FLOWS\"}", 1),
        ("vipr_map_capacity{map=\"FLOWS\"}", 262_144),
        ("vipr_map_entries{map=\"FLOW_INDEX\"}", 1),
        ("vipr_map_capacity{map=\"FLOW_INDEX\"}", 524_288),
        ("vipr_map_entries{map=\"SOURCE_RANGES\"}", 0),
    ] {
        assert_eq!(sample(&mut world, name)?, want, "{name}");
    }
    Ok(())
}

fn sample(world: &mut World, name: &str) -> Result<u64> {
    let metrics = world.agent(NODE).metrics()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {name} in\n{metrics}"))?.parse()?)
}

#[test]
fn flows_are_shown_in_words() -> Result<()> {
    let world = World::start(&["s01-clusterip.yaml"])?;
    let [port] = &world.ports(NODE, "default/kubia")?[..] else { anyhow::bail!("one port") };
    let node = world.lab().node(NODE);
    let mut maps = FlowMaps::open(&PinDir::new(node.pin_dir()))?;
    let (vip, backend) = ("10.111.249.153:80", port.cluster[0]);
    let flow = |origin, port_number, state, idle: u64, change: &dyn Fn(&mut FlowKey, &mut Flow)| {
        let (mut key, mut flow) =
            record(origin, TCP, port_number, state, now().0.wrapping_sub(idle * SECOND));
        (key.destination, key.destination_port) = (backend.ip().into(), Be16::new(backend.port()));
        (flow.vip, flow.vip_port) = (Addr::v4([10, 111, 249, 153]), Be16::new(80));
        flow.service = ServiceId(port.id);
        change(&mut key, &mut flow);
        flow.check = key.check();
        (key, flow)
    };
    let as_it_is = |_: &mut FlowKey, _: &mut Flow| {};
    put(
        &mut maps,
        &[
            flow(OUTSIDE, 1001, REPLIED | ASSURED, 5, &as_it_is),
            flow(POD, 1002, ASSURED | FIN_REPLY, 0, &as_it_is),
            flow(POD, 1003, ASSURED | FIN_REPLY | FIN_REQUEST, 0, &as_it_is),
            // If two flows would have met, one has got another port.
            flow(POD, 1004, ASSURED, 0, &|key, _| key.source_port = Be16::new(12_345)),
            // The Service that the flow began with is gone, and another Service has its id.
            flow(POD, 1005, ASSURED, 0, &|key, flow| {
                (key.destination, flow.vip) = (Addr::v4([10, 64, 9, 9]), Addr::v4([10, 96, 0, 99]));
            }),
            // The flow's backend has left the Service.
            flow(POD, 1006, ASSURED, 0, &|key, _| key.destination = Addr::v4([10, 64, 9, 9])),
        ],
    )?;
    for (key, flow) in [
        flow(POD, 1007, 0, 0, &as_it_is),
        flow(POD, 1008, REPLIED, 0, &as_it_is),
        flow(POD, 1009, RESET, 60, &as_it_is),
    ] {
        maps.new_flows.add(&key, &flow)?;
    }

    let all = world.tool(NODE, "flows")?;
    let shown = |client: u16| -> Result<&Value> {
        let client = json!(format!("203.0.113.7:{client}"));
        all.as_array().and_then(|all| all.iter().find(|flow| flow["client"] == client)).context("not shown")
    };
    let mut first = shown(1001)?.clone();
    let idle = first.as_object_mut().and_then(|flow| flow.remove("idleSeconds")).context("no idleSeconds")?;
    assert!((5.0..65.0).contains(&idle.as_f64().context("a number")?), "{idle}");
    let kubia = json!({
        "service": "default/kubia", "port": "", "protocol": "TCP", "client": "203.0.113.7:1001", "vip": vip,
        "backend": backend, "source": "192.0.2.10:11001", "outside": true, "state": "established", "assured": true,
    });
    assert_eq!(first, kubia);
    for (client, field, want) in [
        (1001, "state", json!("established")),
        (1002, "state", json!("closing")),
        (1003, "state", json!("closed")),
        (1004, "source", json!("203.0.113.7:12345")),
        (1005, "service", Value::Null),
        (1006, "service", json!("default/kubia")),
        (1006, "source", Value::Null),
        (1007, "state", json!("new")),
        (1007, "assured", json!(false)),
        (1008, "state", json!("answered")),
        (1009, "state", json!("expired")),
    ] {
        assert_eq!(shown(client)?[field], want, "{field} of {client}");
    }

    let mut command = world.command(NODE, "flows")?;
    command.args(["--service", "default/kubia"]);
    let text = command.text()?;
    assert_eq!(text.lines().count(), 1 + 8, "a head, and every flow but one:\n{text}");
    let line = text.lines().find(|line| line.contains(":1001 ")).context("the first flow")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let source = "192.0.2.10:11001";
    assert_eq!(words[..1], ["default/kubia"]);
    assert_eq!(words[1..7], ["TCP", "203.0.113.7:1001", vip, &backend.to_string(), source, "established"]);
    Ok(())
}

#[test]
fn what_passed_for_a_service_is_shown_and_forgotten_with_it() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.maps().apply(&Op::Name(ServiceId(3), Some(Box::new(a_service("s")))))?;
    assert_eq!(bench.maps().service_counters(ServiceId(3))?, ServiceCounters::default());
    let counters = Map::PerCpuArray(MapData::from_pin(bench.pins.map(maps::SERVICE_COUNTERS))?);
    let mut counters = PerCpuArray::<_, ServiceCounters>::try_from(counters)?;
    let cpus = counters.get(&3, 0)?.len() as u64;
    for service in [3, 4] {
        let of_cpus = (0..cpus).map(|cpu| ServiceCounters {
            connections: 1,
            request_packets: 2 + cpu,
            request_bytes: u64::MAX / cpus,
            reply_packets: 4,
            reply_bytes: 5,
        });
        counters.set(service, PerCpuValues::try_from(of_cpus.collect::<Vec<_>>())?, 0)?;
    }
    let sum = ServiceCounters {
        connections: cpus,
        request_packets: (0..cpus).map(|cpu| 2 + cpu).sum(),
        request_bytes: u64::MAX / cpus * cpus,
        reply_packets: 4 * cpus,
        reply_bytes: 5 * cpus,
    };
    assert_eq!(bench.maps().service_counters(ServiceId(3))?, sum);
    // The name is removed, and the counters can still be read; the next Service starts from zero.
    bench.maps().apply(&Op::Name(ServiceId(3), None))?;
    assert_eq!(bench.maps().service_counters(ServiceId(3))?, sum);
    bench.maps().apply(&Op::Name(ServiceId(3), Some(Box::new(a_service("t")))))?;
    assert_eq!(bench.maps().service_counters(ServiceId(3))?, ServiceCounters::default());
    assert_eq!(bench.maps().service_counters(ServiceId(4))?, sum, "another's");
    Ok(())
}

fn a_service(name: &str) -> ServiceName {
    let service = ObjectKey::new("a", name);
    service_name(&PortKey { service, port_name: "".into(), proto: TCP, family: Family::V4 })
}
