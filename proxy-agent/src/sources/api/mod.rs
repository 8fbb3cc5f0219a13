//! The Kubernetes API as the source of objects.
//!
//! One task watches Services, EndpointSlices, this Node and ServiceCIDRs, and also this node's Pods if Pods may opt out
//! of the socket edge. All changes go through one channel, so the agent sees them in one order. Each object is
//! converted on arrival and then dropped. Failed requests are retried without end, each kind by itself and at its own
//! pace. Known objects stay known during failures; an object is removed only by its deletion event or by a complete new
//! list without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Uri;
use complaints::Complaints;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use intake::Intake;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use token::TokenFile;
use tokio::sync::mpsc::Sender;

use crate::config::opt_out::Rules;
use crate::reconcile::cluster::Change;
use crate::reconcile::desired::Budgets;
use crate::sources::api::requests::CountRequests;
use crate::sources::error::SourceError;
use crate::sources::update::Update;

mod complaints;
mod follow;
mod intake;
mod kind;
pub(crate) mod kubeconfig;
mod pace;
mod received;
mod renewed;
pub(crate) mod requests;
mod tenants;
mod token;
mod unusable;
mod watch;

/// Number of changes from which on no further event is added to a message.
const BATCH_MAX: usize = 256;

/// Weight of changes from which on no further event is added to a message: objects differ in size.
const WEIGHT_MAX: usize = 1 << 16;

/// Maximum number of objects that are fetched at the same time, and interval at which waiting fetches are tried again.
const FETCHES_MAX: usize = 4;
const FETCH_AGAIN: Duration = Duration::from_secs(1);

/// Maximum silence on a connection, also while a list is awaited.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// An API server and our credentials for it.
#[derive(Clone)]
pub struct Server {
    /// Client of the API server.
    pub(crate) client: Client,
    /// Address of the API server, for messages.
    pub url: String,
}

impl Server {
    /// Reads `kubeconfig`, or, without it and without `master`, the ServiceAccount of this pod. `master` replaces the
    /// server of the kubeconfig; without a kubeconfig, it is a server that asks for no credentials. Nothing is sent
    /// yet, so a server that is down is no error here. Certificate files are read again when they have changed.
    ///
    /// # Errors
    /// The configuration cannot be read or used.
    pub fn configured(kubeconfig: Option<&Path>, master: Option<&Uri>) -> Result<Self, SourceError> {
        let config = read(kubeconfig, master)?;
        let (url, first) = (config.cluster_url.to_string(), files(kubeconfig, &config));
        let (kubeconfig, master) = (kubeconfig.map(Path::to_owned), master.cloned());
        let connect = Box::new(move || {
            let config = read(kubeconfig.as_deref(), master.as_ref())?;
            let files = files(kubeconfig.as_deref(), &config);
            Ok((connect(config)?, files))
        });
        Ok(Self { client: renewed::client(&first, connect)?, url })
    }
}

/// Returns the files that the connection depends on.
fn files(kubeconfig: Option<&Path>, config: &Config) -> Vec<PathBuf> {
    kubeconfig.map(Path::to_owned).into_iter().chain(kubeconfig::files(config)).collect()
}

/// Reads the address of the API server and the credentials for it.
fn read(kubeconfig: Option<&Path>, master: Option<&Uri>) -> Result<Config, SourceError> {
    let mut config = match (kubeconfig, master) {
        (Some(path), _) => {
            let failed = |source| SourceError::Kubeconfig { path: path.to_owned(), source };
            let kubeconfig = kubeconfig::read(path).map_err(|error| failed(error.into()))?;
            kubeconfig::config(&kubeconfig).map_err(|error| failed(error.into()))?
        }
        (None, Some(master)) => Config::new(master.clone()),
        (None, None) => {
            Config::incluster().map_err(|source| SourceError::InCluster { source: Box::new(source) })?
        }
    };
    if let Some(master) = master {
        config.cluster_url = master.clone();
    }
    if config.proxy_url.is_none() {
        let proxy = kubeconfig::proxy(&config.cluster_url, |name| std::env::var(name).ok());
        config.proxy_url = proxy.map_err(SourceError::Proxy)?;
    }
    // The server ends every watch earlier, so a connection that is silent for this long is dead.
    config.read_timeout = Some(SILENCE_MAX);
    // The agent repeats requests itself. The client's own retries come many in a row and are not logged.
    config.default_retry = false;
    Ok(config)
}

