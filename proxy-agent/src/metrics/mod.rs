//! Metrics: kube-proxy's names where we mean the same thing (prefix `kubeproxy_`), our own beside them (prefix
//! `vipr_`); served as OpenMetrics text on `--metrics-bind-address` (default 127.0.0.1:10249).
//!
//! The sync loop and its helpers write through the methods of [`Metrics`], which cost an atomic operation or two.
//! What only the kernel knows is read from the maps at each scrape, by the closures in [`Readers`].

mod scrape;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family as Labelled, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use proxy_common::addr::Family;

pub use self::scrape::{MapUsage, ReadError, Readers};
use crate::health::Probe;
use crate::kube_proxy::KubeProxyConfiguration;

/// Port of the metrics server when `--metrics-bind-address` names none.
pub const DEFAULT_PORT: u16 = 10249;

/// Name of the metrics server in logs and errors.
pub const SERVER: &str = "metrics";

/// Content-Type of the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Seconds = Gauge<f64, AtomicU64>;
type Durations = Labelled<ByFamily, Histogram, Buckets>;

/// All metrics, and the registry that prints them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sync_duration: Durations,
    sync_last: Labelled<ByFamily, Seconds>,
    sync_last_queued: Labelled<ByFamily, Seconds>,
    network_programming: Durations,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    no_local_endpoints: Labelled<ByPolicy, Gauge>,
    healthz: Labelled<ByCode, Counter>,
    livez: Labelled<ByCode, Counter>,
    sockets_destroyed: Counter,
    flows_collected: Counter,
    problems: Gauge,
    events: Labelled<ByFate, Counter>,
}

/// What became of an Event for the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum EventFate {
    /// The API server has it.
    Written,
    /// The API server refused it or did not answer.
    Failed,
    /// There were too many.
    Dropped,
}

/// Which of a Service's two traffic policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// `internalTrafficPolicy`.
    Internal,
    /// `externalTrafficPolicy`.
    External,
}

