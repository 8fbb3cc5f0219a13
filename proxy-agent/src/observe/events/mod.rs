//! Events that a user should see in `kubectl describe`, written to the API (events.k8s.io/v1).
//!
//! The agent hands an Event over ([`Events::tell`]) and goes on; a task of its own writes it. A repeated Event is
//! written once, a flood from one namespace is cut off, and namespaces take turns ([`mod@line`]). A server that does
//! not answer costs the Event, nothing else. Without an API (`--manifests`) there are no Events; everything that
//! becomes an Event is in the log, too.

mod event;
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

pub(crate) use self::event::Event;
use self::event::Regarding;
use self::line::{Fate, Line, Next};
use crate::observe::metrics::{EventFate, Metrics};
use crate::reconcile::cluster::ObjectKey;

/// Reporter in `kubectl get events`.
const CONTROLLER: &str = "vipr";
/// Number of attempts to write an Event, time limit of each, and pause between two.
const ATTEMPTS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(5);
/// Longest note and longest name of a reporter that the API takes, in bytes.
const NOTE_MAX: usize = 1024;
const INSTANCE_MAX: usize = 128;

/// Dropped when the Event is written, or when it never will be.
type Done = Option<oneshot::Sender<()>>;

/// Waiting Events, and what their writer needs.
#[derive(Debug)]
struct Desk {
    line: Mutex<Line<Done>>,
    /// Notified when an Event has been handed over.
    came: Notify,
    metrics: Arc<Metrics>,
}

impl Desk {
    fn line(&self) -> MutexGuard<'_, Line<Done>> {
        // Every method leaves the queue consistent.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle by which Events are handed over. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Events(Option<Arc<Desk>>);

impl Events {
    /// Returns a handle that drops every Event, for an agent without an API.
    pub(crate) fn nowhere() -> Self {
        Self(None)
    }

    /// Returns a handle that writes Events of the node of this name. Needs a runtime.
    pub(crate) fn to_api(client: Client, node: Arc<str>, metrics: Arc<Metrics>) -> Self {
        let line = Mutex::new(Line::new(Instant::now()));
        let desk = Arc::new(Desk { line, came: Notify::new(), metrics });
        tokio::spawn(write_all(client, node, Arc::clone(&desk)));
        Self(Some(desk))
    }

    /// Hands an Event over. When too many wait, it is dropped and counted.
    pub(crate) fn tell(&self, event: Event) {
        self.hand_over(event, None);
    }

    /// Hands an Event over and waits until it is written, for at most `patience`.
    pub(crate) async fn tell_and_wait(&self, event: Event, patience: Duration) {
        let (done, written) = oneshot::channel();
        self.hand_over(event, Some(done));
        // The sender is dropped at once when there is no API.
        let _ = timeout(patience, written).await;
    }

    fn hand_over(&self, event: Event, done: Done) {
        let Some(desk) = &self.0 else { return };
        match desk.line().take(event, done, Instant::now()) {
            Fate::Waits => {}
            Fate::Known => return,
            Fate::TooMany | Fate::Displaces => desk.metrics.event(EventFate::Dropped),
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
        // The kubelet and kube-proxy name the Node this way, and `kubectl describe node` looks for it.
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
    // A repeated Event would be a series, a patch of the first one; the queue lets none through.
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

/// Returns a reference with the uid, by which `kubectl describe` finds the Events of an object. The agent does not keep
/// uids, and it may list Services, but not get them.
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
