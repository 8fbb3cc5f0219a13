//! Checks that `proxy-agent monitor` shows every kind of decision that can be provoked, at sockets and for packets.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::maps;
use proxy_common::abi::{Nanos, Trace};
use proxy_tests::lab::{Place, Proto};
use rustix::process::Signal;
use serde_json::Value;

use super::objects::{balancer, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::world::{ABSENT, ANSWER, ELSEWHERE, EMPTY, GUARDED, N1, ON_THIS_NODE, SILENCE, World, until};

pub(super) const ROWS: &[Row] = &[Row { id: "k065_monitor", check: monitor }];

const INACTIVE: &str = "10.96.77.77:80";

/// Decisions that are expected: at sockets, for packets on their way in, and on their way out.
const SOCKET: [&str; 8] = [
    "connected",
    "datagram",
    "reject_no_endpoint",
    "reject_unused_port",
    "drop_no_local_endpoint",
    "drop_inactive_address",
    "drop_source_range",
    "left_to_packets",
];
const IN: [&str; 8] = [
    "flow",
    "packet",
    "reject_no_endpoint",
    "reject_unused_port",
    "drop_no_local_endpoint",
    "drop_inactive_address",
    "drop_source_range",
    "drop_own_source",
];
const OUT: [&str; 4] = ["packet", "reject_unused_port", "drop_inactive_address", "drop_no_flow"];

fn monitor(world: &World) -> Result<Outcome> {
    let mut command = world.command("monitor")?;
    command.args(["-o", "json", "--sample", "1"]).stdout(Stdio::piped());
    let mut monitor = command.spawn()?;
    let pins = PinDir::new(world.node().pin_dir());
    let trace = Array::<_, Trace>::try_from(Map::Array(MapData::from_pin(pins.map(maps::TRACE))?))?;
    until("the monitor", || Ok((trace.get(&0, 0)?.until != Nanos(0)).then_some(())))?;
    provoke(world)?;
    // The monitor looks for events a few times a second.
    std::thread::sleep(Duration::from_millis(500));
    monitor.signal(Signal::INT)?;
    let mut text = String::new();
    monitor.take_stdout()?.read_to_string(&mut text)?;
    let status = monitor.wait(ANSWER)?;
    ensure!(status.success(), "monitor: {status}");
    ensure!(trace.get(&0, 0)?.until == Nanos(0), "it goes on being told");

    let mut told = BTreeSet::new();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let [at, direction, what] =
            ["at", "direction", "what"].map(|field| event[field].as_str().unwrap_or_default().to_owned());
        told.insert((if at == "socket" { at } else { direction }, what));
    }
    let wanted = [("socket", &SOCKET[..]), ("in", &IN), ("out", &OUT)];
    let wanted = wanted.into_iter().flat_map(|(place, kinds)| kinds.iter().map(move |kind| (place, *kind)));
    let wanted: BTreeSet<_> = wanted.map(|(place, kind)| (place.to_owned(), kind.to_owned())).collect();
    let missing: Vec<_> = wanted.difference(&told).collect();
    ensure!(missing.is_empty(), "not told: {missing:?}; told: {told:?}");
    right(format!("{} kinds of events, {} events", told.len(), text.lines().count()))
}

/// Provokes a decision of every kind. Other rows check the results.
fn provoke(world: &World) -> Result<()> {
    let (pod, host) = (world.pod("P"), world.host());
    let [x, y, far] = ["X", "Y", "far"].map(|name| world.lab().client(name));
    let unused = cluster_ip(ON_THIS_NODE.number, false, 999);
    for (place, way, target) in [
        (&pod, Proto::Tcp, cluster_ip(ON_THIS_NODE.number, false, 80)),
        (&pod, Proto::UdpUnconnected, cluster_ip(ON_THIS_NODE.number, false, 80)),
        (&pod, Proto::Tcp, cluster_ip(EMPTY.number, false, 80)),
        (&pod, Proto::Udp, unused.clone()),
        (host, Proto::Tcp, cluster_ip(ABSENT.number, false, 80)),
        (host, Proto::Udp, INACTIVE.to_owned()),
        (host, Proto::Tcp, balancer(GUARDED.number, false, 80)),
        (&x, Proto::Tcp, node_port(ELSEWHERE.number, false, 80)),
        (&x, Proto::Tcp, balancer(EMPTY.number, false, 80)),
        (&x, Proto::Udp, unused.clone()),
    ] {
        ask(place, way, &target, ANSWER)?;
    }
    for (place, target) in [
        (&pod, cluster_ip(ABSENT.number, false, 80)),
        (&x, balancer(ABSENT.number, false, 80)),
        (&x, INACTIVE.to_owned()),
        (&y, balancer(GUARDED.number, false, 80)),
    ] {
        ask(place, Proto::Udp, &target, SILENCE)?;
    }
    // The socket is in none of the node's cgroups, like a socket of a kernel thread: the socket programs have not
    // translated it.
    host.net()
        .enter(|| send("0.0.0.0", &[&cluster_ip(ON_THIS_NODE.number, false, 80), &unused, INACTIVE]))??;
    // Packets from another machine with the node's own source address.
    far.net().ip(&format!("address add {}/32 dev lo", N1[0]))?;
    let sent = far.net().enter(|| send(N1[0], &[&balancer(ON_THIS_NODE.number, false, 80)]))?;
    far.net().ip(&format!("address delete {}/32 dev lo", N1[0]))?;
    sent
}

fn ask(place: &Place, way: Proto, target: &str, timeout: Duration) -> Result<()> {
    place.connect(target).proto(way).timeout(timeout).one().map(drop)
}

fn send(source: &str, targets: &[&str]) -> Result<()> {
    let socket = UdpSocket::bind((source, 0))?;
    for target in targets {
        // The call may fail with the error of the datagram before.
        let _ = socket.send_to(b"?", target);
    }
    Ok(())
}
