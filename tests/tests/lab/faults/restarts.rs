//! The agent is killed, ends, starts again, and meets a second agent.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::lab::Proto;
use proxy_tests::scenarios::{Loops, NODE, World, endpoint, served};
use serde_json::json;

use super::{KUBIA, KUBIA_VIP, end_of, numbers, says};

const DNS: &str = "10.96.0.10:53";

/// Starts loops over TCP and, with sockets that stay, UDP.
fn loops(world: &World) -> Result<Loops> {
    let mut loops = Loops::start(world, &[KUBIA_VIP])?;
    for place in world.clients() {
        loops.add(DNS, place.connect(DNS).udp())?;
        loops.add(DNS, place.connect(DNS).udp_unconnected().per_socket(usize::MAX))?;
    }
    Ok(loops)
}

#[test]
fn a_killed_agent_is_not_missed() -> Result<()> {
    let mut world = World::start(&[KUBIA, "s02-session-affinity.yaml", "s14-dns.yaml"])?;
    let before = numbers(&world, NODE)?;
    let mut loops = loops(&world)?;
    for _ in 0..3 {
        world.agent(NODE).kill9()?;
        loops.next(50)?;
        assert_eq!(numbers(&world, NODE)?, before, "readable without an agent");
        world.agent(NODE).start_ready()?;
        loops.next(50)?;
        assert_eq!(numbers(&world, NODE)?, before, "the same numbers after a restart");
    }
    loops.none_failed().map(drop)
}

#[test]
fn an_agent_that_is_killed_while_it_starts_is_not_missed_either() -> Result<()> {
    let mut world = World::start(&[KUBIA, "s14-dns.yaml"])?;
    let before = numbers(&world, NODE)?;
    let mut loops = loops(&world)?;
    world.agent(NODE).kill9()?;
    for delay in (0..20).map(|step| Duration::from_millis(step * 15)) {
        world.agent(NODE).start()?;
        thread::sleep(delay);
        world.agent(NODE).kill9()?;
        loops.go_on()?;
    }
    world.agent(NODE).start_ready()?;
    assert_eq!(numbers(&world, NODE)?, before);
    loops.none_failed().map(drop)
}

