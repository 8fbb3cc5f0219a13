//! Metrics: kube-proxy's names where we mean the same thing (prefix `kubeproxy_`), our own beside them (prefix
//! `vipr_`); served on `--metrics-bind-address` (default 127.0.0.1:10249). `docs/metrics.md` lists them.
//!
//! The sync loop and its helpers write through the methods of [`Metrics`], which cost an atomic operation or two.
//! What only the kernel knows is read from the maps at each scrape, by the closures in [`Readers`].

mod buckets;
mod kubeproxy;
mod labels;
mod own;
mod process;
mod scrape;
mod serve;
mod slis;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};
use proxy_common::addr::Family;

use self::kubeproxy::KubeProxy;
use self::labels::{ByCode, ByFate, ByFeature, ByMap, ByPolicy, ByStage, FamilyLabel};
pub use self::labels::{EventFate, PolicyKind, Stage};
use self::own::Own;
pub use self::scrape::{MapUsage, ReadError, Readers};
pub use self::serve::router;
use self::slis::{ByCheck, Slis};
use crate::host::sockets::Report;
use crate::observe::health::Probe;
use crate::sources::api::requests;

/// Name of the metrics server in logs and errors.
pub const SERVER: &str = "metrics";

/// All metrics, and the registry that prints them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    kubeproxy: KubeProxy,
    own: Own,
    features: Labelled<ByFeature, Gauge>,
    slis: Slis,
}

/// How a sync went.
#[derive(Clone, Copy, Debug)]
pub struct SyncResult {
    /// It looked at everything, not only at what had changed.
    pub full: bool,
    /// Everything is programmed.
    pub ok: bool,
    /// From its start to its end.
    pub took: Duration,
}

impl Metrics {
    /// All metrics at zero. `readers` are called at each scrape.
    pub fn new(readers: Readers) -> Self {
        let mut registry = Registry::default();
        let kubeproxy = KubeProxy::new(registry.sub_registry_with_prefix("kubeproxy"));
        let vipr = registry.sub_registry_with_prefix("vipr");
        let own = Own::new(vipr);
        readers.register(vipr);
        process::register(&mut registry);
        requests::register(&mut registry);
        let help = "Whether a feature gate that has a meaning here is on";
        let features = register(&mut registry, "kubernetes_feature_enabled", help, Labelled::default());
        Self { registry, kubeproxy, own, features, slis: Slis::new() }
    }

    /// A sync was asked for.
    pub fn sync_queued(&self, family: Family) {
        self.kubeproxy.sync_last_queued.get_or_create(&family.into()).set(now());
    }

    /// A sync of these families ended.
    pub fn synced(&self, families: &[Family], sync: SyncResult) {
        let of_its_kind = match sync.full {
            true => &self.kubeproxy.full_sync_duration,
            false => &self.kubeproxy.partial_sync_duration,
        };
        for &family in families {
            for durations in [&self.kubeproxy.sync_duration, of_its_kind] {
                durations.get_or_create(&family.into()).observe(sync.took.as_secs_f64());
            }
            if sync.ok {
                self.kubeproxy.sync_last.get_or_create(&family.into()).set(now());
            }
        }
        if !sync.ok {
            self.own.sync_failures.inc();
        }
    }

    /// Changes have spent this long in a stage.
    pub fn stage(&self, stage: Stage, took: Duration) {
        self.own.programming.get_or_create(&ByStage { stage }).observe(took.as_secs_f64());
    }

    /// Operations on maps were carried out: how many, by map.
    pub fn map_operations(&self, by_map: &BTreeMap<&'static str, u64>) {
        for (&map, &count) in by_map {
            self.own.operations.get_or_create(&ByMap { map }).inc_by(count);
        }
    }

    /// Elements of these maps were not what had been written.
    pub fn drifted(&self, maps: impl Iterator<Item = &'static str>) {
        for map in maps {
            self.own.drift.get_or_create(&ByMap { map }).inc();
        }
    }

