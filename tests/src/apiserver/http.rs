//! Handles a request and makes its response.

use std::convert::Infallible;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use axum::body::{self, Body, Bytes};
use axum::extract::Query;
use futures::StreamExt as _;
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::faults::{Gate, Streams};
use super::object::{Key, Object};
use super::resource::{Request, Resource, Verb};
use super::selector::Selection;
use super::status::Status;
use super::store::{Page, Start};
use super::watch::{STREAM_BEGINNING, Watch, error_line};
use super::write::{self, Write};
use super::{Shared, State};

/// Duration of a watch whose request names none.
const WATCH_TIME: Duration = Duration::from_secs(30 * 60);
/// Largest request body that is read, in bytes.
const BODY_LIMIT: usize = 64 << 20;
/// Objects of a list that are sent in one piece.
const PIECE: usize = 64;

/// The query parameters of lists and watches.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Params {
    watch: String,
    limit: String,
    r#continue: String,
    resource_version: String,
    resource_version_match: String,
    label_selector: String,
    field_selector: String,
    timeout_seconds: String,
    allow_watch_bookmarks: String,
    send_initial_events: String,
}

/// Target that a path names.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    resource: Resource,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    subresource: Option<&'a str>,
}

/// Answers one request. `break_write` lets a watch break its own connection.
pub(super) async fn handle(
    shared: Arc<Shared>,
    break_write: Arc<AtomicBool>,
    request: hyper::Request<Incoming>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let response = match route(parts.uri.path()) {
        Some(target) => serve(&shared, break_write, &parts, &target, body).await,
        None => discover(&parts),
    };
    response.unwrap_or_else(Status::into_response)
}

fn route(path: &str) -> Option<Target<'_>> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let (group, rest) = match segments.as_slice() {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => return None,
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
        rest => (None, rest),
    };
    let (plural, name, subresource) = match rest {
        [plural] => (plural, None, None),
        [plural, name] => (plural, Some(*name), None),
        [plural, name, subresource] => (plural, Some(*name), Some(*subresource)),
        _ => return None,
    };
    let resource = Resource::find(group, plural)?;
    let object_has_its_namespace = name.is_none() || resource.namespaced() == namespace.is_some();
    object_has_its_namespace.then_some(Target { resource, namespace, name, subresource })
}

async fn serve(
    shared: &Arc<Shared>,
    break_write: Arc<AtomicBool>,
    parts: &Parts,
    target: &Target<'_>,
    body: Incoming,
) -> Result<Response<Body>, Status> {
    let Query(params) = Query::<Params>::try_from_uri(&parts.uri)
        .map_err(|error| Status::new(400, format!("query parameters: {error}")))?;
    let resource = target.resource;
    let verb = match (parts.method.clone(), target.name) {
        (Method::GET, Some(_)) => Verb::Get,
        (Method::GET, None) if flag(&params.watch) => Verb::Watch,
        (Method::GET, None) => Verb::List,
        (Method::POST, None) => Verb::Create,
        (Method::PUT, Some(_)) => Verb::Update,
        (Method::PATCH, Some(_)) => Verb::Patch,
        (Method::DELETE, Some(_)) => Verb::Delete,
        _ => return Err(Status::new(405, "the server does not allow this method on the requested resource")),
    };
    let latency = {
        let mut state = shared.state();
        let path = parts.uri.path().to_owned();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        state.requests.push(Request { verb, resource, path, query, at: std::time::Instant::now() });
        state.access.judge(&parts.headers, verb, resource)?;
        state.faults.latency
    };
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    if let Some(failure) = shared.state().faults.take_failure(verb, resource) {
        return Err(failure);
    }
    let key = Key::new(target.namespace.unwrap_or_default(), target.name.unwrap_or_default());
    match verb {
        Verb::Get => {
            let object = shared.state().store.get(resource, &key);
            let object = object.ok_or_else(|| Status::not_found(resource, &key))?;
            Ok(document(StatusCode::OK, resource, &object))
        }
        Verb::List => {
            let selection = select(target, &params)?;
            let further_pages = !params.r#continue.is_empty();
            shared.pass(Gate { resource, further_pages }).await;
            let response = list(&mut shared.state(), resource, &selection, &params)?;
            let shared = Arc::clone(shared);
            Ok(response.map(|body| noted_at_end(body, shared, resource)))
        }
        Verb::Watch => watch(shared, break_write, resource, select(target, &params)?, &params).await,
        Verb::Create | Verb::Update | Verb::Patch | Verb::Delete => {
            let body = body::to_bytes(Body::new(body), BODY_LIMIT)
                .await
                .map_err(|error| Status::new(400, format!("the request has no readable body: {error}")))?;
            let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
            let write = Write {
                resource,
                key,
                status_only: subresource(target)?,
                content_type: content_type.unwrap_or("application/json"),
                body: &body,
            };
            write::write(&mut shared.state().store, verb, write)
        }
    }
}

