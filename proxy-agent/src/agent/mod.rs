//! The loop: takes in what the source says, and brings the kernel maps to it.
//!
//! One task owns everything, so there is nothing to lock. Whatever blocks (waiting for a grace period, sweeping
//! sockets) runs beside it and reports back.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::abi::FrontendKey;
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::bpf::dataplane::{DataplaneError, OPT_OUT_ENTRIES};
use crate::cluster::{Change, ObjectKey, Scope};
use crate::config::{Config, Source};
use crate::edge::settings::DetectLocal;
use crate::edge::sources::Facts;
use crate::edge::{self, Edge};
use crate::events::{Event, Events};
use crate::explain::reasons::{self, Asked};
use crate::flows::{Counts, keep_collecting};
use crate::health::check_ports::CheckPorts;
use crate::health::{self, Health};
use crate::http::{self, HttpError, ServerThread};
use crate::knowledge::Knowledge;
use crate::kube_proxy::{self, ConfigFile};
use crate::metrics::{self, Metrics};
use crate::model::Freed;
use crate::node::patience::FOR_POD_CIDRS;
use crate::node::{FollowError, NodeIps, Patience, Verdict, watch_addresses};
use crate::opt_out::{self, Follower, Place};
use crate::process::give_back_memory;
use crate::report::{Report, State};
use crate::selftest::SelfTestError;
use crate::sources::{SourceError, Update, api, manifests};
use crate::telemetry::{Arrival, Telemetry, readers};

mod programming;
mod sizes;

use programming::Programmed;

/// Why the agent ends other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The dataplane cannot be set up.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The host's addresses or devices cannot be read.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// A server cannot serve.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The socket edge does not work.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// The maps cannot be read back or written.
    #[error("reading the pinned maps back: {0}")]
    ReadBack(#[from] aya::maps::MapError),
    /// The source ended, which it never should.
    #[error("the source of objects has ended; restart the agent")]
    SourceEnded,
    /// The configuration file is another one than it was at the start.
    #[error("the configuration file {0} has changed; the agent ends, to be started again with it")]
    FileChanged(PathBuf),
    /// Nobody would notice a change of the configuration file.
    #[error("the configuration file {path} cannot be watched: {source}")]
    FileWatch {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A thread cannot be started.
    #[error("a thread for probes and metrics: {0}; raise the limit of processes or open files")]
    Thread(std::io::Error),
    /// Cgroups cannot be followed.
    #[error("--socket-opt-out: {0}; if too many files are watched, raise fs.inotify.max_user_instances")]
    OptOut(std::io::Error),
    /// Most of what is sent would be of a family that this host does not have.
    #[error("the node's primary IP {0} is IPv6, which is switched off on this host")]
    PrimaryFamily(Addr),
    /// Pods are told by the Node's podCIDRs, which do not come.
    #[error(
        "--detect-local-mode NodeCIDR: the Node has no podCIDRs after {FOR_POD_CIDRS:?}; let the control plane allocate \
         them, or choose another mode"
    )]
    NoPodCidrs,
    /// None of the Node's podCIDRs is of a family that this host has.
    #[error("--detect-local-mode NodeCIDR: this host has no family of the Node's podCIDRs {0}")]
    PodCidrFamily(String),
    /// The Node's podCIDRs are others than at the start.
    #[error(
        "the Node's podCIDRs have changed from {before} to {after}; the agent ends, to be started again with them"
    )]
    PodCidrsChanged {
        /// What they were.
        before: String,
        /// What they are.
        after: String,
    },
}

/// After a failed map operation everything is read back and planned anew, this much later, or after the sync period if
/// that is shorter.
const RETRY: Duration = Duration::from_secs(1);

/// How long the end waits for the Event that says why.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Updates that may wait while the agent programs.
const QUEUE: usize = 64;

