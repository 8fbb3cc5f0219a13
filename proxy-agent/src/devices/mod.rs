//! Devices of the packet edge: their choice, the facts that the programs need about each, and attaching the programs.
//!
//! ```text
//! rtnetlink ─> Snapshot ─> choose() ─> Choices ─┬─> Attacher ─> DEVICES, TCX links or clsact filters
//!                     Facts of the agent ──> Sources ─┘
//! ```
//! One task beside the agent's loop owns all of this, because attaching waits for the kernel's RCU, some 20 ms each
//! time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proxy_common::abi::IfIndex;
use proxy_common::addr::Prefix;
use proxy_common::datapath::edge::Role;
use rtnetlink::Handle;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::bpf::Refused;
use crate::bpf::device::Direction;
use crate::bpf::notes::Notes;
use crate::bpf::others::{Other, Side};
use crate::bpf::pins::PinDir;
use crate::bpf::tc::Mechanism;
use crate::host::FollowError;

pub(crate) mod snapshot;

pub(crate) mod choice;

pub(crate) mod sources;

pub(crate) mod attach;

pub(crate) mod reserved_ports;

mod ipsec;
mod strict;

use crate::config::devices::Devices;
use attach::{Attacher, Outcome};
use choice::{Choices, choose, problems};
use reserved_ports::DatagramPorts;
use snapshot::{Snapshot, watch_network};
use sources::{Facts, Sources, resolve};

/// Time after a failure until everything is tried again. It doubles with each further failure, up to [`RETRY_AT_MOST`].
const RETRY: Duration = Duration::from_secs(5);
const RETRY_AT_MOST: Duration = Duration::from_secs(300);
/// Interval of the passes that check whether everything is still attached, at its place.
const CHECK: Duration = Duration::from_secs(30);
/// Time to wait after a change of [`Facts`] for further ones: facts change in bursts, as the network does.
const SETTLE: Duration = Duration::from_millis(50);
/// Longest pause after a pass. The pause is as long as the pass took, up to this limit, so that frequent changes of
/// pods do not keep the kernel's lock of all devices busy.
const REST_AT_MOST: Duration = Duration::from_secs(1);

const BEHIND_ON_EGRESS: &str = "others are behind ours on the way out (OTHERS in `proxy-agent status`): to them answers come \
    from Services, not from pods. Let them allow Services' addresses; or run the agent with --no-tcx, which puts ours behind \
    filters, if all of them let packets pass by TC_ACT_UNSPEC (`continue`) and have a `pref` below 65535";
const AHEAD_ON_INGRESS: &str = "others are ahead of ours on the way in (OTHERS in `proxy-agent status`): to them requests go to \
    Services, not to pods, and what they accept by anything but TC_ACT_UNSPEC (`continue`) is not served. Give filters a \
    `pref` above 1; TCX programs are behind ours without --no-tcx";

/// A device that carries Service traffic, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeviceState {
    /// Interface index.
    pub(crate) index: u32,
    /// Interface name.
    pub(crate) name: String,
    /// `external` or `pod`.
    pub(crate) role: String,
    /// Reason for the choice.
    pub(crate) reason: String,
    /// `tcx` or `clsact`; empty while the programs are not attached.
    pub(crate) attached: String,
    /// Programs and filters of others on the device, except those behind ours on ingress, where they should be.
    #[serde(default)]
    pub(crate) others: Vec<Other>,
    /// Source addresses of packets to other nodes, at most one for each family.
    pub(crate) sources: Vec<String>,
    /// Whether everything that enters counts as traffic of local pods.
    pub(crate) near: bool,
    /// Whether packets start with the IP header.
    pub(crate) l3: bool,
}

impl DeviceState {
    /// Returns whether the programs are attached.
    pub(crate) fn is_attached(&self) -> bool {
        !self.attached.is_empty()
    }

    /// Returns whether the device is the host's side of a pod and the programs are attached.
    pub(crate) fn is_attached_pod(&self) -> bool {
        self.is_attached() && self.role == Role::Pod.name()
    }
}

/// State of the packet edge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// Number of passes so far; 0 while nothing has been attached.
    pub(crate) passes: u64,
    /// The devices, by index.
    pub(crate) devices: Vec<DeviceState>,
    /// Problems by device or flag.
    pub(crate) problems: BTreeMap<String, Vec<String>>,
    /// Reason why clients outside this node, or all pods of it, are not served as they should be. It keeps a starting
    /// node from being ready.
    pub(crate) holds: Option<String>,
    /// Number of verified instructions per program, where the kernel tells.
    pub(crate) verified: Vec<(&'static str, Option<u32>)>,
    /// Programs that the kernel has refused.
    pub(crate) refused: Refused,
    /// Destinations of the routes that lead past the programs of external devices.
    pub(crate) elsewhere: Vec<Prefix>,
}

/// The task that chooses devices and attaches programs. It ends when this is dropped; attached programs stay.
#[derive(Debug)]
pub(crate) struct DeviceTask {
    facts: watch::Sender<Facts>,
    datagram_ports: watch::Sender<DatagramPorts>,
    state: watch::Receiver<State>,
    _task: JoinSet<()>,
}

