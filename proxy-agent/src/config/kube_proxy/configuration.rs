//! `KubeProxyConfiguration` (`kubeproxy.config.k8s.io/v1alpha1`) in the form of the file.
//!
//! Flags are converted to the same type ([`super::flags`]), so that one set of defaults and one validation hold for
//! both. `None` means not given. After [`KubeProxyConfiguration::with_defaults`] only fields without a default are
//! `None`. Two readers: [`crate::config`], which resolves it, and `/configz`, which shows it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::duration::GoDuration;
use crate::config::servers::{HEALTH_PORT, METRICS_PORT, bind_address};

/// `apiVersion` of the file.
pub(crate) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the file.
pub(crate) const KIND: &str = "KubeProxyConfiguration";

/// The file. `docs/configuration.md` explains the meaning of each field here, and a test checks that it is complete.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeProxyConfiguration {
    pub(crate) api_version: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) feature_gates: Option<BTreeMap<String, bool>>,
    pub(crate) client_connection: ClientConnection,
    pub(crate) logging: Logging,
    pub(crate) hostname_override: Option<String>,
    pub(crate) bind_address: Option<String>,
    /// Empty: no server. (A file cannot express that, because empty means the default there.)
    pub(crate) healthz_bind_address: Option<String>,
    /// As `healthz_bind_address`.
    pub(crate) metrics_bind_address: Option<String>,
    pub(crate) bind_address_hard_fail: Option<bool>,
    pub(crate) enable_profiling: Option<bool>,
    pub(crate) show_hidden_metrics_for_version: Option<String>,
    pub(crate) mode: Option<String>,
    pub(crate) iptables: Iptables,
    pub(crate) ipvs: Ipvs,
    pub(crate) nftables: Nftables,
    pub(crate) winkernel: Winkernel,
    pub(crate) detect_local_mode: Option<String>,
    pub(crate) detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<String>,
    pub(crate) node_port_addresses: Option<Vec<String>>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) conntrack: Conntrack,
    pub(crate) config_sync_period: Option<GoDuration>,
    pub(crate) port_range: Option<String>,
    pub(crate) windows_run_as_service: Option<bool>,
}

/// `clientConnection`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ClientConnection {
    pub(crate) kubeconfig: Option<String>,
    pub(crate) accept_content_types: Option<String>,
    pub(crate) content_type: Option<String>,
    pub(crate) qps: Option<f32>,
    pub(crate) burst: Option<i32>,
}

/// `logging`. Parts without a meaning here are kept as written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Logging {
    pub(crate) format: Option<String>,
    pub(crate) flush_frequency: Option<Value>,
    pub(crate) verbosity: Option<u32>,
    pub(crate) vmodule: Option<Value>,
    pub(crate) options: Option<Value>,
}

/// `iptables`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Iptables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) sync_period: Option<GoDuration>,
    pub(crate) min_sync_period: Option<GoDuration>,
}

/// `ipvs`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ipvs {
    pub(crate) sync_period: Option<GoDuration>,
    pub(crate) min_sync_period: Option<GoDuration>,
    pub(crate) scheduler: Option<String>,
    #[serde(rename = "excludeCIDRs")]
    pub(crate) exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    pub(crate) strict_arp: Option<bool>,
    pub(crate) tcp_timeout: Option<GoDuration>,
    pub(crate) tcp_fin_timeout: Option<GoDuration>,
    pub(crate) udp_timeout: Option<GoDuration>,
}

/// `nftables`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Nftables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) sync_period: Option<GoDuration>,
    pub(crate) min_sync_period: Option<GoDuration>,
}

/// `winkernel`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Winkernel {
    pub(crate) network_name: Option<String>,
    pub(crate) source_vip: Option<String>,
    #[serde(rename = "enableDSR")]
    pub(crate) enable_dsr: Option<bool>,
    pub(crate) root_hns_endpoint_name: Option<String>,
    pub(crate) forward_health_check_vip: Option<bool>,
}