/// Runs the agent until `stop` is ready.
///
/// # Errors
///
/// [`AgentError`]; the dataplane stays as it is.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), AgentError> {
    config.pins.create().map_err(DataplaneError::from)?;
    let _lock = config.pins.lock().map_err(DataplaneError::from)?;
    warn_about_cgroup(&config);

    let health = Health::new(config.sync_period);
    health.waiting_for("the first full list has not arrived");
    let counts = Counts::default();
    let metrics = Arc::new(Metrics::new(readers(&config.pins, counts.clone())));
    let mut servers = JoinSet::new();
    // Whoever decides by a probe whether this agent lives does not wait for a plan, nor for who reads all metrics.
    let probes = ServerThread::start("probes").map_err(AgentError::Thread)?;
    let reading = ServerThread::start("metrics").map_err(AgentError::Thread)?;
    if let Some(address) = config.healthz {
        let router = health::router(health.clone(), Arc::clone(&metrics));
        servers
            .spawn_on(http::serve(health::SERVER, address, router, config.on_bind_failure), probes.handle());
    }
    if let Some(address) = config.metrics {
        let router = metrics::router(Arc::clone(&metrics), &config.effective);
        servers.spawn_on(
            http::serve(metrics::SERVER, address, router, config.on_bind_failure),
            reading.handle(),
        );
    }

    tokio::spawn(keep_collecting(config.pins.clone(), Arc::clone(&metrics), counts));
    let addresses = watch_addresses().await?;
    let opt_out = match config.opt_out.is_empty() {
        true => None,
        false => Some(Follower::start(config.cgroup.clone()).map_err(AgentError::OptOut)?),
    };
    let server = connect(&config).await?;
    let events = match &server {
        None => Events::nowhere(),
        Some(api) => Events::to_api(api.client.clone(), Arc::clone(&config.node_name), Arc::clone(&metrics)),
    };
    events.tell(Event::starting());
    let (tx, updates) = mpsc::channel(QUEUE);
    let mut source = tokio::spawn(run_source(config.clone(), server, tx));
    tracing::info!(node = %config.node_name, source = %config.source, cgroup = %config.cgroup.display(), "starting");
    let (questions, asked) = mpsc::channel(1);
    tokio::spawn(reasons::serve(reasons::socket(&config.state_file), questions));
    let file = config.file.clone();
    let check_ports = CheckPorts::start(health.clone(), probes.handle());
    let mut agent = Agent::new(config, health, metrics, addresses, opt_out, events.clone(), check_ports);

    tokio::pin!(stop);
    tokio::select! {
        () = &mut stop => {
            tracing::info!("stopping; the dataplane stays in place");
            Ok(())
        }
        ended = agent.follow(updates, asked) => ended,
        error = cannot_serve(&mut servers) => {
            events.tell_and_wait(Event::cannot_serve(&error), LAST_WORD).await;
            Err(error.into())
        }
        error = file_changed(file) => Err(error),
        ended = &mut source => match ended {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Err(AgentError::SourceEnded),
        },
    }
}

/// The API server, if that is the source.
pub(crate) async fn connect(config: &Config) -> Result<Option<api::Server>, SourceError> {
    match &config.source {
        Source::Manifests(_) => Ok(None),
        Source::Kubernetes { kubeconfig, master } => {
            Ok(Some(api::Server::configured(kubeconfig.as_deref(), master.as_ref()).await?))
        }
    }
}

/// Sends what the source says until the receiver is dropped.
pub(crate) async fn run_source(
    config: Config,
    server: Option<api::Server>,
    updates: mpsc::Sender<Update>,
) -> Result<(), SourceError> {
    match (config.source, server) {
        (Source::Manifests(dir), _) => manifests::run(dir, &config.node_name, &config.opt_out, updates).await,
        (Source::Kubernetes { .. }, server) => {
            if let Some(server) = server {
                api::run(server, &config.node_name, &config.opt_out, updates).await;
            }
            Ok(())
        }
    }
}

