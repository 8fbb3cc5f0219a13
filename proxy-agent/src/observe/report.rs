//! Facts that a user should know beside the maps: the source of the objects, and the problems of each object.
//!
//! The agent logs each problem once, makes an Event of it if it is about a Service, and keeps the problems in a small
//! file that `proxy-agent status` reads. Each namespace has its own share of the log and of the file, so that many
//! problems in one namespace do not hide those of another.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxy_common::addr::Family;
use serde::{Deserialize, Serialize};

use crate::bpf::self_test::Reach;
use crate::bpf::{Refused, tc};
use crate::devices;
use crate::devices::DeviceState;
use crate::observe::events::{Event, Events};
use crate::observe::health::check_ports::Failures;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::node_ips::NodeIps;
use crate::reconcile::shares::{Shares, tenant_of};
use crate::sources::Problem;

/// The file's contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Version of the agent.
    pub(crate) version: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// This node's name.
    pub(crate) node: String,
    /// The node's IPs, the primary one first; loopback where none is known.
    #[serde(default)]
    pub(crate) node_ips: Vec<String>,
    /// Source of the objects.
    pub(crate) source: String,
    /// The cgroup that is served.
    pub(crate) cgroup: String,
    /// Id of the cgroup, unless it is the root of the hierarchy: only processes below it are served.
    #[serde(default)]
    pub(crate) cgroup_below_root: Option<u64>,
    /// Number of verified instructions of each program, where the kernel tells.
    pub(crate) verified_instructions: BTreeMap<String, u32>,
    /// Whether the kernel lets the programs say why a socket is refused (5.18).
    #[serde(default)]
    pub(crate) reasons_for_sockets: bool,
    /// The devices that carry Service traffic.
    #[serde(default)]
    pub(crate) devices: Vec<DeviceState>,
    /// Pods whose sockets are left alone.
    #[serde(default)]
    pub(crate) opted_out: Vec<String>,
    /// Problems by object.
    pub(crate) problems: BTreeMap<String, Vec<String>>,
}

/// Reporter of problems. The problems of one reporter stand until the same reporter replaces them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Teller {
    Source,
    Programming,
    Devices,
    OptOut,
    CheckPorts,
}

/// Number of reasons that are kept per reporter and object.
const REASONS: usize = 10;
/// Number of objects of one tenant that the file names.
const OBJECTS: usize = 100;
/// Number of log lines that a tenant may have at once.
const LINES: u32 = 50;
/// Time after which a tenant may have one more log line.
const PER_LINE: Duration = Duration::from_secs(10);

type Told = BTreeMap<(String, Teller), Vec<String>>;

/// The problems, and the file that shows them.
#[derive(Debug)]
pub(crate) struct Report {
    path: PathBuf,
    /// State of the file. Its problems are those of the last write.
    state: State,
    /// Whether something has changed since the file was written.
    changed: bool,
    told: Told,
    /// Number of objects with problems.
    objects: usize,
    lines: Shares,
    events: Events,
}

impl Report {
    /// Makes a report that is written to `path`. Problems of Services are also told to `events`.
    pub(crate) fn new(path: PathBuf, state: State, events: Events) -> Self {
        Self {
            path,
            state,
            changed: true,
            told: Told::new(),
            objects: 0,
            lines: Shares::new(LINES, PER_LINE),
            events,
        }
    }

