//! The parts of the tour, in order.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use proxy_tests::lab::{Attempt, Held, Place, Proto, Summary};
use proxy_tests::scenarios::{
    CLIENT, CLIENT_ADDRESS, Loops, NODE, OUTSIDE, OUTSIDE_ADDRESS, World, endpoint, evenly, refusal,
    scaled_pod, until,
};
use serde_json::Value;

use crate::Act;
use crate::outside::{load_balancer, local_policy, node_ports, unused_ports};
use crate::stage::Stage;

pub(crate) const KUBIA: [&str; 3] = ["kubia-7nog1", "kubia-gzwli", "kubia-3inly"];
const KUBIA_VIP: &str = "10.111.249.153:80";
const DNS: &str = "10.96.0.10:53";

/// All parts of the tour.
pub(crate) const ALL: [Act; 12] = [
    one_address,
    sticky_sessions,
    scaling,
    readiness,
    dns,
    node_ports,
    load_balancer,
    local_policy,
    no_endpoints,
    unused_ports,
    killed_agent,
    looking_inside,
];

/// Builds the lab and starts the agents.
pub(crate) fn open(stage: &Stage) -> Result<World> {
    let start = Instant::now();
    let mut world = World::new(&[])?;
    let built = start.elapsed();
    for node in ["node-a", "node-b"] {
        let agent = world.new_agent(node)?.manifests(world.manifests().dir()).quiet();
        world.adopt(node, agent).start_ready()?;
    }
    stage.title("Vipr: Kubernetes Services by eBPF, on this machine, without a cluster");
    stage.say(&format!(
        "Two nodes, {} pods and three machines outside, each a network namespace with real processes, made in {:.1} \
         seconds. On each node runs the real agent; it serves the Kubernetes manifests of examples/ (a copy in {}) and \
         was ready {:.1} seconds later.",
        world.lab().all_pods().len(),
        built.as_secs_f32(),
        world.manifests().dir().display(),
        (start.elapsed() - built).as_secs_f32(),
    ));
    stage.line(&format!(
        "\n  node-a 192.168.1.11   pods 172.16.1.x, among them {CLIENT} {CLIENT_ADDRESS}, where most connections begin"
    ));
    stage.line("  node-b 192.168.1.12   pods 172.16.2.x and 172.16.3.x");
    stage.line(&format!("  {OUTSIDE} {OUTSIDE_ADDRESS}    outside of the cluster, on another network"));
    Ok(world)
}

