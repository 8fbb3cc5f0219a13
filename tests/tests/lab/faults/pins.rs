//! Maps that an agent finds pinned: of another layout, of another size, of another version; and the contents of the
//! maps as bpftool shows them.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use bytemuck::Zeroable;
use proxy_agent::bpf::flow_maps::FlowMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::writable::WritableMaps;
use proxy_agent::host::clock::now;
use proxy_agent::reconcile::store::{MapStore as _, Op};
use proxy_common::abi::maps;
use proxy_common::abi::proto::{TCP, UDP};
use proxy_common::abi::{
    ABI_VERSION, AffinityKey, AffinityValue, CgroupId, Device, Flow, FlowKey, FlowRef, FragmentKey,
    FragmentPorts, NetnsCookie, ServiceId, UdpFlow, UdpFlowKey, opt_out,
};
use proxy_common::addr::{Addr, Prefix};
use proxy_tests::lab::{Agent, Summary};
use proxy_tests::scenarios::{Loops, NODE, World, served};

use super::{KUBIA, KUBIA_VIP, numbers};

/// Runs bpftool with words separated by spaces, the path, and more words.
fn bpftool(world: &World, words: &str, path: &std::path::Path, more: &str) -> Result<String> {
    let mut command = world.host().command("bpftool");
    command.args(words.split(' ')).arg(path).args(more.split_whitespace());
    command.text().context("the lab needs bpftool")
}

/// Pins a new map made by bpftool in the place of one of our maps.
fn put_map(world: &World, version: &str, name: &str, layout: &str) -> Result<()> {
    let dir = world.lab().node(NODE).pin_dir().join(version);
    fs::create_dir_all(&dir)?;
    let pin = dir.join(name);
    if pin.exists() {
        fs::remove_file(&pin)?;
    }
    bpftool(world, "map create", &pin, &format!("{layout} name {name}")).map(drop)
}

/// Returns the layout of the map that is pinned there.
fn layout(world: &World, name: &str) -> Result<String> {
    let pin = world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}")).join(name);
    let shown = bpftool(world, "map show pinned", &pin, "")?;
    let [key, value, entries] = ["key ", "value ", "max_entries "].map(|word| {
        let size = shown.split_once(word).and_then(|(_, rest)| rest.split_whitespace().next());
        size.unwrap_or_default()
    });
    Ok(format!("{key} {value} {entries}"))
}

/// Checks that every connection is answered by some server while the agent starts on maps that it has to replace. The
/// address that getpeername() returns may be wrong for a moment: new programs read a new table.
fn all_answered(loops: Loops) -> Result<()> {
    for (target, attempts) in loops.stop()? {
        let summary = Summary::of(&attempts);
        assert_eq!(summary.ok, summary.total, "{target}: {:?}", summary.by_error);
    }
    Ok(())
}

#[test]
fn maps_of_another_layout_are_replaced_while_clients_go_on() -> Result<()> {
    let mut world = World::start(&[KUBIA, "s14-dns.yaml"])?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    for map in maps::ALL {
        let right = layout(&world, map.name)?;
        world.agent(NODE).kill9()?;
        put_map(&world, &format!("v{ABI_VERSION}"), map.name, "type array key 4 value 12 entries 3")?;
        loops.go_on()?;
        world.agent(NODE).start_ready()?;
        assert_eq!(layout(&world, map.name)?, right, "{}", map.name);
        for place in world.clients() {
            served(KUBIA_VIP, &place.connect(KUBIA_VIP).http().times(10).run()?)?;
            served("10.96.0.10:53", &place.connect("10.96.0.10:53").udp().times(10).run()?)?;
        }
        loops.go_on()?;
    }
    all_answered(loops)
}

