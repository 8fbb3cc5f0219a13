//! Metrics: kube-proxy's names where the meaning is the same (prefix `kubeproxy_`), our own beside them (prefix
//! `vipr_`); served on `--metrics-bind-address` (default 127.0.0.1:10249). `docs/metrics.md` lists them.
//!
//! The sync loop and its helpers write through the methods of [`Metrics`], which cost an atomic operation or two.
//! Values that only the kernel knows are read from the maps at each scrape, by the closures in [`Readers`].

mod buckets;
mod kubeproxy;
mod labels;
mod own;
mod process;
mod scrape;
pub(crate) mod serve;
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
use prometheus_client::registry::Registry;
use proxy_common::addr::Family;

use self::kubeproxy::KubeProxy;
use self::labels::{ByCode, ByFate, ByFeature, ByMap, ByPolicy, ByStage, FamilyLabel, register};
pub(crate) use self::labels::{EventFate, PolicyKind, Stage};
use self::own::Own;
pub(crate) use self::scrape::{MapUsage, ReadError, Readers};
use self::slis::{ByCheck, Slis};
use crate::host::sockets::Report;
use crate::observe::probe::Probe;
use crate::sources::api::requests;

/// Name of the metrics server in logs and errors.
pub(crate) const SERVER: &str = "metrics";

/// All metrics, and the registry that prints them.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    kubeproxy: KubeProxy,
    own: Own,
    features: Labelled<ByFeature, Gauge>,
    slis: Slis,
}

/// Result of a sync.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SyncResult {
    /// Whether it looked at everything, not only at changes.
    pub(crate) full: bool,
    /// Whether everything is programmed.
    pub(crate) ok: bool,
    /// Time from its start to its end.
    pub(crate) took: Duration,
}

impl Metrics {
    /// Makes all metrics, at zero. `readers` are called at each scrape.
    pub(crate) fn new(readers: Readers) -> Self {
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

    /// Notes that a sync was asked for.
    pub(crate) fn sync_queued(&self, family: Family) {
        self.kubeproxy.sync_last_queued.get_or_create(&family.into()).set(now());
    }

    /// Notes that a sync of these families ended.
    pub(crate) fn synced(&self, families: &[Family], sync: SyncResult) {
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

    /// Notes the time that changes have spent in a stage.
    pub(crate) fn stage(&self, stage: Stage, took: Duration) {
        self.own.programming.get_or_create(&ByStage { stage }).observe(took.as_secs_f64());
    }

    /// Counts operations on maps that were carried out, by map.
    pub(crate) fn map_operations(&self, by_map: &BTreeMap<&'static str, u64>) {
        for (&map, &count) in by_map {
            self.own.operations.get_or_create(&ByMap { map }).inc_by(count);
        }
    }

    /// Counts elements of these maps that were not what had been written.
    pub(crate) fn drifted(&self, maps: impl Iterator<Item = &'static str>) {
        for map in maps {
            self.own.drift.get_or_create(&ByMap { map }).inc();
        }
    }

    /// Notes the time from the trigger time of an applied slice change until it reached the kernel maps. Not for the
    /// first list, and not for deletions.
    pub(crate) fn network_programmed(&self, family: Family, after: Duration) {
        self.kubeproxy.network_programming.get_or_create(&family.into()).observe(after.as_secs_f64());
    }

    /// Counts a slice change that arrived.
    pub(crate) fn endpoint_change(&self) {
        self.kubeproxy.endpoint_changes.inc();
    }

    /// Counts a Service change that arrived.
    pub(crate) fn service_change(&self) {
        self.kubeproxy.service_changes.inc();
    }

    /// Sets the numbers of changes of slices and of Services that wait.
    pub(crate) fn pending(&self, endpoint_changes: usize, service_changes: usize) {
        self.kubeproxy.endpoint_changes_pending.set(gauge(endpoint_changes));
        self.kubeproxy.service_changes_pending.set(gauge(service_changes));
    }

    /// Sets the number of service ports that have a Local policy and endpoints, but no endpoint on this node.
    pub(crate) fn no_local_endpoints(&self, policy: PolicyKind, family: Family, service_ports: usize) {
        let labels = ByPolicy { traffic_policy: policy, ip_family: FamilyLabel(family) };
        self.kubeproxy.no_local_endpoints.get_or_create(&labels).set(gauge(service_ports));
    }

    /// Sets whether a feature gate of kube-proxy is on.
    pub(crate) fn feature(&self, name: &'static str, stage: &'static str, enabled: bool) {
        self.features.get_or_create(&ByFeature { name, stage }).set(i64::from(enabled));
    }

    /// Notes that the metrics server was asked whether it is there.
    pub(crate) fn pinged(&self) {
        self.slis.answered(ByCheck { name: "ping", r#type: "healthz" }, true);
    }

    /// Counts a probe that was answered with this HTTP status.
    pub(crate) fn probed(&self, probe: Probe, code: u16) {
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

    /// Notes a sweep over the sockets of these families, which led some elsewhere or ended them.
    pub(crate) fn swept(&self, families: &[Family], took: Duration, report: &Report) {
        for &family in families {
            self.kubeproxy.sweep_duration.get_or_create(&family.into()).observe(took.as_secs_f64());
            let moved = report.by_family.get(family.index()).copied().unwrap_or_default() as u64;
            self.kubeproxy.swept.get_or_create(&family.into()).inc_by(moved);
        }
        self.own.sockets_led.inc_by(report.led as u64);
        self.own.sockets_destroyed.inc_by(report.destroyed as u64);
    }

    /// Counts places of `STREAMS` that were freed.
    pub(crate) fn streams_freed(&self, count: usize) {
        self.own.streams_freed.inc_by(count as u64);
    }

    /// Counts expired flows that were removed.
    pub(crate) fn flows_collected(&self, count: u64) {
        self.own.flows_collected.inc_by(count);
    }

    /// Sets the number of objects or files that cannot be used.
    pub(crate) fn problems(&self, count: usize) {
        self.own.problems.set(gauge(count));
    }

    /// Counts an Event, by its fate.
    pub(crate) fn event(&self, result: EventFate) {
        self.own.events.get_or_create(&ByFate { result }).inc();
    }

    /// Returns all metrics as OpenMetrics text.
    pub(crate) fn text(&self) -> String {
        printed(&self.registry)
    }

    /// Returns the answers to probes in the same format.
    pub(crate) fn slis(&self) -> String {
        printed(&self.slis.registry)
    }
}

fn printed(registry: &Registry) -> String {
    let mut out = String::new();
    // Writing to a String fails only if a metric cannot be printed; the text so far is still worth having.
    if let Err(error) = text::encode(&mut out, registry) {
        tracing::warn!(%error, "a metric cannot be printed");
    }
    buckets::as_client_golang(&out)
}

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn gauge(value: usize) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
