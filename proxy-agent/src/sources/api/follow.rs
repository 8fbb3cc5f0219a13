//! One kind of object, followed for ever: a list, then a watch, and from the start again when the server has forgotten
//! where we were.
//!
//! A list comes as the beginning of a watch where the server offers that (`sendInitialEvents`, Kubernetes 1.34), else in
//! pages. Both are as new as the server's storage: what is known never goes back in time. Every failure is an item of
//! the stream, behind which it waits before it tries again.

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

/// How long the server is to let a watch run. Somewhere in between, or the watches of all agents that started together
/// would end together.
const WATCH_SHORTEST: Duration = Duration::from_secs(90);
const WATCH_LONGEST: Duration = Duration::from_secs(150);
/// Nothing for this long on a watch, neither an event nor its end: the connection has died silently.
const SILENCE: Duration = Duration::from_secs(155);
/// A watch that ends sooner, without an event, might as well have been refused.
const SHORT: Duration = Duration::from_secs(1);
/// Objects in one page of a list. A page of the largest ones is 150 MiB of JSON.
const PAGE: u32 = 100;
/// No answer for this long to a list that is to be streamed, which is longer than a connection may take: something in
/// between waits for the end of a watch.
const STREAM_BEGINS: Duration = Duration::from_secs(45);
/// Nothing new for this long, in a list that has begun to stream, or no end of it for that long: the server does not
/// know that it has to mark the end.
const STREAM_SILENCE: Duration = Duration::from_secs(5);
const STREAM_LONGEST: Duration = Duration::from_secs(30);
/// How often an optional kind that the server does not serve is asked for: it may learn it in an upgrade.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);
/// Marks the bookmark behind the last object of a list that is streamed.
const LIST_END: &str = "k8s.io/initial-events-end";

/// What happens to the objects of a kind.
#[derive(Debug)]
pub(super) enum Event<K> {
    /// A list begins; whatever was not at its end did not come.
    ListBegins,
    /// An object of the list, or one that is new or has changed.
    Applied(K),
    /// An object is gone.
    Deleted(K),
    /// The list is complete: nothing else exists.
    ListEnds,
    /// Everything that has happened so far has been told.
    UpToDate,
}

/// What did not work. All of it is tried again.
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
    /// What the server has answered.
    pub(super) fn status(&self) -> Option<&Status> {
        match self {
            Self::List(kube::Error::Api(status)) | Self::Watch(kube::Error::Api(status)) => Some(status),
            Self::List(_) | Self::ListBrokeOff | Self::NoVersion | Self::Watch(_) | Self::ShortWatch => None,
        }
    }

    /// The HTTP status that it is about.
    pub(super) fn code(&self) -> Option<u16> {
        self.status().map(|status| status.code)
    }

    /// Whether it was a list that did not come.
    pub(super) fn is_of_list(&self) -> bool {
        matches!(self, Self::List(_) | Self::ListBrokeOff | Self::NoVersion)
    }

    /// Whether the server is not to blame for being busy or away, but for what it says.
    fn is_nonsense(&self) -> bool {
        match self {
            Self::List(error) | Self::Watch(error) => is_garbled(error),
            Self::NoVersion | Self::ShortWatch => true,
            Self::ListBrokeOff => false,
        }
    }
}

/// Whether the answer could not be understood at all. (A line that is JSON but no event passes with kube for a status
/// without a code.)
fn is_garbled(error: &kube::Error) -> bool {
    matches!(error, kube::Error::SerdeError(_) | kube::Error::FromUtf8(_))
        || matches!(error, kube::Error::Api(status) if status.code == 0)
}

/// Which objects of a kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    /// The server may not know the kind.
    pub(super) optional: bool,
    /// As the API takes them.
    pub(super) labels: Option<&'static str>,
    /// As the API takes them.
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

/// Where we are.
enum Phase<K> {
    /// Nothing is known for sure.
    Unknown,
    /// The list comes as the beginning of a watch.
    Streaming { events: Events<K>, began: Instant },
    /// The list comes in pages: what is left of this one, and how to get the next.
    Paging { objects: std::vec::IntoIter<Received<K>>, token: Option<String>, version: String },
    /// Everything up to this version is known.
    Listed { version: String },
    /// And what happens since is told.
    Watching { version: String, events: Events<K>, watch: Watch },
}

/// A watch that is open.
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
    /// Lists are streamed, as far as is known.
    streams: bool,
    /// Whether that one kind could not be streamed has been told.
    told: Arc<Once>,
    phase: Phase<K>,
    /// What failures are followed by, and what answers that make no sense: success does not make up for those.
    pace: Pace,
    nonsense_pace: Pace,
    pause: Option<Duration>,
}

/// Follows what is selected, for ever. `told` is shared by all kinds of a server.
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
            // A list alone is no success: it might be asked for again and again.
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
        // What the server asks for comes on top: it asks everybody for the same.
        let asked = error.status().and_then(|status| status.details.as_ref()).map(|d| d.retry_after_seconds);
        pace.pause(Instant::now()) + Duration::from_secs(asked.unwrap_or(0).into()).min(LONGEST)
    }

    /// Begins a list.
    async fn list(&mut self) -> Step<K> {
        if !self.streams {
            return self.page(Vec::new().into_iter(), None, String::new()).await;
        }
        // Without a version it is as new as a list is: whatever is stored when the server is asked.
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

    /// From here on this kind is listed in pages.
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

    /// The next event of a list that is streamed.
    async fn stream(&mut self, mut events: Events<K>, began: Instant) -> Step<K> {
        let patience = STREAM_SILENCE.min(STREAM_LONGEST.saturating_sub(began.elapsed()));
        let Ok(event) = timeout(patience, events.next()).await else {
            return self.without_streams("the end of the list is not marked");
        };
        match event {
            Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                (Phase::Streaming { events, began }, Ok(Some(Event::Applied(object))))
            }
            // The server's cache catches up with its storage.
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

    /// The next object of a list in pages; without objects and token, the first page.
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

/// The next event of a watch.
async fn told<K>(mut version: String, mut events: Events<K>, mut watch: Watch) -> Step<K>
where
    K: Resource<DynamicType = ()>,
{
    // The silence of a connection that died ends like a watch whose time is up.
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
        // Whatever it was about, only a list tells.
        Some(Err(error)) if is_garbled(&error) => (Phase::Unknown, Err(Error::Watch(error))),
        Some(Err(error)) => after(version, error),
        None if watch.is_short() => (Phase::Listed { version }, Err(Error::ShortWatch)),
        None => (Phase::Listed { version }, Ok(None)),
    }
}

/// A watch has failed: it goes on from where it was, unless the server has forgotten that.
fn after<K>(version: String, error: kube::Error) -> Step<K> {
    let forgotten = matches!(&error, kube::Error::Api(status) if status.code == 410);
    let phase = if forgotten { Phase::Unknown } else { Phase::Listed { version } };
    (phase, Err(Error::Watch(error)))
}

fn is_list_end(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(LIST_END).is_some_and(|value| value == "true")
}