fn subresource(target: &Target<'_>) -> Result<bool, Status> {
    match target.subresource {
        None => Ok(false),
        Some("status") if target.resource.has_status() => Ok(true),
        Some(_) => Err(Status::new(404, "the server could not find the requested resource")),
    }
}

fn flag(text: &str) -> bool {
    matches!(text, "true" | "1")
}

fn select(target: &Target<'_>, params: &Params) -> Result<Selection, Status> {
    let namespace = target.namespace.map(str::to_owned);
    Selection::parse(target.resource, namespace, &params.label_selector, &params.field_selector)
}

fn number<N: FromStr>(name: &str, text: &str) -> Result<Option<N>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|_not_a_number| Status::new(400, format!("{name}: invalid value \"{text}\"")))
}

fn list(
    state: &mut State,
    resource: Resource,
    selection: &Selection,
    params: &Params,
) -> Result<Response<Body>, Status> {
    let version = number::<u64>("resourceVersion", &params.resource_version)?;
    let mut limit = number::<usize>("limit", &params.limit)?.filter(|limit| *limit > 0);
    let (at, after) = if params.r#continue.is_empty() {
        // The client accepts any state: the list comes from the cache, which does not page.
        if version == Some(0) {
            limit = None;
        }
        (
            list_version(version, limit.is_some(), &params.resource_version_match, state.store.revision())?,
            None,
        )
    } else if version.is_some() {
        return Err(Status::new(400, "specifying resource version is not allowed when using continue"));
    } else {
        let (at, after) =
            read_token(&params.r#continue).ok_or_else(|| Status::new(400, "continue key is not valid"))?;
        (Some(at), Some(after))
    };
    let page = state.store.page(resource, selection, at, after.as_ref(), limit.unwrap_or(usize::MAX))?;
    Ok(list_response(resource, selection, page))
}

/// Returns the revision that has to be served exactly; `None` for the newest.
fn list_version(
    version: Option<u64>,
    limited: bool,
    version_match: &str,
    newest: u64,
) -> Result<Option<u64>, Status> {
    match (version_match, version) {
        ("", None) => Ok(None),
        ("NotOlderThan" | "Exact", None) => invalid("forbidden unless resourceVersion is provided"),
        ("Exact", Some(0)) => invalid("forbidden for resourceVersion \"0\""),
        ("Exact", Some(version)) => Ok(Some(version)),
        // A limit without a match parameter asks for exactly that revision.
        ("", Some(version)) if limited && version > 0 => Ok(Some(version)),
        ("" | "NotOlderThan", Some(version)) if version > newest => Err(Status::too_large(version, newest)),
        ("" | "NotOlderThan", Some(_)) => Ok(None),
        _ => invalid("supported values: \"Exact\", \"NotOlderThan\""),
    }
}

fn invalid(why: &str) -> Result<Option<u64>, Status> {
    Err(Status::new(422, format!("resourceVersionMatch: Forbidden: {why}")))
}

/// Makes a continue token: the revision of the first page, and the last key of this one.
fn make_token(revision: u64, last: &Key) -> String {
    format!("{revision}/{}/{}", last.namespace, last.name)
}

fn read_token(token: &str) -> Option<(u64, Key)> {
    let mut parts = token.splitn(3, '/');
    let revision = parts.next()?.parse().ok()?;
    Some((revision, Key::new(parts.next()?, parts.next()?)))
}