impl DeviceTask {
    /// Starts choosing and attaching. The maps have to be pinned.
    ///
    /// # Errors
    ///
    /// When the network cannot be read.
    pub(crate) async fn start(config: Devices, facts: Facts) -> Result<Self, FollowError> {
        let network = watch_network().await?;
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| FollowError::Open { what: "this host's routes", source })?;
        let (facts, known) = watch::channel(facts);
        let (publish, state) = watch::channel(State::default());
        let (datagram_ports, reserved) = watch::channel(DatagramPorts::default());
        let mut task = JoinSet::new();
        task.spawn(connection);
        task.spawn(reserved_ports::follow(Notes::of(&config.pins), reserved));
        task.spawn(Worker { config, handle, network, facts: known, chosen: Choices::new() }.run(publish));
        Ok(Self { facts, datagram_ports, state, _task: task })
    }

    /// Replaces the facts and the datagram ports.
    pub(crate) fn tell(&self, facts: &Facts, datagram_ports: &DatagramPorts) {
        replace(&self.facts, facts);
        replace(&self.datagram_ports, datagram_ports);
    }

    /// Waits for the next pass, and returns the state after it.
    pub(crate) async fn changed(&mut self) -> State {
        match self.state.changed().await {
            Ok(()) => self.state.borrow_and_update().clone(),
            // The task ends only by a panic, which has been printed.
            Err(_) => std::future::pending().await,
        }
    }
}

fn replace<T: Clone + PartialEq>(sender: &watch::Sender<T>, value: &T) {
    sender.send_if_modified(|known| {
        let changed = known != value;
        known.clone_from(value);
        changed
    });
}

struct Worker {
    config: Devices,
    handle: Handle,
    network: watch::Receiver<Snapshot>,
    facts: watch::Receiver<Facts>,
    chosen: Choices,
}

impl Worker {
    async fn run(mut self, publish: watch::Sender<State>) {
        let mut attacher = None;
        let mut maps = 0;
        let mut retry = RETRY;
        loop {
            let snapshot = self.network.borrow_and_update().clone();
            let facts = self.facts.borrow_and_update().clone();
            if maps != facts.maps {
                // Attached programs serve until they are replaced, in place.
                (attacher, maps) = (None, facts.maps);
            }
            let mut state = State { passes: publish.borrow().passes + 1, ..State::default() };
            let choices = choose(&snapshot, &self.config.settings, &self.chosen);
            log_changes(&self.chosen, &choices);
            let sources = resolve(&self.handle, &snapshot, &choices, &facts).await;
            let present = names(&snapshot);
            let (config, wanted, given) = (self.config.clone(), choices.clone(), sources.clone());
            let start = Instant::now();
            let work = tokio::task::spawn_blocking(move || pass(attacher, &config, present, &wanted, &given));
            let outcomes = match work.await {
                Ok(Ok(Pass { attacher: back, outcomes, ipsec })) => {
                    state.verified = back.verified();
                    state.refused = back.refused();
                    attacher = Some(back);
                    if ipsec {
                        state.problems.insert("IPsec".to_owned(), vec![ipsec::PROBLEM.to_owned()]);
                    }
                    outcomes
                }
                Ok(Err(error)) => {
                    attacher = None;
                    state.holds = Some(format!("the packet edge: {error}"));
                    state.problems.insert("packet edge".to_owned(), vec![error.to_string()]);
                    BTreeMap::new()
                }
                // The pass has panicked, or the agent ends.
                Err(_) => return,
            };
            let (ended, took) = (Instant::now(), start.elapsed());
            describe(&mut state, &choices, &sources, &outcomes);
            // The programs see packets inside IPsec only as ESP, so with IPsec all routes count as leading past the
            // programs.
            let seen = if state.problems.contains_key("IPsec") { &BTreeMap::new() } else { &outcomes };
            state.elsewhere = elsewhere(&snapshot, &choices, seen);
            for (name, problem) in strict::problems(&snapshot, &choices) {
                state.problems.entry(format!("device {name}")).or_default().push(problem);
            }
            let flags = problems(&snapshot, &self.config.settings);
            if !flags.is_empty() {
                state.problems.insert("--devices".to_owned(), flags);
            }
            let failed = attacher.is_none() || outcomes.values().any(|outcome| outcome.attached.is_err());
            self.chosen = choices;
            publish.send_replace(state);
            let pause = if failed { retry } else { CHECK };
            retry = if failed { (retry * 2).min(RETRY_AT_MOST) } else { RETRY };
            if attacher.is_none() {
                // No change of devices helps here, and loading costs seconds.
                tokio::time::sleep(pause).await;
                continue;
            }
            tokio::select! {
                changed = self.network.changed() => if changed.is_err() { return },
                changed = self.facts.changed() => {
                    if changed.is_err() { return }
                    tokio::time::sleep(SETTLE).await;
                }
                () = tokio::time::sleep(pause) => {}
            }
            tokio::time::sleep_until((ended + took.min(REST_AT_MOST)).into()).await;
        }
    }
}