/// `detectLocal`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DetectLocal {
    pub(crate) bridge_interface: Option<String>,
    pub(crate) interface_name_prefix: Option<String>,
}

/// `conntrack`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Conntrack {
    pub(crate) max_per_core: Option<i32>,
    pub(crate) min: Option<i32>,
    pub(crate) tcp_established_timeout: Option<GoDuration>,
    pub(crate) tcp_close_wait_timeout: Option<GoDuration>,
    pub(crate) tcp_be_liberal: Option<bool>,
    pub(crate) udp_timeout: Option<GoDuration>,
    pub(crate) udp_stream_timeout: Option<GoDuration>,
}

/// Sync periods in the section of a proxy mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SyncPeriods {
    /// Name of the section.
    pub(crate) section: &'static str,
    /// `syncPeriod`.
    pub(crate) period: GoDuration,
    /// `minSyncPeriod`.
    pub(crate) min: GoDuration,
}

impl KubeProxyConfiguration {
    /// Resets the fields to "not given" in which a file's zero (`""`, `0`, `0s`) means the default.
    pub(super) fn forget_zeros(&mut self) {
        forget(&mut self.bind_address);
        forget(&mut self.healthz_bind_address);
        forget(&mut self.metrics_bind_address);
        forget(&mut self.detect_local_mode);
        forget(&mut self.config_sync_period);
        forget(&mut self.client_connection.content_type);
        forget(&mut self.client_connection.qps);
        forget(&mut self.client_connection.burst);
        forget(&mut self.iptables.sync_period);
        forget(&mut self.iptables.min_sync_period);
        forget(&mut self.nftables.sync_period);
        forget(&mut self.nftables.min_sync_period);
        forget(&mut self.ipvs.sync_period);
        forget(&mut self.logging.format);
    }

    /// Fills in every default that kube-proxy has, and adds a port to a bind address without one. `nodePortAddresses`
    /// has no default: the code that resolves it defines its meaning while unset.
    #[must_use]
    pub(crate) fn with_defaults(mut self) -> Self {
        let seconds = GoDuration::from_secs;
        fill(&mut self.api_version, API_VERSION);
        fill(&mut self.kind, KIND);
        zero(&mut self.feature_gates);
        zero(&mut self.hostname_override);
        fill(&mut self.bind_address, "0.0.0.0");
        let [healthz, metrics] = default_addresses(self.bind_address.as_deref());
        fill(&mut self.healthz_bind_address, healthz.to_string());
        fill(&mut self.metrics_bind_address, metrics.to_string());
        append_port(&mut self.healthz_bind_address, HEALTH_PORT);
        append_port(&mut self.metrics_bind_address, METRICS_PORT);
        zero(&mut self.bind_address_hard_fail);
        zero(&mut self.enable_profiling);
        zero(&mut self.show_hidden_metrics_for_version);
        zero(&mut self.mode);
        fill(&mut self.detect_local_mode, "ClusterCIDR");
        zero(&mut self.cluster_cidr);
        fill(&mut self.oom_score_adj, -999);
        fill(&mut self.config_sync_period, seconds(15 * 60));
        zero(&mut self.port_range);
        zero(&mut self.windows_run_as_service);

        let client = &mut self.client_connection;
        zero(&mut client.kubeconfig);
        zero(&mut client.accept_content_types);
        fill(&mut client.content_type, "application/vnd.kubernetes.protobuf");
        fill(&mut client.qps, 5.0);
        fill(&mut client.burst, 10);

        let logging = &mut self.logging;
        fill(&mut logging.format, "text");
        fill(&mut logging.flush_frequency, Value::from("5s"));
        zero(&mut logging.verbosity);

        self.fill_sections_of_modes();

        zero(&mut self.detect_local.bridge_interface);
        zero(&mut self.detect_local.interface_name_prefix);

        let conntrack = &mut self.conntrack;
        fill(&mut conntrack.max_per_core, 32 * 1024);
        fill(&mut conntrack.min, 128 * 1024);
        fill(&mut conntrack.tcp_established_timeout, seconds(24 * 3600));
        fill(&mut conntrack.tcp_close_wait_timeout, seconds(3600));
        zero(&mut conntrack.tcp_be_liberal);
        zero(&mut conntrack.udp_timeout);
        zero(&mut conntrack.udp_stream_timeout);
        self
    }