fn clients(world: &World) -> [(&'static str, Place); 2] {
    let [pod, host] = world.clients();
    [("pod client", pod), ("node-a", host)]
}

/// Describes one connection in words.
pub(crate) fn tell(stage: &Stage, attempt: &Attempt) {
    let [peer, endpoint, peername] = [attempt.peer, attempt.endpoint, attempt.peername]
        .map(|address| address.map_or_else(|| "?".to_owned(), |address| address.to_string()));
    let server = attempt.server.as_deref().unwrap_or("nobody");
    stage.line(&format!(
        "  You've hit {server:<12} on {endpoint:<16} which sees {peer:<18} the client sees {peername}"
    ));
}

fn one_address(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("One address, three pods");
    stage.say(
        "Service kubia has the clusterIP 10.111.249.153, port 80; behind it are three pods on port 8080. A client that \
         connects to the address is connected to one of the pods, at connect() time: there is no packet to rewrite \
         afterwards, and the pod sees the true client.",
    );
    for (name, place) in clients(world) {
        stage.command(name, "curl http://10.111.249.153/        (300 times)");
        let attempts = place.connect(KUBIA_VIP).http().times(300).run()?;
        attempts.iter().take(3).for_each(|attempt| tell(stage, attempt));
        let summary = stage.answered(KUBIA_VIP, &attempts);
        stage.expect(evenly(&summary, &KUBIA));
    }
    Ok(())
}

fn sticky_sessions(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("Sticky sessions");
    stage.say(
        "The same pods behind sticky/kubia, with sessionAffinity: ClientIP. Every pod that connects, and every node, is a \
         client of its own and keeps the pod that it got first.",
    );
    let vip = "10.111.249.154:80";
    let names = ["client", "linuxea-0", "coredns-4n8cx", "kubia-scaled-01", "kubia-scaled-03"];
    let mut places: Vec<(&str, Place)> = Vec::new();
    for name in names {
        places.push((name, Place::clone(&world.lab().pod(name))));
    }
    places.push((NODE, world.host().clone()));
    for (name, place) in places {
        let summary = stage.count(vip, &place.connect(vip).http().times(30).run()?);
        let chosen: Vec<String> =
            summary.by_server.iter().map(|(pod, count)| format!("{pod} {count} times")).collect();
        stage.line(&format!("  {name:<16} -> {}", chosen.join(", ")));
        stage.check_quietly(chosen.len() == 1, &format!("{name} was sent to {chosen:?}"));
    }
    Ok(())
}

fn scaling(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("Scaling, while clients go on");
    let (file, vip) = ("s18-scaling.yaml", "10.111.250.18:80");
    stage.say(
        "A client in a pod and one on the node connect to scaling/kubia without a pause. Meanwhile its EndpointSlice, the \
         file s18-scaling.yaml, is edited: three pods, ten, one, three.",
    );
    for number in 4..=10 {
        let (name, node, address) = scaled_pod(number);
        world.add_pod(node, &name, &address, ("http", 8080))?;
    }
    let loops = Loops::start(world, &[vip])?;
    run_loops(stage, loops, |stage, loops| {
        for count in [3, 10, 1, 3] {
            let pods: Vec<_> = (1..=count).map(scaled_pod).collect();
            let list = pods.iter().map(|(name, node, address)| endpoint(name, node, address)).collect();
            let start = Instant::now();
            world.manifests().set_endpoints(file, list)?;
            world.wait_ports(NODE, "scaling/kubia", |ports| {
                ports.iter().all(|port| port.cluster.len() == count)
            })?;
            let took = start.elapsed();
            let summary = loops.next(100 * count)?.swap_remove(0);
            stage.line(&format!(
                "  {count} pods, in force within {} ms of saving the file:",
                took.as_millis()
            ));
            stage.bars(&summary);
            let names: Vec<&str> = pods.iter().map(|(name, ..)| name.as_str()).collect();
            stage.expect(evenly(&summary, &names));
        }
        Ok(())
    })?;
    world.manifests().restore(file)
}

/// Ends the loops after `during` and reports all their connections, none of which may have failed.
fn run_loops(
    stage: &mut Stage,
    mut loops: Loops,
    during: impl FnOnce(&mut Stage, &mut Loops) -> Result<()>,
) -> Result<()> {
    during(stage, &mut loops)?;
    let (mut total, mut failed) = (0, 0);
    for (target, attempts) in loops.stop()? {
        let summary = stage.count(&target, &attempts);
        total += summary.total;
        failed += summary.total - summary.ok;
    }
    stage.check(failed == 0, &format!("{total} connections meanwhile, {failed} failed"));
    Ok(())
}

fn readiness(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("A pod that is not ready for a while");
    let (file, service, vip) = ("s13-readiness.yaml", "default/service-clusterip", "10.97.97.97:80");
    stage.say(
        "service-clusterip has three pods. linuxea-1 fails its readiness probe: `ready: false` in its slice.",
    );
    let loops = Loops::start(world, &[vip])?;
    run_loops(stage, loops, |stage, loops| {
        for (ready, what) in
            [(true, "all are ready"), (false, "linuxea-1 is not ready"), (true, "it is ready again")]
        {
            world.manifests().set_ready(file, "172.16.2.44", ready)?;
            let count = if ready { 3 } else { 2 };
            world.wait_ports(NODE, service, |ports| ports.iter().all(|port| port.cluster.len() == count))?;
            let summary = loops.next(150)?.swap_remove(0);
            stage.line(&format!("  {what}:"));
            stage.bars(&summary);
            stage.check_quietly(
                summary.by_server.contains_key("linuxea-1") == ready && summary.by_server.len() == count,
                &format!("{what}, and these answered: {:?}", summary.by_server),
            );
        }
        Ok(())
    })?;
    world.manifests().restore(file)
}

fn dns(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("DNS: UDP and TCP");
    stage.say(
        "kube-dns, 10.96.0.10, has two pods. A resolver believes only answers from the address that it asked, on \
         connected sockets and on others; both see 10.96.0.10.",
    );
    for (proto, what) in [
        (Proto::Udp, "UDP, connected socket"),
        (Proto::UdpUnconnected, "UDP, sendto() and recvfrom()"),
        (Proto::Tcp, "TCP"),
    ] {
        let attempts = world.client().connect(DNS).proto(proto).times(100).run()?;
        let source = attempts.first().and_then(|attempt| attempt.from.or(attempt.peername));
        let source = source.map_or_else(|| "?".to_owned(), |source| source.to_string());
        stage.line(&format!("  {what}: 100 queries, answers come from {source}"));
        let summary = stage.answered(DNS, &attempts);
        stage.check_quietly(summary.by_server.len() == 2, &format!("{what}: {:?}", summary.by_server));
    }
    stage.say(
        "A resolver has kept a connected UDP socket for hours. Now its DNS pod leaves. Without help it would ask a pod that \
         is not there, for ever: UDP has no end of a connection. Vipr leads the socket to the pod that is left.",
    );
    let mut held = until("a resolver on coredns-4n8cx", || {
        let mut held: Held = world.client().hold(DNS).udp().open()?;
        Ok((held.say("a query")?.server.as_deref() == Some("coredns-4n8cx")).then_some(held))
    })?;
    let file = "s14-dns.yaml";
    world.manifests().set_endpoints(file, vec![endpoint("coredns-t9v2k", "node-b", "172.16.2.53")])?;
    let led =
        held.say_until(Duration::from_secs(20), |answer| answer.server.as_deref() == Some("coredns-t9v2k"))?;
    let peer = led.peername.map(|peer| peer.to_string()).unwrap_or_default();
    stage.line(&format!(
        "  the same socket's next query: answered by coredns-t9v2k; its peer is still {peer}"
    ));
    let attempts = world.client().connect(DNS).udp().times(20).run()?;
    let summary = stage.answered(DNS, &attempts);
    stage.check_quietly(summary.servers() == ["coredns-t9v2k"], &format!("{:?} answered", summary.by_server));
    world.manifests().restore(file)?;
    world
        .wait_ports(NODE, "kube-system/kube-dns", |ports| ports.iter().all(|port| port.cluster.len() == 2))?;
    Ok(())
}

fn no_endpoints(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("No pod, no waiting");
    stage.say("webapp has no pods at all. Its clients are told at once, by connect(), instead of waiting for a timeout.");
    for (name, place) in clients(world) {
        stage.command(name, "curl http://10.96.17.17/");
        let attempts =
            place.connect("10.96.17.17:80").http().times(5).timeout(Duration::from_secs(10)).run()?;
        stage.add(attempts.len());
        let refused = attempts.iter().filter(|attempt| attempt.error.as_deref() == Some(refusal())).count();
        let slowest = attempts.iter().map(|attempt| attempt.elapsed_us).max().unwrap_or_default();
        stage.check(
            refused == attempts.len(),
            &format!(
                "{refused} of {} refused ({}), the slowest after {slowest} µs",
                attempts.len(),
                refusal()
            ),
        );
    }
    Ok(())
}

fn killed_agent(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("The agent is killed");
    stage.say(
        "The agent only writes maps; the BPF programs in the kernel read them, and both stay when it dies. Clients in a \
         pod, on the node and outside connect without a pause, over TCP and UDP, while the agent of node-a is killed with \
         SIGKILL and started again.",
    );
    let mut loops = Loops::start(world, &[KUBIA_VIP])?;
    loops.add(DNS, world.client().connect(DNS).udp_unconnected())?;
    let node_port = "192.168.1.11:30123";
    loops.add(node_port, world.outside().connect(node_port).http())?;
    let before = world.tool(NODE, "backends")?;
    run_loops(stage, loops, |stage, loops| {
        let pid = world.agent(NODE).id().context("the agent does not run")?;
        stage.command("node-a", &format!("kill -9 {pid}"));
        world.agent(NODE).kill9()?;
        count_summaries(stage, "without an agent", &loops.next(300)?);
        let start = Instant::now();
        world.agent(NODE).start_ready()?;
        stage.line(&format!("  a new agent is ready after {} ms", start.elapsed().as_millis()));
        count_summaries(stage, "with the new agent", &loops.next(300)?);
        Ok(())
    })?;
    stage.check(world.tool(NODE, "backends")? == before, "every backend has the number that it had before");
    Ok(())
}

fn count_summaries(stage: &Stage, when: &str, summaries: &[Summary]) {
    let total: usize = summaries.iter().map(|summary| summary.total).sum();
    let ok: usize = summaries.iter().map(|summary| summary.ok).sum();
    stage.line(&format!("  {when}: {ok} of {total} connections served"));
}

fn looking_inside(world: &mut World, stage: &mut Stage) -> Result<()> {
    stage.act("Nothing is hidden");
    stage.say("What is in force, read back from the kernel; this works without an agent, too:");
    stage.command("node-a", "proxy-agent services");
    stage.output(&world.command(NODE, "services")?.text()?);
    stage.line("");
    stage.say("The same with the kernel's own tool. The frontend names a Service by its number:");
    let pins = world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}"));
    let frontends = pins.join(maps::FRONTENDS);
    stage.command("node-a", &format!("bpftool map dump pinned {}", frontends.display()));
    let mut dump = world.host().command("bpftool");
    dump.args(["map", "dump", "pinned"]).arg(frontends);
    let dump = dump.text()?;
    // The element with the port, not the one for all other ports of the address.
    let element = dump
        .split("},{")
        .find(|element| element.contains("10,111,249,153") && !element.contains("\"kind\": 3"));
    let element = element.context("the frontend 10.111.249.153:80 is not in the dump")?;
    stage.output(element.trim_matches('\n'));
    let ports = world.ports(NODE, "default/kubia")?;
    let id = ports.first().context("default/kubia is not there")?.id;
    let key: Vec<String> = id.to_le_bytes().iter().map(u8::to_string).collect();
    let mut lookup = world.host().command("bpftool");
    lookup.args(["map", "lookup", "pinned"]).arg(pins.join(maps::SERVICES)).arg("key").args(&key);
    stage.line("");
    stage.say("And the Service names a range of slots, for clients of the cluster and for those who want local pods:");
    stage.command(
        "node-a",
        &format!("bpftool map lookup pinned {} key {}", pins.join(maps::SERVICES).display(), key.join(" ")),
    );
    let service = lookup.text()?;
    stage.output(&service);
    let service: Value = serde_json::from_str(&service).context("bpftool's answer")?;
    let range = &service["value"]["cluster"];
    ensure!(!range.is_null(), "no range in {service}");
    stage.check(range["len"] == 3, "three slots for three pods");
    Ok(())
}