#[test]
fn an_agent_that_is_killed_while_it_programs_leaves_nothing_half_done() -> Result<()> {
    let file = "s18-scaling.yaml";
    let mut world = World::start(&[KUBIA, file])?;
    let vip = "10.111.250.18:80";
    let mut loops = Loops::start(&world, &[KUBIA_VIP, vip])?;
    let pods = ["172.16.1.101", "172.16.2.102", "172.16.1.103"];
    for round in 0..12 {
        // In each round, another one of the three is missing.
        let left = (0..3)
            .filter(|index| *index != round % 3)
            .map(|index| endpoint(&format!("kubia-scaled-{:02}", index + 1), "node-a", pods[index]));
        world.manifests().set_endpoints(file, left.collect())?;
        // inotify takes some milliseconds, so this is about the time of the programming.
        thread::sleep(Duration::from_millis(round as u64));
        world.agent(NODE).kill9()?;
        loops.go_on()?;
        world.agent(NODE).start_ready()?;
        let left: Vec<String> =
            (0..3).filter(|i| *i != round % 3).map(|i| format!("{}:8080", pods[i])).collect();
        world.wait_endpoints(NODE, "scaling/kubia", &left.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn what_changed_while_no_agent_ran_is_made_up_for() -> Result<()> {
    let (ready, gone, new) = ("s13-readiness.yaml", "s17-no-endpoints.yaml", "s15-kubernetes.yaml");
    let mut world = World::start(&[KUBIA, ready, gone, new])?;
    let kept = world.ports(NODE, "default/kubia")?;
    let new_objects = world.manifests().objects(new)?;
    world.manifests().remove(new)?;
    world.wait_ports(NODE, "default/kubernetes", <[_]>::is_empty)?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP, "10.97.97.97:80"])?;

    world.agent(NODE).kill9()?;
    world.manifests().set_ready(ready, "172.16.2.44", false)?;
    world.manifests().remove(gone)?;
    world.manifests().put(new, &new_objects)?;
    loops.go_on()?;
    assert_eq!(world.ports(NODE, "default/webapp")?.len(), 1, "nothing happens without an agent");

    world.agent(NODE).start_ready()?;
    let summaries = loops.next(100)?;
    assert_eq!(summaries[1].servers(), ["linuxea-0", "linuxea-2"]);
    assert_eq!(world.ports(NODE, "default/webapp")?, []);
    assert_eq!(world.ports(NODE, "default/kubia")?, kept, "what stays keeps its numbers");
    let kubernetes = "10.96.0.1:443";
    served(kubernetes, &world.client().connect(kubernetes).http().times(10).run()?)?;
    loops.none_failed().map(drop)
}

#[test]
fn sigterm_leaves_the_dataplane_in_place() -> Result<()> {
    let mut world = World::start(&[KUBIA, "s14-dns.yaml"])?;
    let before = numbers(&world, NODE)?;
    let mut loops = loops(&world)?;
    assert_eq!(world.tool(NODE, "status")?["agentRunning"], true);
    let status = world.agent(NODE).terminate()?;
    assert!(status.success(), "{status}");
    loops.next(50)?;
    assert_eq!(numbers(&world, NODE)?, before);
    let status = world.tool(NODE, "status")?;
    assert_eq!(status["agentRunning"], false);
    let attached = status["programs"].as_object().map(|programs| programs.values().all(|on| *on == true));
    assert_eq!(attached, Some(true), "{}", status["programs"]);
    loops.none_failed().map(drop)
}

#[test]
fn cleanup_removes_everything() -> Result<()> {
    let mut world = World::start(&[KUBIA, "s12-redis.yaml"])?;
    let mut held = world.client().hold("10.96.65.65:6379").proto(Proto::Redis).open()?;
    served(KUBIA_VIP, &world.client().connect(KUBIA_VIP).http().times(10).run()?)?;

    // Cleanup is refused while an agent runs.
    let refused = world.command(NODE, "cleanup")?.output()?;
    assert!(!refused.status.success());
    says(&String::from_utf8_lossy(&refused.stderr), &["another agent is running"])?;
    served(KUBIA_VIP, &world.client().connect(KUBIA_VIP).http().times(10).run()?)?;

    world.take_agent(NODE)?.terminate()?;
    world.command(NODE, "cleanup")?.text()?;
    let node = world.lab().node(NODE);
    assert!(!node.pin_dir().exists(), "{} is left", node.pin_dir().display());
    assert_eq!(
        std::fs::read_dir(node.run_dir())?.count(),
        0,
        "files are left in {}",
        node.run_dir().display()
    );
    let mut tree = node.host().command("bpftool");
    tree.args(["-j", "cgroup", "tree", &node.cgroup().display().to_string()]);
    let tree = tree.text()?;
    assert!(!tree.contains("connect4"), "programs are left: {tree}");
    for place in world.clients() {
        assert!(!place.connect(KUBIA_VIP).http().one()?.ok, "nobody translates any more");
    }
    // A connection made before is a connection to the pod itself.
    assert_eq!(held.say("PING")?.text.as_deref(), Some("PONG"));

    // A cleanup without work succeeds, and the node can be served again.
    world.command(NODE, "cleanup")?.text()?;
    world.start_agent(NODE)?;
    served(KUBIA_VIP, &world.client().connect(KUBIA_VIP).http().times(10).run()?)?;
    Ok(())
}

#[test]
fn a_second_agent_on_the_same_pins_is_refused() -> Result<()> {
    let mut world = World::start(&[KUBIA])?;
    let before = numbers(&world, NODE)?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    let empty = world.dir().join("empty");
    std::fs::create_dir(&empty)?;
    let log = end_of(world.new_agent(NODE)?.manifests(&empty))?;
    let pins = world.lab().node(NODE).pin_dir().display().to_string();
    says(&log, &["another agent is running", &pins, "--pin-dir"])?;

    loops.go_on()?;
    assert_eq!(numbers(&world, NODE)?, before);
    assert!(matches!(world.agent(NODE).get("/readyz"), Ok((200, _))));
    // The first agent still follows its files.
    world.manifests().patch_service(KUBIA, &json!({ "sessionAffinity": "ClientIP" }))?;
    world.wait_ports(NODE, "default/kubia", |ports| ports.iter().all(|port| port.affinity_seconds > 0))?;
    loops.none_failed().map(drop)
}

#[test]
fn another_cgroup_path_takes_over() -> Result<()> {
    let mut world = World::new(&[KUBIA])?;
    let host_only = world.host().cgroup().display().to_string();
    let everybody = world.lab().node(NODE).cgroup().display().to_string();
    let mut loops = Loops::default();
    for round in 0..4 {
        let cgroup = if round % 2 == 0 { &host_only } else { &everybody };
        let agent = world.new_agent(NODE)?.manifests(world.manifests().dir()).flag("cgroup-path", cgroup);
        // The packet edge would serve the pod as well.
        let agent = agent.flag("devices", "none").flag("pod-interfaces", "none");
        world.adopt(NODE, agent).start_ready()?;
        if round == 0 {
            loops.add(KUBIA_VIP, world.host().connect(KUBIA_VIP).http())?;
        }
        let from_pod = world.client().connect(KUBIA_VIP).http().one()?;
        assert_eq!(from_pod.ok, round % 2 == 1, "a pod is served if its cgroup is: {from_pod:?}");
        loops.next(50)?;
        world.agent(NODE).terminate()?;
        ensure!(world.client().connect(KUBIA_VIP).http().one()?.ok == from_pod.ok, "the end changes nothing");
    }
    loops.none_failed().map(drop)
}
