//! A small Kubernetes API server for tests, and a starter for the real one.
//!
//! [`ApiServer`] speaks the list and watch protocol over plain HTTP and can misbehave on request: its fault methods cut
//! watches, go away, fail requests, hold back lists, lose or reorder events. It stores objects as given: it neither
//! validates nor defaults nor allocates addresses. Clients need no credentials, unless [`ApiServer::restrict`] sets
//! access rules. [`ControlPlane`] starts a real etcd and kube-apiserver with the same basic interface.
//! [`client::apply`] writes to either.
//!
//! The protocol: <https://kubernetes.io/docs/reference/using-api/api-concepts/>.

mod access;
pub mod client;
mod control_plane;
mod faults;
mod http;
mod object;
mod resource;
mod selector;
mod server;
mod status;
mod store;
mod watch;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;
use tokio::sync::mpsc;

pub use access::allows;
pub use control_plane::ControlPlane;
pub use faults::{Cut, Streams};
pub use resource::{Request, Resource, Verb};
pub use watch::STREAM_BEGINNING;

use access::Access;
use faults::{Faults, Gate};
use object::Key;
use server::Command;
use store::Store;

/// State shared by the handle and the connections.
struct Shared {
    state: Mutex<State>,
    /// Lists that are held.
    gates: tokio::sync::watch::Sender<BTreeSet<Gate>>,
}

#[derive(Default)]
struct State {
    store: Store,
    requests: Vec<Request>,
    access: Access,
    faults: Faults,
    /// Times at which the last list and the last watch event of a resource were sent.
    lists_sent: BTreeMap<Resource, Instant>,
    events_sent: BTreeMap<Resource, Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server. It has a thread of its own, so that tests without a runtime can use it, and stops when dropped.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    commands: mpsc::UnboundedSender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Starts a server on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// If no port or no thread is available.
    pub fn start() -> Result<Self> {
        let mut attempts = 0;
        loop {
            // A free port is asked for, then bound by its number; another process may bind it in between.
            let address =
                TcpListener::bind("127.0.0.1:0").context("no port for the API server")?.local_addr()?;
            match TcpListener::bind(address).map_err(Into::into).and_then(Self::start_on) {
                Err(_taken) if attempts < 10 => attempts += 1,
                started => return started,
            }
        }
    }

    /// Starts a server on a listener, which may belong to another network namespace. The listener must have been bound
    /// to an explicit port, not to port 0: a port that the kernel chose is lost when the server goes away.
    ///
    /// # Errors
    /// If the listener cannot be used, the kernel chose its port, or no thread is available.
    pub fn start_on(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr()?;
        let gates = tokio::sync::watch::Sender::default();
        let shared = Arc::new(Shared { state: Mutex::default(), gates });
        let (commands, orders) = mpsc::unbounded_channel();
        let serve = server::prepare(Arc::clone(&shared), listener, orders)?;
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(serve)?;
        Ok(Self { shared, address, commands, thread: Some(thread) })
    }

    /// Returns the address that the server listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the URL of the server, without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns a kubeconfig that names this server.
    pub fn kubeconfig(&self) -> String {
        client::kubeconfig(&self.url(), None)
    }

    /// Writes [`Self::kubeconfig`] to a file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        fs::write(path, self.kubeconfig()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Creates or replaces an object, status included; its `apiVersion` and `kind` decide the resource. uid and
    /// creationTimestamp are kept, or made if absent. Returns the object's revision; an unchanged object keeps its
    /// revision.
    ///
    /// # Errors
    /// If the object is of no served kind, or lacks its name or namespace.
    pub fn apply(&self, object: Value) -> Result<u64> {
        let resource = Resource::of(&object)?;
        let put = self.shared.state().store.put(resource, object, true);
        Ok(put.map_err(|problem| anyhow!(problem))?.revision)
    }