/// Returns when a server ends, which it does if its address cannot be bound and that is to be fatal.
async fn cannot_serve(servers: &mut JoinSet<Result<(), HttpError>>) -> HttpError {
    while let Some(ended) = servers.join_next().await {
        // A panic has been printed.
        if let Ok(Err(error)) = ended {
            return error;
        }
    }
    std::future::pending().await
}

/// Returns when the configuration file has changed; never without one.
async fn file_changed(file: Option<ConfigFile>) -> AgentError {
    let Some(file) = file else { return std::future::pending().await };
    match kube_proxy::watch::changed(&file).await {
        Ok(()) => AgentError::FileChanged(file.path),
        Err(source) => AgentError::FileWatch { path: file.path, source },
    }
}

struct Agent {
    config: Config,
    known: Knowledge,
    addresses: watch::Receiver<BTreeSet<Addr>>,
    programmed: Option<Programmed>,
    /// Devices and what is attached to them, from the first programming on.
    edge: Option<Edge>,
    /// Whether any interface of a pod is attached; `None` until that is known.
    pods_attached: Option<bool>,
    /// Devices that are attached, once the first pass is made and until that is announced.
    announce: Option<usize>,
    facts: Facts,
    /// Finds the cgroups of pods that opt out of the socket edge, if any may.
    opt_out: Option<Follower>,
    found: opt_out::Found,
    /// Those cgroups; `None` until the pods are known.
    opted_out: Option<BTreeSet<u64>>,
    synced: bool,
    /// What is waited for before the first programming, once the first full list is there.
    patience: Option<Patience>,
    /// With detect-local by the Node's podCIDRs: those that the agent works with.
    pod_cidrs: Option<Vec<Prefix>>,
    /// The node's own tables have to be looked at.
    node_changed: bool,
    /// Every Service has to be looked at, because other endpoints may be near.
    zone_changed: bool,
    /// Everything has to be looked at: at the start, and after a failure.
    everything: bool,
    /// When the maps are next compared with the model.
    audit_at: Instant,
    /// Freed numbers: those that wait for a grace period which has begun, and those that came later.
    waiting: Option<(JoinHandle<std::io::Result<()>>, Freed)>,
    freed: Freed,
    /// Services of which something did not fit into the maps: tried again with every change, and whenever numbers
    /// have come back.
    refused: BTreeSet<ObjectKey>,
    numbers_came_back: bool,
    /// Maps are not made larger before.
    grow_at: Instant,
    sweep: Option<JoinHandle<()>>,
    sweep_again: bool,
    telemetry: Telemetry,
    check_ports: CheckPorts,
    report: Report,
    health: Health,
    metrics: Arc<Metrics>,
}

