//! The daemon: starts the source, the servers and the loop that brings the kernel maps up to date.
//!
//! ```text
//! event ─> the part of the agent that it concerns ─> turn: decide ─> program ─> tell
//! ```
//! Each part owns its fields and its rules: `phase` (progress of the start), `extent` (what the next turn looks at),
//! `queue` (which Services, in which order), `shortage` (what had no room, and when maps grow), `sweeps` (when sockets
//! are looked through), `grace` (numbers that come back), `kernel` (maps and programs), `opt_out`, `packet_edge`, `told`
//! (reports). The `event_loop` passes values between them.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::agent::flows::{Counts, keep_collecting};
use crate::agent::telemetry::readers;
use crate::bpf::dataplane::DataplaneError;
use crate::config::kube_proxy;
use crate::config::kube_proxy::ConfigFile;
use crate::config::{Config, Source};
use crate::host::cgroups::Follower;
use crate::host::watch_addresses;
use crate::observe::events::{Event, Events};
use crate::observe::health;
use crate::observe::health::Health;
use crate::observe::health::check_ports::CheckPorts;
use crate::observe::http;
use crate::observe::http::{HttpError, ServerThread};
use crate::observe::metrics;
use crate::observe::metrics::Metrics;
use crate::observe::reasons;
use crate::observe::report::{Report, State};
use crate::sources::{SourceError, Update, api, manifests};

mod error;
mod event_loop;
mod extent;
pub(crate) mod first_wait;
pub mod flows;
mod grace;
mod heavy;
mod kernel;
pub(crate) mod knowledge;
mod opt_out;
mod packet_edge;
mod phase;
mod queue;
mod shortage;
mod sizes;
mod sweeps;
pub(crate) mod telemetry;
mod told;

pub(crate) use error::AgentError;
use event_loop::{Agent, Inbox};
use told::Told;

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
    // Probes, which decide whether this agent lives, wait neither for a plan nor for a client that reads all metrics.
    let probes = ServerThread::start("probes").map_err(AgentError::Thread)?;
    let reading = ServerThread::start("metrics").map_err(AgentError::Thread)?;
    let mut servers = serve(&config, &health, &metrics, probes.handle(), reading.handle());
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
    let report = Report::new(config.state_file.clone(), state(&config), events.clone());
    let mut agent = Agent::new(config, metrics, opt_out, Told::new(report, health, check_ports));

    tokio::pin!(stop);
    tokio::select! {
        () = &mut stop => {
            tracing::info!("stopping; the dataplane stays in place");
            Ok(())
        }
        ended = agent.follow(Inbox { updates, addresses, asked }) => ended,
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

/// Starts the servers of probes and metrics on these runtimes, as far as they are configured.
fn serve(
    config: &Config,
    health: &Health,
    metrics: &Arc<Metrics>,
    probes: &Handle,
    reading: &Handle,
) -> JoinSet<Result<(), HttpError>> {
    let mut servers = JoinSet::new();
    if let Some(address) = config.healthz {
        let router = health::router(health.clone(), Arc::clone(metrics));
        servers.spawn_on(http::serve(health::SERVER, address, router, config.on_bind_failure), probes);
    }
    if let Some(address) = config.metrics {
        let router = metrics::serve::router(Arc::clone(metrics), &config.effective);
        servers.spawn_on(http::serve(metrics::SERVER, address, router, config.on_bind_failure), reading);
    }
    servers
}

/// Returns the state of an agent that starts, as `status` shows it.
fn state(config: &Config) -> State {
    State {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        node: config.node_name.to_string(),
        source: config.source.to_string(),
        cgroup: config.cgroup.display().to_string(),
        ..State::default()
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
