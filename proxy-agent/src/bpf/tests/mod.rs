//! Tests of growing maps, in a real kernel. They need root.

mod refusals;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use proxy_common::abi::maps;
use proxy_common::abi::{
    Affinity, Backend, BackendId, BackendState, FrontendKey, FrontendValue, NetnsCookie, Service,
    ServiceCounters, ServiceId, SlotRange, proto,
};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use super::dataplane::{Dataplane, FLOW_ENTRIES, Sizes};
use super::pins::PinDir;
use super::writable::WritableMaps;
use crate::bpf::self_test;
use crate::host::sys::netns_cookie;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::PortKey;
use crate::reconcile::model::service_name;
use crate::reconcile::store::{Capacity, Contents, MapStore as _, Op};

const SMALL: Capacity = Capacity { frontends: 4, services: 4, slots: 8, backends: 4, source_ranges: 4 };
const LARGE: Capacity = Capacity { frontends: 64, services: 32, slots: 80, backends: 48, source_ranges: 40 };
const GROWING: [&str; 7] = [
    maps::NAMES,
    maps::SERVICE_COUNTERS,
    maps::SERVICES,
    maps::BACKENDS,
    maps::SLOTS,
    maps::SOURCE_RANGES,
    maps::FRONTENDS,
];

/// A pin directory that is removed when it is dropped.
struct Pins(PinDir);

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("{error}");
        }
    }
}

fn open(pins: &PinDir, capacity: Capacity) -> Dataplane {
    let sizes = Sizes { least: capacity, want: capacity, flows: FLOW_ENTRIES };
    Dataplane::open(pins.clone(), sizes, drop).unwrap()
}

/// Writes an element into each of the maps, at its highest number.
fn fill(maps: &mut WritableMaps) {
    let port = PortKey {
        service: ObjectKey::new("default", "kubia"),
        port_name: "".into(),
        proto: proto::TCP,
        family: Family::V4,
    };
    let key = FrontendKey { addr: addr(1), port: Be16::new(80), proto: proto::TCP, kind: 0 };
    let range = SlotRange { base: 6, len: 2 };
    let backend = Backend {
        addr: addr(2),
        port: Be16::new(8080),
        pad: [0; 2],
        service: ServiceId(3),
        state: BackendState { flags: 7, generation: 5 },
    };
    let service =
        Service { cluster: range, local: SlotRange::REJECT, affinity: Affinity { seconds: 9, epoch: 4 } };
    for op in [
        Op::Name(ServiceId(3), Some(Box::new(service_name(&port)))),
        Op::Backend(BackendId(3), backend),
        Op::Slots(6, vec![BackendId(3); 2]),
        Op::Service(ServiceId(3), service),
        Op::SourceRange(ServiceId(3), Prefix::new(addr(0), 24).unwrap(), true),
        Op::Frontend(key, Some(FrontendValue::new(&key, ServiceId(3), 0))),
    ] {
        maps.apply(&op).unwrap();
    }
}

fn addr(last: u8) -> Addr {
    Addr::from(Ipv4Addr::new(192, 0, 2, last))
}

/// Counts a connection on each CPU, as the programs do.
fn count(pins: &PinDir) {
    let map = Map::PerCpuArray(MapData::from_pin(pins.map(maps::SERVICE_COUNTERS)).unwrap());
    let mut counters = PerCpuArray::<_, ServiceCounters>::try_from(map).unwrap();
    let one = ServiceCounters { connections: 1, ..ServiceCounters::default() };
    let cpus = aya::util::nr_cpus().unwrap();
    counters.set(3, PerCpuValues::try_from(vec![one; cpus]).unwrap(), 0).unwrap();
}

fn shown(contents: &Contents) -> String {
    format!("{contents:#?}")
}

fn pin_again(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_file(to).unwrap();
    }
    MapData::from_pin(from).unwrap().pin(to).unwrap();
}

#[test]
fn larger_maps_hold_the_same_wherever_a_growth_was_cut_short() {
    let pins = Pins(PinDir::new(Path::new(&format!("/sys/fs/bpf/vipr-unit-grow-{}", std::process::id()))));
    let pins = &pins.0;
    pins.create().unwrap();
    let mut small = open(pins, SMALL);
    fill(&mut small.maps);
    count(pins);
    let connections = small.maps.service_counters(ServiceId(3)).unwrap().connections;
    assert!(connections > 0);
    let before = small.maps.contents().unwrap();
    let elements = [before.names.len(), before.frontends.len(), before.source_ranges.len()];
    assert_eq!((elements, before.backends.len(), before.slots.len()), ([1, 1, 1], 4, 8));
    GROWING.iter().for_each(|name| pin_again(&pins.map(name), &kept(pins, name)));

    for replaced in 0..=GROWING.len() {
        // The earlier agent died after it had replaced this many maps, while it filled the next one.
        for (number, name) in GROWING.iter().enumerate() {
            if number >= replaced {
                pin_again(&kept(pins, name), &pins.map(name));
            }
        }
        if let Some(next) = GROWING.get(replaced) {
            pin_again(&kept(pins, next), &pins.maps().join(format!("{next}-larger")));
        }
        let large = open(pins, LARGE);
        assert!(large.resumed);
        assert_eq!(large.maps.capacity(), LARGE, "{replaced} were replaced");
        assert_eq!(shown(&large.maps.contents().unwrap()), shown(&before), "{replaced} were replaced");
        assert_eq!(
            large.maps.service_counters(ServiceId(3)).unwrap().connections,
            connections,
            "{replaced} were replaced"
        );
        assert!(
            !pins.maps().read_dir().unwrap().any(|pin| pin
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains('-'))
        );
    }
    // Maps that are large enough are kept.
    let before = ids(pins);
    open(pins, SMALL);
    assert_eq!(ids(pins), before);
}

fn kept(pins: &PinDir, name: &str) -> PathBuf {
    pins.root().join(format!("{name}-kept"))
}

fn ids(pins: &PinDir) -> [u32; GROWING.len()] {
    GROWING.map(|name| MapData::from_pin(pins.map(name)).unwrap().info().unwrap().id())
}

/// A pod that finds the probe's port in time makes the socket edge learn the pod's network namespace, but that is
/// corrected.
#[test]
fn the_hosts_network_namespace_is_the_agents() {
    let dir = Path::new("/sys/fs/bpf").join(format!("vipr-netns-{}", std::process::id()));
    let pins = Pins(PinDir::new(&dir));
    pins.0.create().unwrap();
    let dataplane = open(&pins.0, SMALL);
    let own = netns_cookie().expect("a kernel of 5.14");
    for wrong in [NetnsCookie::NONE, NetnsCookie(own.0 + 1)] {
        dataplane.maps.set_host_netns(wrong).unwrap();
        self_test::settle(&dataplane.maps).unwrap();
        assert_eq!((dataplane.maps.host_netns(), dataplane.maps.node_flags()), (own, 0));
    }
}

/// An earlier version of the agent had no `NEW_AFFINITY`, but has left everything else as it should be.
#[test]
fn a_map_that_is_new_costs_no_other() {
    let pins = PinDir::new(Path::new(&format!("/sys/fs/bpf/vipr-unit-new-map-{}", std::process::id())));
    pins.create().unwrap();
    let pins = Pins(pins);
    assert!(!open(&pins.0, SMALL).resumed);
    for (map, resumed) in [(maps::NEW_AFFINITY, true), (maps::AFFINITY, false)] {
        std::fs::remove_file(pins.0.map(map)).unwrap();
        assert_eq!(open(&pins.0, SMALL).resumed, resumed, "{map}");
        assert!(pins.0.map(map).exists());
    }
}
