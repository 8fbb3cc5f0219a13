//! Every field of the configuration file, the flag that sets it, and whether it has an effect here. The log line
//! about settings without effect and the messages that name a field use this list. A test compares
//! `docs/configuration.md` with it.

use serde_json::Value;

use super::configuration::KubeProxyConfiguration;

/// A field of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    /// Path of the field in the file.
    pub(crate) path: &'static str,
    /// Flag that sets the field, without the dashes; empty if there is none.
    pub(crate) flag: &'static str,
    /// Whether the field has an effect in the agent.
    pub(crate) effect: bool,
}

const fn used(path: &'static str, flag: &'static str) -> Field {
    Field { path, flag, effect: true }
}

const fn unused(path: &'static str, flag: &'static str) -> Field {
    Field { path, flag, effect: false }
}

/// All fields.
pub(crate) const FIELDS: &[Field] = &[
    used("apiVersion", ""),
    used("kind", ""),
    used("clientConnection.kubeconfig", "kubeconfig"),
    used("hostnameOverride", "hostname-override"),
    used("featureGates", "feature-gates"),
    used("clusterCIDR", "cluster-cidr"),
    used("detectLocalMode", "detect-local-mode"),
    used("detectLocal.bridgeInterface", "pod-bridge-interface"),
    used("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix"),
    used("nodePortAddresses", "nodeport-addresses"),
    used("bindAddress", "bind-address"),
    used("iptables.syncPeriod", "iptables-sync-period"),
    used("nftables.syncPeriod", "iptables-sync-period"),
    used("ipvs.syncPeriod", "ipvs-sync-period"),
    used("healthzBindAddress", "healthz-bind-address"),
    used("metricsBindAddress", "metrics-bind-address"),
    used("bindAddressHardFail", "bind-address-hard-fail"),
    used("oomScoreAdj", "oom-score-adj"),
    used("logging.verbosity", "v"),
    used("logging.format", "logging-format"),
    unused("mode", "proxy-mode"),
    unused("iptables.masqueradeAll", "masquerade-all"),
    unused("nftables.masqueradeAll", "masquerade-all"),
    unused("iptables.masqueradeBit", "iptables-masquerade-bit"),
    unused("nftables.masqueradeBit", ""),
    unused("iptables.localhostNodePorts", "iptables-localhost-nodeports"),
    unused("iptables.minSyncPeriod", "iptables-min-sync-period"),
    unused("nftables.minSyncPeriod", "iptables-min-sync-period"),
    unused("ipvs.minSyncPeriod", "ipvs-min-sync-period"),
    unused("ipvs.scheduler", "ipvs-scheduler"),
    unused("ipvs.excludeCIDRs", "ipvs-exclude-cidrs"),
    unused("ipvs.strictARP", "ipvs-strict-arp"),
    unused("ipvs.tcpTimeout", "ipvs-tcp-timeout"),
    unused("ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout"),
    unused("ipvs.udpTimeout", "ipvs-udp-timeout"),
    unused("conntrack.maxPerCore", "conntrack-max-per-core"),
    unused("conntrack.min", "conntrack-min"),
    unused("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established"),
    unused("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait"),
    unused("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal"),
    unused("conntrack.udpTimeout", "conntrack-udp-timeout"),
    unused("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream"),
    unused("clientConnection.qps", "kube-api-qps"),
    unused("clientConnection.burst", "kube-api-burst"),
    unused("clientConnection.contentType", "kube-api-content-type"),
    unused("clientConnection.acceptContentTypes", ""),
    unused("configSyncPeriod", "config-sync-period"),
    unused("enableProfiling", "profiling"),
    unused("showHiddenMetricsForVersion", "show-hidden-metrics-for-version"),
    unused("logging.vmodule", "vmodule"),
    unused("logging.flushFrequency", "log-flush-frequency"),
    unused("logging.options", ""),
    unused("portRange", ""),
    unused("windowsRunAsService", ""),
    unused("winkernel.networkName", ""),
    unused("winkernel.sourceVip", ""),
    unused("winkernel.enableDSR", ""),
    unused("winkernel.rootHnsEndpointName", ""),
    unused("winkernel.forwardHealthCheckVip", ""),
];

/// Returns the flag that sets the field at `path`; empty if there is none.
pub(crate) fn flag_of(path: &str) -> &'static str {
    FIELDS.iter().find(|field| field.path == path).map_or("", |field| field.flag)
}

/// Returns the value of each field of [`FIELDS`], in that order; null for fields that are not given.
pub(crate) fn values(configuration: &KubeProxyConfiguration) -> Vec<(&'static Field, Value)> {
    let whole = serde_json::to_value(configuration).unwrap_or_default();
    FIELDS
        .iter()
        .map(|field| {
            let steps = field.path.split('.');
            let value = steps.fold(&whole, |value, step| value.get(step).unwrap_or(&Value::Null));
            (field, value.clone())
        })
        .collect()
}

/// Returns the settings of `configuration` (with defaults) that differ from the default and have no effect, each as
/// `field=value`. Fields that consist of named parts (feature gates) are handled in [`crate::config`].
pub(crate) fn without_effect(configuration: &KubeProxyConfiguration) -> Vec<String> {
    let defaults = values(&KubeProxyConfiguration::default().with_defaults());
    let given = values(configuration).into_iter().zip(defaults);
    let idle =
        given.filter(|((field, value), (_, default))| !field.effect && value != default && !is_zero(value));
    idle.map(|((field, value), _)| format!("{}={}", field.path, plain(&value))).collect()
}

/// Returns the flags of the fields that `configuration` (without defaults) gives, with the dashes.
pub(crate) fn flags_given(configuration: &KubeProxyConfiguration) -> Vec<String> {
    let given =
        values(configuration).into_iter().filter(|(field, value)| !field.flag.is_empty() && !value.is_null());
    let mut flags: Vec<String> = given.map(|(field, _)| format!("--{}", field.flag)).collect();
    flags.sort_unstable();
    flags.dedup();
    flags
}

/// Returns a value as it would be written in the file; text without quotes.
pub(crate) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Returns whether a value asks for nothing, so that it does not matter that it has no effect. A file may spell that
/// out: `options: {}`, `minSyncPeriod: 0s`.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(_) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(items) => items.iter().all(is_zero),
        Value::Object(fields) => fields.values().all(is_zero),
    }
}