    /// Notes the number of verified instructions of each program.
    pub(crate) fn verified(&mut self, programs: &[(&'static str, Option<u32>)]) {
        let known = programs.iter().filter_map(|(name, count)| Some(((*name).to_owned(), (*count)?)));
        for (name, count) in known {
            self.changed |= self.state.verified_instructions.insert(name, count) != Some(count);
        }
    }

    /// Notes whether the kernel lets the programs say why a socket is refused.
    pub(crate) fn reasons_for_sockets(&mut self, there: bool) {
        self.changed |= self.state.reasons_for_sockets != there;
        self.state.reasons_for_sockets = there;
    }

    /// Notes which processes are served, and logs it if some are not.
    pub(crate) fn reach(&mut self, reach: Reach) {
        let below = match reach {
            Reach::Host => None,
            Reach::Below(id) => Some(id),
        };
        if let Some(id) = below {
            tracing::warn!(
                cgroup = %self.state.cgroup,
                id,
                "not the root of the cgroup v2 hierarchy: only processes below it are served"
            );
        }
        self.changed |= replace(&mut self.state.cgroup_below_root, below);
    }

    /// Replaces what the kernel has refused of `programs`.
    pub(crate) fn refused(&mut self, programs: &[&str], refused: &Refused) {
        for program in programs {
            self.set(program_object(program), refused.get(program).cloned().into_iter().collect());
        }
    }

    /// Replaces the node's IPs.
    pub(crate) fn node_ips(&mut self, ips: &NodeIps) {
        let mut families = Family::ALL;
        families.sort_by_key(|family| *family != ips.primary());
        self.changed |=
            replace(&mut self.state.node_ips, families.map(|family| ips.of(family).to_string()).into());
    }

    /// Replaces the problems of the source.
    pub(crate) fn source(&mut self, problems: Vec<Problem>) {
        let mut by_object: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for problem in problems {
            by_object.entry(problem.object).or_default().push(problem.reason);
        }
        self.replace(Teller::Source, by_object);
    }

    /// Replaces the pods whose sockets are left alone, and the problems of pods that opt out.
    pub(crate) fn opted_out(&mut self, pods: Vec<String>, problems: BTreeMap<String, Vec<String>>) {
        self.changed |= replace(&mut self.state.opted_out, pods);
        self.replace(Teller::OptOut, problems);
    }

    /// Replaces what is known of devices.
    pub(crate) fn edge(&mut self, state: devices::State) {
        self.verified(&state.verified);
        self.refused(&tc::PROGRAMS, &state.refused);
        self.changed |= replace(&mut self.state.devices, state.devices);
        self.replace(Teller::Devices, state.problems);
    }

    /// Replaces the problems of the servers of healthCheckNodePorts.
    pub(crate) fn check_ports(&mut self, failures: Failures) {
        let by_object = failures.into_iter().map(|(service, reasons)| (object(&service), reasons));
        self.replace(Teller::CheckPorts, by_object.collect());
    }

    /// Replaces the problems of a Service as it is programmed.
    pub(crate) fn service(&mut self, service: &ObjectKey, reasons: Vec<String>) {
        self.set(object(service), reasons);
    }

    /// Returns the Services that had problems when they were programmed.
    pub(crate) fn services(&self) -> Vec<ObjectKey> {
        let told = self.told.keys().filter(|(_, teller)| *teller == Teller::Programming);
        told.filter_map(|(object, _)| service_of(object)).collect()
    }

    /// Replaces the problems of another object.
    pub(crate) fn set(&mut self, object: String, reasons: Vec<String>) {
        self.tell((object, Teller::Programming), reasons);
    }

    fn replace(&mut self, teller: Teller, by_object: BTreeMap<String, Vec<String>>) {
        let told = self.told.keys().filter(|(_, of)| *of == teller);
        let solved = told.filter(|(object, _)| !by_object.contains_key(object));
        for key in solved.cloned().collect::<Vec<_>>() {
            self.tell(key, Vec::new());
        }
        for (object, reasons) in by_object {
            self.tell((object, teller), reasons);
        }
    }

    fn tell(&mut self, key: (String, Teller), mut reasons: Vec<String>) {
        let before = self.told.remove(&key).unwrap_or_default();
        let known: BTreeSet<&str> = before.iter().map(String::as_str).collect();
        let new: Vec<&str> =
            reasons.iter().map(String::as_str).filter(|reason| !known.contains(reason)).collect();
        let (note, logged) = (note(&new), new.iter().take(REASONS).map(|&reason| reason.to_owned()));
        let logged: Vec<String> = logged.collect();
        shorten(&mut reasons);
        if reasons == before {
            self.told.extend((!reasons.is_empty()).then_some((key, reasons)));
            return;
        }
        self.changed = true;
        let (object, teller) = key.clone();
        for reason in &logged {
            if let Some(unlogged) = self.line(&object) {
                tracing::warn!(%object, %reason, unlogged, "problem");
            }
        }
        if let Some(service) = service_of(&object)
            && let Some(note) = note
        {
            self.events.tell(match teller {
                Teller::CheckPorts => Event::check_port_failed(service, note),
                Teller::Source | Teller::Programming | Teller::Devices | Teller::OptOut => {
                    Event::problem(service, note)
                }
            });
        }
        let was_told = !before.is_empty() || self.is_told(&object);
        self.told.extend((!reasons.is_empty()).then_some((key, reasons)));
        match (was_told, self.is_told(&object)) {
            (false, true) => self.objects += 1,
            (true, false) => {
                self.objects -= 1;
                if let Some(unlogged) = self.line(&object) {
                    tracing::info!(%object, unlogged, "problem solved");
                }
            }
            _ => {}
        }
    }

    /// Returns the number of lines left out before, if the log may have another line about the object.
    fn line(&mut self, object: &str) -> Option<u64> {
        match tenant_of(object) {
            "" => Some(0),
            tenant => self.lines.take(tenant, Instant::now()),
        }
    }

    fn is_told(&self, object: &str) -> bool {
        let all = (object.to_owned(), Teller::Source)..=(object.to_owned(), Teller::CheckPorts);
        self.told.range(all).next().is_some()
    }

    /// Returns the number of objects with problems.
    pub(crate) fn count(&self) -> usize {
        self.objects
    }

    /// Writes the file if anything has changed. A failure is logged: the dataplane does not depend on it.
    pub(crate) fn write(&mut self) {
        if !self.changed {
            return;
        }
        self.state.problems = shown(&self.told);
        match write_atomically(&self.path, &self.state) {
            Ok(()) => self.changed = false,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the file that `status` reads cannot be written");
            }
        }
    }
}

/// Replaces a value. Returns whether it was another one.
fn replace<T: PartialEq>(place: &mut T, value: T) -> bool {
    let changed = *place != value;
    *place = value;
    changed
}

/// Cuts off the reasons beyond [`REASONS`], and appends their number.
fn shorten(reasons: &mut Vec<String>) {
    if let Some(more) = reasons.len().checked_sub(REASONS).filter(|more| *more > 0) {
        reasons.truncate(REASONS);
        reasons.push(format!("and {more} more like these"));
    }
}

/// Returns the problems that the file shows: of each tenant up to [`OBJECTS`] objects and the number of further ones;
/// of the node everything.
fn shown(told: &Told) -> BTreeMap<String, Vec<String>> {
    let mut problems: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut tenants: BTreeMap<&str, (usize, BTreeSet<&str>)> = BTreeMap::new();
    for ((object, _), reasons) in told {
        if let Some(shown) = problems.get_mut(object) {
            shown.extend(reasons.iter().cloned());
            continue;
        }
        let tenant = tenant_of(object);
        let (count, more) = tenants.entry(tenant).or_default();
        if *count >= OBJECTS && !tenant.is_empty() {
            more.insert(object);
        } else {
            *count += 1;
            problems.insert(object.clone(), reasons.clone());
        }
    }
    for (tenant, (_, more)) in tenants.into_iter().filter(|(_, (_, more))| !more.is_empty()) {
        let line = format!("something is wrong with {} more objects, which are not named here", more.len());
        problems.insert(format!("all of {tenant}"), vec![line]);
    }
    problems
}

/// Reads the file that an agent left.
///
/// # Errors
///
/// When there is none, or it is not one of ours.
pub(crate) fn read(path: &Path) -> std::io::Result<State> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// Puts all reasons into one note, because a Service can have a thousand.
fn note(reasons: &[&str]) -> Option<String> {
    let (first, others) = reasons.split_first()?;
    Some(match others.len() {
        0 => (*first).to_owned(),
        more => format!("{first} (and {more} more: `proxy-agent status` on this node)"),
    })
}

/// Returns the object by which problems name a BPF program.
pub(crate) fn program_object(program: &str) -> String {
    format!("BPF program {program}")
}

/// Returns the object by which `status` names a Service.
fn object(service: &ObjectKey) -> String {
    format!("Service {service}")
}

/// Returns the Service that `status` names by this object; `None` for other objects.
fn service_of(object: &str) -> Option<ObjectKey> {
    let (namespace, name) = object.strip_prefix("Service ")?.split_once('/')?;
    Some(ObjectKey::new(namespace, name))
}

/// Returns the path of the new file, which replaces the old one once it is complete. An agent that dies before that
/// leaves it behind.
pub(crate) fn beside(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn write_atomically(path: &Path, state: &State) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let beside = beside(path);
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

    /// Checks the problems of Service a/s in the file.
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

    /// Ten thousand Services of a namespace with a thousand reasons each, and one of another.
    #[test]
    fn a_namespace_does_not_crowd_out_another() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = report(dir.path());
        let reasons: Vec<String> = (0..1_000).map(|number| format!("no {number}")).collect();
        for number in 0..10_000 {
            report.service(&ObjectKey::new("a", &format!("s{number}")), reasons.clone());
        }
        report.service(&ObjectKey::new("b", "s"), vec!["no room".to_owned()]);
        for device in 0..200 {
            report.set(format!("device eth{device}"), vec!["down".to_owned()]);
        }
        assert_eq!(report.count(), 10_201);
        report.write();
        let problems = read(&report.path).unwrap().problems;
        assert_eq!(problems["Service b/s"], ["no room"]);
        assert_eq!(problems.len(), OBJECTS + 1 + 1 + 200);
        let more = "something is wrong with 9900 more objects, which are not named here";
        assert_eq!(problems["all of a"], [more]);
        let of_one = &problems["Service a/s0"];
        assert_eq!((of_one.len(), &*of_one[REASONS]), (REASONS + 1, "and 990 more like these"));
        assert!(std::fs::metadata(&report.path).unwrap().len() < 64 << 10);
        // Present problems are told, and solved ones are forgotten.
        assert_eq!(report.services().len(), 10_001);
        for number in 0..10_000 {
            report.service(&ObjectKey::new("a", &format!("s{number}")), Vec::new());
        }
        assert_eq!(report.count(), 201);
        report.write();
        assert!(!read(&report.path).unwrap().problems.contains_key("all of a"));
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
