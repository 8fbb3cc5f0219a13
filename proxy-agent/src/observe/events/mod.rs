//! Events: what a user should see in `kubectl describe`, written to the API (events.k8s.io/v1).
//!
//! Whoever has something to say hands it over ([`Events::tell`]) and goes on; a task of its own writes it. What comes
//! again and again is written once, a flood is cut off where it comes from, and namespaces take turns ([`mod@line`]); a server
//! that does not answer costs the Event, nothing else. Without an API (`--manifests`) there are none: whatever becomes an Event is in the log, too.

mod line;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client, Resource as _};
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, timeout};

use self::line::{Line, Next, Verdict};
use crate::observe::http::HttpError;
use crate::observe::metrics::{EventFate, Metrics};
use crate::reconcile::cluster::ObjectKey;

/// Who reports, in `kubectl get events`.
const CONTROLLER: &str = "vipr";
/// How often one is tried, how long each time, and the pause in between.
const ATTEMPTS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(5);
/// The longest note and the longest name of a reporter that the API takes, bytes.
const NOTE_MAX: usize = 1024;
const INSTANCE_MAX: usize = 128;

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Regarding {
    /// This node.
    Node,
    /// A Service.
    Service(ObjectKey),
}

/// Something that a user should see.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    regarding: Regarding,
    warning: bool,
    reason: &'static str,
    action: &'static str,
    note: String,
}

impl Event {
    /// The agent starts.
    pub fn starting() -> Self {
        let note = concat!("proxy-agent ", env!("CARGO_PKG_VERSION")).to_owned();
        Self { regarding: Regarding::Node, warning: false, reason: "Starting", action: "Start", note }
    }

    /// One of the agent's own servers cannot serve, which ends the agent. (For the health server kube-proxy's reason.)
    pub fn cannot_serve(error: &HttpError) -> Self {
        let reason = match error.server() {
            crate::observe::health::SERVER => "FailedToStartProxierHealthcheck",
            _ => "FailedToStartMetricsServer",
        };
        Self { regarding: Regarding::Node, warning: true, reason, action: "Start", note: error.to_string() }
    }

    /// A port for load balancers' health checks cannot be opened.
    pub fn check_port_failed(service: ObjectKey, note: String) -> Self {
        Self::about(service, "FailedToStartServiceHealthcheck", "Listen", note)
    }

    /// Something about a Service or its slices cannot be served as it is written.
    pub fn problem(service: ObjectKey, note: String) -> Self {
        Self::about(service, "ServiceProblem", "Program", note)
    }

    fn about(service: ObjectKey, reason: &'static str, action: &'static str, note: String) -> Self {
        let regarding = Regarding::Service(service);
        Self { regarding, warning: true, reason, action, note }
    }
}

/// Dropped when the Event is written, or never will be.
type Done = Option<oneshot::Sender<()>>;

/// Where Events wait.
#[derive(Debug)]
struct Desk {
    line: Mutex<Line<Done>>,
    /// Somebody has handed one over.
    came: Notify,
    metrics: Arc<Metrics>,
}

impl Desk {
    fn line(&self) -> MutexGuard<'_, Line<Done>> {
        // Every method leaves it whole.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where Events are handed over. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(Option<Arc<Desk>>);

impl Events {
    /// For an agent without an API.
    pub fn nowhere() -> Self {
        Self(None)
    }

    /// Events of the node of this name. Needs a runtime.
    pub fn to_api(client: Client, node: Arc<str>, metrics: Arc<Metrics>) -> Self {
        let line = Mutex::new(Line::new(Instant::now()));
        let desk = Arc::new(Desk { line, came: Notify::new(), metrics });
        tokio::spawn(write_all(client, node, Arc::clone(&desk)));
        Self(Some(desk))
    }

    /// Hands an Event over. When too many wait it is dropped, and counted.
    pub fn tell(&self, event: Event) {
        self.hand_over(event, None);
    }

    /// Hands an Event over and waits until it is written, or this long.
    pub async fn tell_and_wait(&self, event: Event, patience: Duration) {
        let (done, written) = oneshot::channel();
        self.hand_over(event, Some(done));
        // Dropped without a word when there is nobody to write.
        let _ = timeout(patience, written).await;
    }

