//! `/healthz`, `/livez` and `/readyz` on `--healthz-bind-address` (default 0.0.0.0:10256).
//!
//! The sync loop reports its progress to [`Health`], the Node watcher reports whether load balancers may send traffic
//! here, and [`judge()`] turns both into an answer. `/healthz` and `/livez` answer exactly as kube-proxy does: load
//! balancers and autoscalers read them.
//!
//! Services with a `healthCheckNodePort` have servers of their own: [`check_ports`]. [`checks`] decides the answers of
//! these servers.

pub(crate) mod check_ports;
pub(crate) mod checks;
mod judge;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::Family;

pub(crate) use self::judge::{Answer, HealthState, Now, judge};
use crate::observe::metrics::Metrics;
use crate::observe::probe::Probe;

/// Name of the health server in logs and errors.
pub(crate) const SERVER: &str = "health";

/// State behind the probes, shared by all tasks that report to it. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Health(Arc<Mutex<HealthState>>);

impl Health {
    /// Makes the state of an agent that starts. A change that waits for twice `sync_period` has waited too long.
    pub(crate) fn new(sync_period: Duration) -> Self {
        Self(Arc::new(Mutex::new(HealthState::new(sync_period))))
    }

    /// Notes that a change of this family waits to be programmed.
    pub(crate) fn queued(&self, family: Family) {
        self.state().queued(family, Instant::now());
    }

    /// Notes that all waiting changes of this family have been programmed. The first call, at the start of the sync
    /// loop, makes the family judged from then on.
    pub(crate) fn updated(&self, family: Family) {
        self.state().updated(family, wall_clock());
    }

    /// Sets what still has to happen before `/readyz` says yes, as a clause: "the first list has not arrived yet".
    pub(crate) fn waiting_for(&self, reason: impl Into<String>) {
        self.state().waiting_for = Some(reason.into());
    }

    /// Notes that the first full list is programmed: `/readyz` says yes from now on.
    pub(crate) fn programmed(&self) {
        self.state().waiting_for = None;
    }

    /// Sets whether this node may get traffic from load balancers: its Node object has been seen, is not being deleted
    /// and has no taint `ToBeDeletedByClusterAutoscaler`. A source without Nodes sets `true` once.
    pub(crate) fn node(&self, eligible: bool) {
        self.state().node_eligible = eligible;
    }

    /// Returns whether the sync loop keeps up (`serviceProxyHealthy` of healthCheckNodePorts).
    pub(crate) fn healthy(&self) -> bool {
        self.state().healthy(Instant::now())
    }

    /// Returns the answer to a probe at this moment.
    pub(crate) fn answer(&self, probe: Probe) -> Answer {
        judge(&self.state(), probe, Now { instant: Instant::now(), time: wall_clock() })
    }

    fn state(&self) -> MutexGuard<'_, HealthState> {
        // Every method leaves the state whole, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wall_clock() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since_1970.as_nanos())
        .ok()
        .and_then(|nanoseconds| Timestamp::from_nanosecond(nanoseconds).ok())
        .unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Returns the router of the probes, for any method. Answers are counted in `metrics`.
pub(crate) fn router(health: Health, metrics: Arc<Metrics>) -> Router {
    type Shared = State<(Health, Arc<Metrics>)>;
    Router::new()
        .route("/healthz", any(|State(shared): Shared| async move { respond(&shared, Probe::Healthz) }))
        .route("/livez", any(|State(shared): Shared| async move { respond(&shared, Probe::Livez) }))
        .route("/readyz", any(|State(shared): Shared| async move { respond(&shared, Probe::Readyz) }))
        .with_state((health, metrics))
}

fn respond((health, metrics): &(Health, Arc<Metrics>), probe: Probe) -> Response {
    let response = respond_with(health.answer(probe));
    metrics.probed(probe, response.status().as_u16());
    response
}

fn respond_with(answer: Answer) -> Response {
    let Answer { ok, content_type, body } = answer;
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    (status, headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::http::testing::{request, with_server};
    use crate::observe::metrics::Readers;

    const SYNC_PERIOD: Duration = Duration::from_secs(30);

    fn serve<F: Future<Output = ()>>(
        health: &Health,
        test: impl FnOnce(std::net::SocketAddr, Arc<Metrics>) -> F,
    ) {
        let metrics = Arc::new(Metrics::new(Readers::default()));
        let router = router(health.clone(), Arc::clone(&metrics));
        with_server(router, |address| test(address, metrics));
    }

    #[test]
    fn p198_fresh_start_over_http() {
        let health = Health::new(SYNC_PERIOD);
        health.node(true);
        serve(&health, |address, metrics| async move {
            for path in ["/healthz", "/livez"] {
                // Any method.
                for method in ["GET", "POST"] {
                    let response = request(address, method, path).await.unwrap();
                    assert_eq!(response.status, 200, "{response:?}");
                }
            }
            assert_eq!(request(address, "HEAD", "/healthz").await.unwrap().body, "");
            assert_eq!(request(address, "GET", "/other").await.unwrap().status, 404);
            let text = metrics.text();
            assert!(text.contains("kubeproxy_proxy_healthz_total{code=\"200\"} 3\n"), "{text}");
            assert!(text.contains("kubeproxy_proxy_livez_total{code=\"200\"} 2\n"), "{text}");
            assert!(text.contains("kubeproxy_proxy_livez_total{code=\"503\"} 0\n"), "{text}");
        });
    }

    #[test]
    fn p204_headers_and_body_over_http() {
        let health = Health::new(SYNC_PERIOD);
        health.updated(Family::V4);
        // The Node has not been seen: 503, with the same body.
        serve(&health, |address, _| async move {
            let response = request(address, "GET", "/healthz").await.unwrap();
            assert_eq!(response.status, 503);
            assert!(response.head.contains("\r\ncontent-type: application/json\r\n"), "{}", response.head);
            assert!(response.head.contains("\r\nx-content-type-options: nosniff\r\n"), "{}", response.head);
            let body: serde_json::Value = serde_json::from_str(&response.body).unwrap();
            for field in ["lastUpdated", "currentTime"] {
                body[field].as_str().unwrap().parse::<Timestamp>().unwrap();
            }
            assert_eq!(body["nodeEligible"], false);
            assert_eq!(body["status"]["IPv4"]["healthy"], true);
            assert!(!response.body.ends_with('\n'));
        });
    }

    #[test]
    fn readiness_waits_for_the_first_full_list() {
        let health = Health::new(SYNC_PERIOD);
        let teller = health.clone();
        serve(&health, |address, _| async move {
            let first = request(address, "GET", "/readyz").await.unwrap();
            assert_eq!((first.status, &*first.body), (503, "not ready: nothing has been programmed yet\n"));
            assert!(first.head.contains("\r\ncontent-type: text/plain; charset=utf-8\r\n"), "{}", first.head);
            teller.waiting_for("the probe connection has not come through");
            let second = request(address, "GET", "/readyz").await.unwrap();
            assert_eq!(second.body, "not ready: the probe connection has not come through\n");
            teller.programmed();
            let third = request(address, "GET", "/readyz").await.unwrap();
            assert_eq!((third.status, &*third.body), (200, "ok"));
        });
    }
}
