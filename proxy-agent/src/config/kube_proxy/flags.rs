//! kube-proxy's flags, with the names and meanings that kube-proxy gives them.
//!
//! Each flag is `None` (or empty) when not given, so that the defaults of [`super::configuration`] hold for flags and
//! file alike. `docs/configuration.md` explains the meaning of each flag here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use super::accepted::{Accepted, go_bool};
use super::configuration::{KubeProxyConfiguration, append_port, default_addresses};
use super::duration::GoDuration;

/// The flags that have an effect, and the flags that have none.
#[derive(Args, Clone, Debug, Default)]
pub struct Flags {
    /// kube-proxy's configuration file (KubeProxyConfiguration v1alpha1).
    ///
    /// With it, flags of kube-proxy are ignored except --hostname-override, --master and those of the log. The agent
    /// ends when the file changes, so that it is started again.
    #[arg(long, value_name = "FILE", help_heading = "Configuration file")]
    #[arg(value_parser = path())]
    pub(crate) config: Option<PathBuf>,
    /// Write the configuration, with all defaults, to this file and exit.
    #[arg(long, value_name = "FILE", help_heading = "Configuration file")]
    #[arg(value_parser = path())]
    pub(crate) write_config_to: Option<PathBuf>,
    /// Do what `proxy-agent cleanup` does, and exit.
    #[arg(long, value_name = "BOOL", help_heading = "Instead of running", value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) cleanup: Option<bool>,
    /// Do the work that needs full root (a BPF file system, sysctls), and exit.
    #[arg(long, value_name = "BOOL", help_heading = "Instead of running", value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) init_only: Option<bool>,

    /// Kubeconfig file of the cluster to watch. Without it, --master and --manifests: the cluster that this process
    /// runs in as a pod.
    #[arg(long, value_name = "FILE", help_heading = "Cluster", conflicts_with = "manifests")]
    #[arg(value_parser = path())]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// URL of the Kubernetes API server, in place of the one in the kubeconfig.
    #[arg(long, value_name = "URL", help_heading = "Cluster")]
    pub(crate) master: Option<String>,
    /// Name of this node, if it is not the host name. Trimmed and lower-cased.
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    pub hostname_override: Option<String>,
    /// Feature gates of kube-proxy as NAME=true or NAME=false, separated by commas.
    ///
    /// The gate AllowServiceExternalIPs (default true) is known. Other gates have no meaning here and are named in
    /// the log.
    #[arg(long, value_name = "GATES", help_heading = "Cluster", value_delimiter = ',', value_parser = gate)]
    pub(crate) feature_gates: Vec<(String, bool)>,

    /// Pod addresses of the cluster: one CIDR, or one of each family, separated by a comma.
    ///
    /// Traffic from these addresses counts as local pod traffic: with externalTrafficPolicy Local it is still served
    /// by endpoints of the whole cluster.
    #[arg(long, value_name = "CIDRS", help_heading = "Services")]
    pub cluster_cidr: Option<String>,
    /// Definition of the traffic of local pods: ClusterCIDR (from --cluster-cidr), NodeCIDR (from the Node's
    /// podCIDRs), BridgeInterface or InterfaceNamePrefix [default: ClusterCIDR].
    #[arg(long, value_name = "MODE", help_heading = "Services")]
    pub(crate) detect_local_mode: Option<String>,
    /// With --detect-local-mode BridgeInterface: the bridge that pods are behind.
    #[arg(long, value_name = "NAME", help_heading = "Services")]
    pub(crate) pod_bridge_interface: Option<String>,
    /// With --detect-local-mode InterfaceNamePrefix: prefix of the names of pods' interfaces on the host.
    #[arg(long, value_name = "PREFIX", help_heading = "Services")]
    pub(crate) pod_interface_name_prefix: Option<String>,
    /// Addresses of this node that serve nodePorts: CIDRs separated by commas, or `primary` for the Node's own
    /// addresses [default: primary].
    #[arg(long, value_name = "CIDRS", help_heading = "Services", value_delimiter = ',')]
    pub(crate) nodeport_addresses: Vec<String>,
    /// This node's primary IP, in place of the Node's. Nothing is bound to it.
    #[arg(long, value_name = "IP", help_heading = "Services")]
    pub(crate) bind_address: Option<String>,
    /// A failed change is tried again after a second, or after this time if it is shorter. /livez fails when a change
    /// has waited for twice this time [default: 30s].
    #[arg(long, value_name = "DURATION", help_heading = "Services")]
    pub(crate) iptables_sync_period: Option<GoDuration>,