impl Agent {
    fn new(
        config: Config,
        health: Health,
        metrics: Arc<Metrics>,
        addresses: watch::Receiver<BTreeSet<Addr>>,
        opt_out: Option<Follower>,
        events: Events,
        check_ports: CheckPorts,
    ) -> Self {
        let state = State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            node: config.node_name.to_string(),
            source: config.source.to_string(),
            cgroup: config.cgroup.display().to_string(),
            ..State::default()
        };
        let telemetry = Telemetry::new(Arc::clone(&metrics), config.families.clone());
        let no_pods = config.edge.settings.pods.is_none();
        let known = Knowledge::new(&config);
        let audit_at = Instant::now() + config.sync_period;
        Self {
            report: Report::new(config.state_file.clone(), state, events),
            config,
            known,
            addresses,
            programmed: None,
            edge: None,
            // What an earlier agent has attached to pods goes with the first pass.
            pods_attached: no_pods.then_some(false),
            announce: None,
            facts: Facts::default(),
            opt_out,
            found: opt_out::Found::new(),
            opted_out: None,
            synced: false,
            patience: None,
            pod_cidrs: None,
            node_changed: true,
            zone_changed: false,
            everything: true,
            audit_at,
            waiting: None,
            freed: Freed::default(),
            refused: BTreeSet::new(),
            numbers_came_back: false,
            grow_at: Instant::now(),
            sweep: None,
            sweep_again: false,
            telemetry,
            check_ports,
            health,
            metrics,
        }
    }

    async fn follow(
        &mut self,
        mut updates: mpsc::Receiver<Update>,
        mut asked: mpsc::Receiver<Asked>,
    ) -> Result<(), AgentError> {
        let mut retry: Option<Instant> = None;
        loop {
            let retry_at = retry.map(tokio::time::Instant::from_std);
            tokio::select! {
                update = updates.recv() => match update {
                    // The source task tells why, if there is a reason.
                    None => std::future::pending().await,
                    Some(update) => self.take_in(update),
                },
                changed = self.addresses.changed() => match changed {
                    Ok(()) => self.take_addresses(),
                    Err(_) => std::future::pending().await,
                },
                Some(state) = edge_changed(&mut self.edge) => self.take_edge(state),
                Some(found) = opt_out_changed(&mut self.opt_out) => {
                    self.found = found;
                    self.take_opt_out();
                }
                failures = self.check_ports.failures() => self.report.check_ports(failures),
                Some(asked) = asked.recv() => {
                    // Who asks may have gone.
                    let _ = asked.reply.send(self.reasons(&asked.service));
                    continue;
                }
                Some(()) = grace_over(&mut self.waiting) => self.release(),
                Some(()) = finished(&mut self.sweep) => self.sweep = None,
                () = async { tokio::time::sleep_until(retry_at.unwrap_or_else(tokio::time::Instant::now)).await },
                    if retry_at.is_some() => self.everything = true,
                () = tokio::time::sleep_until(self.audit_at.into()) => self.audit(),
            }
            // What has arrived meanwhile is programmed together.
            while let Ok(update) = updates.try_recv() {
                self.take_in(update);
            }
            if !self.synced {
                continue;
            }
            if let Some(until) = self.wait_for_node()? {
                retry = Some(until);
                continue;
            }
            retry = match self.sync().await {
                Ok(()) => {
                    self.tell_edge().await?;
                    None
                }
                Err(AgentError::SelfTest(SelfTestError::Store(error))) => Some(self.failed(&error)),
                Err(AgentError::ReadBack(error)) => Some(self.failed(&error)),
                Err(error) => return Err(error),
            };
            // Who waits for readiness may look at `status` next.
            self.report.write();
            self.metrics.problems(self.report.count());
            if retry.is_none()
                && let Some(devices) = self.announce.take()
            {
                tracing::info!(devices, "ready");
                self.health.programmed();
            }
        }
    }

    fn failed(&mut self, error: &dyn std::error::Error) -> Instant {
        self.telemetry.sync_ended(false);
        tracing::error!(%error, "programming failed; trying again");
        self.everything = true;
        Instant::now() + RETRY.min(self.config.sync_period)
    }

    fn take_in(&mut self, update: Update) {
        match update {
            Update::Changes(changes) => {
                for change in changes {
                    self.take_change(change);
                }
            }
            Update::Synced => {
                self.synced = true;
                self.patience = Some(Patience {
                    since: Instant::now(),
                    ips: matches!(self.config.source, Source::Kubernetes { .. }),
                    pod_cidrs: self.config.edge.settings.detect_local == DetectLocal::NodeCidr,
                });
                // Without a cluster there need not be a Node: this one is then as good as any.
                if matches!(self.config.source, Source::Manifests(_)) && !self.known.cluster.node().leaving {
                    self.health.node(true);
                }
                self.take_addresses();
                self.take_opt_out();
            }
            Update::Problems(problems) => self.report.source(problems),
        }
    }

    fn take_change(&mut self, change: Change) {
        if let Change::Node(node) = &change {
            self.health.node(!node.leaving);
        }
        let arrival = Arrival::of(&change);
        let scope = self.known.cluster.apply(change);
        self.telemetry.arrived(arrival, scope, !self.synced);
        match scope {
            Scope::Nothing => return,
            Scope::Service => {}
            Scope::Node => self.take_node(),
            Scope::Pods => return self.take_opt_out(),
        }
        for &family in &self.config.families {
            self.health.queued(family);
        }
    }

    fn take_node(&mut self) {
        let before = self.known.context.node.ips;
        self.zone_changed |= self.known.context.node.zone != self.known.cluster.node().zone;
        let ips = self.known.take_node(&self.config);
        self.node_changed = true;
        self.report.node_ips(&ips);
        if self.programmed.is_some() && before != self.known.context.node.ips {
            tracing::info!(?before, after = ?self.known.context.node.ips, "the node's IPs have changed");
        }
    }

    /// Waits for what the first programming needs of the Node, until the time that is returned. Later on, ends the agent
    /// when its podCIDRs change.
    fn wait_for_node(&mut self) -> Result<Option<Instant>, AgentError> {
        let node = self.known.cluster.node();
        if let Some(patience) = self.patience {
            match patience.judge(node, Instant::now()) {
                Verdict::Wait { until, reason } => {
                    self.health.waiting_for(reason);
                    return Ok(Some(until));
                }
                Verdict::GiveUp => return Err(AgentError::NoPodCidrs),
                Verdict::Start => self.patience = None,
            }
            self.health.waiting_for("nothing has been programmed yet");
            let ips = NodeIps::derive(node, self.config.bind_address);
            if !self.config.families.contains(&ips.primary()) {
                return Err(AgentError::PrimaryFamily(ips.of(ips.primary())));
            }
            tracing::info!(ipv4 = %ips.of(Family::V4), ipv6 = %ips.of(Family::V6), primary = %ips.primary(), "node IPs");
            self.report.node_ips(&ips);
            let pod_cidrs = patience.pod_cidrs.then(|| node.pod_cidrs.clone());
            self.known.take_node(&self.config);
            if let Some(cidrs) = pod_cidrs {
                if !self.known.take_pod_cidrs(&self.config.families) {
                    return Err(AgentError::PodCidrFamily(list(&cidrs)));
                }
                self.pod_cidrs = Some(cidrs);
            }
        } else if let Some(before) = self.pod_cidrs.as_ref().filter(|cidrs| **cidrs != node.pod_cidrs) {
            return Err(AgentError::PodCidrsChanged { before: list(before), after: list(&node.pod_cidrs) });
        }
        Ok(None)
    }

    fn take_addresses(&mut self) {
        self.known.take_addresses(&self.addresses.borrow_and_update());
        self.node_changed = true;
    }

    /// Brings together which Pods opt out and where their cgroups are.
    fn take_opt_out(&mut self) {
        let Some(follower) = &self.opt_out else {
            self.opted_out = Some(BTreeSet::new());
            return;
        };
        let own_network = || self.known.cluster.pods().filter(|pod| !pod.host_network);
        follower.want(own_network().map(|pod| Arc::clone(&pod.uid)).collect());
        // Until all are known, what an earlier agent has written stays.
        if !self.synced || !own_network().all(|pod| self.found.contains_key(&pod.uid)) {
            return;
        }
        let (mut cgroups, mut names, mut problems) = (BTreeSet::new(), Vec::new(), BTreeMap::new());
        for pod in self.known.cluster.pods() {
            let problem = match self.found.get(&pod.uid) {
                _ if pod.host_network => "it uses the host's network, whose packets nobody judges",
                _ if !self.known.context.pods_in_packets => {
                    "no interface of a pod is attached (--pod-interfaces), so nobody would serve its packets"
                }
                Some(Place::Cgroup(_)) if cgroups.len() >= OPT_OUT_ENTRIES as usize => {
                    "too many pods opt out"
                }
                Some(Place::Cgroup(cgroup)) => {
                    cgroups.insert(*cgroup);
                    names.push(pod.key.to_string());
                    continue;
                }
                Some(Place::Missing) => "its cgroup is not there (--cgroup-path)",
                Some(Place::NotYet) | None => continue,
            };
            let reason = format!("cannot opt out of the socket edge: {problem}; its sockets are served");
            problems.insert(format!("Pod {}", pod.key), vec![reason]);
        }
        self.report.opted_out(names, problems);
        if self.opted_out.as_ref() != Some(&cgroups) {
            self.opted_out = Some(cgroups);
            self.node_changed = true;
        }
    }

    /// Lets the packet edge know what it cannot see; starts it, the first time.
    async fn tell_edge(&mut self) -> Result<(), AgentError> {
        let Some(programmed) = &self.programmed else { return Ok(()) };
        let frontends = &programmed.model.frontends;
        let is_frontend = |addr: &&Addr| {
            let from = FrontendKey { addr: **addr, port: Be16::new(0), proto: 0, kind: 0 };
            frontends.range(from..).next().is_some_and(|(key, _)| key.addr == **addr)
        };
        self.facts.node_ips = self.known.context.node.ips;
        self.facts.frontends =
            self.known.context.host_addresses.iter().filter(is_frontend).copied().collect();
        match &self.edge {
            Some(edge) => edge.tell(self.facts.clone()),
            None => self.edge = Some(Edge::start(self.config.edge.clone(), self.facts.clone()).await?),
        }
        Ok(())
    }

    /// Traffic from outside is served once the first pass over the devices is made; only then the node is ready.
    fn take_edge(&mut self, state: edge::State) {
        if state.passes == 1 {
            // Loading has taken some.
            give_back_memory();
            self.announce = Some(state.devices.iter().filter(|device| device.is_attached()).count());
        }
        let pods = state.devices.iter().any(edge::DeviceState::is_attached_pod);
        if self.pods_attached != Some(pods) {
            self.pods_attached = Some(pods);
            self.node_changed = true;
        }
        if self.known.context.pods_in_packets != pods {
            self.known.context.pods_in_packets = pods;
            // What is reported about them.
            self.known.cluster.touch_with_source_ranges();
            self.take_opt_out();
        }
        self.report.edge(state);
    }
}

