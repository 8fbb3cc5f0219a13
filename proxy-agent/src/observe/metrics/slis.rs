//! `/metrics/slis`: answers to probes, as components of Kubernetes count them.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Metrics of the checks, in a registry of their own.
#[derive(Debug)]
pub(super) struct Slis {
    pub(super) registry: Registry,
    last: Labelled<ByCheck, Gauge>,
    all: Labelled<ByResult, Counter>,
}

/// Labels of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByCheck {
    /// `ping`: the metrics server answers; `proxy`: what the health server says of the node.
    pub(super) name: &'static str,
    /// Last part of the path.
    pub(super) r#type: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    name: &'static str,
    r#type: &'static str,
    status: &'static str,
}

impl Slis {
    /// Makes the metrics before any probe.
    pub(super) fn new() -> Self {
        let mut registry = Registry::default();
        let (last, all) = (Labelled::default(), Labelled::default());
        let kubernetes = registry.sub_registry_with_prefix("kubernetes");
        kubernetes.register("healthcheck", "Whether the last answer to a probe was yes (1)", last.clone());
        kubernetes.register("healthchecks", "Answers to probes", all.clone());
        Self { registry, last, all }
    }

    /// Counts an answer to a probe.
    pub(super) fn answered(&self, check: ByCheck, ok: bool) {
        let ByCheck { name, r#type } = check;
        self.last.get_or_create(&check).set(i64::from(ok));
        let status = if ok { "success" } else { "error" };
        self.all.get_or_create(&ByResult { name, r#type, status }).inc();
    }
}
