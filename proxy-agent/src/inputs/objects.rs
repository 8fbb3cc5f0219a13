//! Objects as an API server sends them.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::future::ready;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use crate::sources::Update;
use crate::sources::api;
use crate::sources::api::Server;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode};
use futures::stream::{self, StreamExt as _};
use kube::Client;
use tokio::sync::mpsc;

use super::node::{NAME, Node, check_problems, speaks_of_witness};

/// First byte of a line after which another answer begins; the letter after it names the kind.
const MARK: u8 = b'@';
/// Resources that are watched.
const RESOURCES: [&str; 5] = ["services", "endpointslices", "nodes", "servicecidrs", "pods"];
/// Number of polls without an update after which the source is left.
const PATIENCE: usize = 24;
/// Event after the objects of a streamed list.
const LIST_END: &str = r#"{"type":"BOOKMARK","object":{"kind":"","apiVersion":"","metadata":{"resourceVersion":"9","annotations":{"k8s.io/initial-events-end":"true"}}}}"#;
/// Valid object beside those of the input.
const GOOD: &str = r#"{"type":"ADDED","object":{"metadata":{"namespace":"witness","name":"witness"},"spec":{"clusterIP":"10.96.255.254","ports":[{"port":80}]}}}"#;
/// Answer to a request to stream a list that is sent as a whole.
const NO_STREAM: &str =
    r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}"#;

/// Uses `data` as the answers of an API server: objects in lists and watches. Valid objects are programmed; errors are
/// reported and do not affect other objects.
///
/// # Panics
/// If an object affects another one, or the maps have wrong contents.
pub fn objects(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut node = Node::new();
    let mut synced = false;
    // Nothing is programmed before the first full list.
    let mut held = Vec::new();
    let answers = Answers::new(data);
    let hides_witness = answers.has_whole_services() || speaks_of_witness(data);
    for update in runtime.block_on(follow(&answers)) {
        match update {
            Update::Changes(changes) if synced => node.take(changes),
            Update::Changes(changes) => held.extend(changes),
            Update::Synced => {
                synced = true;
                node.take(std::mem::take(&mut held));
                assert!(node.has_witness() || hides_witness);
            }
            Update::Problems(problems) => check_problems(&problems),
        }
    }
    if !synced {
        node.take(held);
    }
    node.ask();
    node.end();
}

/// Returns the updates of the source until it has taken all answers.
async fn follow(answers: &Answers) -> Vec<Update> {
    let asked = answers.clone();
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        ready(Ok::<_, Infallible>(asked.answer(&request)))
    });
    let server = Server { client: Client::new(service, "default"), url: "http://server/".to_owned() };
    let config = Node::config();
    let (sender, mut receiver) = mpsc::channel(64);
    let mut run = pin!(api::run(server, NAME, &config.opt_out, config.budgets, sender));
    let (mut updates, mut quiet) = (Vec::new(), 0);
    while quiet < PATIENCE {
        quiet += 1;
        if futures::poll!(run.as_mut()).is_ready() {
            break;
        }
        while let Ok(update) = receiver.try_recv() {
            updates.push(update);
            quiet = 0;
        }
        // Lets the client's own task run.
        tokio::task::yield_now().await;
    }
    updates
}

/// Answers of the server, by resource.
#[derive(Clone)]
struct Answers(Arc<Mutex<BTreeMap<&'static str, OfKind>>>);

#[derive(Default)]
struct OfKind {
    /// Whether the first answer is a list, not a stream.
    whole: bool,
    parts: VecDeque<Bytes>,
}

impl Answers {
    /// Splits an input into answers. A line that begins with `@` and the letter of a kind (s, e, n, c, p) begins
    /// another answer; with a capital letter, the first answer of its kind is a list.
    fn new(data: &[u8]) -> Self {
        let mut kinds: BTreeMap<&'static str, OfKind> = BTreeMap::new();
        let (mut kind, mut part) = ("services", Vec::new());
        let mut whole = Vec::new();
        for line in data.split_inclusive(|byte| *byte == b'\n') {
            if let [MARK, letter, ..] = line
                && let Some(other) = resource(letter.to_ascii_lowercase())
            {
                if !part.is_empty() {
                    kinds.entry(kind).or_default().parts.push_back(std::mem::take(&mut part).into());
                }
                kind = other;
                whole.extend(letter.is_ascii_uppercase().then_some(other));
            } else {
                part.extend_from_slice(line);
            }
        }
        kinds.entry(kind).or_default().parts.push_back(std::mem::take(&mut part).into());
        for kind in whole {
            kinds.entry(kind).or_default().whole = true;
        }
        Self(Arc::new(Mutex::new(kinds)))
    }

    /// Returns whether the list of Services is sent as a whole.
    fn has_whole_services(&self) -> bool {
        let kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kinds.get("services").is_some_and(|of_kind| of_kind.whole)
    }

    fn answer(&self, request: &Request<kube::client::Body>) -> Response<Body> {
        let (uri, mut kinds) = (request.uri(), self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let query = uri.query().unwrap_or_default();
        let name = RESOURCES.into_iter().find(|name| uri.path().ends_with(&format!("/{name}")));
        // A single object that is requested does not exist.
        let Some(name) =
            name.filter(|_| !query.contains("metadata.name%3D") || uri.path().ends_with("nodes"))
        else {
            return with(StatusCode::OK, Body::from(r#"{"metadata":{"resourceVersion":"9"},"items":[]}"#));
        };
        let of_kind = kinds.entry(name).or_default();
        let is_watch = query.contains("watch=true");
        let streams = query.contains("sendInitialEvents=true");
        match (is_watch, streams) {
            (true, true) if of_kind.whole => with(StatusCode::UNPROCESSABLE_ENTITY, Body::from(NO_STREAM)),
            (true, true) => {
                let good = if name == "services" { GOOD } else { "" };
                let first = of_kind.parts.pop_front().unwrap_or_default();
                let list = [good.into(), first, LIST_END.into()];
                with(StatusCode::OK, lines(list.into_iter().chain(of_kind.parts.drain(..))))
            }
            (true, false) => with(StatusCode::OK, lines(of_kind.parts.drain(..))),
            (false, _) => match of_kind.parts.pop_front() {
                Some(list) => with(StatusCode::OK, Body::from(list)),
                None => with(StatusCode::OK, lines(std::iter::empty())),
            },
        }
    }
}

/// Returns the resource that a letter stands for.
fn resource(letter: u8) -> Option<&'static str> {
    [b's', b'e', b'n', b'c', b'p'].iter().position(|of| *of == letter).map(|index| RESOURCES[index])
}

fn with(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// Returns a body with the parts as lines, which does not end.
fn lines(parts: impl Iterator<Item = Bytes>) -> Body {
    let all: Vec<Bytes> = parts.flat_map(|part| [part, Bytes::from_static(b"\n")]).collect();
    let pieces = stream::iter(all.into_iter().map(Ok::<_, Infallible>));
    Body::from_stream(pieces.chain(stream::pending()))
}
