//! Follows one kind of object without end: a list, then a watch, and again a list when the server no longer knows the
//! resourceVersion.
//!
//! A list is streamed as the beginning of a watch if the server offers that (`sendInitialEvents`, Kubernetes 1.34), and
//! comes in pages otherwise. Both forms are as new as the server's storage, so the known state never goes back in time.
//! Every failure is an item of the stream; after a failure, the stream waits before the next try.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, Stream, StreamExt as _};
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Status;
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::time::timeout;

use super::pace::{LONGEST, Pace, between};
use super::received::Received;

/// Bounds of the time after which the server ends a watch. Each watch gets a random time in between, so that the
/// watches of agents that started together do not end together.
const WATCH_SHORTEST: Duration = Duration::from_secs(90);
const WATCH_LONGEST: Duration = Duration::from_secs(150);
/// Time without an event or the end of a watch after which the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(155);
/// Minimum duration of a watch. A watch that ends sooner without an event counts as refused.
const SHORT: Duration = Duration::from_secs(1);
/// Number of objects in one page of a list. A page of the largest objects is 150 MiB of JSON.
const PAGE: u32 = 100;
/// Time without an answer after which a list is not streamed any more. Setting up a connection takes less, so something
/// between agent and server is waiting for the end of the watch.
const STREAM_BEGINS: Duration = Duration::from_secs(45);
/// Time without a new object, and total time without an end, after which a list is not streamed any more: the server
/// does not know that it has to mark the end.
const STREAM_SILENCE: Duration = Duration::from_secs(5);
const STREAM_LONGEST: Duration = Duration::from_secs(30);
/// Interval at which an optional kind that the server does not serve is requested again: an upgrade of the server may
/// add the kind.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);
/// Annotation of the bookmark behind the last object of a streamed list.
const LIST_END: &str = "k8s.io/initial-events-end";

/// Event that concerns the objects of a kind.
#[derive(Debug)]
pub(super) enum Event<K> {
    /// A list begins. An earlier list without its end has failed.
    ListBegins,
    /// An object of the list, or an object that is new or has changed.
    Applied(K),
    /// An object is gone.
    Deleted(K),
    /// The list is complete: nothing else exists.
    ListEnds,
    /// All events so far have been delivered.
    UpToDate,
}

/// Failure of a list or watch. After every failure there is another try.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("cannot list")]
    List(#[source] kube::Error),
    #[error("the list broke off before its end")]
    ListBrokeOff,
    #[error("the list has no resourceVersion to watch from")]
    NoVersion,
    #[error("cannot watch")]
    Watch(#[source] kube::Error),
    #[error("the watch was ended as soon as it was opened")]
    ShortWatch,
}

impl Error {
    /// Returns the status that the server answered with.
    pub(super) fn status(&self) -> Option<&Status> {
        match self {
            Self::List(kube::Error::Api(status)) | Self::Watch(kube::Error::Api(status)) => Some(status),
            Self::List(_) | Self::ListBrokeOff | Self::NoVersion | Self::Watch(_) | Self::ShortWatch => None,
        }
    }

    /// Returns the HTTP status of the answer.
    pub(super) fn code(&self) -> Option<u16> {
        self.status().map(|status| status.code)
    }

    /// Returns whether a list failed.
    pub(super) fn is_of_list(&self) -> bool {
        matches!(self, Self::List(_) | Self::ListBrokeOff | Self::NoVersion)
    }

    /// Returns whether the answer itself was wrong, rather than the server busy or unreachable.
    fn is_nonsense(&self) -> bool {
        match self {
            Self::List(error) | Self::Watch(error) => is_garbled(error),
            Self::NoVersion | Self::ShortWatch => true,
            Self::ListBrokeOff => false,
        }
    }
}

/// Returns whether the answer could not be parsed at all. (kube takes a line that is JSON but no event for a status
/// without a code.)
fn is_garbled(error: &kube::Error) -> bool {
    matches!(error, kube::Error::SerdeError(_) | kube::Error::FromUtf8(_))
        || matches!(error, kube::Error::Api(status) if status.code == 0)
}

/// Selection of objects of a kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    /// Whether the server may lack the kind.
    pub(super) optional: bool,
    /// Label selector of the API.
    pub(super) labels: Option<&'static str>,
    /// Field selector of the API.
    pub(super) fields: Option<String>,
}

impl Selection {
    fn list(&self, token: Option<String>) -> ListParams {
        ListParams {
            label_selector: self.labels.map(str::to_owned),
            field_selector: self.fields.clone(),
            limit: Some(PAGE),
            continue_token: token,
            ..ListParams::default()
        }
    }

    fn watch(&self, streams_list: bool) -> WatchParams {
        WatchParams {
            label_selector: self.labels.map(str::to_owned),
            field_selector: self.fields.clone(),
            timeout: u32::try_from(between(WATCH_SHORTEST, WATCH_LONGEST).as_secs()).ok(),
            bookmarks: true,
            send_initial_events: streams_list,
        }
    }
}

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<Received<K>>>>;

