//! Watches of all kinds as one endless stream. Errors are items; after an error, the kind concerned waits and tries
//! again.

use std::fmt::Debug;
use std::sync::{Arc, Once};

use futures::StreamExt as _;
use futures::stream::{self, BoxStream, SelectAll};
use kube::api::ListParams;
use kube::core::{NamespaceResourceScope, Resource};
use kube::{Api, Client};
use serde::de::DeserializeOwned;

use super::follow::{Error, Event, Selection, follow};
use super::kind::{Kind, KindEvent};
use super::received::Received;
use crate::reconcile::cluster::ObjectKey;

/// An event or error of one of the kinds.
pub(super) type Item = (Kind, Result<KindEvent, Error>);

/// Returns the stream of all kinds; `pods` includes this node's Pods.
pub(super) fn all(client: &Client, node_name: &str, pods: bool) -> SelectAll<BoxStream<'static, Item>> {
    let services = Selection {
        labels: Some("!service.kubernetes.io/service-proxy-name"),
        fields: Some("spec.clusterIP!=None".to_owned()),
        ..Selection::default()
    };
    let slices = Selection { labels: Some("!service.kubernetes.io/headless"), ..Selection::default() };
    let [node, of_node] = [format!("metadata.name={node_name}"), format!("spec.nodeName={node_name}")]
        .map(|fields| Selection { fields: Some(fields), ..Selection::default() });
    let told = Arc::new(Once::new());
    let mut kinds = vec![
        of_kind(client, Kind::Services, services, &told, KindEvent::Service),
        of_kind(client, Kind::EndpointSlices, slices, &told, KindEvent::Slice),
        of_kind(client, Kind::Node, node, &told, KindEvent::Node),
        of_kind(client, Kind::ServiceCidrs, Selection::default(), &told, KindEvent::ServiceCidr),
    ];
    if pods {
        kinds.push(of_kind(client, Kind::Pods, of_node, &told, KindEvent::Pod));
    }
    stream::select_all(kinds)
}

/// Returns whether the server refuses a kind: it does not serve the kind, or RBAC forbids it.
pub(super) fn is_refused(error: &Error) -> bool {
    matches!(error.code(), Some(403 | 404))
}

/// Object that was fetched by its name, as an event of its watch; `None` if the server does not have the object.
pub(super) type Fetched = (Kind, ObjectKey, Result<Option<KindEvent>, kube::Error>);

/// Fetches an object by its name.
pub(super) async fn fetch(client: Client, kind: Kind, key: ObjectKey) -> Fetched {
    let event = match kind {
        Kind::Services => one(client, &key).await.map(|object| object.map(KindEvent::Service)),
        Kind::EndpointSlices => one(client, &key).await.map(|object| object.map(KindEvent::Slice)),
        Kind::Node | Kind::ServiceCidrs | Kind::Pods => Ok(None),
    };
    (kind, key, event)
}

/// Fetches one object as a list of one, which needs no more RBAC rights than the list of all.
async fn one<K>(client: Client, key: &ObjectKey) -> kube::Result<Option<Event<Received<K>>>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<Received<K>> = Api::namespaced(client, &key.namespace);
    let list = api.list(&ListParams::default().fields(&format!("metadata.name={}", key.name))).await?;
    Ok(list.items.into_iter().next().map(Event::Applied))
}

fn of_kind<K>(
    client: &Client,
    kind: Kind,
    selection: Selection,
    told: &Arc<Once>,
    wrap: fn(Event<Received<K>>) -> KindEvent,
) -> BoxStream<'static, Item>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let selection = Selection { optional: kind.is_optional(), ..selection };
    let events = follow(Api::all(client.clone()), selection, Arc::clone(told));
    events.map(move |event| (kind, event.map(wrap))).boxed()
}
