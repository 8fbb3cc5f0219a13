//! Services and endpoints in numbers beyond any usual cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;

use anyhow::Result;
use proxy_tests::lab::Attempt;
use proxy_tests::scenarios::{Loops, NODE, World, served};
use serde_json::{Value, json};

use super::{KUBIA, KUBIA_VIP};

const MANY: u32 = 10_000;
/// Number of endpoints that the Kubernetes API allows in one slice.
const PER_SLICE: u32 = 1000;

/// Returns one Service with `count` endpoints, from 172.20.0.1 on, in slices as a controller makes them.
fn crowd(count: u32) -> Vec<Value> {
    let mut objects = vec![json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "crowd" },
        "spec": { "clusterIP": "10.96.20.20", "ports": [{ "port": 80 }] },
    })];
    for slice in 0..count.div_ceil(PER_SLICE) {
        let numbers = slice * PER_SLICE..count.min((slice + 1) * PER_SLICE);
        let endpoints: Vec<Value> = numbers
            .map(|number| {
                let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 20, 0, 1)) + number);
                json!({ "addresses": [address], "nodeName": NODE, "conditions": { "ready": true } })
            })
            .collect();
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": { "name": format!("crowd-{slice}"), "labels": { "kubernetes.io/service-name": "crowd" } },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": 8080 }],
            "endpoints": endpoints,
        }));
    }
    objects
}

fn reached(attempts: &[Attempt]) -> BTreeSet<String> {
    attempts.iter().filter_map(|attempt| Some(attempt.endpoint?.ip().to_string())).collect()
}

#[test]
fn ten_thousand_endpoints_of_one_service() -> Result<()> {
    let (file, vip) = ("crowd.yaml", "10.96.20.20:80");
    let world = World::start(&[KUBIA])?;
    // One pod answers for all endpoints: the whole prefix is its own.
    let pod = world.lab().add_pod(NODE, "crowd", &["172.16.1.20"])?;
    pod.net().ip("route add local 172.20.0.0/16 dev lo")?;
    // The route goes by the pod's address, because the kernel has one small neighbour table for all namespaces.
    let route = format!("route add 172.20.0.0/16 via 172.16.1.20 dev {} onlink", pod.host_device());
    world.host().net().ip(&route)?;
    pod.serve().at("http", "0.0.0.0:8080").start()?;

    let mut others = Loops::start(&world, &[KUBIA_VIP])?;
    world.manifests().put(file, &crowd(MANY))?;
    world.wait_ports(NODE, "default/crowd", |ports| {
        ports.iter().any(|port| port.cluster.len() == MANY as usize)
    })?;
    let attempts = world.client().connect(vip).http().times(2000).run()?;
    served(vip, &attempts)?;
    // 2000 draws out of 10000 hit about 1813 different endpoints.
    let distinct = reached(&attempts).len();
    assert!((1700..1920).contains(&distinct), "{distinct} of {MANY} endpoints were reached");

    let mut loops = Loops::start(&world, &[vip])?;
    for count in [MANY / 2, MANY, 1] {
        world.manifests().put(file, &crowd(count))?;
        world.wait_ports(NODE, "default/crowd", |ports| {
            ports.iter().all(|port| port.cluster.len() == count as usize)
        })?;
        loops.next(20)?;
    }
    let attempts = world.client().connect(vip).http().times(20).run()?;
    assert_eq!(reached(&attempts), BTreeSet::from(["172.20.0.1".to_owned()]));
    loops.none_failed()?;
    others.go_on()?;
    others.none_failed()?;
    assert_eq!(world.problems(NODE)?, BTreeMap::new());
    Ok(())
}

#[test]
fn a_file_with_thousands_of_services() -> Result<()> {
    let world = World::start(&[KUBIA])?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    let mut text = String::new();
    for number in 0..3000 {
        let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + number);
        text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: many-{number}\n  annotations: {{ note: {} }}\nspec:\n  \
             clusterIP: {ip}\n  ports:\n  - port: 80\n",
            "long ".repeat(100)
        );
    }
    world.manifests().write("many.yaml", &text)?;
    world.wait_ports(NODE, "default/many-2999", |ports| ports.len() == 1)?;
    loops.next(20)?;
    world.manifests().remove("many.yaml")?;
    world.wait_ports(NODE, "default/many-0", <[_]>::is_empty)?;
    loops.none_failed()?;
    Ok(())
}

#[test]
fn hostile_files() -> Result<()> {
    let world = World::start(&[KUBIA])?;
    let mut loops = Loops::start(&world, &[KUBIA_VIP])?;
    let huge = fs::File::create(world.manifests().dir().join("huge.yaml"))?;
    huge.set_len(65 << 20)?;
    drop(huge);
    world.manifests().write("deep.yaml", &"[".repeat(1_000_000))?;
    let mut bomb = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
    for level in 1..10 {
        let list = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb += &format!("a{level}: &a{level} [{list}]\n");
    }
    world.manifests().write("bomb.yaml", &bomb)?;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        world.manifests().dir().join("pipe.yaml"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )?;

    let words = [
        ("huge.yaml", "larger than"),
        ("deep.yaml", ""),
        ("bomb.yaml", "alias"),
        ("pipe.yaml", "regular file"),
    ];
    world.wait_problems(NODE, |problems| {
        words.iter().all(|(file, word)| {
            problems.iter().any(|(object, reasons)| object.contains(file) && reasons.concat().contains(word))
        })
    })?;
    loops.next(20)?;
    world.manifests().patch_service(KUBIA, &json!({ "sessionAffinity": "ClientIP" }))?;
    world.wait_ports(NODE, "default/kubia", |ports| ports.iter().all(|port| port.affinity_seconds > 0))?;
    loops.none_failed().map(drop)
}
