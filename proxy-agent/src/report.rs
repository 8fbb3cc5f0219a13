//! What a user should know beside the maps: where objects come from, and what is wrong with which.
//!
//! The agent logs each problem once, makes an Event of it where it is about a Service, and keeps them all in a small
//! file that `proxy-agent status` reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proxy_common::addr::Family;
use serde::{Deserialize, Serialize};

use crate::bpf::{Refused, tc};
use crate::cluster::ObjectKey;
use crate::edge::{self, DeviceState};
use crate::events::{Event, Events};
use crate::health::check_ports::Failures;
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

/// Who tells of problems. What one says stands until that one says something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Teller {
    Source,
    Programming,
    Devices,
    OptOut,
    CheckPorts,
}

/// Keeps the file.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    state: State,
    written: Option<State>,
    told: BTreeMap<(String, Teller), Vec<String>>,
    events: Events,
}

impl Report {
    /// A report that will be written to `path`; what is wrong with Services is also told to `events`.
    pub fn new(path: PathBuf, state: State, events: Events) -> Self {
        Self { path, state, written: None, told: BTreeMap::new(), events }
    }

    /// What the programs cost the verifier.
    pub fn verified(&mut self, programs: &[(&'static str, Option<u32>)]) {
        let known = programs.iter().filter_map(|(name, count)| Some(((*name).to_owned(), (*count)?)));
        self.state.verified_instructions.extend(known);
    }

    /// Replaces which of `programs` the kernel has refused.
    pub fn refused(&mut self, programs: &[&str], refused: &Refused) {
        for program in programs {
            self.set(program_object(program), refused.get(program).cloned().into_iter().collect());
        }
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
        self.replace(Teller::Source, by_object);
    }

    /// Replaces which pods' sockets are left alone, and what is wrong with that.
    pub fn opted_out(&mut self, pods: Vec<String>, problems: BTreeMap<String, Vec<String>>) {
        self.state.opted_out = pods;
        self.replace(Teller::OptOut, problems);
    }

    /// Replaces what is known of devices.
    pub fn edge(&mut self, state: edge::State) {
        self.verified(&state.verified);
        self.refused(&tc::PROGRAMS, &state.refused);
        self.state.devices = state.devices;
        self.replace(Teller::Devices, state.problems);
    }

    /// Replaces what is wrong with the servers of healthCheckNodePorts.
    pub fn check_ports(&mut self, failures: Failures) {
        let by_object = failures.into_iter().map(|(service, reasons)| (object(&service), reasons));
        self.replace(Teller::CheckPorts, by_object.collect());
    }

    /// Replaces what is wrong with a Service as it is programmed.
    pub fn service(&mut self, service: &ObjectKey, reasons: Vec<String>) {
        self.set(object(service), reasons);
    }

    /// The Services with which something was wrong when they were programmed.
    pub fn services(&self) -> Vec<ObjectKey> {
        let told = self.told.keys().filter(|(_, teller)| *teller == Teller::Programming);
        told.filter_map(|(object, _)| service_of(object)).collect()
    }

    /// Replaces what is wrong with something else.
    pub fn set(&mut self, object: String, reasons: Vec<String>) {
        self.tell((object, Teller::Programming), reasons);
    }

    fn replace(&mut self, teller: Teller, by_object: BTreeMap<String, Vec<String>>) {
        let solved = |(object, of): &&(String, Teller)| *of == teller && !by_object.contains_key(object);
        let solved: Vec<_> = self.told.keys().filter(solved).cloned().collect();
        for key in solved {
            self.tell(key, Vec::new());
        }
        for (object, reasons) in by_object {
            self.tell((object, teller), reasons);
        }
    }

    fn tell(&mut self, key: (String, Teller), reasons: Vec<String>) {
        let before = self.told.remove(&key).unwrap_or_default();
        if reasons == before {
            if !reasons.is_empty() {
                self.told.insert(key, reasons);
            }
            return;
        }
        let (object, teller) = &key;
        let known: BTreeSet<&str> = before.iter().map(String::as_str).collect();
        let new: Vec<&str> =
            reasons.iter().map(String::as_str).filter(|reason| !known.contains(reason)).collect();
        for reason in &new {
            tracing::warn!(%object, %reason, "problem");
        }
        if let Some(service) = service_of(object)
            && let Some(note) = note(&new)
        {
            self.events.tell(match teller {
                Teller::CheckPorts => Event::check_port_failed(service, note),
                Teller::Source | Teller::Programming | Teller::Devices | Teller::OptOut => {
                    Event::problem(service, note)
                }
            });
        }
        let object = object.clone();
        if !reasons.is_empty() {
            self.told.insert(key, reasons);
        }
        let of_object =
            self.told.range((object.clone(), Teller::Source)..=(object.clone(), Teller::CheckPorts));
        let all: Vec<String> = of_object.flat_map(|(_, reasons)| reasons).cloned().collect();
        if all.is_empty() {
            tracing::info!(%object, "problem solved");
            self.state.problems.remove(&object);
        } else {
            self.state.problems.insert(object, all);
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

/// All of them in one Event: a Service can have a thousand.
fn note(reasons: &[&str]) -> Option<String> {
    let (first, others) = reasons.split_first()?;
    Some(match others.len() {
        0 => (*first).to_owned(),
        more => format!("{first} (and {more} more: `proxy-agent status` on this node)"),
    })
}

/// A Service as `status` names it.
/// What problems name a BPF program.
pub fn program_object(program: &str) -> String {
    format!("BPF program {program}")
}

fn object(service: &ObjectKey) -> String {
    format!("Service {service}")
}

/// The Service that `status` names so; `None` for other objects.
fn service_of(object: &str) -> Option<ObjectKey> {
    let (namespace, name) = object.strip_prefix("Service ")?.split_once('/')?;
    Some(ObjectKey::new(namespace, name))
}

fn write_atomically(path: &Path, state: &State) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let beside = path.with_extension("new");
    std::fs::write(&beside, serde_json::to_vec_pretty(state)?)?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(dir: &Path) -> Report {
        Report::new(dir.join("state.json"), State::default(), Events::nowhere())
    }

    fn problem(reason: &str) -> Problem {
        Problem { object: "Service a/s".to_owned(), reason: reason.to_owned() }
    }

    /// What is wrong with Service a/s according to the file.
    fn check(report: &mut Report, want: &[&str]) {
        report.write();
        let state = read(&report.path).unwrap();
        let got = state.problems.get("Service a/s").map_or(&[][..], Vec::as_slice);
        assert_eq!(got, want);
        assert_eq!(report.count(), usize::from(!want.is_empty()));
    }

    #[test]
    fn nobody_takes_back_what_another_has_told() {
        let dir = tempfile::tempdir().unwrap();
        let (mut report, key) = (report(dir.path()), ObjectKey::new("a", "s"));
        report.source(vec![problem("no name")]);
        check(&mut report, &["no name"]);
        // The Service that cannot be used is programmed as one that is gone.
        report.service(&key, Vec::new());
        check(&mut report, &["no name"]);
        report.check_ports(Failures::from([(key.clone(), vec!["taken".to_owned()])]));
        assert_eq!(report.services(), []);
        report.service(&key, vec!["no room".to_owned()]);
        assert_eq!(report.services(), std::slice::from_ref(&key));
        check(&mut report, &["no name", "no room", "taken"]);
        report.source(Vec::new());
        check(&mut report, &["no room", "taken"]);
        report.check_ports(Failures::new());
        report.service(&key, Vec::new());
        check(&mut report, &[]);
    }

    #[test]
    fn one_note_for_all() {
        assert_eq!(note(&[]), None);
        assert_eq!(note(&["x"]).unwrap(), "x");
        assert_eq!(note(&["x", "y", "z"]).unwrap(), "x (and 2 more: `proxy-agent status` on this node)");
    }

    #[test]
    fn services_are_known_by_their_names() {
        let key = ObjectKey::new("a", "s");
        assert_eq!(service_of(&object(&key)), Some(key));
        for other in ["EndpointSlice a/s", "Service", "Service x", "services.yaml, document 2", "node"] {
            assert_eq!(service_of(other), None, "{other}");
        }
    }
}
