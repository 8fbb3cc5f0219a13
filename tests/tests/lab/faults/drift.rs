//! Another program writes to the maps: `verify` names the difference, and the agent corrects it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use proxy_tests::scenarios::{NODE, World, until};
use serde_json::Value;

use super::{KUBIA, KUBIA_VIP, numbers};

/// Returns a world whose agent compares once a second.
fn world() -> Result<World> {
    let mut world = World::new(&[KUBIA, "s14-dns.yaml"])?;
    let manifests = world.manifests().dir().to_path_buf();
    let agent = world.new_agent(NODE)?.manifests(&manifests);
    let agent = agent.flag("iptables-sync-period", "1s").flag("iptables-min-sync-period", "1s");
    world.adopt(NODE, agent).start_ready()?;
    Ok(world)
}

/// Returns the maps and objects of the differences that `verify` finds. It exits with 1 if there are any.
fn verify(world: &World) -> Result<Vec<(String, String)>> {
    verify_with(world, "--manifests", world.manifests().dir())
}

/// Returns the same, with another source.
pub(super) fn verify_with(world: &World, flag: &str, source: &Path) -> Result<Vec<(String, String)>> {
    let node = world.lab().node(NODE);
    let mut command = world.command(NODE, "verify")?;
    command.args(["-o", "json", "--hostname-override", NODE, "--cluster-cidr", node.cluster_cidr()]);
    command.arg(flag).arg(source);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let found: Value = serde_json::from_slice(&output.stdout).with_context(|| said.clone())?;
    ensure!(found["services"].as_u64() > Some(0) && found["refused"] == serde_json::json!({}), "{found}");
    let differences = found["differences"].as_array().context("a list")?;
    ensure!(output.status.success() == differences.is_empty(), "{}: {found}", output.status);
    ensure!(differences.is_empty() || said.contains("differences between"), "{said}");
    let texts = differences
        .iter()
        .map(|one| ["map", "object"].map(|field| one[field].as_str().unwrap_or_default().to_owned()).into());
    Ok(texts.collect())
}

/// Runs `bpftool map WORDS` on a map. The word `{}` stands for the pin.
fn bpftool(world: &World, map: &str, words: &str) -> Result<String> {
    let pin = world.lab().node(NODE).pin_dir().join(format!("v{ABI_VERSION}")).join(map);
    let mut command = world.host().command("bpftool");
    command.args(["-j", "map"]);
    for word in words.split_whitespace() {
        match word {
            "{}" => command.arg("pinned").arg(&pin),
            other => command.arg(other),
        };
    }
    command.text().context("the lab needs bpftool")
}

/// Returns the keys of a hash map in bpftool's form.
fn keys(world: &World, map: &str) -> Result<Vec<String>> {
    let dump: Value = serde_json::from_str(&bpftool(world, map, "dump {}")?)?;
    Ok(dump.as_array().context("elements")?.iter().map(key).collect())
}

fn key(element: &Value) -> String {
    let bytes = element["key"].as_array().into_iter().flatten().filter_map(Value::as_str);
    bytes.collect::<Vec<_>>().join(" ")
}

fn drift(world: &mut World, map: &str) -> Result<u64> {
    let metrics = world.agent(NODE).metrics()?;
    let name = format!("vipr_drift_total{{map=\"{map}\"}} ");
    Ok(metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0))
}

#[test]
fn elements_that_are_removed_or_changed_are_named_and_come_back() -> Result<()> {
    let mut world = world()?;
    assert_eq!(verify(&world)?, [], "nothing has been touched");
    let before = numbers(&world, NODE)?;

    // Every frontend is deleted while no agent runs: `verify` needs none.
    world.agent(NODE).kill9()?;
    let frontends = keys(&world, maps::FRONTENDS)?;
    for key in &frontends {
        bpftool(&world, maps::FRONTENDS, &format!("delete {{}} key {key}"))?;
    }
    let found = verify(&world)?;
    ensure!(
        found.len() == frontends.len() && found.iter().all(|(map, _)| map == maps::FRONTENDS),
        "{found:?}"
    );
    ensure!(
        found.iter().any(|(_, object)| object.contains(KUBIA_VIP) && object.contains("kubia")),
        "{found:?}"
    );
    world.agent(NODE).start_ready()?;
    assert_eq!(verify(&world)?, []);
    assert_eq!(numbers(&world, NODE)?, before);

    // One element at a time, under a running agent.
    for (map, what) in
        [(maps::FRONTENDS, "delete"), (maps::NAMES, "delete"), (maps::LOCAL_ADDRESSES, "delete")]
    {
        let key = keys(&world, map)?.swap_remove(0);
        bpftool(&world, map, &format!("{what} {{}} key {key}"))?;
        until(map, || Ok((drift(&mut world, map)? > 0).then_some(())))?;
        until("healed", || Ok(keys(&world, map)?.contains(&key).then_some(())))?;
    }
    // Arrays have no elements to delete, so a slot gets a backend that does not exist.
    bpftool(&world, maps::SLOTS, "update {} key 1 0 0 0 value 255 255 0 0")?;
    until(maps::SLOTS, || Ok((drift(&mut world, maps::SLOTS)? > 0).then_some(())))?;
    until("verified", || Ok(verify(&world)?.is_empty().then_some(())))?;
    let attempts = world.client().connect(KUBIA_VIP).http().times(20).run()?;
    ensure!(attempts.iter().all(|attempt| attempt.ok), "{attempts:?}");
    // Corrections do not count as drift.
    let (counted, end) = (drift_of_maps(&mut world)?, Instant::now() + Duration::from_secs(3));
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(drift_of_maps(&mut world)?, counted);
    Ok(())
}

fn drift_of_maps(world: &mut World) -> Result<u64> {
    [maps::FRONTENDS, maps::NAMES, maps::SLOTS, maps::LOCAL_ADDRESSES]
        .map(|map| drift(world, map))
        .into_iter()
        .sum::<Result<u64>>()
}

#[test]
fn programs_that_are_detached_are_attached_again() -> Result<()> {
    let mut world = world()?;
    let (all, links) = (attached(&world)?, world.lab().node(NODE).pin_dir().join("links"));
    for name in ["connect4", "sendmsg4"] {
        let mut command = world.host().command("bpftool");
        command.args(["link", "detach", "pinned"]).arg(links.join(name));
        command.text().with_context(|| format!("bpftool detaches {name}"))?;
        ensure!(
            attached(&world)? < all || drift(&mut world, "links")? > 0,
            "what is pinned is not what is attached"
        );
    }
    until("attached", || Ok((attached(&world)? == all).then_some(())))?;
    // Both may have been found in one comparison.
    ensure!((1..=2).contains(&drift(&mut world, "links")?));
    let attempts = world.client().connect(KUBIA_VIP).http().times(20).run()?;
    ensure!(attempts.iter().all(|attempt| attempt.ok), "{attempts:?}");
    Ok(())
}

fn attached(world: &World) -> Result<usize> {
    let programs = world.tool(NODE, "status")?["programs"].clone();
    Ok(programs.as_object().context("programs")?.values().filter(|attached| **attached == true).count())
}
