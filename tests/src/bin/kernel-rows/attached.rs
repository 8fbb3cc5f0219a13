//! Programs that are loaded and attached, and their cost for the verifier.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_agent::bpf::dataplane::PROGRAMS;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::{sys, tc};
use proxy_agent::host::Host;
use proxy_common::abi::CgroupId;
use proxy_tests::lab::Place;
use serde_json::Value;

use super::kernel::{has_tcx, tells_verified_instructions};
use super::row::{Outcome, Row, right, say};
use super::world::{READY, World};
use super::{insns, lifetime};

pub(super) const ROWS: &[Row] = &[
    Row { id: "k001_takeover", check: lifetime::takeover },
    Row { id: "k002_load", check: load },
    Row { id: "k003_attach", check: attach },
    Row { id: "k004_cgroup", check: cgroup },
    Row { id: "k005_verified", check: verified },
];

/// Starts the agent, unless it is running.
pub(super) fn start(world: &World) -> Result<()> {
    let mut agent = world.agent();
    if agent.id().is_none() {
        agent.start()?;
        agent.wait_ready(READY)?;
    }
    Ok(())
}

/// Checks that every program is in the kernel, and that the agent reports no problem.
fn load(world: &World) -> Result<Outcome> {
    start(world)?;
    let mut command = world.command("status")?;
    command.args(["-o", "json"]);
    let status: Value = serde_json::from_str(&command.text()?)?;
    let programs: BTreeMap<String, bool> = serde_json::from_value(status["programs"].clone())?;
    for name in PROGRAMS {
        ensure!(programs.get(name) == Some(&true), "{name} is not attached: {programs:?}");
    }
    let mut loaded = insns::names(world.node().pin_dir())?;
    loaded.retain(|name| tc::PROGRAMS.contains(&name.as_str()));
    ensure!(loaded.len() == tc::PROGRAMS.len(), "of the packet edge only {loaded:?} are loaded");
    let problems = &status["agent"]["problems"];
    ensure!(problems == &serde_json::json!({}), "problems: {problems}");
    right(format!("{} programs at sockets, {} at devices", PROGRAMS.len(), loaded.len()))
}

/// Returns the names of the programs that TCX has on a device, for ingress and egress.
pub(super) fn tcx_programs(place: &Place, device: &str) -> Result<Vec<String>> {
    place.net().enter(|| -> Result<Vec<String>> {
        let mut names = Vec::new();
        for attach_type in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx(device, attach_type)?;
            names.extend(programs.iter().filter_map(|program| program.name_as_str().map(str::to_owned)));
        }
        Ok(names)
    })?
}

/// Returns the names of the programs that filters have on a device, for ingress and egress.
pub(super) fn clsact_programs(place: &Place, device: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for direction in ["ingress", "egress"] {
        let mut command = place.command("tc");
        command.args(["filter", "show", "dev", device, direction]);
        // Without a queueing discipline there is an error instead of no filter.
        let shown = String::from_utf8_lossy(&command.output()?.stdout).into_owned();
        names.extend(tc::PROGRAMS.iter().filter(|name| shown.contains(*name)).map(|name| (*name).to_owned()));
    }
    Ok(names)
}

/// Checks that the programs are attached in the way that this kernel supports, and in no other.
fn attach(world: &World) -> Result<Outcome> {
    let pod = world.lab().pod("P");
    let host = world.host();
    for (device, names) in
        [("eth0", ["edge_ingress", "edge_egress"]), (pod.host_device(), ["pod_ingress", "pod_egress"])]
    {
        let none: [&str; 0] = [];
        let (tcx, clsact) = if has_tcx() { (&names[..], &none[..]) } else { (&none[..], &names[..]) };
        if has_tcx() {
            ensure!(tcx_programs(host, device)? == tcx, "{device}: by TCX {:?}", tcx_programs(host, device)?);
        }
        let filters = clsact_programs(host, device)?;
        ensure!(filters == clsact, "{device}: by clsact {filters:?}");
    }
    if has_tcx() { right("by TCX") } else { Ok(Outcome::Lacks("TCX: clsact".to_owned())) }
}

/// Checks that the agent finds the hierarchy by itself, and that the programs are attached to the configured cgroup.
fn cgroup(world: &World) -> Result<Outcome> {
    let found = Host::look(None)?.cgroup;
    let unified = Path::new("/sys/fs/cgroup/unified");
    let wanted = if world.hybrid { unified } else { Path::new("/sys/fs/cgroup") };
    ensure!(found == wanted || !world.hybrid && found == unified, "the agent finds {}", found.display());
    ensure!(
        !world.hybrid || fs::read_to_string("/proc/self/mountinfo")?.contains(" - cgroup "),
        "no version 1 beside it"
    );
    // Not asked of bpftool, which fails here on 5.10.
    let cgroup = fs::metadata(world.node().cgroup())?.ino();
    let pins = PinDir::new(world.node().pin_dir());
    for name in PROGRAMS {
        let link = sys::open_link(&pins.link(name)).with_context(|| name.to_owned())?;
        let info = sys::cgroup_link_info(link.as_fd()).with_context(|| name.to_owned())?;
        ensure!(
            info.cgroup_id == CgroupId(cgroup),
            "{name} is attached to the cgroup {}, not {cgroup}",
            info.cgroup_id
        );
    }
    right(format!("{}: every program at the node's cgroup", found.display()))
}

/// Prints the number of instructions that the verifier processed for every program.
fn verified(world: &World) -> Result<Outcome> {
    let counts = if tells_verified_instructions() {
        let status = world.tool("status")?;
        serde_json::from_value(status["agent"]["verified_instructions"].clone())?
    } else {
        insns::by_log(world.node().pin_dir())?
    };
    let counts: BTreeMap<String, u32> = counts;
    for name in PROGRAMS.iter().chain(&tc::PROGRAMS) {
        let count = counts.get(*name).with_context(|| format!("nothing is known of {name}: {counts:?}"))?;
        ensure!(*count > 10, "{name}: {count}");
        say(&format!("insns {name} {count}"));
    }
    let most = counts.iter().max_by_key(|(_, count)| **count).context("no program")?;
    let how = if tells_verified_instructions() { "program info" } else { "the verifier's log" };
    right(format!("by {how}; the most are {} of {}", most.1, most.0))
}