fn connect(mut config: Config) -> Result<Client, SourceError> {
    let server = config.cluster_url.to_string();
    let count = CountRequests::of(&config.cluster_url);
    // A token file takes precedence over a token as long as the file can be read.
    let file = config.auth_info.token_file.take().map(|file| Arc::new(PathBuf::from(file)));
    let instead = file.as_ref().and_then(|_| config.auth_info.token.take());
    let token = TokenFile { file, instead };
    ClientBuilder::try_from(config)
        .map(|builder| builder.with_layer(&token).with_layer(&count).build())
        .map_err(|source| SourceError::Client { server, source: Box::new(source) })
}

/// Returns the number of items that the agent has to hold for a change until the change is applied.
fn weight(change: &Change) -> usize {
    match change {
        Change::Service(service) => {
            let addresses = service.external_ips.len() + service.load_balancer_ips.len();
            service.ports.len() + addresses + service.source_ranges.len()
        }
        Change::Slice(slice) => slice.ports.len() + slice.endpoints.len(),
        Change::ServiceGone(_)
        | Change::SliceGone(_)
        | Change::Node(_)
        | Change::ServiceCidr(..)
        | Change::ServiceCidrGone(_)
        | Change::Pod(_)
        | Change::PodGone(_) => 1,
    }
}

/// Returns what the agent is to be told: changes, the list of problems if it is another one, and once that the first
/// full list is there.
fn messages(
    changes: Vec<Change>,
    intake: &mut Intake,
    complaints: &mut Complaints,
    synced: &mut bool,
) -> Vec<Update> {
    let mut messages = Vec::new();
    if !changes.is_empty() {
        messages.push(Update::Changes(changes));
    }
    if complaints.have_changed() | intake.tenants.have_changed() | intake.unusable.have_changed() {
        let problems = complaints.problems().into_iter().chain(intake.tenants.problems());
        messages.push(Update::Problems(problems.chain(intake.unusable.problems()).collect()));
    }
    if !*synced && intake.is_complete() {
        messages.push(Update::Synced);
        *synced = true;
    }
    messages
}

/// Sends updates from the API server until the receiver is dropped. `node_name` is the name of this node in lower case,
/// `opt_out` selects the Pods that matter, `budgets` limits the objects kept of each namespace.
pub async fn run(
    server: Server,
    node_name: &str,
    opt_out: &Rules,
    budgets: Budgets,
    updates: Sender<Update>,
) {
    let mut events = watch::all(&server.client, node_name, !opt_out.is_empty());
    let mut fetches = FuturesUnordered::new();
    let mut intake = Intake::new(node_name, opt_out, budgets);
    let mut complaints = Complaints::new(server.url);
    let mut synced = false;
    loop {
        while fetches.len() < FETCHES_MAX
            && let Some((kind, key)) = intake.tenants.next_fetch(Instant::now())
        {
            fetches.push(watch::fetch(server.client.clone(), kind, key));
        }
        let mut changes = Vec::new();
        let mut next = tokio::select! {
            event = events.next() => match event {
                Some(event) => Some(event),
                None => return,
            },
            Some(fetched) = fetches.next() => {
                intake.take_fetched(fetched, &mut changes);
                None
            }
            () = tokio::time::sleep(FETCH_AGAIN), if intake.tenants.waits() => None,
            () = updates.closed() => return,
        };
        let (mut weighed, mut sum) = (0, 0);
        // Further events that are ready join the message; none is waited for.
        while let Some((kind, event)) = next {
            match event {
                Ok(event) => {
                    let is_object = !event.is_mark();
                    intake.take(event, &mut changes);
                    match intake.has_list(kind) {
                        true if is_object => complaints.settle(kind),
                        true => complaints.answered(kind),
                        false => {}
                    }
                }
                Err(error) => {
                    complaints.note(kind, &error, Instant::now());
                    if kind.is_optional() && watch::is_refused(&error) {
                        intake.go_without(kind);
                    }
                }
            }
            next = None;
            sum += changes.iter().skip(weighed).map(weight).sum::<usize>();
            weighed = changes.len();
            if weighed < BATCH_MAX && sum < WEIGHT_MAX {
                next = events.next().now_or_never().flatten();
                if next.is_none() && !intake.has_list(kind) {
                    // A list is being streamed: the connection's task must run before the next piece of the list is
                    // ready.
                    tokio::task::yield_now().await;
                    next = events.next().now_or_never().flatten();
                }
            }
        }
        let messages = messages(changes, &mut intake, &mut complaints, &mut synced);
        for message in messages {
            if updates.send(message).await.is_err() {
                return;
            }
        }
    }
}