/// Progress in following a kind.
enum Phase<K> {
    /// A list has to be read first.
    Unknown,
    /// The list comes as the beginning of a watch.
    Streaming { events: Events<K>, began: Instant },
    /// The list comes in pages: the remaining objects of this page, and the token for the next page.
    Paging { objects: std::vec::IntoIter<Received<K>>, token: Option<String>, version: String },
    /// Everything up to this version is known.
    Listed { version: String },
    /// Everything up to this version is known, and a watch reports later changes.
    Watching { version: String, events: Events<K>, watch: Watch },
}

/// An open watch.
#[derive(Clone, Copy)]
struct Watch {
    opened: Instant,
    silent: bool,
}

impl Watch {
    fn opened() -> Self {
        Self { opened: Instant::now(), silent: true }
    }

    fn is_short(self) -> bool {
        self.silent && self.opened.elapsed() < SHORT
    }
}

struct Follow<K> {
    api: Api<Received<K>>,
    selection: Selection,
    /// Whether the server streams lists, as far as is known.
    streams: bool,
    /// Guard to log only once, for all kinds of a server, that lists cannot be streamed.
    told: Arc<Once>,
    phase: Phase<K>,
    /// Pauses after failures, and pauses after wrong answers. A watch that works resets only the pauses after failures.
    pace: Pace,
    nonsense_pace: Pace,
    pause: Option<Duration>,
}

/// Follows the selected objects without end. `told` is shared by all kinds of a server.
pub(super) fn follow<K>(
    api: Api<Received<K>>,
    selection: Selection,
    told: Arc<Once>,
) -> impl Stream<Item = Result<Event<Received<K>>, Error>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let follow = Follow {
        api,
        selection,
        streams: true,
        told,
        phase: Phase::Unknown,
        pace: Pace::default(),
        nonsense_pace: Pace::default(),
        pause: None,
    };
    futures::stream::unfold(follow, |mut follow| async move { Some((follow.next().await, follow)) })
}

impl<K> Follow<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    async fn next(&mut self) -> Result<Event<Received<K>>, Error> {
        if let Some(pause) = self.pause.take() {
            tokio::time::sleep(pause).await;
        }
        loop {
            let phase = std::mem::replace(&mut self.phase, Phase::Unknown);
            let watch = if let Phase::Watching { watch, .. } = &phase { Some(*watch) } else { None };
            let (phase, result) = match phase {
                Phase::Unknown => self.list().await,
                Phase::Streaming { events, began } => self.stream(events, began).await,
                Phase::Paging { objects, token, version } => self.page(objects, token, version).await,
                Phase::Listed { version } => self.open(version).await,
                Phase::Watching { version, events, watch } => told(version, events, watch).await,
            };
            self.phase = phase;
            // A list alone is no success, because it might be requested again and again.
            if watch.is_some_and(|watch| !watch.is_short()) {
                self.pace.reset();
            }
            match result {
                Ok(None) => {}
                Ok(Some(event)) => return Ok(event),
                Err(error) => {
                    self.pause = Some(self.pause_after(&error));
                    return Err(error);
                }
            }
        }
    }

    fn pause_after(&mut self, error: &Error) -> Duration {
        if self.selection.optional && error.is_of_list() && error.code() == Some(404) {
            return NOT_SERVED_RETRY;
        }
        let pace = if error.is_nonsense() { &mut self.nonsense_pace } else { &mut self.pace };
        // The time that the server asks for is added to the random pause, because the server asks all agents for the
        // same time.
        let asked = error.status().and_then(|status| status.details.as_ref()).map(|d| d.retry_after_seconds);
        pace.pause(Instant::now()) + Duration::from_secs(asked.unwrap_or(0).into()).min(LONGEST)
    }

    /// Begins a list.
    async fn list(&mut self) -> Step<K> {
        if !self.streams {
            return self.page(Vec::new().into_iter(), None, String::new()).await;
        }
        // Without a resourceVersion, the stream begins with the server's stored state at the time of the request, as a
        // list does.
        let params = self.selection.watch(true);
        let Ok(answer) = timeout(STREAM_BEGINS, self.api.watch(&params, "")).await else {
            return self.without_streams("a list that was to be streamed did not begin");
        };
        match answer {
            Ok(events) => {
                let phase = Phase::Streaming { events: events.boxed(), began: Instant::now() };
                (phase, Ok(Some(Event::ListBegins)))
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 400 | 405 | 406 | 415 | 422) => {
                self.without_streams(&status.message)
            }
            Err(error) => (Phase::Unknown, Err(Error::List(error))),
        }
    }

    /// Lists this kind in pages from now on.
    fn without_streams(&mut self, reason: &str) -> Step<K> {
        self.streams = false;
        let resource = K::plural(&());
        tracing::debug!(resource = &*resource, reason, "lists come in pages");
        self.told.call_once(|| {
            tracing::info!(
                reason,
                "the API server does not stream lists (Kubernetes 1.34); they come in pages"
            );
        });
        (Phase::Unknown, Ok(None))
    }

    /// Returns the next event of a streamed list.
    async fn stream(&mut self, mut events: Events<K>, began: Instant) -> Step<K> {
        let patience = STREAM_SILENCE.min(STREAM_LONGEST.saturating_sub(began.elapsed()));
        let Ok(event) = timeout(patience, events.next()).await else {
            return self.without_streams("the end of the list is not marked");
        };
        match event {
            Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                (Phase::Streaming { events, began }, Ok(Some(Event::Applied(object))))
            }
            // A deletion within the list: the server's cache is catching up with its storage.
            Some(Ok(WatchEvent::Deleted(object))) => {
                (Phase::Streaming { events, began }, Ok(Some(Event::Deleted(object))))
            }
            Some(Ok(WatchEvent::Bookmark(mark))) if is_list_end(&mark.metadata.annotations) => {
                let (version, watch) = (mark.metadata.resource_version, Watch::opened());
                (Phase::Watching { version, events, watch }, Ok(Some(Event::ListEnds)))
            }
            Some(Ok(WatchEvent::Bookmark(_))) => (Phase::Streaming { events, began }, Ok(None)),
            Some(Ok(WatchEvent::Error(status))) => {
                (Phase::Unknown, Err(Error::List(kube::Error::Api(status))))
            }
            Some(Err(error)) => (Phase::Unknown, Err(Error::List(error))),
            None => (Phase::Unknown, Err(Error::ListBrokeOff)),
        }
    }

    /// Returns the next object of a list in pages. Requests the first page if objects, token and version are empty.
    async fn page(
        &mut self,
        mut objects: std::vec::IntoIter<Received<K>>,
        token: Option<String>,
        version: String,
    ) -> Step<K> {
        if let Some(object) = objects.next() {
            return (Phase::Paging { objects, token, version }, Ok(Some(Event::Applied(object))));
        }
        let is_first = token.is_none();
        if is_first && !version.is_empty() {
            return (Phase::Listed { version }, Ok(Some(Event::ListEnds)));
        }
        match self.api.list(&self.selection.list(token)).await {
            Ok(list) => {
                let token = list.metadata.continue_.filter(|token| !token.is_empty());
                let version = list.metadata.resource_version.unwrap_or_default();
                if version.is_empty() {
                    return (Phase::Unknown, Err(Error::NoVersion));
                }
                let phase = Phase::Paging { objects: list.items.into_iter(), token, version };
                (phase, Ok(is_first.then_some(Event::ListBegins)))
            }
            Err(error) => (Phase::Unknown, Err(Error::List(error))),
        }
    }

    /// Opens a watch.
    async fn open(&mut self, version: String) -> Step<K> {
        match self.api.watch(&self.selection.watch(false), &version).await {
            Ok(events) => {
                let (events, watch) = (events.boxed(), Watch::opened());
                (Phase::Watching { version, events, watch }, Ok(None))
            }
            Err(error) => after(version, error),
        }
    }
}

