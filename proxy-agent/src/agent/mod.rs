//! The agent's loop: takes in news from the source, and brings the kernel maps up to date.
//!
//! One task owns everything, so nothing has to be locked. Work that blocks (waiting for a grace period, sweeping
//! sockets) runs beside the task and reports back.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family, Prefix};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::agent::first_wait::{Patience, Verdict};
use crate::agent::flows::{Counts, keep_collecting};
use crate::agent::knowledge::Knowledge;
use crate::agent::telemetry::{Telemetry, readers};
use crate::bpf::dataplane::DataplaneError;
use crate::bpf::self_test::SelfTestError;
use crate::config::kube_proxy;
use crate::config::kube_proxy::ConfigFile;
use crate::config::{Config, Source};
use crate::devices;
use crate::devices::Edge;
use crate::devices::reserved_ports::DatagramPorts;
use crate::devices::sources::Facts;
use crate::host::cgroups;
use crate::host::cgroups::Follower;
use crate::host::{HostAddresses, watch_addresses};
use crate::observe::events::{Event, Events};
use crate::observe::health;
use crate::observe::health::Health;
use crate::observe::health::check_ports::CheckPorts;
use crate::observe::http;
use crate::observe::http::{HttpError, ServerThread};
use crate::observe::metrics;
use crate::observe::metrics::Metrics;
use crate::observe::reasons;
use crate::observe::reasons::Asked;
use crate::observe::report::{Report, State};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::model::Freed;
use crate::reconcile::node_ips::NodeIps;
use crate::sources::{SourceError, Update, api, manifests};

mod error;
mod extent;
pub(crate) mod first_wait;
pub mod flows;
mod grace;
pub mod knowledge;
mod news;
mod phase;
mod programmed;
mod programming;
mod queue;
mod room;
mod sizes;
mod sweeps;
pub(crate) mod telemetry;
mod telling;

pub(crate) use error::AgentError;
use extent::Extent;
use phase::Phase;
use programmed::Programmed;
use queue::Queue;
use sweeps::Sweeps;

/// Time after a failed map operation until everything is read back and planned anew; the sync period instead, if that
/// is shorter.
const RETRY: Duration = Duration::from_secs(1);

/// Longest time that the end of the agent waits for the Event that gives the reason.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Number of updates that may wait while the agent programs.
const QUEUE: usize = 16;

