//! One cluster and one agent meet every fault of an API server, one after the other. After each fault, untouched
//! Services still have the same map elements, and the changing Service is right.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::{FrontendKey, ServiceId, proto};
use proxy_common::be::Be16;
use proxy_tests::apiserver::{ApiServer, Cut, Resource, Streams};
use proxy_tests::scenarios::{Loops, NODE, World, refusal};
use serde_json::{Value, json};

use super::api::{READY, READY_VIP, cluster, slice, wait_for};
use super::drift::verify_with;
use super::{KUBIA, KUBIA_VIP};

/// Number of Services beside those of the examples, so that lists have further pages and bursts are large.
const FILLING: u16 = 3000;
/// Time for what the agent does at its own pace: the longest pause after a failure is half a minute.
const PATIENCE: Duration = Duration::from_secs(60);
/// Length of an outage after which every pause has reached its limit.
const OUTAGE: Duration = Duration::from_secs(130);
/// Time in which the agent notices the server's return and catches up: the longest pause, and some more for a debug
/// build on a busy machine.
const BACK: Duration = Duration::from_secs(45);

/// A cluster under attack.
struct Storm {
    world: World,
    server: ApiServer,
    kubeconfig: PathBuf,
    loops: Loops,
    /// Elements of the untouched Services.
    untouched: Vec<String>,
    /// Number of changes of the changing Service.
    changes: usize,
}

impl Storm {
    fn start(streams: Streams) -> Result<Self> {
        let mut world = World::new(&[KUBIA, READY, "s17-no-endpoints.yaml", "s15-kubernetes.yaml"])?;
        let (server, agent) = cluster(&world)?;
        server.offer_streams(streams);
        for index in 0..FILLING {
            server.apply_all([filling(index), filling_slice(index, 2)])?;
        }
        world.adopt(NODE, agent).start_ready()?;
        let kubeconfig = world.dir().join("kubeconfig");
        let loops = Loops::start(&world, &[KUBIA_VIP, READY_VIP])?;
        let untouched = elements(&world)?;
        ensure!(untouched.len() > 4, "{untouched:?}");
        Ok(Self { world, server, kubeconfig, loops, untouched, changes: 0 })
    }

    /// Changes the changing Service, and returns the pods that must be behind it.
    fn change(&mut self) -> Result<&'static [usize]> {
        const PODS: [&[usize]; 5] = [&[0, 1], &[1, 2], &[2], &[0, 1, 2], &[0]];
        self.changes += 1;
        let pods = PODS[self.changes % PODS.len()];
        self.server.apply(slice(&self.world, pods)?)?;
        Ok(pods)
    }

    /// Waits until the agent watches every kind.
    fn is_watching(&self) -> Result<()> {
        let kinds = [Resource::Services, Resource::EndpointSlices, Resource::Nodes, Resource::ServiceCidrs];
        kinds.iter().try_for_each(|kind| self.server.wait_for_watches(*kind, 1, PATIENCE))
    }

    /// Applies a fault to the server, changes a Service and checks that all is well.
    fn meets(&mut self, what: &str, fault: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.is_watching()?;
        let began = Instant::now();
        fault(self).with_context(|| what.to_owned())?;
        self.is_well(what)?;
        println!("{what}: {:.1} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    fn is_well(&mut self, what: &str) -> Result<()> {
        self.takes_a_change().with_context(|| format!("behind {what}"))
    }

    fn takes_a_change(&mut self) -> Result<()> {
        let pods = self.change()?;
        wait_for(&self.world, pods)?;
        ensure!(elements(&self.world)? == self.untouched, "elements of untouched Services have changed");
        self.loops.next(5)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = verify_with(&self.world, "--kubeconfig", &self.kubeconfig)?;
            if found.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "verify finds {found:?}");
        }
    }

    /// Makes the server forget its history, so that the agent lists everything again.
    fn forgets(&self) {
        self.server.forget_requests();
        self.server.compact();
        self.server.cut_watches(Cut::Broken);
    }

    fn wait_for_list(&self, resource: Resource) -> Result<()> {
        soon("a list", || Ok(self.server.lists(resource) > 0))
    }

    /// Returns how many of the filling Services have a frontend.
    fn programmed(&self) -> Result<usize> {
        let maps = maps(&self.world)?;
        (0..FILLING)
            .try_fold(0, |sum, index| Ok(sum + usize::from(maps.frontend(&frontend(index))?.is_some())))
    }

    /// Changes all filling slices at once. Returns the time until all were programmed.
    fn burst(&self, endpoints: u8) -> Result<Duration> {
        let maps = maps(&self.world)?;
        self.server.hold_events(Resource::EndpointSlices);
        for index in 0..FILLING {
            self.server.apply(filling_slice(index, endpoints))?;
        }
        let began = Instant::now();
        self.server.release_events(Resource::EndpointSlices);
        for index in 0..FILLING {
            soon("programmed", || {
                let value = maps.frontend(&frontend(index))?.context("it has a frontend")?;
                Ok(maps.service(value.service).is_some_and(|s| s.cluster.len == u32::from(endpoints)))
            })?;
        }
        Ok(began.elapsed())
    }
}