fn list(cidrs: &[Prefix]) -> String {
    let cidrs: Vec<String> = cidrs.iter().map(Prefix::to_string).collect();
    format!("[{}]", cidrs.join(", "))
}

/// The next news of the packet edge; never while it has not been started.
async fn edge_changed(edge: &mut Option<Edge>) -> Option<edge::State> {
    match edge {
        Some(edge) => Some(edge.changed().await),
        None => std::future::pending().await,
    }
}

/// Other cgroups of pods that opt out; never where none can.
async fn opt_out_changed(follower: &mut Option<Follower>) -> Option<opt_out::Found> {
    match follower {
        Some(follower) => Some(follower.changed().await),
        None => std::future::pending().await,
    }
}

/// Ready when the grace period that is waited for is over; never when there is none.
async fn grace_over(waiting: &mut Option<(JoinHandle<std::io::Result<()>>, Freed)>) -> Option<()> {
    let Some((grace, _)) = waiting else { return std::future::pending().await };
    match grace.await {
        Ok(Ok(())) => Some(()),
        failed => {
            // Without a grace period the numbers are never used again; the next full plan finds them.
            tracing::warn!(?failed, "waiting for running programs failed");
            *waiting = None;
            std::future::pending().await
        }
    }
}

async fn finished(task: &mut Option<JoinHandle<()>>) -> Option<()> {
    let Some(task) = task else { return std::future::pending().await };
    // A panic in it has been printed; the next sweep is a new task.
    let _ = task.await;
    Some(())
}

fn warn_about_cgroup(config: &Config) {
    use std::os::unix::fs::MetadataExt as _;
    // The root of a cgroup hierarchy is its first inode.
    if std::fs::metadata(&config.cgroup).is_ok_and(|dir| dir.ino() != 1) {
        tracing::warn!(
            cgroup = %config.cgroup.display(),
            "not the root of the cgroup v2 hierarchy: only processes below it are served"
        );
    }
}
