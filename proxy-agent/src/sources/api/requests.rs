//! Metrics of requests to the API server, as Kubernetes clients have them.
//!
//! The metrics are global to the process, and a layer of every client updates them: clients are made where the other
//! metrics are not at hand.

use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::http::{Request, Response, Uri};
use futures::future::BoxFuture;
use hyper::body::{Body, Buf as _, Frame, SizeHint};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family as Labelled, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tower::{Layer, Service};

/// Code that client-go uses for requests without an answer, in place of a status.
const NO_ANSWER: &str = "<error>";

static REQUESTS: LazyLock<Requests> = LazyLock::new(|| Requests {
    total: Labelled::default(),
    duration: Labelled::new_with_constructor(Buckets::Request),
    sent: Labelled::new_with_constructor(Buckets::Size),
    received: Labelled::new_with_constructor(Buckets::Size),
});

#[derive(Debug)]
struct Requests {
    total: Labelled<ByRequest, Counter>,
    duration: Labelled<ByVerb, Histogram, Buckets>,
    sent: Labelled<ByVerb, Histogram, Buckets>,
    received: Labelled<ByVerb, Histogram, Buckets>,
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

/// Buckets of histograms, as client-go has them.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    /// 5 ms to a minute.
    Request,
    /// 64 bytes to 16 MiB.
    Size,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Request => {
                Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
            }
            Self::Size => Histogram::new([
                64.0,
                256.0,
                512.0,
                1024.0,
                4096.0,
                16384.0,
                65536.0,
                262_144.0,
                1_048_576.0,
                4_194_304.0,
                16_777_216.0,
            ]),
        }
    }
}

/// Registers the metrics, without a prefix.
pub(crate) fn register(registry: &mut Registry) {
    let Requests { total, duration, sent, received } = &*REQUESTS;
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
    registry.register(
        "rest_client_request_size_bytes",
        "Size of what was sent to the API server beside the head of the request, by HTTP method",
        sent.clone(),
    );
    registry.register(
        "rest_client_response_size_bytes",
        "Size of what the API server answered beside the head, by HTTP method; watches have none",
        received.clone(),
    );
}

/// Counts one request to `host` in every metric.
#[cfg(test)]
pub(crate) fn example(host: &str) {
    let of = ByVerb::new("GET", host);
    of.answered(None, Duration::ZERO);
    of.sent(0);
    of.received(0);
}

impl ByVerb {
    fn new(verb: &str, host: &str) -> Self {
        Self { verb: verb.to_owned(), host: host.to_owned() }
    }

    /// Counts a request that took this time, with its HTTP status if there was an answer.
    fn answered(&self, status: Option<u16>, took: Duration) {
        let code = status.map_or_else(|| NO_ANSWER.to_owned(), |status| status.to_string());
        REQUESTS.duration.get_or_create(self).observe(took.as_secs_f64());
        let (method, host) = (self.verb.clone(), self.host.clone());
        REQUESTS.total.get_or_create(&ByRequest { code, method, host }).inc();
    }

    fn sent(&self, bytes: u64) {
        REQUESTS.sent.get_or_create(self).observe(bytes as f64);
    }

    fn received(&self, bytes: u64) {
        REQUESTS.received.get_or_create(self).observe(bytes as f64);
    }
}

/// Layer that counts requests.
#[derive(Clone, Debug)]
pub(crate) struct CountRequests {
    host: Arc<str>,
}

impl CountRequests {
    /// Creates the layer for a client of `server`.
    pub(crate) fn of(server: &Uri) -> Self {
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
pub(crate) struct Counted<S> {
    inner: S,
    host: Arc<str>,
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    B: Body,
{
    type Response = Response<Measured<R>>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let of = ByVerb::new(request.method().as_str(), &self.host);
        if let Some(bytes) = request.body().size_hint().exact() {
            of.sent(bytes);
        }
        let is_watch = is_watch(request.uri());
        let start = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let status = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            of.answered(status, start.elapsed());
            Ok(answer?.map(|inner| Measured { inner, bytes: 0, of: (!is_watch).then_some(of) }))
        })
    }
}

fn is_watch(uri: &Uri) -> bool {
    let query = uri.query().unwrap_or_default();
    query.split('&').any(|parameter| ["watch=true", "watch=1"].contains(&parameter))
}

/// Body of an answer. When it is dropped, the number of bytes that were read is recorded.
#[derive(Debug)]
pub(crate) struct Measured<R> {
    inner: R,
    bytes: u64,
    /// `None` for a watch, which ends at an arbitrary point.
    of: Option<ByVerb>,
}

impl<R: Body + Unpin> Body for Measured<R> {
    type Data = R::Data;
    type Error = R::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<R::Data>, R::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            self.bytes += frame.data_ref().map_or(0, |data| data.remaining() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<R> Drop for Measured<R> {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            of.received(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    type Text = axum::body::Body;

    /// Returns sum and count of the sizes of GETs to `host`.
    fn sizes(host: &str, metric: &str) -> Vec<String> {
        let mut registry = Registry::default();
        register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let of = ["sum", "count"].map(|part| format!("{metric}_{part}{{verb=\"GET\",host=\"{host}\"}} "));
        of.iter()
            .filter_map(|name| text.lines().find_map(|line| line.strip_prefix(name)))
            .map(str::to_owned)
            .collect()
    }

    #[tokio::test]
    async fn what_is_sent_and_received_is_measured_and_a_watch_is_not() {
        let server: Uri = "https://sizes.example:6443".parse().unwrap();
        let answering = tower::service_fn(|_: Request<Text>| async {
            Ok::<_, Infallible>(Response::new(Text::from("x".repeat(700))))
        });
        let mut client = CountRequests::of(&server).layer(answering);
        for (path, sent) in
            [("/services?limit=500", "question"), ("/services?a=1&watch=true", ""), ("/gone", "")]
        {
            let request = Request::get(path).body(Text::from(sent)).unwrap();
            let answer = client.call(request).await.unwrap();
            if path != "/gone" {
                let body = axum::body::to_bytes(Text::new(answer.into_body()), 1000).await.unwrap();
                assert_eq!(body.len(), 700);
            }
        }
        let host = "sizes.example:6443";
        assert_eq!(sizes(host, "rest_client_request_size_bytes"), ["8.0", "3"]);
        // One answer was read, and one was dropped unread.
        assert_eq!(sizes(host, "rest_client_response_size_bytes"), ["700.0", "2"]);
    }
}