    /// An applied slice change reached the kernel maps this long after its trigger time. Not for the first list,
    /// and not for deletions.
    pub fn network_programmed(&self, family: Family, after: Duration) {
        self.kubeproxy.network_programming.get_or_create(&family.into()).observe(after.as_secs_f64());
    }

    /// A slice change arrived.
    pub fn endpoint_change(&self) {
        self.kubeproxy.endpoint_changes.inc();
    }

    /// A Service change arrived.
    pub fn service_change(&self) {
        self.kubeproxy.service_changes.inc();
    }

    /// So many changes of slices and of Services wait.
    pub fn pending(&self, endpoint_changes: usize, service_changes: usize) {
        self.kubeproxy.endpoint_changes_pending.set(gauge(endpoint_changes));
        self.kubeproxy.service_changes_pending.set(gauge(service_changes));
    }

    /// So many service ports have a Local policy and endpoints, but none here.
    pub fn no_local_endpoints(&self, policy: PolicyKind, family: Family, service_ports: usize) {
        let labels = ByPolicy { traffic_policy: policy, ip_family: FamilyLabel(family) };
        self.kubeproxy.no_local_endpoints.get_or_create(&labels).set(gauge(service_ports));
    }

    /// A feature gate of kube-proxy is on, or off.
    pub fn feature(&self, name: &'static str, stage: &'static str, enabled: bool) {
        self.features.get_or_create(&ByFeature { name, stage }).set(i64::from(enabled));
    }

    /// The metrics server was asked whether it is there.
    pub fn pinged(&self) {
        self.slis.answered(ByCheck { name: "ping", r#type: "healthz" }, true);
    }

    /// A probe was answered with this HTTP status.
    pub fn probed(&self, probe: Probe, code: u16) {
        let r#type = match probe {
            Probe::Healthz => "healthz",
            Probe::Livez => "livez",
            Probe::Readyz => "readyz",
        };
        self.slis.answered(ByCheck { name: "proxy", r#type }, code == 200);
        match probe {
            Probe::Healthz => drop(self.kubeproxy.healthz.get_or_create(&ByCode { code }).inc()),
            Probe::Livez => drop(self.kubeproxy.livez.get_or_create(&ByCode { code }).inc()),
            Probe::Readyz => {}
        }
    }

    /// Sockets of these families were looked at, and some were led elsewhere or ended.
    pub fn swept(&self, families: &[Family], took: Duration, report: &Report) {
        for &family in families {
            self.kubeproxy.sweep_duration.get_or_create(&family.into()).observe(took.as_secs_f64());
            let moved = report.by_family.get(family.index()).copied().unwrap_or_default() as u64;
            self.kubeproxy.swept.get_or_create(&family.into()).inc_by(moved);
        }
        self.own.sockets_led.inc_by(report.led as u64);
        self.own.sockets_destroyed.inc_by(report.destroyed as u64);
    }

    /// So many places of `STREAMS` were freed.
    pub fn streams_freed(&self, count: usize) {
        self.own.streams_freed.inc_by(count as u64);
    }

    /// Expired flows were removed.
    pub fn flows_collected(&self, count: u64) {
        self.own.flows_collected.inc_by(count);
    }

    /// So many objects or files cannot be used.
    pub fn problems(&self, count: usize) {
        self.own.problems.set(gauge(count));
    }

    /// An Event was written, or not.
    pub fn event(&self, result: EventFate) {
        self.own.events.get_or_create(&ByFate { result }).inc();
    }

    /// Everything as OpenMetrics text.
    pub fn text(&self) -> String {
        printed(&self.registry)
    }

    /// What probes were told, likewise.
    pub fn slis(&self) -> String {
        printed(&self.slis.registry)
    }
}

fn printed(registry: &Registry) -> String {
    let mut out = String::new();
    // Writing to a String fails only if a metric cannot be printed; what is there is still worth having.
    if let Err(error) = text::encode(&mut out, registry) {
        tracing::warn!(%error, "a metric cannot be printed");
    }
    buckets::as_client_golang(&out)
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