fn list_response(resource: Resource, selection: &Selection, page: Page) -> Response<Body> {
    let mut metadata = json!({ "resourceVersion": page.revision.to_string() });
    if let Some(last) = page.objects.last()
        && page.remaining > 0
    {
        metadata["continue"] = json!(make_token(page.revision, &last.key));
        if !selection.selects() {
            metadata["remainingItemCount"] = json!(page.remaining);
        }
    }
    let (kind, api_version) = (resource.kind(), resource.api_version());
    let head =
        format!(r#"{{"kind":"{kind}List","apiVersion":"{api_version}","metadata":{metadata},"items":["#);
    let mut nonsense = page.nonsense.join(",");
    if !nonsense.is_empty() && !page.objects.is_empty() {
        nonsense.push(',');
    }
    let pieces: Vec<Vec<Arc<Object>>> = page.objects.chunks(PIECE).map(<[_]>::to_vec).collect();
    let pieces = pieces.into_iter().enumerate().flat_map(|(index, piece)| {
        let comma = if index == 0 { "" } else { "," };
        [Bytes::from(comma), Bytes::from(items(&piece))]
    });
    let all = [head, nonsense].map(Bytes::from).into_iter().chain(pieces).chain([Bytes::from("]}\n")]);
    let body = Body::from_stream(futures::stream::iter(all.map(Ok::<_, Infallible>)));
    respond(StatusCode::OK, body)
}

/// Records the time at which the body is read to its end, which is when its last piece goes to the socket.
fn noted_at_end(body: Body, shared: Arc<Shared>, resource: Resource) -> Body {
    let end = futures::stream::once(async move {
        shared.state().lists_sent.insert(resource, std::time::Instant::now());
        Ok(Bytes::new())
    });
    Body::from_stream(body.into_data_stream().chain(end))
}

fn items(objects: &[Arc<Object>]) -> Vec<u8> {
    let items: Vec<&[u8]> = objects.iter().map(|object| object.as_item()).collect();
    items.join(&b","[..])
}

async fn watch(
    shared: &Arc<Shared>,
    break_write: Arc<AtomicBool>,
    resource: Resource,
    selection: Selection,
    params: &Params,
) -> Result<Response<Body>, Status> {
    let bookmarks = flag(&params.allow_watch_bookmarks);
    let streams = shared.state().faults.streams;
    if streams == Streams::Refused && !params.send_initial_events.is_empty() {
        return Err(Status::new(
            422,
            "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature \
             gate is enabled",
        ));
    }
    if streams == Streams::Stuck && flag(&params.send_initial_events) {
        std::future::pending::<()>().await;
    }
    let send_initial = streams == Streams::Offered && flag(&params.send_initial_events);
    if !params.send_initial_events.is_empty() && params.resource_version_match != "NotOlderThan" {
        return Err(Status::new(
            422,
            "resourceVersionMatch: Forbidden: sendInitialEvents needs NotOlderThan",
        ));
    }
    if send_initial && !bookmarks {
        return Err(Status::new(422, "allowWatchBookmarks: Forbidden: sendInitialEvents needs it"));
    }
    let start =
        match number::<u64>("resourceVersion", &params.resource_version)?.filter(|version| *version > 0) {
            _ if send_initial => Start::State,
            Some(version) => Start::Revision(version),
            None if params.send_initial_events.is_empty() || streams == Streams::Ignored => Start::State,
            None => Start::Latest,
        };
    let timeout = number::<u64>("timeoutSeconds", &params.timeout_seconds)?.filter(|seconds| *seconds > 0);
    let until = Instant::now() + timeout.map_or(WATCH_TIME, Duration::from_secs);
    if matches!(start, Start::State) {
        shared.pass(Gate { resource, further_pages: false }).await;
    }
    let mut state = shared.state();
    if state.faults.short_watches && !matches!(start, Start::State) {
        return Ok(respond(StatusCode::OK, Body::empty()));
    }
    let (items, from) = match state.store.watch(resource, &selection, start, send_initial) {
        Ok(begun) => begun,
        Err(expired) if state.faults.expired_as_http => return Err(expired),
        Err(expired) => return Ok(respond(StatusCode::OK, Body::from(error_line(&expired)))),
    };
    drop(state);
    let shared = Arc::clone(shared);
    let beginning = STREAM_BEGINNING.min(items.len() / 2);
    let watch = Watch {
        shared,
        resource,
        selection,
        items,
        from,
        bookmarks,
        until,
        break_write,
        cut_next_event: false,
        beginning: send_initial.then_some(beginning),
    };
    Ok(respond(StatusCode::OK, watch.into_body()))
}

/// Makes a response of an object.
pub(super) fn document(status: StatusCode, resource: Resource, object: &Object) -> Response<Body> {
    let mut body = Vec::with_capacity(object.as_item().len() + 64);
    object.write(resource, &mut body);
    respond(status, Body::from(body))
}

/// Makes a JSON response.
pub(super) fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn discover(parts: &Parts) -> Result<Response<Body>, Status> {
    let segments: Vec<&str> = parts.uri.path().split('/').filter(|segment| !segment.is_empty()).collect();
    let value = match segments.as_slice() {
        ["healthz" | "livez" | "readyz"] => return Ok(Response::new(Body::from("ok"))),
        ["version"] => json!({ "major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "test" }),
        ["api"] => json!({ "kind": "APIVersions", "versions": ["v1"] }),
        ["apis"] => {
            let groups: Vec<Value> = ["discovery.k8s.io", "events.k8s.io", "networking.k8s.io"]
                .into_iter()
                .map(|group| {
                    let version = json!({ "groupVersion": format!("{group}/v1"), "version": "v1" });
                    json!({ "name": group, "versions": [version], "preferredVersion": version })
                })
                .collect();
            json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
        }
        ["api", "v1"] => resources_of(""),
        ["apis", group, "v1"] if Resource::ALL.iter().any(|resource| resource.group() == *group) => {
            resources_of(group)
        }
        _ => return Err(Status::new(404, "the server could not find the requested resource")),
    };
    Ok(respond(StatusCode::OK, Body::from(value.to_string())))
}

fn resources_of(group: &str) -> Value {
    let resources: Vec<Value> = Resource::ALL
        .iter()
        .filter(|resource| resource.group() == group)
        .map(|resource| {
            json!({
                "name": resource.plural(), "singularName": "", "namespaced": resource.namespaced(),
                "kind": resource.kind(),
                "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
            })
        })
        .collect();
    let group_version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
    json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources })
}
