//! Requests to the API server, as clients of Kubernetes count them.
//!
//! They are counted once for the process, by a layer of every client: clients are made where no other metrics are at hand.

use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::{Request, Response, Uri};
use futures::future::BoxFuture;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tower::{Layer, Service};

use super::labels::Buckets;

/// What client-go puts in the place of a status for requests without an answer.
const NO_ANSWER: &str = "<error>";

static REQUESTS: LazyLock<Requests> = LazyLock::new(|| Requests {
    total: Labelled::default(),
    duration: Labelled::new_with_constructor(Buckets::Request),
});

#[derive(Debug)]
struct Requests {
    total: Labelled<ByRequest, Counter>,
    duration: Labelled<ByVerb, Histogram, Buckets>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRequest {
    code: String,
    method: String,
    host: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByVerb {
    verb: String,
    host: String,
}

/// Registers them, without a prefix.
pub(super) fn register(registry: &mut Registry) {
    let Requests { total, duration } = &*REQUESTS;
    registry.register(
        "rest_client_requests",
        "Requests to the API server, by method and HTTP status; without an answer the code is 'error' in angle brackets",
        total.clone(),
    );
    registry.register(
        "rest_client_request_duration_seconds",
        "Time until the answer of the API server began, by HTTP method; a watch is a GET",
        duration.clone(),
    );
}

/// Counts a request: its HTTP status, if it was answered, and how long that took.
pub(super) fn count(host: &str, method: &str, status: Option<u16>, took: std::time::Duration) {
    let code = status.map_or_else(|| NO_ANSWER.to_owned(), |status| status.to_string());
    let (method, host) = (method.to_owned(), host.to_owned());
    let by_verb = ByVerb { verb: method.clone(), host: host.clone() };
    REQUESTS.duration.get_or_create(&by_verb).observe(took.as_secs_f64());
    REQUESTS.total.get_or_create(&ByRequest { code, method, host }).inc();
}

/// The layer that counts.
#[derive(Clone, Debug)]
pub struct CountRequests {
    host: Arc<str>,
}

impl CountRequests {
    /// For a client of `server`.
    pub fn of(server: &Uri) -> Self {
        Self { host: server.authority().map_or("", |authority| authority.as_str()).into() }
    }
}

impl<S> Layer<S> for CountRequests {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, host: Arc::clone(&self.host) }
    }
}

/// A service whose requests are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    host: Arc<str>,
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (method, host) = (request.method().clone(), Arc::clone(&self.host));
        let start = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let status = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            count(&host, method.as_str(), status, start.elapsed());
            answer
        })
    }
}