    /// Address of /healthz, /livez and /readyz; empty for none [default: 0.0.0.0:10256].
    #[arg(long, value_name = "ADDR:PORT", help_heading = "Servers")]
    pub(crate) healthz_bind_address: Option<String>,
    /// Address of /metrics, /configz and /proxyMode; empty for none [default: 127.0.0.1:10249].
    #[arg(long, value_name = "ADDR:PORT", help_heading = "Servers")]
    pub(crate) metrics_bind_address: Option<String>,
    /// End when a server's address cannot be bound, instead of trying again.
    #[arg(long, value_name = "BOOL", help_heading = "Servers", value_parser = go_bool)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) bind_address_hard_fail: Option<bool>,
    /// Deprecated: port of the health server, 0 for none. Use --healthz-bind-address.
    #[arg(long, value_name = "PORT", help_heading = "Servers", hide_short_help = true)]
    pub(crate) healthz_port: Option<u16>,
    /// Deprecated: port of the metrics server, 0 for none. Use --metrics-bind-address.
    #[arg(long, value_name = "PORT", help_heading = "Servers", hide_short_help = true)]
    pub(crate) metrics_port: Option<u16>,

    /// OOM score adjustment of this process, -1000 (never ended when memory runs out) to 1000 [default: -999].
    #[arg(long, value_name = "SCORE", help_heading = "Process", allow_negative_numbers = true)]
    pub(crate) oom_score_adj: Option<i32>,
    /// Verbosity of the log on stderr: 0 is normal, 4 and more adds decisions, 6 and more everything.
    #[arg(short, long = "v", value_name = "LEVEL", help_heading = "Process")]
    #[arg(num_args = 0..=1, default_missing_value = "4")]
    pub(crate) verbosity: Option<u32>,
    /// Format of the log: text or json [default: text].
    #[arg(long, value_name = "FORMAT", help_heading = "Process")]
    pub(crate) logging_format: Option<String>,

    /// Flags without effect.
    #[command(flatten)]
    pub(crate) accepted: Accepted,
}

impl Flags {
    /// Returns the path of the configuration file, if one is given.
    pub fn config(&self) -> Option<&Path> {
        self.config.as_deref().filter(|path| !path.as_os_str().is_empty())
    }

    /// Returns the path to write the configuration to, if one is given.
    pub(crate) fn write_config_to(&self) -> Option<&Path> {
        self.write_config_to.as_deref().filter(|path| !path.as_os_str().is_empty())
    }

    /// Returns sentences about deprecated flags that are given.
    pub(crate) fn deprecated(&self) -> Vec<String> {
        let ports = [("healthz", self.healthz_port), ("metrics", self.metrics_port)];
        let given = ports.into_iter().filter(|(_, port)| port.is_some());
        given.map(|(name, _)| format!("--{name}-port is deprecated; use --{name}-bind-address")).collect()
    }

    /// Converts the flags to the type of the file.
    pub(crate) fn to_configuration(&self) -> KubeProxyConfiguration {
        let mut configuration = KubeProxyConfiguration {
            hostname_override: self.hostname_override.clone(),
            bind_address: self.bind_address.clone(),
            bind_address_hard_fail: self.bind_address_hard_fail,
            detect_local_mode: self.detect_local_mode.clone(),
            cluster_cidr: self.cluster_cidr.clone(),
            oom_score_adj: self.oom_score_adj,
            ..KubeProxyConfiguration::default()
        };
        let [healthz, metrics] = default_addresses(self.bind_address.as_deref());
        configuration.healthz_bind_address =
            address(self.healthz_bind_address.as_deref(), self.healthz_port, &healthz);
        configuration.metrics_bind_address =
            address(self.metrics_bind_address.as_deref(), self.metrics_port, &metrics);
        if !self.feature_gates.is_empty() {
            configuration.feature_gates = Some(BTreeMap::from_iter(self.feature_gates.iter().cloned()));
        }
        let node_ports: Vec<String> =
            self.nodeport_addresses.iter().filter(|value| !value.is_empty()).cloned().collect();
        configuration.node_port_addresses = Some(node_ports).filter(|values| !values.is_empty());
        let kubeconfig = self.kubeconfig.as_ref().map(|path| path.to_string_lossy().into_owned());
        configuration.client_connection.kubeconfig = kubeconfig;
        configuration.detect_local.bridge_interface.clone_from(&self.pod_bridge_interface);
        configuration.detect_local.interface_name_prefix.clone_from(&self.pod_interface_name_prefix);
        configuration.iptables.sync_period = self.iptables_sync_period;
        configuration.nftables.sync_period = self.iptables_sync_period;
        configuration.logging.verbosity = self.verbosity;
        configuration.logging.format.clone_from(&self.logging_format);
        self.accepted.apply_to(&mut configuration);
        configuration
    }
}

/// Determines the address of a server from its flag and from the deprecated flag for its port.
fn address(given: Option<&str>, port: Option<u16>, default: &std::net::SocketAddr) -> Option<String> {
    match (given, port) {
        (_, Some(0)) => Some(String::new()),
        (given, None) => given.map(str::to_owned),
        (None, Some(port)) => Some(std::net::SocketAddr::new(default.ip(), port).to_string()),
        (Some(given), Some(port)) => {
            let mut address = Some(given.to_owned());
            append_port(&mut address, port);
            address
        }
    }
}

/// Returns a parser of paths. It accepts an empty path, which counts as not given.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// Parses `NAME=true` and `NAME=false`.
fn gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=true or NAME=false")?;
    Ok((name.trim().to_owned(), go_bool(value.trim())?))
}
