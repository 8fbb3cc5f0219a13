//! What a user should know beside the maps: where objects come from, and what is wrong with which.
//!
//! The agent logs each problem once and keeps them all in a small file that `proxy-agent status` reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proxy_common::addr::Family;
use serde::{Deserialize, Serialize};

use crate::cluster::ObjectKey;
use crate::edge::{self, DeviceState};
use crate::node::NodeIps;
use crate::sources::Problem;

/// The file's contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of the agent.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// This node's name.
    pub node: String,
    /// Its IPs, the primary one first; loopback where nobody names one.
    #[serde(default)]
    pub node_ips: Vec<String>,
    /// Where objects come from.
    pub source: String,
    /// The cgroup that is served.
    pub cgroup: String,
    /// Verified instructions of each program, where the kernel tells.
    pub verified_instructions: BTreeMap<String, u32>,
    /// The devices that carry Service traffic.
    #[serde(default)]
    pub devices: Vec<DeviceState>,
    /// Pods whose sockets are left alone.
    #[serde(default)]
    pub opted_out: Vec<String>,
    /// What is wrong, by object.
    pub problems: BTreeMap<String, Vec<String>>,
}

/// Keeps the file.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    state: State,
    written: Option<State>,
    /// The objects that have a problem, by who says so.
    objects: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    /// A report that will be written to `path`.
    pub fn new(path: PathBuf, state: State) -> Self {
        Self { path, state, written: None, objects: BTreeMap::new() }
    }

    /// What the programs cost the verifier.
    pub fn verified(&mut self, programs: &[(&'static str, Option<u32>)]) {
        let known = programs.iter().filter_map(|(name, count)| Some(((*name).to_owned(), (*count)?)));
        self.state.verified_instructions.extend(known);
    }

    /// Replaces the node's IPs.
    pub fn node_ips(&mut self, ips: &NodeIps) {
        let mut families = Family::ALL;
        families.sort_by_key(|family| *family != ips.primary());
        self.state.node_ips = families.map(|family| ips.of(family).to_string()).into();
    }

    /// Replaces what the source said.
    pub fn source(&mut self, problems: Vec<Problem>) {
        let mut by_object: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for problem in problems {
            by_object.entry(problem.object).or_default().push(problem.reason);
        }
        self.replace("source", by_object);
    }

    /// Replaces which pods' sockets are left alone, and what is wrong with that.
    pub fn opted_out(&mut self, pods: Vec<String>, problems: BTreeMap<String, Vec<String>>) {
        self.state.opted_out = pods;
        self.replace("opt-out", problems);
    }

    /// Replaces what is known of devices.
    pub fn edge(&mut self, state: edge::State) {
        self.verified(&state.verified);
        self.state.devices = state.devices;
        self.replace("edge", state.problems);
    }

    /// Replaces all that `who` has found wrong.
    fn replace(&mut self, who: &'static str, problems: BTreeMap<String, Vec<String>>) {
        let objects = problems.keys().cloned().collect();
        for object in self.objects.insert(who, objects).unwrap_or_default() {
            if !problems.contains_key(&object) {
                self.set(object, Vec::new());
            }
        }
        for (object, reasons) in problems {
            self.set(object, reasons);
        }
    }

    /// Replaces what is wrong with a Service.
    pub fn service(&mut self, service: &ObjectKey, reasons: Vec<String>) {
        self.set(format!("Service {service}"), reasons);
    }

    /// Replaces what is wrong with something else.
    pub fn set(&mut self, object: String, reasons: Vec<String>) {
        let before = self.state.problems.remove(&object).unwrap_or_default();
        for reason in reasons.iter().filter(|reason| !before.contains(reason)) {
            tracing::warn!(%object, %reason, "problem");
        }
        if reasons.is_empty() {
            if !before.is_empty() {
                tracing::info!(%object, "problem solved");
            }
        } else {
            self.state.problems.insert(object, reasons);
        }
    }

    /// How many objects have a problem.
    pub fn count(&self) -> usize {
        self.state.problems.len()
    }

    /// Writes the file if anything has changed. A failure is logged: the dataplane does not depend on it.
    pub fn write(&mut self) {
        if self.written.as_ref() == Some(&self.state) {
            return;
        }
        match write_atomically(&self.path, &self.state) {
            Ok(()) => self.written = Some(self.state.clone()),
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the file that `status` reads cannot be written");
            }
        }
    }
}

/// Reads the file that an agent left.
///
/// # Errors
///
/// When there is none, or it is not one of ours.
pub fn read(path: &Path) -> std::io::Result<State> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

fn write_atomically(path: &Path, state: &State) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let beside = path.with_extension("new");
    std::fs::write(&beside, serde_json::to_vec_pretty(state)?)?;
    std::fs::rename(&beside, path)
}
