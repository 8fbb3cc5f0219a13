//! The servers behind `healthCheckNodePort`: one for each Service, family and address of this node.
//!
//! The sync loop says what is to be served ([`CheckPorts::services`], [`CheckPorts::listen_on`]) and goes on. A task
//! opens and closes the ports, and reports those that it could not open, which it tries again every few seconds.
//! [`super::checks`] decides the answers.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse as _, Response};
use rustix::net::sockopt::set_ipv6_v6only;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use super::checks::{Check, answer};
use super::{Health, respond_with};
use crate::config::servers::BIND_RETRY;
use crate::observe::http::{Limits, Room, serve_on};
use crate::reconcile::cluster::ObjectKey;

/// Number of connections that the kernel keeps waiting for a server.
const BACKLOG: u32 = 128;

/// Problems of each Service's port, in sentences.
pub(crate) type Failures = BTreeMap<ObjectKey, Vec<String>>;

/// Servers that are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// Addresses to listen on, by [`proxy_common::addr::Family::index`].
    listen_on: [Vec<IpAddr>; 2],
    /// Services with a check in some family, by [`proxy_common::addr::Family::index`].
    services: BTreeMap<ObjectKey, [Option<Check>; 2]>,
}

/// The sync loop's handle. The servers close when it is dropped.
#[derive(Debug)]
pub(crate) struct CheckPorts {
    wanted: watch::Sender<Wanted>,
    failures: watch::Receiver<Failures>,
}

impl CheckPorts {
    /// Starts the task, without servers yet. They will run on `runtime`.
    pub(crate) fn start(health: Health, runtime: &Handle) -> Self {
        let (wanted, orders) = watch::channel(Wanted::default());
        let (told, failures) = watch::channel(Failures::new());
        runtime.spawn(keep(health, orders, told));
        Self { wanted, failures }
    }

    /// Listens on these addresses, by [`proxy_common::addr::Family::index`], instead of the earlier ones.
    pub(crate) fn listen_on(&self, addresses: [Vec<IpAddr>; 2]) {
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.listen_on != addresses;
            wanted.listen_on = addresses;
            changed
        });
    }

    /// Replaces the checks of these Services, each by [`proxy_common::addr::Family::index`]; `None` where there is
    /// none.
    pub(crate) fn services(&self, checks: impl Iterator<Item = (ObjectKey, [Option<Check>; 2])>) {
        self.wanted.send_if_modified(|wanted| {
            let mut changed = false;
            for (service, checks) in checks {
                changed |= if checks == [None, None] {
                    wanted.services.remove(&service).is_some()
                } else {
                    wanted.services.insert(service, checks) != Some(checks)
                };
            }
            changed
        });
    }

    /// Returns the Services that have a check in some family.
    pub(crate) fn known(&self) -> Vec<ObjectKey> {
        self.wanted.borrow().services.keys().cloned().collect()
    }

    /// Waits until the failures change, and returns them.
    pub(crate) async fn failures(&mut self) -> Failures {
        match self.failures.changed().await {
            Ok(()) => self.failures.borrow_and_update().clone(),
            // Only a panic ends the task, and that has been printed.
            Err(_) => std::future::pending().await,
        }
    }
}

async fn keep(health: Health, mut orders: watch::Receiver<Wanted>, told: watch::Sender<Failures>) {
    // All servers share one room, in which no port takes a place from another.
    let limits = Limits { room: Room::new(512), ..Limits::default() };
    let mut open: BTreeMap<(ObjectKey, SocketAddr), Server> = BTreeMap::new();
    loop {
        let places = places(&orders.borrow_and_update());
        // Ports are closed first, because another Service may take one over.
        let closing: Vec<Server> =
            open.extract_if(.., |place, _| !places.contains_key(place)).map(|(_, server)| server).collect();
        for server in closing {
            server.close().await;
        }
        let mut failures = Failures::new();
        for ((service, address), endpoints) in places {
            if let Some(server) = open.get(&(service.clone(), address)) {
                server.endpoints.store(endpoints, Ordering::Relaxed);
                continue;
            }
            match Server::open(&service, address, endpoints, health.clone(), limits.clone()) {
                Ok(server) => {
                    tracing::debug!(%service, %address, "listening for spec.healthCheckNodePort");
                    open.insert((service, address), server);
                }
                Err(error) => failures.entry(service).or_default().push(format!(
                    "spec.healthCheckNodePort: cannot listen on {address}: {error}; load balancers take this node for \
                     one without endpoints; the agent tries again every {BIND_RETRY:?}"
                )),
            }
        }
        let again = !failures.is_empty();
        told.send_if_modified(|before| {
            let changed = *before != failures;
            *before = failures;
            changed
        });
        tokio::select! {
            changed = orders.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(BIND_RETRY), if again => {}
        }
    }
}

/// Returns the addresses to listen on for each Service, and the number of endpoints to tell there.
fn places(wanted: &Wanted) -> BTreeMap<(ObjectKey, SocketAddr), usize> {
    let mut places = BTreeMap::new();
    for (service, checks) in &wanted.services {
        for (addresses, check) in wanted.listen_on.iter().zip(checks) {
            let Some(Check { port, endpoints }) = *check else { continue };
            let addresses = addresses.iter().map(|address| SocketAddr::new(*address, port));
            places.extend(addresses.map(|address| ((service.clone(), address), endpoints)));
        }
    }
    places
}

/// An open port.
#[derive(Debug)]
struct Server {
    endpoints: Arc<AtomicUsize>,
    /// Dropped to close the port.
    stop: oneshot::Sender<()>,
    /// Ready when the port is closed.
    closed: oneshot::Receiver<()>,
}

/// Values that an answer is made from.
#[derive(Debug)]
struct Told {
    service: ObjectKey,
    endpoints: Arc<AtomicUsize>,
    health: Health,
}

impl Server {
    fn open(
        service: &ObjectKey,
        address: SocketAddr,
        endpoints: usize,
        health: Health,
        limits: Limits,
    ) -> io::Result<Self> {
        let listener = listen(address)?;
        let endpoints = Arc::new(AtomicUsize::new(endpoints));
        let told = Told { service: service.clone(), endpoints: Arc::clone(&endpoints), health };
        // Any path, any method.
        let router = Router::new().fallback(respond).with_state(Arc::new(told));
        let (stop, stopped) = oneshot::channel::<()>();
        let (open, closed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let stopped = async {
                // Nothing is ever sent; the sender is only dropped.
                let _ = stopped.await;
            };
            serve_on(listener, router, limits, stopped).await;
            drop(open);
        });
        Ok(Self { endpoints, stop, closed })
    }

    /// Closes the port, and returns when it is free. Open connections end after the answer that they wait for.
    async fn close(self) {
        drop(self.stop);
        // Nothing is ever sent; the sender is only dropped.
        let _ = self.closed.await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if address.is_ipv6() {
        // Each family has servers of its own.
        set_ipv6_v6only(&socket, true)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn respond(State(told): State<Arc<Told>>) -> Response {
    let endpoints = told.endpoints.load(Ordering::Relaxed);
    let weight = HeaderName::from_static("x-load-balancing-endpoint-weight");
    let answer = answer(&told.service, endpoints, told.health.healthy());
    ([(weight, HeaderValue::from(endpoints))], respond_with(answer)).into_response()
}

#[cfg(test)]
mod tests;
