//! The Kubernetes API as the source of objects.
//!
//! Four kinds (Services, EndpointSlices, this Node, ServiceCIDRs), and this node's Pods if any may opt out of the socket
//! edge, are followed in one task and end in one channel, so the agent sees one order of changes. Each object is reduced
//! at once and dropped. Whatever fails is retried for ever, each kind by itself and at its own pace; what was known stays
//! known, and only a complete new list makes an object go.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Uri;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use kube::client::ClientBuilder;
use kube::{Client, Config, Resource as _};
use tokio::sync::mpsc::Sender;

use super::objects::{EndpointSlice, Node, Pod, Service, ServiceCidr};
use super::{SourceError, Update};
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::Change;
use crate::reconcile::desired::Budgets;
use crate::sources::api::requests::CountRequests;
use complaints::Complaints;
use follow::Event;
use intake::Intake;
pub use kubeconfig::Wrong;
use received::Received;
use token::TokenFile;

mod complaints;
mod follow;
mod intake;
pub mod kubeconfig;
mod pace;
mod received;
mod renewed;
pub mod requests;
mod tenants;
mod token;
mod unusable;
mod watch;

/// The most changes in one message while lists come in.
const BATCH_MAX: usize = 256;

/// The heaviest message: objects are as large as they are.
const WEIGHT_MAX: usize = 1 << 16;

/// Objects that are fetched at the same time, and how often those are looked at that wait for it.
const FETCHES_MAX: usize = 4;
const FETCH_AGAIN: Duration = Duration::from_secs(1);

/// How long a connection may be silent, also while a list is awaited.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// An API server and our credentials for it.
#[derive(Clone)]
pub struct Server {
    /// Its client.
    pub client: Client,
    /// Its address, for messages.
    pub url: String,
}

impl Server {
    /// Reads `kubeconfig`; without it and without `master`, the ServiceAccount of this pod. `master` is the server in
    /// place of the one that is read, or, alone, one that asks for no credentials. Nothing is sent yet: a server that
    /// is down is no error here. Files with certificates are read again when they have changed.
    ///
    /// # Errors
    /// The configuration cannot be read or used.
    pub fn configured(kubeconfig: Option<&Path>, master: Option<&Uri>) -> Result<Self, SourceError> {
        let files = |kubeconfig: Option<&Path>, config: &Config| {
            kubeconfig.map(Path::to_owned).into_iter().chain(kubeconfig::files(config)).collect::<Vec<_>>()
        };
        let config = read(kubeconfig, master)?;
        let (url, first) = (config.cluster_url.to_string(), files(kubeconfig, &config));
        let (kubeconfig, master) = (kubeconfig.map(Path::to_owned), master.cloned());
        let make = move || {
            let config = read(kubeconfig.as_deref(), master.as_ref())?;
            let files = files(kubeconfig.as_deref(), &config);
            Ok((connect(config)?, files))
        };
        Ok(Self { client: renewed::client(&first, Box::new(make))?, url })
    }
}

/// Where the API server is, and who we are there.
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
    // Every watch is ended by the server before that, so a connection on which nothing comes for this long is dead.
    config.read_timeout = Some(SILENCE_MAX);
    // The client's own retries are for requests that nobody repeats: many in a row, and without a word.
    config.default_retry = false;
    Ok(config)
}

fn connect(mut config: Config) -> Result<Client, SourceError> {
    let server = config.cluster_url.to_string();
    let count = CountRequests::of(&config.cluster_url);
    // A file goes before a token, as long as it can be read.
    let file = config.auth_info.token_file.take().map(|file| Arc::new(PathBuf::from(file)));
    let instead = file.as_ref().and_then(|_| config.auth_info.token.take());
    let token = TokenFile { file, instead };
    ClientBuilder::try_from(config)
        .map(|builder| builder.with_layer(&token).with_layer(&count).build())
        .map_err(|source| SourceError::Client { server, source: Box::new(source) })
}

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Services,
    EndpointSlices,
    Node,
    ServiceCidrs,
    Pods,
}

impl Kind {
    /// As RBAC rules name it: resource and API group.
    fn resource(self) -> (&'static str, &'static str) {
        match self {
            Self::Services => ("services", ""),
            Self::EndpointSlices => ("endpointslices", "discovery.k8s.io"),
            Self::Node => ("nodes", ""),
            Self::ServiceCidrs => ("servicecidrs", "networking.k8s.io"),
            Self::Pods => ("pods", ""),
        }
    }

    /// Whether the agent works without it: ServiceCIDRs are newer than everything else, and so are the RBAC rules
    /// that allow to read them; Pods are more than kube-proxy may read.
    fn is_optional(self) -> bool {
        matches!(self, Self::ServiceCidrs | Self::Pods)
    }
}

/// An event of one of the watches.
enum KindEvent {
    Service(Event<Received<Service>>),
    Slice(Event<Received<EndpointSlice>>),
    Node(Event<Received<Node>>),
    ServiceCidr(Event<Received<ServiceCidr>>),
    Pod(Event<Received<Pod>>),
}

impl KindEvent {
    /// Whether it tells only that nothing is missing.
    fn is_mark(&self) -> bool {
        matches!(
            self,
            Self::Service(Event::UpToDate)
                | Self::Slice(Event::UpToDate)
                | Self::Node(Event::UpToDate)
                | Self::ServiceCidr(Event::UpToDate)
                | Self::Pod(Event::UpToDate)
        )
    }

    /// `metadata.creationTimestamp` of the object of which there is a new state, in seconds since 1970.
    fn created(&self) -> i64 {
        let time = match self {
            Self::Service(Event::Applied(received)) => received.meta().creation_timestamp.as_ref(),
            Self::Slice(Event::Applied(received)) => received.meta().creation_timestamp.as_ref(),
            Self::Service(_) | Self::Slice(_) | Self::Node(_) | Self::ServiceCidr(_) | Self::Pod(_) => None,
        };
        time.map_or(i64::MAX, |time| time.0.as_second())
    }
}

/// What the agent has to hold of a change until it has taken it in.
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

/// Sends what the API server says until the receiver is dropped. `node_name` is the name of this node in lower
/// case, `opt_out` tells which of its Pods matter, `budgets` how much of a namespace is kept.
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
        // What is ready goes with it; nothing is waited for.
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
                    // A list that is streamed: the connection has to be given its turn for each piece of it.
                    tokio::task::yield_now().await;
                    next = events.next().now_or_never().flatten();
                }
            }
        }
        let mut messages = Vec::new();
        if !changes.is_empty() {
            messages.push(Update::Changes(changes));
        }
        if complaints.have_changed() | intake.tenants.have_changed() | intake.unusable.have_changed() {
            let problems = complaints.problems().into_iter().chain(intake.tenants.problems());
            messages.push(Update::Problems(problems.chain(intake.unusable.problems()).collect()));
        }
        if !synced && intake.is_complete() {
            messages.push(Update::Synced);
            synced = true;
        }
        for message in messages {
            if updates.send(message).await.is_err() {
                return;
            }
        }
    }
}
