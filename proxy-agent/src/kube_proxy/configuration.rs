//! `KubeProxyConfiguration` (`kubeproxy.config.k8s.io/v1alpha1`) as the file has it.
//!
//! Flags are turned into the same type ([`super::flags`]), so that one set of defaults and one validation hold for
//! both. `None` means not given; after [`KubeProxyConfiguration::with_defaults`] only fields without a default are
//! `None`. Who reads it: [`crate::config`], which resolves it, and `/configz`, which shows it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::duration::GoDuration;
use crate::http::bind_address;
use crate::{health, metrics};

/// `apiVersion` of the file.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the file.
pub const KIND: &str = "KubeProxyConfiguration";

/// The file. What each field means here is told in `docs/configuration.md`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "docs/configuration.md documents every field, and a test holds it to that")]
pub struct KubeProxyConfiguration {
    pub api_version: Option<String>,
    pub kind: Option<String>,
    pub feature_gates: Option<BTreeMap<String, bool>>,
    pub client_connection: ClientConnection,
    pub logging: Logging,
    pub hostname_override: Option<String>,
    pub bind_address: Option<String>,
    /// Empty: no server. (A file cannot say that: empty means the default there.)
    pub healthz_bind_address: Option<String>,
    /// As `healthz_bind_address`.
    pub metrics_bind_address: Option<String>,
    pub bind_address_hard_fail: Option<bool>,
    pub enable_profiling: Option<bool>,
    pub show_hidden_metrics_for_version: Option<String>,
    pub mode: Option<String>,
    pub iptables: Iptables,
    pub ipvs: Ipvs,
    pub nftables: Nftables,
    pub winkernel: Winkernel,
    pub detect_local_mode: Option<String>,
    pub detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    pub node_port_addresses: Option<Vec<String>>,
    pub oom_score_adj: Option<i32>,
    pub conntrack: Conntrack,
    pub config_sync_period: Option<GoDuration>,
    pub port_range: Option<String>,
    pub windows_run_as_service: Option<bool>,
}

/// `clientConnection`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct ClientConnection {
    pub kubeconfig: Option<String>,
    pub accept_content_types: Option<String>,
    pub content_type: Option<String>,
    pub qps: Option<f32>,
    pub burst: Option<i32>,
}

/// `logging`. Parts without a meaning here are kept as they are written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Logging {
    pub format: Option<String>,
    pub flush_frequency: Option<Value>,
    pub verbosity: Option<u32>,
    pub vmodule: Option<Value>,
    pub options: Option<Value>,
}

/// `iptables`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Iptables {
    pub masquerade_bit: Option<i32>,
    pub masquerade_all: Option<bool>,
    pub localhost_node_ports: Option<bool>,
    pub sync_period: Option<GoDuration>,
    pub min_sync_period: Option<GoDuration>,
}

/// `ipvs`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Ipvs {
    pub sync_period: Option<GoDuration>,
    pub min_sync_period: Option<GoDuration>,
    pub scheduler: Option<String>,
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    pub strict_arp: Option<bool>,
    pub tcp_timeout: Option<GoDuration>,
    pub tcp_fin_timeout: Option<GoDuration>,
    pub udp_timeout: Option<GoDuration>,
}

/// `nftables`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Nftables {
    pub masquerade_bit: Option<i32>,
    pub masquerade_all: Option<bool>,
    pub sync_period: Option<GoDuration>,
    pub min_sync_period: Option<GoDuration>,
}

/// `winkernel`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Winkernel {
    pub network_name: Option<String>,
    pub source_vip: Option<String>,
    #[serde(rename = "enableDSR")]
    pub enable_dsr: Option<bool>,
    pub root_hns_endpoint_name: Option<String>,
    pub forward_health_check_vip: Option<bool>,
}

/// `detectLocal`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct DetectLocal {
    pub bridge_interface: Option<String>,
    pub interface_name_prefix: Option<String>,
}

/// `conntrack`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "as for the file")]
pub struct Conntrack {
    pub max_per_core: Option<i32>,
    pub min: Option<i32>,
    pub tcp_established_timeout: Option<GoDuration>,
    pub tcp_close_wait_timeout: Option<GoDuration>,
    pub tcp_be_liberal: Option<bool>,
    pub udp_timeout: Option<GoDuration>,
    pub udp_stream_timeout: Option<GoDuration>,
}

/// What a proxy mode's section says about syncing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncPeriods {
    /// Name of the section.
    pub section: &'static str,
    /// `syncPeriod`.
    pub period: GoDuration,
    /// `minSyncPeriod`.
    pub min: GoDuration,
}

impl KubeProxyConfiguration {
    /// Makes those fields "not given" in which a file's zero (`""`, `0`, `0s`) means the default.
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

    /// With every default that kube-proxy has; a bind address without a port gets one. `nodePortAddresses` has no
    /// default: what it means while unset is told where it is resolved.
    #[must_use]
    pub fn with_defaults(mut self) -> Self {
        let seconds = GoDuration::from_secs;
        fill(&mut self.api_version, API_VERSION);
        fill(&mut self.kind, KIND);
        zero(&mut self.feature_gates);
        zero(&mut self.hostname_override);
        fill(&mut self.bind_address, "0.0.0.0");
        let [healthz, metrics] = default_addresses(self.bind_address.as_deref());
        fill(&mut self.healthz_bind_address, healthz.to_string());
        fill(&mut self.metrics_bind_address, metrics.to_string());
        append_port(&mut self.healthz_bind_address, health::DEFAULT_PORT);
        append_port(&mut self.metrics_bind_address, metrics::DEFAULT_PORT);
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

    /// As a file.
    ///
    /// # Errors
    ///
    /// When a value cannot be written as YAML, which none is known to do.
    pub fn to_yaml(&self) -> Result<String, serde_saphyr::SerializeError> {
        serde_saphyr::to_string(self)
    }

    /// What the section of the proxy mode says about syncing; the mode without a name is iptables.
    pub fn sync_periods(&self) -> SyncPeriods {
        let (section, period, min) = match self.mode.as_deref() {
            Some("ipvs") => ("ipvs", self.ipvs.sync_period, self.ipvs.min_sync_period),
            Some("nftables") => ("nftables", self.nftables.sync_period, self.nftables.min_sync_period),
            _ => ("iptables", self.iptables.sync_period, self.iptables.min_sync_period),
        };
        SyncPeriods { section, period: period.unwrap_or_default(), min: min.unwrap_or_default() }
    }

    /// Whether the section of the proxy mode asks for masquerading of everything that is sent to clusterIPs. ipvs has
    /// no such field of its own.
    pub fn masquerade_all(&self) -> bool {
        let all = match self.mode.as_deref() {
            Some("nftables") => self.nftables.masquerade_all,
            _ => self.iptables.masquerade_all,
        };
        all.unwrap_or_default()
    }
}

/// The default addresses of the health and the metrics server: of the family of `bindAddress`.
pub(super) fn default_addresses(bind_address: Option<&str>) -> [SocketAddr; 2] {
    let v6 = bind_address.is_some_and(|text| text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()));
    let (any, loopback): (IpAddr, IpAddr) = if v6 {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
    };
    [SocketAddr::new(any, health::DEFAULT_PORT), SocketAddr::new(loopback, metrics::DEFAULT_PORT)]
}

/// Appends `port` to an IP address that stands alone.
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