#[test]
fn maps_that_are_too_small_are_replaced_while_clients_go_on() -> Result<()> {
    let mut world = World::start(&[KUBIA])?;
    let right = layout(&world, maps::FRONTENDS)?;
    let loops = Loops::start(&world, &[KUBIA_VIP])?;
    world.agent(NODE).kill9()?;
    put_map(&world, &format!("v{ABI_VERSION}"), maps::FRONTENDS, "type hash key 20 value 8 entries 1")?;
    assert_ne!(layout(&world, maps::FRONTENDS)?, right);
    world.agent(NODE).start_ready()?;
    assert_eq!(layout(&world, maps::FRONTENDS)?, right);
    // With the right maps, nothing is replaced.
    let before = numbers(&world, NODE)?;
    world.agent(NODE).kill9()?;
    world.agent(NODE).start_ready()?;
    assert_eq!(numbers(&world, NODE)?, before);
    all_answered(loops)
}

#[test]
fn maps_of_another_version_are_removed_when_nobody_needs_them() -> Result<()> {
    let mut world = World::start(&[KUBIA])?;
    let loops = Loops::start(&world, &[KUBIA_VIP])?;
    world.agent(NODE).kill9()?;
    let before = numbers(&world, NODE)?;
    // An older version, and a newer version that was rolled back.
    for version in ["v0", "v999"] {
        put_map(&world, version, maps::FRONTENDS, "type hash key 24 value 16 entries 64")?;
    }
    // Pins of others are not touched.
    put_map(&world, "version-of-somebody", "MAP", "type array key 4 value 4 entries 1")?;
    world.agent(NODE).start_ready()?;
    let mut left: Vec<String> = fs::read_dir(world.lab().node(NODE).pin_dir())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    left.sort();
    // The file `made` notes changes outside the pin directory.
    assert_eq!(left, ["links", "made", &format!("v{ABI_VERSION}"), "version-of-somebody"]);
    assert_eq!(numbers(&world, NODE)?, before);
    loops.none_failed().map(drop)
}

#[test]
fn a_link_that_is_missing_is_made_again() -> Result<()> {
    let mut world = World::start(&[KUBIA])?;
    world.agent(NODE).kill9()?;
    fs::remove_file(world.lab().node(NODE).pin_dir().join("links/connect4"))?;
    // The kernel detaches the program some time after the pin is gone. Packets of a pod are translated at its
    // interface even then.
    let deadline = Instant::now() + Duration::from_secs(10);
    while world.host().connect(KUBIA_VIP).http().one()?.ok {
        ensure!(Instant::now() < deadline, "connect4 still runs");
    }
    let status = world.tool(NODE, "status")?;
    assert_eq!(status["programs"]["connect4"], false, "{status}");
    Agent::start_ready(world.agent(NODE))?;
    for place in world.clients() {
        served(KUBIA_VIP, &place.connect(KUBIA_VIP).http().times(10).run()?)?;
    }
    Ok(())
}

/// Puts an element into each table that only packets, devices or rarer Services fill.
fn something_for_the_packet_edge(pins: &PinDir) -> Result<()> {
    let range = Prefix::new(Addr::v4([203, 0, 113, 0]), 24).context("a prefix")?;
    let mut maps = WritableMaps::open(pins)?;
    maps.apply(&Op::SourceRange(ServiceId::NONE, range, true))?;
    maps.apply(&Op::OptOut(CgroupId(u64::MAX), Some(opt_out::EVERYTHING)))?;
    maps.apply(&Op::Sandbox(NetnsCookie(u64::MAX), Some(CgroupId(u64::MAX))))?;
    let mut flows = FlowMaps::open(pins)?;
    let key = FlowKey { proto: TCP, ..Zeroable::zeroed() };
    for table in [&mut flows.flows, &mut flows.new_flows] {
        table.add(&key, &Flow { last_seen: now(), ..Flow::default() })?;
    }
    for table in [&mut flows.index, &mut flows.new_index] {
        table.add(&key, &FlowRef::default())?;
    }
    let fragment = FragmentKey { proto: UDP, ..Zeroable::zeroed() };
    let mut fragments = HashMap::<_, FragmentKey, FragmentPorts>::try_from(open(pins, maps::FRAGMENTS)?)?;
    fragments.insert(fragment, FragmentPorts::default(), 0)?;
    let mut clients = HashMap::<_, AffinityKey, AffinityValue>::try_from(open(pins, maps::NEW_AFFINITY)?)?;
    clients.insert(AffinityKey::zeroed(), AffinityValue::zeroed(), 0)?;
    // No device has this number.
    let mut datagrams = HashMap::<_, UdpFlowKey, UdpFlow>::try_from(open(pins, maps::UDP_FLOWS)?)?;
    datagrams.insert(UdpFlowKey::zeroed(), UdpFlow::zeroed(), 0)?;
    let mut devices = HashMap::<_, u32, Device>::try_from(open(pins, maps::DEVICES)?)?;
    Ok(devices.insert(u32::MAX, Device::default(), 0)?)
}

