//! Labels, and the buckets of histograms.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::family::MetricConstructor;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use proxy_common::addr::Family;

/// One of a Service's two traffic policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PolicyKind {
    /// `internalTrafficPolicy`.
    Internal,
    /// `externalTrafficPolicy`.
    External,
}

impl PolicyKind {
    /// Both policies.
    pub(crate) const ALL: [Self; 2] = [Self::Internal, Self::External];
}

/// Fate of an Event for the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventFate {
    /// The API server has it.
    Written,
    /// The API server refused it, or did not answer.
    Failed,
    /// Too many Events were handed over or waited.
    Dropped,
}

impl EventFate {
    pub(super) const ALL: [Self; 3] = [Self::Written, Self::Failed, Self::Dropped];
}

/// Part of the time between the arrival of a change and the end of its sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// From the arrival of the oldest change to the start of the sync.
    Wait,
    /// From there until the operations on the maps are known.
    Plan,
    /// From there until the operations are carried out.
    Write,
}

impl Stage {
    pub(super) const ALL: [Self; 3] = [Self::Wait, Self::Plan, Self::Write];
}

/// Encodes a type as a label value that names each of its values.
macro_rules! label_value {
    ($type:ty, |$value:ident| $name:expr) => {
        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
                let $value = self;
                EncodeLabelValue::encode(&$name, encoder)
            }
        }
    };
}

label_value!(PolicyKind, |policy| match policy {
    Self::Internal => "internal",
    Self::External => "external",
});
label_value!(EventFate, |fate| match fate {
    Self::Written => "written",
    Self::Failed => "failed",
    Self::Dropped => "dropped",
});
label_value!(Stage, |stage| match stage {
    Self::Wait => "wait",
    Self::Plan => "plan",
    Self::Write => "write",
});
label_value!(FamilyLabel, |family| family.0.to_string());

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FamilyLabel(pub(super) Family);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByFamily {
    ip_family: FamilyLabel,
}

impl From<Family> for ByFamily {
    fn from(family: Family) -> Self {
        Self { ip_family: FamilyLabel(family) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPolicy {
    pub(super) traffic_policy: PolicyKind,
    pub(super) ip_family: FamilyLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByCode {
    pub(super) code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByFeature {
    pub(super) name: &'static str,
    pub(super) stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByFate {
    pub(super) result: EventFate,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByStage {
    pub(super) stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByMap {
    pub(super) map: &'static str,
}

/// Histogram buckets, in seconds unless stated otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) enum Buckets {
    /// kube-proxy's: 1 ms, doubling, to 16.384 s.
    Sync,
    /// kube-proxy's: dense up to a minute, then to five.
    NetworkProgramming,
    /// 10 µs, times four, to 42 s.
    Stage,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Sync => Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            Self::NetworkProgramming => {
                let whole = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
                Histogram::new([0.25, 0.5].into_iter().chain(whole.map(f64::from)))
            }
            Self::Stage => Histogram::new((0..12).map(|n| 1e-5 * 4_f64.powi(n))),
        }
    }
}

/// Registers `metric` and returns it. The registry appends the full stop to a help text.
pub(super) fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}
