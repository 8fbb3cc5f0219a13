//! `proxy-agent monitor` prints the datapath's decisions while it runs, and costs nothing afterwards.

use std::io::Read as _;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::host::clock::now;
use proxy_common::abi::Trace;
use proxy_common::abi::maps;
use proxy_tests::lab::Proc;
use proxy_tests::scenarios::{NODE, OUTSIDE_ADDRESS, World};
use rustix::process::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running monitor.
struct Monitor(Proc);

impl Monitor {
    fn start(world: &World, args: &[&str]) -> Result<Self> {
        let mut command = world.command(NODE, "monitor")?;
        command.args(["-o", "json"]).args(args).stdout(Stdio::piped());
        let monitor = Self(command.spawn()?);
        // A killed monitor may have left its request, which has expired.
        wait("nobody watches", || Ok(trace(world)?.until > now()))?;
        Ok(monitor)
    }

    /// Ends the monitor, and returns its events.
    fn end(mut self) -> Result<Vec<Value>> {
        self.0.signal(Signal::INT)?;
        let mut text = String::new();
        self.0.take_stdout()?.read_to_string(&mut text)?;
        let status = self.0.wait(PATIENCE)?;
        ensure!(status.success(), "monitor: {status}");
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Returns the trace that the datapath has been asked for.
fn trace(world: &World) -> Result<Trace> {
    let pins = PinDir::new(world.lab().node(NODE).pin_dir());
    let map = Array::<_, Trace>::try_from(Map::Array(MapData::from_pin(pins.map(maps::TRACE))?))?;
    Ok(map.get(&0, 0)?)
}

/// Returns the events that have these values of `fields`.
fn of<'a>(events: &'a [Value], fields: &[(&str, &str)]) -> Vec<&'a Value> {
    events.iter().filter(|event| fields.iter().all(|(name, want)| event[*name] == *want)).collect()
}

#[test]
fn what_is_decided_is_told_while_somebody_watches() -> Result<()> {
    let world = World::start(&["s08-nodeport.yaml", "s17-no-endpoints.yaml"])?;
    let (node_port, service) = ("192.168.1.11:30123", "default/kubia-nodeport");
    let (vip, nobody) = ("10.111.254.223:80", "10.96.17.17:80");

    let monitor = Monitor::start(&world, &["--sample", "1"])?;
    let mut second = world.command(NODE, "monitor")?;
    second.stdout(Stdio::piped()).stderr(Stdio::piped());
    let refused = second.output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("another"), "two at a time: {said}");
    world.outside().connect(node_port).http().times(1).run()?;
    world.client().connect(vip).http().times(1).run()?;
    let _ = world.client().connect(nobody).times(1).run();
    let events = monitor.end()?;

    let flow = of(&events, &[("what", "flow"), ("destination", node_port)]);
    let [flow] = flow.as_slice() else { panic!("one flow begins: {events:#?}") };
    assert!(flow["service"].as_str().is_some_and(|name| name.starts_with(service)), "{flow}");
    assert!(flow["source"].as_str().is_some_and(|source| source.starts_with(OUTSIDE_ADDRESS)), "{flow}");
    assert_eq!((&flow["direction"], &flow["protocol"]), (&"in".into(), &"TCP".into()), "{flow}");
    let backend = flow["newDestination"].as_str().context("translated")?;
    // Replies come from the backend, and leave with the nodePort as source.
    let answers = of(&events, &[("what", "packet"), ("source", backend), ("newSource", node_port)]);
    assert!(answers.len() > 2 && answers.iter().all(|answer| answer["direction"] == "out"), "{events:#?}");
    let connected = of(&events, &[("what", "connected"), ("at", "socket"), ("destination", vip)]);
    assert!(connected.len() == 1 && connected[0]["newDestination"].is_string(), "{events:#?}");
    let refused = of(&events, &[("what", "reject_no_endpoint"), ("destination", nobody)]);
    assert!(refused.len() == 1 && refused[0]["newDestination"].is_null(), "{events:#?}");

    // Without a monitor, no events are sent; with a filter, none of other Services.
    assert_eq!(trace(&world)?, Trace::default());
    world.outside().connect(node_port).http().times(1).run()?;
    let monitor = Monitor::start(&world, &["--service", service])?;
    world.client().connect(nobody).times(1).run().ok();
    world.outside().connect(node_port).http().times(1).run()?;
    let events = monitor.end()?;
    assert!(of(&events, &[("what", "flow")]).len() == 1 && events.len() == 1, "{events:#?}");
    Ok(())
}

#[test]
fn a_monitor_that_is_killed_leaves_nothing_on() -> Result<()> {
    let world = World::start(&["s08-nodeport.yaml"])?;
    Monitor::start(&world, &[])?.0.kill9();
    // The request is still there, and has expired.
    let until = trace(&world)?.until;
    wait("it does not end", || Ok(now() > until))?;
    world.client().connect("10.111.254.223:80").http().times(1).run()?;
    let events = Monitor::start(&world, &[])?.end()?;
    assert!(events.is_empty(), "{events:#?}");
    Ok(())
}
