//! Maps that flows depend on: tries, and the filter.

use proxy_common::abi::{BackendId, ServiceId};

use super::*;

#[test]
fn tries_hold_what_was_put_into_them() -> Result<()> {
    let mut bench = Bench::new()?;
    let ranges = [
        (1, "203.0.113.0/24"),
        (1, "203.0.113.0/25"),
        (1, "198.51.100.7/32"),
        (2, "203.0.113.128/25"),
        (2, "2001:db8::/32"),
        (2, "2001:db8::5/128"),
        (65_537, "0.0.0.0/1"),
    ];
    let ranges = ranges.map(|(id, text)| prefix(text).map(|range| (ServiceId(id), range)));
    let ranges: BTreeSet<(ServiceId, Prefix)> = ranges.into_iter().collect::<Result<_>>()?;
    for (id, range) in &ranges {
        bench.maps().apply(&Op::SourceRange(*id, *range, true))?;
    }
    let (pods, cidr) = (prefix("10.64.0.0/12")?, prefix("fd00:96::/112")?);
    bench.maps().apply(&Op::PodSource(pods, true))?;
    bench.maps().apply(&Op::ServiceCidr(cidr, true))?;

    let contents = bench.maps().contents()?;
    assert_eq!(contents.source_ranges.len(), ranges.len());
    assert_eq!(contents.source_ranges.into_iter().collect::<BTreeSet<_>>(), ranges);
    assert_eq!((contents.pod_sources, contents.service_cidrs), (vec![pods], vec![cidr]));
    let usage = bench.maps().usage()?;
    assert!(usage.contains(&(maps::SOURCE_RANGES, 7, 64)), "{usage:?}");

    // A lookup as a BPF program makes it: the id with a whole address.
    let trie = Map::LpmTrie(MapData::from_pin(bench.pins.map(maps::SOURCE_RANGES))?);
    let trie = LpmTrie::<_, [u8; 20], u32>::try_from(trie)?;
    let admits = |id: u32, client: &str| -> Result<bool> {
        let client: Addr = client.parse::<std::net::IpAddr>()?.into();
        let mut data = [0; 20];
        data[..4].copy_from_slice(&id.to_ne_bytes());
        data[4..].copy_from_slice(&client.bytes);
        Ok(trie.get(&lpm_trie::Key::new(160, data), 0).is_ok())
    };
    for (id, client, want) in [
        (1, "203.0.113.7", true),
        (1, "203.0.113.200", true),
        (1, "198.51.100.7", true),
        (1, "198.51.100.8", false),
        (2, "203.0.113.7", false),
        (2, "203.0.113.200", true),
        (2, "2001:db8:ffff::1", true),
        (2, "2001:db9::1", false),
        (65_537, "10.0.0.1", true),
        (65_537, "203.0.113.7", false),
        (3, "203.0.113.7", false),
    ] {
        assert_eq!(admits(id, client)?, want, "{id} from {client}");
    }

    // Removing succeeds also if the element is already gone.
    for _ in 0..2 {
        bench.maps().apply(&Op::SourceRange(ServiceId(1), prefix("203.0.113.0/24")?, false))?;
        bench.maps().apply(&Op::PodSource(pods, false))?;
    }
    assert!(admits(1, "203.0.113.7")? && !admits(1, "203.0.113.200")?, "the longer prefix stays");
    assert_eq!(bench.maps().contents()?.pod_sources, []);
    Ok(())
}

fn prefix(text: &str) -> Result<Prefix> {
    let (addr, len) = text.split_once('/').context("a prefix")?;
    Prefix::new(addr.parse::<std::net::IpAddr>()?.into(), len.parse()?).context("a prefix")
}

#[test]
fn the_filter_keeps_what_flows_lead_to() -> Result<()> {
    let mut bench = Bench::new()?;
    let state = BackendState { flags: backend::flags::IN_CLUSTER, generation: 1 };
    for number in 1..=3 {
        let addr = backend_of(number);
        let backend = Backend { addr, port: Be16::new(8080), pad: [0; 2], service: ServiceId(1), state };
        bench.maps().apply(&Op::Backend(BackendId(number.into()), backend))?;
    }
    // All backends but the first leave their Service; the second and a fourth still have flows.
    for number in 2..=3 {
        bench.maps().apply(&Op::BackendState(BackendId(number), BackendState { flags: 0, generation: 1 }))?;
    }
    let mut maps = bench.flows()?;
    for (table, number) in [(&mut maps.flows, 2), (&mut maps.new_flows, 4)] {
        let (key, flow) = record(POD, TCP, 1, ASSURED, now().0);
        table.add(&FlowKey { destination: backend_of(number), ..key }, &flow)?;
    }
    let all = [1, 2, 3, 4].map(backend_of);
    let kept = all.each_ref().map(|backend| in_filter(&bench.dataplane.maps, backend));
    assert_eq!(kept, [true, true, true, false]);
    let contents = bench.maps().contents()?;
    bench.maps().refresh_filter(&contents)?;
    let kept = all.each_ref().map(|backend| in_filter(&bench.dataplane.maps, backend));
    assert_eq!(kept, [true, true, false, true]);
    Ok(())
}

fn backend_of(number: u8) -> Addr {
    Addr::v4([10, 64, 7, number])
}

fn in_filter(maps: &KernelMaps, backend: &Addr) -> bool {
    let FilterBit { word, mask } = FilterBit::of_backend(backend);
    maps.filter().get(word as usize).is_some_and(|bits| bits & mask != 0)
}

#[test]
fn new_maps_know_what_older_flows_lead_to() -> Result<()> {
    let mut world = World::start(&["s01-clusterip.yaml"])?;
    let pins = PinDir::new(world.lab().node(NODE).pin_dir());
    let departed = Addr::v4([10, 64, 7, 2]);
    let (key, flow) = record(POD, TCP, 1, ASSURED, now().0);
    FlowMaps::open(&pins)?.flows.add(&FlowKey { destination: departed, ..key }, &flow)?;
    // Nothing has told the filter yet. A new agent does, whether it takes the maps over or replaces them.
    assert!(!in_filter(&KernelMaps::open(&pins)?, &departed));
    world.agent(NODE).kill9()?;
    world.agent(NODE).start_ready()?;
    assert!(in_filter(&KernelMaps::open(&pins)?, &departed));
    world.agent(NODE).kill9()?;
    std::fs::remove_file(pins.map(maps::FRONTENDS))?;
    world.agent(NODE).start_ready()?;
    assert!(in_filter(&KernelMaps::open(&pins)?, &departed));
    Ok(())
}
