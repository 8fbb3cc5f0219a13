//! kube-proxy's flags that have no effect here: they are about mechanisms (iptables, ipvs, conntrack, polling) that
//! the agent does not have. They are accepted and validated, so that kube-proxy's command line can stay.

use clap::Args;
use serde_json::Value;

use super::configuration::KubeProxyConfiguration;
use super::duration::GoDuration;

/// The flags.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Accepted from kube-proxy, without effect")]
pub(crate) struct Accepted {
    /// Proxy mode: iptables, ipvs or nftables.
    #[arg(long, value_name = "MODE", hide_short_help = true)]
    pub(crate) proxy_mode: Option<String>,
    /// Masquerade all traffic to clusterIPs.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) masquerade_all: Option<bool>,
    /// Bit of the packet mark.
    #[arg(long, value_name = "BIT", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) iptables_masquerade_bit: Option<i32>,
    /// nodePorts on 127.0.0.1.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) iptables_localhost_nodeports: Option<bool>,
    /// Pause between syncs: changes are programmed at once.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) iptables_min_sync_period: Option<GoDuration>,
    /// As --iptables-sync-period, with --proxy-mode ipvs.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) ipvs_sync_period: Option<GoDuration>,
    /// Pause between syncs.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) ipvs_min_sync_period: Option<GoDuration>,
    /// IPVS scheduler.
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub(crate) ipvs_scheduler: Option<String>,
    /// CIDRs of IPVS virtual servers that kube-proxy leaves alone.
    #[arg(long, value_name = "CIDRS", hide_short_help = true, value_delimiter = ',')]
    pub(crate) ipvs_exclude_cidrs: Vec<String>,
    /// arp_ignore and arp_announce for IPVS.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) ipvs_strict_arp: Option<bool>,
    /// IPVS timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) ipvs_tcp_timeout: Option<GoDuration>,
    /// IPVS timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) ipvs_tcpfin_timeout: Option<GoDuration>,
    /// IPVS timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) ipvs_udp_timeout: Option<GoDuration>,
    /// Size of the conntrack table.
    #[arg(long, value_name = "COUNT", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) conntrack_max_per_core: Option<i32>,
    /// Size of the conntrack table.
    #[arg(long, value_name = "COUNT", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) conntrack_min: Option<i32>,
    /// Conntrack timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) conntrack_tcp_timeout_established: Option<GoDuration>,
    /// Conntrack timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    /// nf_conntrack_tcp_be_liberal.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) conntrack_tcp_be_liberal: Option<bool>,
    /// Conntrack timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) conntrack_udp_timeout: Option<GoDuration>,
    /// Conntrack timeout.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) conntrack_udp_timeout_stream: Option<GoDuration>,
    /// Requests per second: everything is watched, nothing is polled.
    #[arg(long, value_name = "QPS", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) kube_api_qps: Option<f32>,
    /// Requests at once.
    #[arg(long, value_name = "COUNT", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) kube_api_burst: Option<i32>,
    /// Encoding of requests: the agent uses JSON.
    #[arg(long, value_name = "TYPE", hide_short_help = true)]
    pub(crate) kube_api_content_type: Option<String>,
    /// Resync with the API server.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) config_sync_period: Option<GoDuration>,
    /// Go's profiler.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) profiling: Option<bool>,
    /// Metrics that a release of Kubernetes has hidden.
    #[arg(long, value_name = "VERSION", hide_short_help = true)]
    pub(crate) show_hidden_metrics_for_version: Option<String>,
    /// Verbosity by source file.
    #[arg(long, value_name = "PATTERNS", hide_short_help = true)]
    pub(crate) vmodule: Option<String>,
    /// Pause between flushes of the log.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub(crate) log_flush_frequency: Option<GoDuration>,
    /// Separate streams for errors and for other messages.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) log_text_split_stream: Option<bool>,
    /// Size of the buffer for the log.
    #[arg(long, value_name = "BYTES", hide_short_help = true)]
    pub(crate) log_text_info_buffer_size: Option<String>,
    /// As --log-text-split-stream.
    #[arg(long, value_name = "BOOL", hide_short_help = true, value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) log_json_split_stream: Option<bool>,
    /// As --log-text-info-buffer-size.
    #[arg(long, value_name = "BYTES", hide_short_help = true)]
    pub(crate) log_json_info_buffer_size: Option<String>,
    /// Files that contain the boot id of the machine.
    #[arg(long, value_name = "FILES", hide_short_help = true)]
    pub(crate) boot_id_file: Option<String>,
    /// Files that contain the id of the machine.
    #[arg(long, value_name = "FILES", hide_short_help = true)]
    pub(crate) machine_id_file: Option<String>,
}

impl Accepted {
    /// Copies the given flags into `configuration`.
    pub(super) fn apply_to(&self, configuration: &mut KubeProxyConfiguration) {
        configuration.mode.clone_from(&self.proxy_mode);
        configuration.config_sync_period = self.config_sync_period;
        configuration.enable_profiling = self.profiling;
        configuration.show_hidden_metrics_for_version.clone_from(&self.show_hidden_metrics_for_version);

        let KubeProxyConfiguration {
            iptables, nftables, ipvs, conntrack, client_connection, logging, ..
        } = configuration;
        iptables.masquerade_all = self.masquerade_all;
        nftables.masquerade_all = self.masquerade_all;
        iptables.masquerade_bit = self.iptables_masquerade_bit;
        iptables.localhost_node_ports = self.iptables_localhost_nodeports;
        iptables.min_sync_period = self.iptables_min_sync_period;
        nftables.min_sync_period = self.iptables_min_sync_period;

        ipvs.sync_period = self.ipvs_sync_period;
        ipvs.min_sync_period = self.ipvs_min_sync_period;
        ipvs.scheduler.clone_from(&self.ipvs_scheduler);
        let excluded: Vec<String> =
            self.ipvs_exclude_cidrs.iter().filter(|value| !value.is_empty()).cloned().collect();
        ipvs.exclude_cidrs = Some(excluded).filter(|values| !values.is_empty());
        ipvs.strict_arp = self.ipvs_strict_arp;
        ipvs.tcp_timeout = self.ipvs_tcp_timeout;
        ipvs.tcp_fin_timeout = self.ipvs_tcpfin_timeout;
        ipvs.udp_timeout = self.ipvs_udp_timeout;

        conntrack.max_per_core = self.conntrack_max_per_core;
        conntrack.min = self.conntrack_min;
        conntrack.tcp_established_timeout = self.conntrack_tcp_timeout_established;
        conntrack.tcp_close_wait_timeout = self.conntrack_tcp_timeout_close_wait;
        conntrack.tcp_be_liberal = self.conntrack_tcp_be_liberal;
        conntrack.udp_timeout = self.conntrack_udp_timeout;
        conntrack.udp_stream_timeout = self.conntrack_udp_timeout_stream;

        client_connection.qps = self.kube_api_qps;
        client_connection.burst = self.kube_api_burst;
        client_connection.content_type.clone_from(&self.kube_api_content_type);

        logging.vmodule = self.vmodule.clone().map(Value::from);
        logging.flush_frequency = self.log_flush_frequency.map(|period| Value::from(period.to_string()));
    }
}

/// Parses a truth value in any spelling that Go's flags accept.
pub(super) fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}
