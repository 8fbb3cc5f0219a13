//! The agent's other commands.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::maps;
use serde_json::Value;

use super::kernel;
use super::objects::{HERE, THERE, balancer, cluster_ip};
use super::row::{Outcome, Row, right};
use super::world::{ABSENT, BOTH, EMPTY, GUARDED, N1, NODE, P, World, X, Y, until};

pub(super) const ROWS: &[Row] =
    &[Row { id: "k066_verify", check: verify }, Row { id: "k067_explain", check: explain }];

/// Returns the maps that differ from the manifests.
pub(super) fn differences(world: &World) -> Result<Vec<String>> {
    let mut command = world.command("verify")?;
    command.args(["-o", "json", "--hostname-override", NODE, "--cluster-cidr", world.node().cluster_cidr()]);
    command.arg("--manifests").arg(world.manifests());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let found: Value = serde_json::from_slice(&output.stdout).with_context(|| said.clone())?;
    ensure!(found["services"].as_u64() > Some(0), "it looks at no Service: {found}");
    let all = found["differences"].as_array().context("a list")?;
    ensure!(output.status.success() == all.is_empty(), "{}: {found}", output.status);
    Ok(all.iter().map(|one| one["map"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Checks that nothing differs, and that a removed element is named and put back.
fn verify(world: &World) -> Result<Outcome> {
    let before = differences(world)?;
    ensure!(before.is_empty(), "{before:?}");
    let dump: Value = serde_json::from_str(&bpftool(world, &["dump"])?)?;
    let key = dump[0]["key"].as_array().context("no frontend")?;
    let key: Vec<&str> = key.iter().filter_map(Value::as_str).collect();
    // The agent is stopped, because it would put the element back at once.
    let stopped = world.agent().id().context("the agent does not run")?;
    let agent = rustix::process::Pid::from_raw(stopped.cast_signed()).context("a process id")?;
    rustix::process::kill_process(agent, rustix::process::Signal::STOP)?;
    let seen = bpftool(world, &[&["delete", "key"], &key[..]].concat()).and_then(|_| differences(world));
    rustix::process::kill_process(agent, rustix::process::Signal::CONT)?;
    let seen = seen?;
    ensure!(seen == [maps::FRONTENDS], "one frontend is missing: {seen:?}");
    until("the frontend is put back", || Ok(differences(world)?.is_empty().then_some(())))?;
    right("nothing differs; a frontend that is removed is named and put back")
}

fn bpftool(world: &World, words: &[&str]) -> Result<String> {
    let pin = world.node().pin_dir().join(format!("v{ABI_VERSION}/FRONTENDS"));
    let mut command = world.host().command("bpftool");
    command.args(["-j", "map"]).args(words.iter().take(1)).arg("pinned").arg(&pin).args(words.iter().skip(1));
    command.text().context("bpftool")
}

/// Checks that `explain` agrees with the results of other rows.
fn explain(world: &World) -> Result<Outcome> {
    let both = BTreeSet::from([format!("{}:8080", HERE.v4), format!("{}:8080", THERE.v4)]);
    let none = BTreeSet::new;
    let host = if kernel::has_set_retval() { "denied" } else { "refused" };
    let cases = [
        (P[0], cluster_ip(BOTH.number, false, 80), "served", both.clone()),
        (X[0], balancer(BOTH.number, false, 80), "served", both),
        (P[0], cluster_ip(EMPTY.number, false, 80), "refused", none()),
        (N1[0], cluster_ip(ABSENT.number, false, 80), host, none()),
        (X[0], balancer(ABSENT.number, false, 80), "dropped", none()),
        (Y[0], balancer(GUARDED.number, false, 80), "dropped", none()),
    ];
    let count = cases.len();
    for (from, target, verdict, servers) in cases {
        let mut command = world.command("explain")?;
        command.args(["-o", "json", "--from", from, "tcp", &target]);
        let said: Value = serde_json::from_str(&command.text()?)?;
        let clients = said["clients"].as_array().context("clients")?;
        let judged = clients.iter().find(|client| client["verdict"] != "left-to-packets");
        let judged = judged.with_context(|| format!("no verdict: {said}"))?;
        let named = judged["backends"].as_array().into_iter().flatten();
        let named: BTreeSet<String> = named.filter_map(|one| Some(one.as_str()?.to_owned())).collect();
        ensure!(judged["verdict"] == verdict && named == servers, "{from} to {target}: {judged}");
    }
    right(format!("{count} verdicts as seen"))
}