impl Metrics {
    /// All metrics at zero. `readers` are called at each scrape.
    pub fn new(readers: Readers) -> Self {
        let mut registry = Registry::default();
        let kubeproxy = registry.sub_registry_with_prefix("kubeproxy");
        // prometheus-client appends `_total` to the name of a counter and nothing to that of a gauge.
        let sync_duration = register(
            kubeproxy,
            "sync_proxy_rules_duration_seconds",
            "Time that a sync took, failed ones included",
            Durations::new_with_constructor(Buckets::Sync),
        );
        let sync_last = register(
            kubeproxy,
            "sync_proxy_rules_last_timestamp_seconds",
            "When the last successful sync ended, in seconds since 1970",
            Labelled::default(),
        );
        let sync_last_queued = register(
            kubeproxy,
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a sync was last asked for, in seconds since 1970",
            Labelled::default(),
        );
        let network_programming = register(
            kubeproxy,
            "network_programming_duration_seconds",
            "Time from a change of a Service's pods to the kernel maps, by the trigger time of the EndpointSlice",
            Durations::new_with_constructor(Buckets::NetworkProgramming),
        );
        let endpoint_changes = register(
            kubeproxy,
            "sync_proxy_rules_endpoint_changes",
            "EndpointSlice changes seen",
            Counter::default(),
        );
        let endpoint_changes_pending = register(
            kubeproxy,
            "sync_proxy_rules_endpoint_changes_pending",
            "EndpointSlice changes that wait to be programmed",
            Gauge::default(),
        );
        let service_changes = register(
            kubeproxy,
            "sync_proxy_rules_service_changes",
            "Service changes seen",
            Counter::default(),
        );
        let service_changes_pending = register(
            kubeproxy,
            "sync_proxy_rules_service_changes_pending",
            "Service changes that wait to be programmed",
            Gauge::default(),
        );
        let no_local_endpoints = register(
            kubeproxy,
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local traffic policy that have endpoints, but none on this node",
            Labelled::default(),
        );
        let healthz = register(kubeproxy, "proxy_healthz", "Answers of /healthz", Labelled::default());
        let livez = register(kubeproxy, "proxy_livez", "Answers of /livez", Labelled::default());

        let vipr = registry.sub_registry_with_prefix("vipr");
        let sockets_destroyed = register(
            vipr,
            "sockets_destroyed",
            "Connected UDP sockets that were ended because their backend had left",
            Counter::default(),
        );
        let flows_collected = register(
            vipr,
            "flows_collected",
            "Expired flows of the packet edge whose memory was freed",
            Counter::default(),
        );
        let problems = register(
            vipr,
            "problems",
            "Objects or files that cannot be used at present; `proxy-agent status` lists them",
            Gauge::default(),
        );
        let events = register(vipr, "events", "Events for the Kubernetes API", Labelled::default());
        vipr.register("build", "The agent that runs", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        readers.register(vipr);

        // A rate over answers needs the zero before the first one.
        for family in [&healthz, &livez] {
            for code in [200, 503] {
                drop(family.get_or_create(&ByCode { code }));
            }
        }
        Self {
            registry,
            sync_duration,
            sync_last,
            sync_last_queued,
            network_programming,
            endpoint_changes,
            endpoint_changes_pending,
            service_changes,
            service_changes_pending,
            no_local_endpoints,
            healthz,
            livez,
            sockets_destroyed,
            flows_collected,
            problems,
            events,
        }
    }

    /// A sync was asked for.
    pub fn sync_queued(&self, family: Family) {
        self.sync_last_queued.get_or_create(&family.into()).set(now());
    }

    /// A sync ended.
    pub fn synced(&self, family: Family, took: Duration, ok: bool) {
        self.sync_duration.get_or_create(&family.into()).observe(took.as_secs_f64());
        if ok {
            self.sync_last.get_or_create(&family.into()).set(now());
        }
    }

    /// An applied slice change reached the kernel maps this long after its trigger time. Not for the first list,
    /// and not for deletions.
    pub fn network_programmed(&self, family: Family, after: Duration) {
        self.network_programming.get_or_create(&family.into()).observe(after.as_secs_f64());
    }

    /// Slice changes arrived.
    pub fn endpoint_changes(&self, seen: u64) {
        self.endpoint_changes.inc_by(seen);
    }

    /// So many slice changes wait.
    pub fn endpoint_changes_pending(&self, waiting: usize) {
        self.endpoint_changes_pending.set(gauge(waiting));
    }

    /// Service changes arrived.
    pub fn service_changes(&self, seen: u64) {
        self.service_changes.inc_by(seen);
    }

    /// So many Service changes wait.
    pub fn service_changes_pending(&self, waiting: usize) {
        self.service_changes_pending.set(gauge(waiting));
    }

    /// So many service ports have a Local policy and endpoints, but none here.
    pub fn no_local_endpoints(&self, policy: PolicyKind, family: Family, service_ports: usize) {
        let labels = ByPolicy { traffic_policy: policy, ip_family: FamilyLabel(family) };
        self.no_local_endpoints.get_or_create(&labels).set(gauge(service_ports));
    }

    /// A probe was answered with this HTTP status.
    pub fn probed(&self, probe: Probe, code: u16) {
        match probe {
            Probe::Healthz => drop(self.healthz.get_or_create(&ByCode { code }).inc()),
            Probe::Livez => drop(self.livez.get_or_create(&ByCode { code }).inc()),
            Probe::Readyz => {}
        }
    }

    /// Sockets were ended because their backend had left.
    pub fn sockets_destroyed(&self, count: usize) {
        self.sockets_destroyed.inc_by(count as u64);
    }

    /// Expired flows were removed.
    pub fn flows_collected(&self, count: u64) {
        self.flows_collected.inc_by(count);
    }

    /// So many objects or files cannot be used.
    pub fn problems(&self, count: usize) {
        self.problems.set(gauge(count));
    }

    /// An Event was written, or not.
    pub fn event(&self, result: EventFate) {
        self.events.get_or_create(&ByFate { result }).inc();
    }

    /// Everything as OpenMetrics text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String fails only if a metric cannot be printed; what is there is still worth having.
        if let Err(error) = text::encode(&mut out, &self.registry) {
            tracing::warn!(%error, "a metric cannot be printed");
        }
        out
    }
}

/// `/metrics`, and what kube-proxy serves beside it: `/healthz`, `/proxyMode` and `/configz`, which shows the
/// configuration with all defaults.
pub fn router(metrics: Arc<Metrics>, configuration: &KubeProxyConfiguration) -> Router {
    let configz = Json(serde_json::json!({ "kubeproxy.config.k8s.io": configuration }));
    let scrape =
        |State(metrics): State<Arc<Metrics>>| async move { ([(CONTENT_TYPE, OPEN_METRICS)], metrics.text()) };
    Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(|| async { "ok" }))
        .route("/proxyMode", get(|| async { "ebpf" }))
        .route("/configz", get(|| async { configz }))
        .with_state(metrics)
}

/// Registers `metric` and gives it back. A help text gets its full stop from the registry.
fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn gauge(value: usize) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FamilyLabel(Family);

impl EncodeLabelValue for FamilyLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.0.to_string(), encoder)
    }
}

impl EncodeLabelValue for PolicyKind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Self::Internal => "internal",
            Self::External => "external",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByFamily {
    ip_family: FamilyLabel,
}

impl From<Family> for ByFamily {
    fn from(family: Family) -> Self {
        Self { ip_family: FamilyLabel(family) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPolicy {
    traffic_policy: PolicyKind,
    ip_family: FamilyLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByFate {
    result: EventFate,
}

/// kube-proxy's histogram buckets, in seconds.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    /// 1 ms, doubling, to 16.384 s.
    Sync,
    /// Dense up to a minute, then to five.
    NetworkProgramming,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Sync => Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            Self::NetworkProgramming => {
                let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
                Histogram::new([0.25, 0.5].into_iter().chain(whole.map(f64::from)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