/// Runs the agent until `stop` is ready.
///
/// # Errors
///
/// [`AgentError`]; the dataplane stays as it is.
pub(crate) async fn run(config: Config, stop: impl Future<Output = ()>) -> Result<(), AgentError> {
    config.pins.create().map_err(DataplaneError::from)?;
    let _lock = config.pins.lock().map_err(DataplaneError::from)?;

    let health = Health::new(config.sync_period);
    health.waiting_for("the first full list has not arrived");
    let counts = Counts::default();
    let metrics = Arc::new(Metrics::new(readers(&config.pins, counts.clone())));
    let mut servers = JoinSet::new();
    // Probes, which decide whether this agent lives, wait neither for a plan nor for a client that reads all metrics.
    let probes = ServerThread::start("probes").map_err(AgentError::Thread)?;
    let reading = ServerThread::start("metrics").map_err(AgentError::Thread)?;
    if let Some(address) = config.healthz {
        let router = health::router(health.clone(), Arc::clone(&metrics));
        servers
            .spawn_on(http::serve(health::SERVER, address, router, config.on_bind_failure), probes.handle());
    }
    if let Some(address) = config.metrics {
        let router = metrics::serve::router(Arc::clone(&metrics), &config.effective);
        servers.spawn_on(
            http::serve(metrics::SERVER, address, router, config.on_bind_failure),
            reading.handle(),
        );
    }

    tokio::spawn(keep_collecting(config.pins.clone(), Arc::clone(&metrics), counts));
    let addresses = watch_addresses().await?;
    let opt_out = Follower::start(config.cgroup.clone(), config.opt_out.cgroups().clone());
    let server = connect(&config)?;
    let events = match &server {
        None => Events::nowhere(),
        Some(api) => Events::to_api(api.client.clone(), Arc::clone(&config.node_name), Arc::clone(&metrics)),
    };
    events.tell(Event::starting());
    let (tx, updates) = mpsc::channel(QUEUE);
    // The parsing of an object of the largest permitted size delays no other work, because it has a thread of its own.
    let reader = ServerThread::start("source").map_err(AgentError::Thread)?;
    let mut source = reader.handle().spawn(run_source(config.clone(), server, tx));
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

/// Returns the API server, if that is the source.
pub(crate) fn connect(config: &Config) -> Result<Option<api::Server>, SourceError> {
    match &config.source {
        Source::Manifests(_) => Ok(None),
        Source::Kubernetes { kubeconfig, master } => {
            Ok(Some(api::Server::configured(kubeconfig.as_deref(), master.as_ref())?))
        }
    }
}

/// Sends the updates of the source until the receiver is dropped.
pub(crate) async fn run_source(
    config: Config,
    server: Option<api::Server>,
    updates: mpsc::Sender<Update>,
) -> Result<(), SourceError> {
    match (config.source, server) {
        (Source::Manifests(dir), _) => manifests::run(dir, &config.node_name, &config.opt_out, updates).await,
        (Source::Kubernetes { .. }, server) => {
            if let Some(server) = server {
                api::run(server, &config.node_name, &config.opt_out, config.budgets, updates).await;
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

/// Returns when the configuration file has changed; never returns without a file.
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
    addresses: watch::Receiver<HostAddresses>,
    programmed: Option<Programmed>,
    /// The packet edge, from the first programming on.
    edge: Option<Edge>,
    /// Whether any interface of a pod is attached; `None` until that is known.
    pods_attached: Option<bool>,
    /// Destinations of the routes that lead past the packet edge; `None` until its first pass.
    elsewhere: Option<Vec<Prefix>>,
    facts: Facts,
    datagram_ports: DatagramPorts,
    /// Finds the cgroups of pods, and those that opt out of the socket edge.
    opt_out: Follower,
    /// Findings of `opt_out`; `None` until it has looked.
    found: Option<cgroups::Found>,
    /// The cgroups that have opted out; `None` until the pods are known.
    opted_out: Option<BTreeSet<u64>>,
    phase: Phase,
    extent: Extent,
    /// Time of the next comparison of the maps with the model.
    audit_at: Instant,
    /// Services of which some part did not fit into the maps.
    refused: BTreeSet<ObjectKey>,
    /// Whether `refused` has to be tried again: there may be room in the maps, or the Services have to be told that the
    /// maps do not grow.
    room: bool,
    /// Whether the maps could not be made larger at the last attempt.
    stuck: bool,
    /// Services that have changed and are not programmed yet.
    queue: Queue,
    /// Services that have been programmed and whose health is not told yet.
    concluded: Vec<ObjectKey>,
    /// Problems of Services, except claims that other Services have.
    said: BTreeMap<ObjectKey, Vec<String>>,
    /// Services with clusterIPs that are also addresses of this host.
    held_by_host: BTreeMap<ObjectKey, Vec<(Addr, IfIndex)>>,
    /// Services whose claims other Services may have taken or given back.
    retell: BTreeSet<ObjectKey>,
    /// Time before which maps are not made larger.
    grow_at: Instant,
    sweeps: Sweeps,
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
        addresses: watch::Receiver<HostAddresses>,
        opt_out: Follower,
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
        let no_pods = config.devices.settings.pods.is_none();
        let known = Knowledge::new(&config);
        let audit_at = Instant::now() + config.sync_period;
        Self {
            report: Report::new(config.state_file.clone(), state, events),
            config,
            known,
            addresses,
            programmed: None,
            edge: None,
            // The first pass detaches what an earlier agent has attached to pods.
            pods_attached: no_pods.then_some(false),
            elsewhere: None,
            facts: Facts::default(),
            datagram_ports: DatagramPorts::default(),
            opt_out,
            found: None,
            opted_out: None,
            phase: Phase::Listing,
            extent: Extent::Everything,
            audit_at,
            refused: BTreeSet::new(),
            room: false,
            stuck: false,
            queue: Queue::default(),
            concluded: Vec::new(),
            said: BTreeMap::new(),
            held_by_host: BTreeMap::new(),
            retell: BTreeSet::new(),
            grow_at: Instant::now(),
            sweeps: Sweeps::new(Instant::now()),
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
            let busy = retry.is_none() && self.is_busy();
            tokio::select! {
                update = updates.recv() => match update {
                    // The source task gives the reason, if there is one.
                    None => std::future::pending().await,
                    Some(update) => self.take_in(update),
                },
                changed = self.addresses.changed() => match changed {
                    Ok(()) => self.take_addresses(),
                    Err(_) => std::future::pending().await,
                },
                Some(state) = edge_changed(&mut self.edge) => self.take_edge(state),
                found = self.opt_out.changed() => {
                    if self.found.as_ref().is_none_or(|before| before.sandboxes != found.sandboxes) {
                        self.extent.widen(Extent::Node);
                    }
                    self.found = Some(found);
                    self.take_opt_out();
                }
                failures = self.check_ports.failures() => self.report.check_ports(failures),
                Some(asked) = asked.recv() => {
                    // The asker may have gone.
                    let _ = asked.reply.send(self.reasons(&asked.service));
                    continue;
                }
                (service, wanted) = self.queue.worked_out() => self.begin(service, wanted),
                freed = grace_over(&mut self.programmed) => self.release(freed),
                () = self.sweeps.changed() => self.begin_sweep(),
                () = async { tokio::time::sleep_until(retry_at.unwrap_or_else(tokio::time::Instant::now)).await },
                    if retry_at.is_some() => self.extent = Extent::Everything,
                () = tokio::time::sleep_until(self.audit_at.into()) => self.audit(),
                // News come first: the tasks that bring them run before the next turn.
                () = tokio::task::yield_now(), if busy => {}
            }
            // Updates that have arrived meanwhile are programmed together.
            while let Ok(update) = updates.try_recv() {
                self.take_in(update);
            }
            retry = self.go_on().await?;
        }
    }

    /// Goes on as far as the phase permits. Returns the time of the next attempt, if it does not wait for news.
    async fn go_on(&mut self) -> Result<Option<Instant>, AgentError> {
        match self.phase {
            Phase::Listing => return Ok(None),
            Phase::AwaitingNode(patience) => {
                match patience.judge(self.known.cluster.node(), Instant::now()) {
                    Verdict::Wait { until, reason } => {
                        self.health.waiting_for(reason);
                        return Ok(Some(until));
                    }
                    Verdict::GiveUp => return Err(AgentError::NoPodCidrs),
                    Verdict::Start => self.start(patience)?,
                }
            }
            Phase::Starting { .. } | Phase::Ready => {
                if let Some((before, after)) = self.known.other_pod_cidrs() {
                    return Err(AgentError::PodCidrsChanged { before: list(before), after: list(after) });
                }
            }
        }
        self.turn().await
    }

    /// Takes the facts of the Node that the first programming has waited for.
    fn start(&mut self, patience: Patience) -> Result<(), AgentError> {
        self.phase = Phase::Starting { attached: None };
        self.health.waiting_for("nothing has been programmed yet");
        let node = self.known.cluster.node();
        let ips = NodeIps::derive(node, self.config.bind_address);
        if !self.config.families.contains(&ips.primary()) {
            return Err(AgentError::PrimaryFamily(ips.of(ips.primary())));
        }
        tracing::info!(ipv4 = %ips.of(Family::V4), ipv6 = %ips.of(Family::V6), primary = %ips.primary(), "node IPs");
        self.report.node_ips(&ips);
        self.known.take_node(&self.config);
        if patience.pod_cidrs && !self.known.take_pod_cidrs(&self.config.families) {
            return Err(AgentError::PodCidrFamily(list(&self.known.cluster.node().pod_cidrs)));
        }
        Ok(())
    }

    /// Programs what has changed, and tells what came of it. Returns the time of the next attempt after a failure.
    async fn turn(&mut self) -> Result<Option<Instant>, AgentError> {
        let retry = match self.sync().await {
            Ok(()) => {
                self.tell_edge().await?;
                None
            }
            Err(AgentError::SelfTest(SelfTestError::Store(error))) => Some(self.failed(&error)),
            Err(AgentError::ReadBack(error)) => Some(self.failed(&error)),
            Err(error) => return Err(error),
        };
        // A client that waits for readiness may look at `status` next.
        self.report.write();
        self.metrics.problems(self.report.count());
        if retry.is_none()
            && let Some(devices) = self.phase.announce()
        {
            tracing::info!(devices, "ready");
            self.health.programmed();
        }
        Ok(retry)
    }

    fn failed(&mut self, error: &dyn std::error::Error) -> Instant {
        self.telemetry.sync_ended(false);
        tracing::error!(%error, "programming failed; trying again");
        self.extent = Extent::Everything;
        Instant::now() + RETRY.min(self.config.sync_period)
    }
}

fn list(cidrs: &[Prefix]) -> String {
    let cidrs: Vec<String> = cidrs.iter().map(Prefix::to_string).collect();
    format!("[{}]", cidrs.join(", "))
}

/// Returns the next state of the packet edge; never returns while the packet edge has not been started.
async fn edge_changed(edge: &mut Option<Edge>) -> Option<devices::State> {
    match edge {
        Some(edge) => Some(edge.changed().await),
        None => std::future::pending().await,
    }
}

/// Returns the numbers whose grace period is over; never returns while there are none.
async fn grace_over(programmed: &mut Option<Programmed>) -> Freed {
    match programmed {
        Some(programmed) => programmed.grace.over().await,
        None => std::future::pending().await,
    }
}
