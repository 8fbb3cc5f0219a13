//! The watches as one endless stream: errors are items, after which the watch concerned waits and tries again.

use std::fmt::Debug;
use std::time::Duration;

use futures::stream::{self, BoxStream, SelectAll};
use futures::{Stream, StreamExt as _};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, Config, DefaultBackoff, Error, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use super::{Kind, KindEvent};

/// How long the server lets a watch run, seconds. A connection that died silently is noticed 5 seconds later.
const WATCH_SECONDS: u32 = 120;
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// How often a kind that the server does not serve is asked for: it may learn it in an upgrade.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);

/// An event or error of one of the watches.
pub(super) type Item = (Kind, Result<KindEvent, Error>);

/// All watches.
pub(super) fn all(client: &Client, node_name: &str, pods: bool) -> SelectAll<BoxStream<'static, Item>> {
    let config = Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    let services =
        config.clone().labels("!service.kubernetes.io/service-proxy-name").fields("spec.clusterIP!=None");
    let slices = config.clone().labels("!service.kubernetes.io/headless");
    let node = config.clone().fields(&format!("metadata.name={node_name}"));
    let of_node = config.clone().fields(&format!("spec.nodeName={node_name}"));
    let mut watches = vec![
        of_kind(client, Kind::Services, services, KindEvent::Service),
        of_kind(client, Kind::EndpointSlices, slices, KindEvent::Slice),
        of_kind(client, Kind::Node, node, KindEvent::Node),
        of_kind(client, Kind::ServiceCidrs, config, KindEvent::ServiceCidr),
    ];
    if pods {
        watches.push(of_kind(client, Kind::Pods, of_node, KindEvent::Pod));
    }
    stream::select_all(watches)
}

/// The server has answered that we cannot have this kind: it does not serve it, or RBAC forbids it.
pub(super) fn is_refused(error: &Error) -> bool {
    matches!(status_code(error), Some(403 | 404))
}

/// The HTTP status that an error is about.
pub(super) fn status_code(error: &Error) -> Option<u16> {
    match error {
        Error::InitialListFailed(kube::Error::Api(status)) => Some(status.code),
        Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        Error::WatchFailed(kube::Error::Api(status)) => Some(status.code),
        Error::WatchError(status) => Some(status.code),
        Error::InitialListFailed(_)
        | Error::WatchStartFailed(_)
        | Error::WatchFailed(_)
        | Error::NoResourceVersion => None,
    }
}

fn of_kind<K>(
    client: &Client,
    kind: Kind,
    config: Config,
    wrap: fn(Event<K>) -> KindEvent,
) -> BoxStream<'static, Item>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    patient(Api::all(client.clone()), config).map(move |event| (kind, event.map(wrap))).boxed()
}

/// A watcher that pauses after errors. (kube's own back-off starts anew with each `Init`, so that a list which fails
/// again and again would never be asked for less often.)
fn patient<K>(api: Api<K>, config: Config) -> impl Stream<Item = Result<Event<K>, Error>> + Send
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    struct State<K> {
        events: BoxStream<'static, Result<Event<K>, Error>>,
        backoff: DefaultBackoff,
        pause: Option<Duration>,
    }
    let start = move || watcher::watcher(api.clone(), config.clone()).boxed();
    let state = State { events: start(), backoff: DefaultBackoff::default(), pause: None };
    stream::unfold((state, start), |(mut state, start)| async move {
        if let Some(pause) = state.pause.take() {
            tokio::time::sleep(pause).await;
        }
        let event = state.events.next().await?;
        match &event {
            Ok(Event::Init | Event::InitApply(_)) => {}
            Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_)) => state.backoff.reset(),
            Err(error @ Error::WatchStartFailed(_)) if status_code(error) == Some(410) => {
                // The watcher would ask for the same, forgotten version for ever.
                state.events = start();
                state.pause = state.backoff.next();
            }
            Err(error @ Error::InitialListFailed(_)) if status_code(error) == Some(404) => {
                state.pause = Some(NOT_SERVED_RETRY);
            }
            Err(_) => state.pause = state.backoff.next(),
        }
        Some((event, (state, start)))
    })
}