fn soon(what: &str, done: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        if Instant::now() > deadline {
            bail!("{what}: not after {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn maps(world: &World) -> Result<KernelMaps> {
    Ok(KernelMaps::open(&PinDir::new(world.lab().node(NODE).pin_dir()))?)
}

/// Returns all elements of the maps that belong to the untouched Service.
fn elements(world: &World) -> Result<Vec<String>> {
    let contents = maps(world)?.contents()?;
    let named = contents
        .names
        .iter()
        .filter(|(_, name)| String::from_utf8_lossy(&name.name).trim_end_matches('\0') == "kubia");
    let ids: BTreeSet<ServiceId> = named.map(|(id, _)| *id).collect();
    let mut elements = Vec::new();
    let mut frontends: Vec<_> = contents.frontends.iter().filter(|(_, f)| ids.contains(&f.service)).collect();
    // Each map draws the number that decides the order in its hash.
    frontends.sort_by_key(|(key, _)| format!("{key:?}"));
    elements.extend(frontends.iter().map(|frontend| format!("{frontend:?}")));
    for id in ids {
        let service = contents.services.get(id.0 as usize).context("a Service")?;
        elements.push(format!("{id}: {service:?}"));
        for slot in service.cluster.base..service.cluster.base + service.cluster.len {
            let backend = *contents.slots.get(slot as usize).context("a slot")?;
            elements.push(format!("{slot}: {backend}: {:?}", contents.backends.get(backend.0 as usize)));
        }
    }
    Ok(elements)
}

fn filling_vip(index: u16) -> IpAddr {
    let [high, low] = index.to_be_bytes();
    IpAddr::from([10, 98, high, low])
}

fn frontend(index: u16) -> FrontendKey {
    FrontendKey::exact(filling_vip(index).into(), Be16::new(80), proto::TCP)
}

fn filling(index: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "filling", "name": format!("filling-{index}") },
        "spec": {
            "clusterIP": filling_vip(index), "clusterIPs": [filling_vip(index)],
            "ports": [{ "protocol": "TCP", "port": 80 }],
        },
    })
}

fn filling_slice(index: u16, endpoints: u8) -> Value {
    let [high, low] = index.to_be_bytes();
    let addresses = (0..endpoints).map(|number| IpAddr::from([10, 200 + number, high, low]));
    let endpoints: Vec<_> = addresses.map(|address| json!({ "addresses": [address] })).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "filling", "name": format!("filling-{index}-0"),
            "labels": { "kubernetes.io/service-name": format!("filling-{index}") },
        },
        "ports": [{ "name": "", "protocol": "TCP", "port": 8080 }],
        "endpoints": endpoints,
    })
}

/// Runs every fault, one after the other.
fn all_faults(streams: Streams) -> Result<()> {
    let mut storm = Storm::start(streams)?;
    storm.is_well("the start")?;
    connections(&mut storm)?;
    answers(&mut storm)?;
    events(&mut storm)?;
    lists(&mut storm)?;
    starts(&mut storm)?;
    storm.meets("slices changed at once", |storm| {
        for endpoints in [1, 2] {
            let took = storm.burst(endpoints)?;
            println!("{FILLING} slices at once: all programmed after {:.2} s", took.as_secs_f64());
        }
        Ok(())
    })?;
    storm.loops.none_failed().map(drop)
}