fn open(pins: &PinDir, name: &str) -> Result<Map> {
    Ok(Map::HashMap(MapData::from_pin(pins.map(name))?))
}

#[test]
fn bpftool_shows_every_map_with_field_names() -> Result<()> {
    let mut world = World::start(&[])?;
    // Every table gets an element.
    for (target, sticky) in [(KUBIA_VIP, false), ("10.111.249.154:80", true)] {
        let attempts = world.client().connect(target).http().times(5).run()?;
        assert!(served(target, &attempts)?.by_server.len() == 1 || !sticky);
    }
    // A running agent would remove these elements.
    world.agent(NODE).kill9()?;
    something_for_the_packet_edge(&PinDir::new(world.lab().node(NODE).pin_dir()))?;
    for map in maps::ALL {
        let fields: &[&str] = match map.name {
            maps::FRONTENDS => &["addr", "port", "proto", "kind", "service", "flags", "check"],
            maps::SERVICES => &["cluster", "local", "base", "len", "affinity", "seconds", "epoch"],
            maps::BACKENDS => &["addr", "port", "service", "state", "flags", "generation"],
            maps::NAMES => &["namespace", "name", "port_name", "proto", "family"],
            maps::AFFINITY | maps::NEW_AFFINITY => {
                &["client", "service", "backend", "generation", "epoch", "last_seen"]
            }
            maps::UDP_FLOWS => &["cookie", "addr", "port", "direction", "backend", "check"],
            maps::STREAMS => &["cookie", "record", "vip", "backend_addr", "service", "check"],
            maps::NODE => &["host_netns", "flags"],
            maps::DEVICES => &["snat_v4", "snat_v6", "flags"],
            maps::FLOWS | maps::NEW_FLOWS => &[
                "source",
                "destination_port",
                "proto",
                "kind",
                "vip",
                "snat",
                "client_port",
                "answered_by",
                "asked_by",
                "state",
                "last_seen",
            ],
            maps::FLOW_INDEX | maps::NEW_FLOW_INDEX => {
                &["destination", "source_port", "addr", "port", "check"]
            }
            maps::FRAGMENTS => &["source", "destination", "id", "proto", "egress"],
            maps::SERVICE_COUNTERS => &["connections", "request_packets", "reply_bytes"],
            // Names that bpftool itself gives the key of a trie.
            maps::SERVICE_CIDRS | maps::POD_SOURCES => &["prefix_len", "bytes"],
            maps::SOURCE_RANGES => &["prefix_len", "service", "addr"],
            // Plain numbers and addresses.
            maps::FILTER
            | maps::SLOTS
            | maps::LOCAL_ADDRESSES
            | maps::COUNTERS
            | maps::OPT_OUT
            | maps::SANDBOXES => &["key", "value"],
            maps::TRACE => &["until", "service", "sample"],
            // The kernel shows socket storage by socket only, and a ring buffer only to its reader.
            maps::SOCKETS | maps::ORDERS | maps::EVENTS => continue,
            other => anyhow::bail!("what does {other} hold?"),
        };
        let pin = world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}")).join(map.name);
        let dump = bpftool(&world, "map dump pinned", &pin, "")?;
        for field in fields {
            assert!(
                dump.contains(&format!("\"{field}\": ")),
                "no {field} in the dump of {}, which begins\n{}",
                map.name,
                dump.lines().take(40).collect::<Vec<_>>().join("\n")
            );
        }
    }
    Ok(())
}
