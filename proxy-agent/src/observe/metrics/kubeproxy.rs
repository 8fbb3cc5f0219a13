//! Metrics that kube-proxy has, by its names; prefix `kubeproxy_`.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::labels::{Buckets, ByCode, ByFamily, ByPolicy, register};

type Seconds = Gauge<f64, AtomicU64>;
type Durations = Labelled<ByFamily, Histogram, Buckets>;

/// The metrics.
#[derive(Debug)]
pub(super) struct KubeProxy {
    pub(super) sync_duration: Durations,
    pub(super) full_sync_duration: Durations,
    pub(super) partial_sync_duration: Durations,
    pub(super) sync_last: Labelled<ByFamily, Seconds>,
    pub(super) sync_last_queued: Labelled<ByFamily, Seconds>,
    pub(super) network_programming: Durations,
    pub(super) endpoint_changes: Counter,
    pub(super) endpoint_changes_pending: Gauge,
    pub(super) service_changes: Counter,
    pub(super) service_changes_pending: Gauge,
    pub(super) no_local_endpoints: Labelled<ByPolicy, Gauge>,
    pub(super) sweep_duration: Durations,
    pub(super) swept: Labelled<ByFamily, Counter>,
    pub(super) healthz: Labelled<ByCode, Counter>,
    pub(super) livez: Labelled<ByCode, Counter>,
}

impl KubeProxy {
    /// Registers all of them. The encoder appends `_total` to the name of a counter, and nothing to that of a gauge.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let (sweep_duration, swept) = Self::sweeps(registry);
        let [(endpoint_changes, endpoint_changes_pending), (service_changes, service_changes_pending)] =
            Self::changes(registry);
        let metrics = Self {
            sync_duration: register(
                registry,
                "sync_proxy_rules_duration_seconds",
                "Time that a sync took, failed ones included",
                Durations::new_with_constructor(Buckets::Sync),
            ),
            full_sync_duration: register(
                registry,
                "sync_full_proxy_rules_duration_seconds",
                "Time that a sync of everything took: at the start, after a failure, when maps grow, when the zone of the Node changes",
                Durations::new_with_constructor(Buckets::Sync),
            ),
            partial_sync_duration: register(
                registry,
                "sync_partial_proxy_rules_duration_seconds",
                "Time that a sync of what has changed took",
                Durations::new_with_constructor(Buckets::Sync),
            ),
            sync_last: register(
                registry,
                "sync_proxy_rules_last_timestamp_seconds",
                "When the last successful sync ended, in seconds since 1970",
                Labelled::default(),
            ),
            sync_last_queued: register(
                registry,
                "sync_proxy_rules_last_queued_timestamp_seconds",
                "When a sync was last asked for, in seconds since 1970",
                Labelled::default(),
            ),
            network_programming: register(
                registry,
                "network_programming_duration_seconds",
                "Time from a change of a Service's pods to the kernel maps, by the trigger time of the EndpointSlice",
                Durations::new_with_constructor(Buckets::NetworkProgramming),
            ),
            endpoint_changes,
            endpoint_changes_pending,
            service_changes,
            service_changes_pending,
            no_local_endpoints: register(
                registry,
                "sync_proxy_rules_no_local_endpoints_total",
                "Service ports with a Local traffic policy that have endpoints, but none on this node",
                Labelled::default(),
            ),
            sweep_duration,
            swept,
            healthz: register(registry, "proxy_healthz", "Answers of /healthz", Labelled::default()),
            livez: register(registry, "proxy_livez", "Answers of /livez", Labelled::default()),
        };
        metrics.answer_from_zero();
        metrics
    }

    /// Makes the counters of answers appear with zero: a rate needs the zero before the first answer.
    fn answer_from_zero(&self) {
        for family in [&self.healthz, &self.livez] {
            for code in [200, 503] {
                drop(family.get_or_create(&ByCode { code }));
            }
        }
    }

    /// Registers the counters of changes seen and the gauges of changes that wait: of EndpointSlices, then of Services.
    fn changes(registry: &mut Registry) -> [(Counter, Gauge); 2] {
        [
            (
                "sync_proxy_rules_endpoint_changes",
                "EndpointSlice changes seen",
                "EndpointSlice changes that wait to be programmed",
            ),
            (
                "sync_proxy_rules_service_changes",
                "Service changes seen; kube-proxy counts each once per family",
                "Service changes that wait to be programmed",
            ),
        ]
        .map(|(name, seen, pending)| {
            let count = register(registry, name, seen, Counter::default());
            (count, register(registry, &format!("{name}_pending"), pending, Gauge::default()))
        })
    }

    /// Registers the metrics of sweeps for UDP sockets, by the names that kube-proxy has for its connection tracking.
    fn sweeps(registry: &mut Registry) -> (Durations, Labelled<ByFamily, Counter>) {
        let duration = register(
            registry,
            "conntrack_reconciler_sync_duration_seconds",
            "Time of a sweep for UDP sockets whose backend has left; one sweep looks at both families",
            Durations::new_with_constructor(Buckets::Sync),
        );
        let swept = register(
            registry,
            "conntrack_reconciler_deleted_entries",
            "Connected UDP sockets that were ended because their backend had left, by the family of the backend",
            Labelled::default(),
        );
        (duration, swept)
    }
}