    fn hand_over(&self, event: Event, done: Done) {
        let Some(desk) = &self.0 else { return };
        match desk.line().take(event, done, Instant::now()) {
            Verdict::Waits => {}
            Verdict::Known => return,
            Verdict::TooMany | Verdict::Displaces => desk.metrics.event(EventFate::Dropped),
        }
        desk.came.notify_one();
    }
}

async fn write_all(client: Client, node: Arc<str>, desk: Arc<Desk>) {
    loop {
        let next = desk.line().next(Instant::now());
        match next {
            Next::Write(event, done) => {
                desk.metrics.event(write(&client, &node, &event).await);
                drop(done);
            }
            Next::Late(_) => desk.metrics.event(EventFate::Dropped),
            Next::Rest(until) => {
                tokio::select! {
                    () = tokio::time::sleep_until(until.into()) => {}
                    () = desk.came.notified() => {}
                }
            }
            Next::Nothing => desk.came.notified().await,
        }
    }
}

async fn write(client: &Client, node: &Arc<str>, event: &Event) -> EventFate {
    let mut attempt = 1;
    loop {
        let refused = match timeout(PATIENCE, publish(client, node, event)).await {
            Ok(Ok(())) => return EventFate::Written,
            Ok(Err(kube::Error::Api(status))) if status.code < 500 && status.code != 429 => {
                Some(status.message)
            }
            Ok(Err(error)) if attempt == ATTEMPTS => Some(error.to_string()),
            Err(_) if attempt == ATTEMPTS => Some("no answer".to_owned()),
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some(error) = refused {
            tracing::warn!(reason = event.reason, note = event.note, error, "an Event could not be written");
            return EventFate::Failed;
        }
        attempt += 1;
        sleep(PAUSE).await;
    }
}

async fn publish(client: &Client, node: &Arc<str>, event: &Event) -> Result<(), kube::Error> {
    let reference = match &event.regarding {
        // As the kubelet and kube-proxy name it, and `kubectl describe node` looks for it.
        Regarding::Node => ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_string()),
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        },
        Regarding::Service(key) => reference(client, key).await?,
    };
    let namespace = reference.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let now = Timestamp::now();
    let name = format!("{}.{:x}", reference.name.as_deref().unwrap_or(CONTROLLER), now.as_nanosecond());
    // A repeated Event would be a series, a patch of the first one; the gate lets none through.
    let written = api::Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        type_: Some(if event.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(event.reason.to_owned()),
        note: Some(shortened(&event.note, NOTE_MAX)),
        action: Some(event.action.to_owned()),
        regarding: Some(reference),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(shortened(node, INSTANCE_MAX)),
        ..api::Event::default()
    };
    let events: Api<api::Event> = Api::namespaced(client.clone(), &namespace);
    events.create(&PostParams::default(), &written).await.map(drop)
}

/// A reference with the uid, by which `kubectl describe` finds the Events of an object. The agent does not keep uids,
/// and may list Services, but not get them.
async fn reference(client: &Client, key: &ObjectKey) -> Result<ObjectReference, kube::Error> {
    let services: Api<Service> = Api::namespaced(client.clone(), &key.namespace);
    let of_name = ListParams::default().fields(&format!("metadata.name={}", key.name)).limit(1);
    let found = services.list(&of_name).await?.items.into_iter().next();
    Ok(match found {
        Some(service) => service.object_ref(&()),
        None => ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(key.namespace.to_string()),
            name: Some(key.name.to_string()),
            ..ObjectReference::default()
        },
    })
}

fn shortened(text: &str, most: usize) -> String {
    text.get(..text.floor_char_boundary(most)).unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_end_where_the_api_does() {
        assert_eq!(shortened("short", NOTE_MAX), "short");
        let long = "ä".repeat(600);
        assert_eq!(shortened(&long, NOTE_MAX), "ä".repeat(512));
        assert_eq!(shortened(&format!("x{long}"), NOTE_MAX).len(), 1023);
    }

    #[tokio::test]
    async fn nobody_waits_where_there_is_no_api() {
        let start = Instant::now();
        Events::nowhere().tell_and_wait(Event::starting(), Duration::from_secs(60)).await;
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
