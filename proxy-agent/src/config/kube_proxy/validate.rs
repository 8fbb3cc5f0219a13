//! Checks that kube-proxy makes on its configuration: pure, and all at once.
//!
//! Fields that have no effect here are checked, too, so that a configuration is valid for both programs or for
//! neither. Values that the agent reads as something else than text or a number (addresses, CIDRs, modes) are checked
//! where they are parsed, in [`crate::config`].

use std::fmt;
use std::ops::RangeInclusive;

use super::configuration::KubeProxyConfiguration;
use super::duration::GoDuration;
use super::fields::flag_of;
use crate::config::lenient;

/// A field with a value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: `{value}` {reason}", named(.field))]
pub struct Invalid {
    /// Path of the field in the file.
    pub(crate) field: &'static str,
    /// The value, or the part of it that is wrong.
    pub(crate) value: String,
    /// Reason of the error, to be read after the value: `must be …`.
    pub(crate) reason: String,
}

impl Invalid {
    /// Creates the error that `value` of `field` is invalid for `reason`.
    pub(crate) fn new(field: &'static str, value: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self { field, value: value.to_string(), reason: reason.into() }
    }
}

/// Returns the name of a field with its flag.
fn named(field: &str) -> String {
    match flag_of(field) {
        "" => field.to_owned(),
        flag => format!("{field} (--{flag})"),
    }
}

/// Returns every error in `configuration`, which has its defaults.
pub(crate) fn validate(configuration: &KubeProxyConfiguration) -> Vec<Invalid> {
    let mut all = Findings::default();
    let c = configuration;
    let mode = c.mode.as_deref().unwrap_or_default();
    all.word("mode", mode, &["", "iptables", "ipvs", "nftables"]);
    let (format, formats) = (c.logging.format.as_deref().unwrap_or_default(), ["text", "json"]);
    all.word("logging.format", format, &formats);
    all.range("iptables.masqueradeBit", c.iptables.masquerade_bit, 0..=31);
    all.range("nftables.masqueradeBit", c.nftables.masquerade_bit, 0..=31);
    all.range("oomScoreAdj", c.oom_score_adj, -1000..=1000);
    if let Some(qps) = c.client_connection.qps.filter(|qps| !qps.is_finite()) {
        all.add("clientConnection.qps", qps, "must be a number of 32 bits");
    }
    all.range("clientConnection.burst", c.client_connection.burst, 0..=i32::MAX);
    all.range("conntrack.maxPerCore", c.conntrack.max_per_core, 0..=i32::MAX);
    all.range("conntrack.min", c.conntrack.min, 0..=i32::MAX);
    all.not_negative("conntrack.tcpEstablishedTimeout", c.conntrack.tcp_established_timeout);
    all.not_negative("conntrack.tcpCloseWaitTimeout", c.conntrack.tcp_close_wait_timeout);
    all.not_negative("conntrack.udpTimeout", c.conntrack.udp_timeout);
    all.not_negative("conntrack.udpStreamTimeout", c.conntrack.udp_stream_timeout);
    all.positive("configSyncPeriod", c.config_sync_period.unwrap_or_default());
    all.sync_periods(c);
    if mode == "ipvs" {
        all.ipvs(c);
    }
    let version = c.show_hidden_metrics_for_version.as_deref().unwrap_or_default();
    if !version.is_empty() && !is_version(version) {
        all.add("showHiddenMetricsForVersion", version, "must be MAJOR.MINOR");
    }
    all.0
}

#[derive(Default)]
struct Findings(Vec<Invalid>);

impl Findings {
    fn add(&mut self, field: &'static str, value: impl fmt::Display, reason: impl Into<String>) {
        self.0.push(Invalid::new(field, value, reason));
    }

    fn range(&mut self, field: &'static str, value: Option<i32>, range: RangeInclusive<i32>) {
        if let Some(value) = value.filter(|value| !range.contains(value)) {
            let (least, most) = range.into_inner();
            match most {
                i32::MAX => self.add(field, value, format!("must be {least} or more")),
                most => self.add(field, value, format!("must be {least} to {most}")),
            }
        }
    }

    fn positive(&mut self, field: &'static str, value: GoDuration) {
        if value <= GoDuration::ZERO {
            self.add(field, value, "must be more than 0");
        }
    }

    fn not_negative(&mut self, field: &'static str, value: Option<GoDuration>) {
        if let Some(value) = value.filter(|value| *value < GoDuration::ZERO) {
            self.add(field, value, "must be 0 or more");
        }
    }

    fn word(&mut self, field: &'static str, value: &str, known: &[&str]) {
        if !known.contains(&value) {
            let known: Vec<&str> = known.iter().copied().filter(|word| !word.is_empty()).collect();
            self.add(field, value, format!("must be one of {}", known.join(", ")));
        }
    }

    /// Checks the periods of the section that the mode selects.
    fn sync_periods(&mut self, c: &KubeProxyConfiguration) {
        let periods = c.sync_periods();
        let (period, min) = match periods.section {
            "ipvs" => ("ipvs.syncPeriod", "ipvs.minSyncPeriod"),
            "nftables" => ("nftables.syncPeriod", "nftables.minSyncPeriod"),
            _ => ("iptables.syncPeriod", "iptables.minSyncPeriod"),
        };
        self.positive(period, periods.period);
        self.not_negative(min, Some(periods.min));
        if periods.period > GoDuration::ZERO && periods.min > periods.period {
            self.add(
                min,
                periods.min,
                format!("must not be more than {period}, which is {}", periods.period),
            );
        }
    }

    fn ipvs(&mut self, c: &KubeProxyConfiguration) {
        self.not_negative("ipvs.tcpTimeout", c.ipvs.tcp_timeout);
        self.not_negative("ipvs.tcpFinTimeout", c.ipvs.tcp_fin_timeout);
        self.not_negative("ipvs.udpTimeout", c.ipvs.udp_timeout);
        for cidr in c.ipvs.exclude_cidrs.iter().flatten() {
            if let Err(what) = lenient::prefix(cidr) {
                self.add("ipvs.excludeCIDRs", cidr, what);
            }
        }
    }
}

fn is_version(text: &str) -> bool {
    text.split_once('.').is_some_and(|(major, minor)| {
        [major, minor].iter().all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    })
}
