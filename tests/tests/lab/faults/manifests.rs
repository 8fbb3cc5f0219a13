//! Wrong files and objects: each affects only itself, and is named.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;
use proxy_tests::scenarios::{Loops, NODE, World, endpoint, evenly, served};
use serde_json::{Value, json};

use super::{KUBIA, KUBIA_VIP};

/// Reports whether the problems, by object, contain one line with all of these words.
fn named(problems: &BTreeMap<String, Vec<String>>, words: &[&str]) -> bool {
    let mut lines =
        problems.iter().flat_map(|(object, reasons)| reasons.iter().map(move |r| format!("{object}: {r}")));
    lines.any(|line| words.iter().all(|word| line.contains(word)))
}

/// Returns a Service with one port, and its slice with one pod on port 8080.
fn service(name: &str, cluster_ip: &str, pod: Value) -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": name },
            "spec": { "clusterIP": cluster_ip, "ports": [{ "port": 80 }] },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": { "name": format!("{name}-1"), "labels": { "kubernetes.io/service-name": name } },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": 8080 }],
            "endpoints": [pod],
        }),
    ]
}

#[test]
fn a_broken_file_is_named_and_keeps_its_last_good_state() -> Result<()> {
    let other = "s13-readiness.yaml";
    let world = World::start(&[KUBIA, other])?;
    let good = fs::read_to_string(world.manifests().dir().join(KUBIA))?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;

    let broken = [
        // The second document, the slice, is no longer valid YAML.
        (good.replace("addressType: IPv4", "addressType: [IPv4"), vec![KUBIA, "document 2"]),
        // One field of the Service has the wrong type.
        (
            good.replace("port: 80\n", "port: eighty\n"),
            vec![KUBIA, "document 1", "Service", "spec.ports[0].port"],
        ),
        // One field of the slice has the wrong type.
        (
            good.replace("port: 8080\n", "port: {}\n"),
            vec![KUBIA, "document 2", "EndpointSlice", "ports[0].port"],
        ),
        // The file has no document at all.
        ("\u{1}".to_owned(), vec![KUBIA, "document 1"]),
    ];
    for (ready, (text, words)) in [false, true].into_iter().cycle().zip(broken) {
        assert_ne!(text, good);
        world.manifests().write(KUBIA, &text)?;
        let words: Vec<&str> = words.into_iter().chain(["last good state"]).collect();
        world.wait_problems(NODE, |problems| named(problems, &words))?;
        // Everything else continues.
        world.manifests().set_ready(other, "172.16.2.44", ready)?;
        let count = if ready { 3 } else { 2 };
        world.wait_ports(NODE, "default/service-clusterip", |ports| ports[0].cluster.len() == count)?;
        for summary in loops.next(100)? {
            evenly(&summary, &["kubia-7nog1", "kubia-gzwli", "kubia-3inly"])?;
        }
        world.manifests().write(KUBIA, &good)?;
        world.wait_problems(NODE, BTreeMap::is_empty)?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn a_file_that_is_broken_from_the_start_costs_only_itself() -> Result<()> {
    let mut world = World::new(&[KUBIA])?;
    world.manifests().write("broken.yaml", "kind: Service\napiVersion: v1\nspec: [\n")?;
    world.manifests().write(
        "half-broken.yaml",
        "kind: Service\napiVersion: v1\nmetadata: {name: bad}\nspec: {clusterIP: 7, ports: []}\n---\n\
         kind: Service\napiVersion: v1\nmetadata: {name: good}\nspec: {clusterIP: 10.96.1.1, ports: [{port: 1}]}\n",
    )?;
    world.start_agent(NODE)?;
    for place in world.clients() {
        served(KUBIA_VIP, &place.connect(KUBIA_VIP).http().times(10).run()?)?;
    }
    assert_eq!(world.ports(NODE, "default/good")?.len(), 1);
    let problems = world.problems(NODE)?;
    assert!(named(&problems, &["broken.yaml", "document 1"]), "{problems:#?}");
    assert!(
        named(&problems, &["half-broken.yaml, document 1", "Service default/bad", "spec.clusterIP"]),
        "{problems:#?}"
    );
    Ok(())
}

#[test]
fn an_address_that_two_services_want_is_the_older_ones() -> Result<()> {
    let file = "claims.yaml";
    let world = World::start(&[KUBIA])?;
    let external = "198.51.100.77:80";
    let younger = claim("a-younger", "10.96.2.1", endpoint("kubia-7nog1", "node-a", "172.16.1.4"), 2021);
    let older = claim("b-older", "10.96.2.2", endpoint("kubia-gzwli", "node-b", "172.16.2.5"), 2020);
    let both = [younger.clone(), older].concat();
    let loser = "Service default/a-younger";
    let is_told = |problems: &BTreeMap<String, Vec<String>>| {
        problems.len() == 1
            && problems.get(loser).is_some_and(|reasons| {
                let words = [external, "not served", "default/b-older"];
                reasons.iter().any(|reason| words.iter().all(|word| reason.contains(word)))
            })
    };

    world.manifests().put(file, &both)?;
    world.wait_problems(NODE, is_told)?;
    let mut loops = Loops::start(&world, &[external])?;
    for _ in 0..2 {
        for summary in loops.next(20)? {
            assert_eq!(summary.servers(), ["kubia-gzwli"]);
        }
        // Its own address is not affected.
        served("10.96.2.1:80", &world.client().connect("10.96.2.1:80").http().times(10).run()?)?;
        world.manifests().put(file, &younger)?;
        world.wait_problems(NODE, BTreeMap::is_empty)?;
        for summary in loops.next(20)? {
            assert_eq!(summary.servers(), ["kubia-7nog1"]);
        }
        world.manifests().put(file, &both)?;
        world.wait_problems(NODE, is_told)?;
    }
    loops.none_failed().map(drop)
}

fn claim(name: &str, ip: &str, pod: Value, year: u32) -> [Value; 2] {
    let mut objects = service(name, ip, pod);
    objects[0]["spec"]["externalIPs"] = json!(["198.51.100.77"]);
    objects[0]["metadata"]["creationTimestamp"] = format!("{year}-01-01T00:00:00Z").into();
    objects
}

#[test]
fn a_slice_may_be_there_before_its_service() -> Result<()> {
    let file = "s03-two-ports.yaml";
    let world = World::start(&[KUBIA, file])?;
    let vip = "10.111.249.155:80";
    let objects = world.manifests().objects(file)?;
    let (services, slices): (Vec<Value>, Vec<Value>) =
        objects.into_iter().partition(|object| object["kind"] == "Service");
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    for _ in 0..2 {
        world.manifests().put(file, &slices)?;
        world.wait_ports(NODE, "two-ports/kubia", <[_]>::is_empty)?;
        assert_eq!(world.problems(NODE)?, BTreeMap::new(), "an orphan is nothing to be mended");
        assert!(!world.client().connect(vip).http().one()?.ok);
        world.manifests().put(file, &[services.clone(), slices.clone()].concat())?;
        world.wait_ports(NODE, "two-ports/kubia", |ports| ports.len() == 2)?;
        served(vip, &world.client().connect(vip).http().times(10).run()?)?;
        loops.go_on()?;
    }
    loops.none_failed().map(drop)
}

#[test]
fn a_directory_that_vanishes_is_waited_for() -> Result<()> {
    let world = World::start(&[KUBIA])?;
    let (dir, away) = (world.manifests().dir(), world.dir().join("away"));
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    fs::rename(dir, &away)?;
    let shown = dir.display().to_string();
    world.wait_problems(NODE, |problems| named(problems, &[&shown, "stays in force"]))?;
    loops.next(20)?;
    fs::rename(&away, dir)?;
    world.wait_problems(NODE, BTreeMap::is_empty)?;
    // The file is followed again.
    world.manifests().set_endpoints(KUBIA, vec![endpoint("kubia-gzwli", "node-b", "172.16.2.5")])?;
    world.wait_endpoints(NODE, "default/kubia", &["172.16.2.5:8080"])?;
    loops.none_failed().map(drop)
}