/// Breaks watches and connections.
fn connections(storm: &mut Storm) -> Result<()> {
    for cut in [Cut::Clean, Cut::Broken, Cut::WithinNextEvent] {
        storm.meets(&format!("watches that end: {cut:?}"), |storm| {
            storm.server.cut_watches(cut);
            Ok(())
        })?;
    }
    storm.meets("connections that break", |storm| {
        storm.server.cut_connections();
        Ok(())
    })?;
    storm.meets("watches that end at once", |storm| {
        storm.server.end_watches_at_once(true);
        storm.server.cut_watches(Cut::Clean);
        storm.loops.next(200)?;
        storm.server.end_watches_at_once(false);
        Ok(())
    })?;
    storm.meets("a short absence", |storm| {
        storm.server.go_away();
        storm.loops.next(50)?;
        storm.server.come_back();
        Ok(())
    })
}

/// Sends HTTP answers and events that refuse.
fn answers(storm: &mut Storm) -> Result<()> {
    for by_http in [false, true] {
        storm.meets(&format!("410, by HTTP: {by_http}"), |storm| {
            storm.server.expire_watches_by_http(by_http);
            storm.server.compact();
            storm.server.fail_watches(410);
            let pods = storm.change()?;
            wait_for(&storm.world, pods)?;
            storm.forgets();
            Ok(())
        })?;
    }
    for code in [429, 500, 503] {
        for retry_after in [None, Some(1)] {
            storm.meets(&format!("{code}, Retry-After: {retry_after:?}"), |storm| {
                match retry_after {
                    None => storm.server.fail(None, None, code, 6),
                    Some(seconds) => storm.server.fail_and_ask_for(seconds, code, 6),
                }
                storm.server.cut_watches(Cut::Broken);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Sends events twice, in the wrong order, or with nonsense.
fn events(storm: &mut Storm) -> Result<()> {
    storm.meets("events that come twice", |storm| {
        storm.server.duplicate_events(Resource::EndpointSlices, 3);
        storm.server.duplicate_events(Resource::Services, 2);
        let webapp = storm.server.get(Resource::Services, "default", "webapp").context("an example")?;
        storm.server.delete(&webapp)?;
        storm.server.apply(webapp)?;
        Ok(())
    })?;
    storm.meets("old events behind new ones", |storm| {
        storm.server.reorder_events(Resource::EndpointSlices, 2);
        storm.change()?;
        storm.change()?;
        storm.server.reorder_events(Resource::Services, 2);
        let webapp = storm.server.get(Resource::Services, "default", "webapp").context("an example")?;
        storm.server.delete(&webapp)?;
        storm.server.apply(webapp)?;
        // The deletion came last. The next event of the Service is the truth.
        storm.world.wait_ports(NODE, "default/webapp", <[_]>::is_empty)?;
        storm.server.touch(Resource::Services, "default", "webapp")?;
        Ok(())
    })?;
    storm.meets("nonsense", |storm| {
        let one = r#"{"metadata":{"namespace":"default","name":"kubia"},"spec":{"ports":"none"}}"#;
        for nonsense in [one, r#"{"spec":{"clusterIP":"10.111.249.153"}}"#, "[7]"] {
            storm.server.add_nonsense(Resource::Services, nonsense);
            storm.server.add_nonsense(Resource::EndpointSlices, nonsense);
        }
        storm.server.send_line(Resource::EndpointSlices, "nonsense");
        Ok(())
    })?;
    storm.meets("nonsense in lists", |storm| {
        storm.forgets();
        Ok(())
    })
}

/// Sends lists that are slow, break off in the middle, or lack deleted objects.
fn lists(storm: &mut Storm) -> Result<()> {
    storm.meets("a list without what is gone", |storm| {
        storm.server.go_away();
        let webapp = storm.server.get(Resource::Services, "default", "webapp").context("an example")?;
        storm.server.delete_silently(Resource::Services, "default", "webapp");
        storm.server.delete_silently(Resource::EndpointSlices, "default", "kubernetes");
        storm.server.compact();
        storm.loops.next(20)?;
        ensure!(storm.world.ports(NODE, "default/webapp")?.len() == 1, "nobody has heard of it");
        storm.server.come_back();
        storm.world.wait_ports(NODE, "default/webapp", <[_]>::is_empty)?;
        storm.world.wait_endpoints(NODE, "default/kubernetes", &[])?;
        let refused = storm.world.client().connect("10.96.0.1:443").http().one()?;
        ensure!(refused.error.as_deref() == Some(refusal()), "{refused:?}");
        storm.server.apply(webapp)?;
        storm.world.wait_ports(NODE, "default/webapp", |ports| ports.len() == 1).map(drop)
    })?;
    for resource in [Resource::EndpointSlices, Resource::Services] {
        storm.meets(&format!("a slow list of {resource}"), |storm| {
            storm.server.hold_list(resource);
            storm.forgets();
            storm.wait_for_list(resource)?;
            storm.loops.next(200)?;
            ensure!(elements(&storm.world)? == storm.untouched, "nothing has come yet");
            storm.server.release_list(resource);
            Ok(())
        })?;
    }
    storm.meets("a list that stops in the middle", |storm| {
        storm.server.hold_further_pages(Resource::Services);
        storm.server.delete_silently(Resource::Services, "filling", "filling-7");
        storm.forgets();
        storm.wait_for_list(Resource::Services)?;
        storm.loops.next(200)?;
        ensure!(storm.programmed()? == usize::from(FILLING), "gone before the end of the list");
        // The list breaks off there.
        storm.server.cut_connections();
        storm.loops.next(200)?;
        ensure!(storm.programmed()? == usize::from(FILLING), "gone by a list that broke off");
        storm.server.release_list(Resource::Services);
        soon("gone", || Ok(storm.programmed()? == usize::from(FILLING) - 1))?;
        storm.server.apply(filling(7))?;
        soon("back", || Ok(storm.programmed()? == usize::from(FILLING)))
    })
}

/// Sends lists that are slow or break off in the middle while the agent starts on maps of an earlier run.
fn starts(storm: &mut Storm) -> Result<()> {
    for (resource, all) in [
        (Resource::EndpointSlices, true),
        (Resource::Services, true),
        (Resource::EndpointSlices, false),
        (Resource::Services, false),
    ] {
        let what = if all { "is slow" } else { "stops in the middle" };
        storm.meets(&format!("a start whose list of {resource} {what}"), |storm| {
            storm.world.agent(NODE).kill9()?;
            if all {
                storm.server.hold_list(resource);
            } else {
                storm.server.hold_further_pages(resource);
            }
            storm.server.forget_requests();
            storm.world.agent(NODE).start()?;
            storm.wait_for_list(resource)?;
            storm.loops.next(200)?;
            ensure!(!matches!(storm.world.agent(NODE).get("/readyz"), Ok((200, _))), "ready without a list");
            ensure!(elements(&storm.world)? == storm.untouched, "nothing is programmed yet");
            ensure!(storm.programmed()? == usize::from(FILLING), "nor removed");
            storm.server.release_list(resource);
            storm.world.agent(NODE).wait_ready(PATIENCE)
        })?;
    }
    Ok(())
}

#[test]
fn every_fault_with_streamed_lists() -> Result<()> {
    all_faults(Streams::Offered)
}

#[test]
fn every_fault_with_lists_in_pages() -> Result<()> {
    all_faults(Streams::Refused)
}

#[test]
fn an_api_server_that_is_away_for_minutes() -> Result<()> {
    let mut storm = Storm::start(Streams::Offered)?;
    storm.server.go_away();
    let pods = storm.change()?;
    let end = Instant::now() + OUTAGE;
    while Instant::now() < end {
        storm.loops.next(100)?;
        thread::sleep(Duration::from_secs(1));
    }
    ensure!(elements(&storm.world)? == storm.untouched, "nobody could say that anything had changed");
    let back = Instant::now();
    storm.server.come_back();
    while let Err(not_yet) = wait_for(&storm.world, pods) {
        ensure!(back.elapsed() < BACK, "{not_yet:#}");
    }
    let took = back.elapsed();
    ensure!(took < BACK, "the agent was back {took:?} after the server");
    println!("the agent was back {:.1} s after the server", took.as_secs_f64());
    storm.is_well("the outage")?;
    storm.loops.none_failed().map(drop)
}