    /// Fills the sections of the proxy modes with their defaults.
    fn fill_sections_of_modes(&mut self) {
        let seconds = GoDuration::from_secs;
        let iptables = &mut self.iptables;
        fill(&mut iptables.masquerade_bit, 14);
        zero(&mut iptables.masquerade_all);
        fill(&mut iptables.localhost_node_ports, true);
        fill(&mut iptables.sync_period, seconds(30));
        fill(&mut iptables.min_sync_period, seconds(1));

        let ipvs = &mut self.ipvs;
        fill(&mut ipvs.sync_period, seconds(30));
        zero(&mut ipvs.min_sync_period);
        zero(&mut ipvs.scheduler);
        zero(&mut ipvs.strict_arp);
        for timeout in [&mut ipvs.tcp_timeout, &mut ipvs.tcp_fin_timeout, &mut ipvs.udp_timeout] {
            zero(timeout);
        }

        let nftables = &mut self.nftables;
        fill(&mut nftables.masquerade_bit, 14);
        zero(&mut nftables.masquerade_all);
        fill(&mut nftables.sync_period, seconds(30));
        fill(&mut nftables.min_sync_period, seconds(1));

        let windows = &mut self.winkernel;
        for name in [&mut windows.network_name, &mut windows.source_vip, &mut windows.root_hns_endpoint_name]
        {
            zero(name);
        }
        zero(&mut windows.enable_dsr);
        zero(&mut windows.forward_health_check_vip);
    }

    /// Returns the configuration as a file.
    ///
    /// # Errors
    ///
    /// A value cannot be written as YAML. No such value is known.
    pub fn to_yaml(&self) -> Result<String, serde_saphyr::SerializeError> {
        serde_saphyr::to_string(self)
    }

    /// Returns the verbosity of the log, as set by `-v`.
    pub(crate) fn verbosity(&self) -> u32 {
        self.logging.verbosity.unwrap_or_default()
    }

    /// Returns whether the log is JSON, not text.
    pub(crate) fn logs_json(&self) -> bool {
        self.logging.format.as_deref() == Some("json")
    }

    /// Returns the sync periods in the section of the proxy mode. An empty mode means iptables.
    pub(crate) fn sync_periods(&self) -> SyncPeriods {
        let (section, period, min) = match self.mode.as_deref() {
            Some("ipvs") => ("ipvs", self.ipvs.sync_period, self.ipvs.min_sync_period),
            Some("nftables") => ("nftables", self.nftables.sync_period, self.nftables.min_sync_period),
            _ => ("iptables", self.iptables.sync_period, self.iptables.min_sync_period),
        };
        SyncPeriods { section, period: period.unwrap_or_default(), min: min.unwrap_or_default() }
    }
}

/// Returns the default addresses of the health and the metrics server, in the family of `bindAddress`.
pub(super) fn default_addresses(bind_address: Option<&str>) -> [SocketAddr; 2] {
    let v6 = bind_address.is_some_and(|text| text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()));
    let (any, loopback): (IpAddr, IpAddr) = if v6 {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
    };
    [SocketAddr::new(any, HEALTH_PORT), SocketAddr::new(loopback, METRICS_PORT)]
}

/// Appends `port` to an IP address without a port.
pub(super) fn append_port(address: &mut Option<String>, port: u16) {
    if let Some(text) = address
        && let Ok(Some(complete)) = bind_address(text, port)
    {
        *text = complete.to_string();
    }
}

fn fill<T>(field: &mut Option<T>, default: impl Into<T>) {
    field.get_or_insert_with(|| default.into());
}

fn zero<T: Default>(field: &mut Option<T>) {
    field.get_or_insert_default();
}

fn forget<T: Default + PartialEq>(field: &mut Option<T>) {
    if *field == Some(T::default()) {
        *field = None;
    }
}