/// Result of a pass.
struct Pass {
    attacher: Attacher,
    outcomes: BTreeMap<IfIndex, Outcome>,
    /// Whether there are IPsec policies that apply to packets on the devices.
    ipsec: bool,
}

/// Does the blocking part of a pass.
fn pass(
    attacher: Option<Attacher>,
    config: &Devices,
    present: BTreeMap<IfIndex, String>,
    choices: &Choices,
    sources: &BTreeMap<IfIndex, Sources>,
) -> Result<Pass, attach::AttacherError> {
    let mut attacher = match attacher {
        Some(attacher) => attacher,
        None => {
            let mechanism = if config.no_tcx { Mechanism::Clsact } else { Mechanism::of_kernel() };
            Attacher::new(config.pins.clone(), mechanism, present)?
        }
    };
    let outcomes = attacher.apply(choices, sources);
    let ipsec = !choices.is_empty()
        && ipsec::has_policies().unwrap_or_else(|error| {
            tracing::warn!(%error, "whether there are IPsec policies cannot be told");
            false
        });
    Ok(Pass { attacher, outcomes, ipsec })
}

fn names(snapshot: &Snapshot) -> BTreeMap<IfIndex, String> {
    snapshot.links.iter().map(|(index, link)| (*index, link.name.clone())).collect()
}

fn log_changes(before: &Choices, after: &Choices) {
    for choice in after.iter().filter(|(index, choice)| before.get(index) != Some(choice)).map(|(_, c)| c) {
        let (device, role) = (&choice.name, choice.role.name());
        tracing::info!(%device, role, reason = %choice.reason, near = choice.near, "device carries Service traffic");
    }
    for (_, choice) in before.iter().filter(|(index, _)| !after.contains_key(index)) {
        tracing::info!(device = %choice.name, "device does not carry Service traffic any more");
    }
}

fn describe(
    state: &mut State,
    choices: &Choices,
    sources: &BTreeMap<IfIndex, Sources>,
    outcomes: &BTreeMap<IfIndex, Outcome>,
) {
    for (index, choice) in choices {
        let outcome = outcomes.get(index);
        let others = outcome.map(|outcome| outcome.others.clone()).unwrap_or_default();
        let mut problems = wrong_places(&others);
        let attached = match outcome.map(|outcome| &outcome.attached) {
            Some(Ok(mechanism)) => mechanism.name().to_owned(),
            Some(Err(reason)) => {
                if outcome.is_some_and(|outcome| outcome.holds) {
                    state.holds.get_or_insert_with(|| format!("device {}: {reason}", choice.name));
                }
                problems.push(reason.clone());
                String::new()
            }
            None => String::new(),
        };
        if !problems.is_empty() {
            state.problems.insert(format!("device {}", choice.name), problems);
        }
        let addresses = sources.get(index).into_iter().flatten().copied().map(attach::shown);
        state.devices.push(DeviceState {
            index: index.0,
            name: choice.name.clone(),
            role: choice.role.name().to_owned(),
            reason: choice.reason.clone(),
            attached,
            others,
            sources: addresses.filter(|address| !address.is_empty()).collect(),
            near: choice.near,
            l3: choice.layer == snapshot::Layer::L3,
        });
    }
}

/// Returns the destinations of the routes that lead past the programs of external devices.
fn elsewhere(snapshot: &Snapshot, choices: &Choices, outcomes: &BTreeMap<IfIndex, Outcome>) -> Vec<Prefix> {
    let routes = snapshot.routes.iter().filter(|route| {
        let role = choices.get(&route.device).map(|choice| choice.role);
        let attached = outcomes.get(&route.device).is_some_and(|outcome| outcome.attached.is_ok());
        !(role == Some(Role::External) && attached)
    });
    routes.map(|route| route.destination).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Returns the problems that follow when others see Services where they should see pods.
fn wrong_places(others: &[Other]) -> Vec<String> {
    let wrong = [
        (Direction::Egress, Side::Behind, BEHIND_ON_EGRESS),
        (Direction::Ingress, Side::Ahead, AHEAD_ON_INGRESS),
    ];
    let met = wrong.into_iter().filter(|&(direction, side, _)| {
        others.iter().any(|other| (other.direction, other.side) == (direction, side))
    });
    met.map(|(.., problem)| problem.to_owned()).collect()
}

/// Removes all our clsact filters in the calling thread's network namespace, and the queueing disciplines that we made
/// for them. Links go with their pins. Returns the failures, by device.
///
/// # Errors
///
/// When the devices cannot be listed.
pub(crate) async fn remove_filters(pins: &PinDir) -> Result<Vec<(String, std::io::Error)>, FollowError> {
    let what = "this host's devices";
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| FollowError::Open { what, source })?;
    let connection = tokio::spawn(connection);
    let snapshot = snapshot::dump(handle).await;
    connection.abort();
    let devices = names(&snapshot.map_err(|source| FollowError::Dump { what, source })?);
    Ok(devices
        .into_iter()
        .filter_map(|(index, name)| Some((name, crate::bpf::clsact::detach(pins, index).err()?)))
        .collect())
}

#[cfg(test)]
mod tests;