    /// Does [`Self::apply`] for many objects.
    ///
    /// # Errors
    /// As [`Self::apply`]; the objects before the faulty one are then applied.
    pub fn apply_all(&self, objects: impl IntoIterator<Item = Value>) -> Result<()> {
        objects.into_iter().try_for_each(|object| self.apply(object).map(drop))
    }

    /// Deletes the object with the kind, namespace and name of `object`; returns whether it existed.
    ///
    /// # Errors
    /// If the object is of no served kind, or lacks its name or namespace.
    pub fn delete(&self, object: &Value) -> Result<bool> {
        let resource = Resource::of(object)?;
        let key = Key::of(resource, object).map_err(|problem| anyhow!(problem))?;
        Ok(self.shared.state().store.delete(resource, &key, true).is_some())
    }

    /// Deletes an object by name; the namespace of cluster-scoped objects is empty. Returns whether the object existed.
    pub fn delete_named(&self, resource: Resource, namespace: &str, name: &str) -> bool {
        self.shared.state().store.delete(resource, &Key::new(namespace, name), true).is_some()
    }

    /// Deletes every object of a resource; returns their number.
    pub fn delete_all(&self, resource: Resource) -> usize {
        let mut state = self.shared.state();
        let objects = state.store.all(resource);
        objects.iter().filter(|object| state.store.delete(resource, &object.key, true).is_some()).count()
    }

    /// Returns an object as a client would get it; the namespace of cluster-scoped objects is empty.
    pub fn get(&self, resource: Resource, namespace: &str, name: &str) -> Option<Value> {
        let object = self.shared.state().store.get(resource, &Key::new(namespace, name))?;
        Some(object.to_value(resource))
    }

    /// Returns every object of a resource, ordered by namespace and name.
    pub fn list(&self, resource: Resource) -> Vec<Value> {
        let objects = self.shared.state().store.all(resource);
        objects.iter().map(|object| object.to_value(resource)).collect()
    }

    /// Returns the Events that clients have recorded, of both API groups.
    pub fn recorded_events(&self) -> Vec<Value> {
        let mut events = self.list(Resource::CoreEvents);
        events.extend(self.list(Resource::Events));
        events
    }

    /// Returns the newest revision.
    pub fn revision(&self) -> u64 {
        self.shared.state().store.revision()
    }

    /// Returns every request for a resource since the start or [`Self::forget_requests`], failed ones included.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state().requests.clone()
    }

    /// Returns the number of requests for lists of a resource, including streamed ones; further pages do not count.
    pub fn lists(&self, resource: Resource) -> usize {
        let state = self.shared.state();
        state.requests.iter().filter(|request| request.resource == resource && request.is_list()).count()
    }

    /// Returns the number of [`Self::requests`] with this verb and resource.
    pub fn count(&self, verb: Verb, resource: Resource) -> usize {
        let state = self.shared.state();
        state.requests.iter().filter(|request| request.verb == verb && request.resource == resource).count()
    }

    /// Returns the time at which the last byte of the last list of a resource (a page or a streamed list, too) went to
    /// the socket.
    pub fn list_sent(&self, resource: Resource) -> Option<Instant> {
        self.shared.state().lists_sent.get(&resource).copied()
    }

    /// Returns the time at which the last event of a resource went to the socket of a watch.
    pub fn event_sent(&self, resource: Resource) -> Option<Instant> {
        self.shared.state().events_sent.get(&resource).copied()
    }

    /// Forgets the counted requests.
    pub fn forget_requests(&self) {
        self.shared.state().requests.clear();
    }

    /// Returns the number of open watches of a resource.
    pub fn open_watches(&self, resource: Resource) -> usize {
        self.shared.state().store.open_watches(resource)
    }

    /// Blocks the thread until `count` watches of a resource are open.
    ///
    /// # Errors
    /// If that does not happen within `limit`.
    pub fn wait_for_watches(&self, resource: Resource, count: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let open = self.open_watches(resource);
            if open == count {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{open} watches of {resource} instead of {count} after {limit:?}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _thread_gone = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