type Step<K> = (Phase<K>, Result<Option<Event<Received<K>>>, Error>);

/// Returns the next event of a watch.
async fn told<K>(mut version: String, mut events: Events<K>, mut watch: Watch) -> Step<K>
where
    K: Resource<DynamicType = ()>,
{
    // A connection that has died silently is handled like a watch whose time is up.
    let event = timeout(SILENCE, events.next()).await.unwrap_or_default();
    watch.silent &= event.is_none();
    let mut seen = |object: &Received<K>| {
        if let Some(newer) = object.resource_version() {
            version = newer;
        }
    };
    match event {
        Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
            seen(&object);
            (Phase::Watching { version, events, watch }, Ok(Some(Event::Applied(object))))
        }
        Some(Ok(WatchEvent::Deleted(object))) => {
            seen(&object);
            (Phase::Watching { version, events, watch }, Ok(Some(Event::Deleted(object))))
        }
        Some(Ok(WatchEvent::Bookmark(mark))) => {
            let version = mark.metadata.resource_version;
            (Phase::Watching { version, events, watch }, Ok(Some(Event::UpToDate)))
        }
        Some(Ok(WatchEvent::Error(status))) => after(version, kube::Error::Api(status)),
        // Only a new list can show what the unreadable event was about.
        Some(Err(error)) if is_garbled(&error) => (Phase::Unknown, Err(Error::Watch(error))),
        Some(Err(error)) => after(version, error),
        None if watch.is_short() => (Phase::Listed { version }, Err(Error::ShortWatch)),
        None => (Phase::Listed { version }, Ok(None)),
    }
}

/// Handles a failed watch: it continues from its resourceVersion, unless the server no longer knows that version (410).
fn after<K>(version: String, error: kube::Error) -> Step<K> {
    let forgotten = matches!(&error, kube::Error::Api(status) if status.code == 410);
    let phase = if forgotten { Phase::Unknown } else { Phase::Listed { version } };
    (phase, Err(Error::Watch(error)))
}

fn is_list_end(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(LIST_END).is_some_and(|value| value == "true")
}
