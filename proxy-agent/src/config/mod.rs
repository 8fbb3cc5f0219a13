//! Command line and configuration file resolved: names looked up, addresses parsed, contradictions refused.
//!
//! [`Raw`] holds the given settings, [`Host`] the facts of this host. [`Config::resolve`] is a pure function of both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Uri;
use proxy_common::addr::{Addr, Family, Prefix};

use crate::bpf::pins::PinDir;
use crate::config::args::{RunArgs, SourceArgs};
use crate::config::devices::{DetectLocal, Selection, Settings, SettingsError};
use crate::config::kube_proxy::{ConfigFile, FileError, Invalid, KubeProxyConfiguration, fields, validate};
use crate::config::node_ports::NodePortAddresses;
use crate::config::servers::{BIND_RETRY, HEALTH_PORT, METRICS_PORT, OnBindFailure, bind_address};
use crate::host::Host;
use crate::reconcile::desired::Budgets;

pub mod args;

pub(crate) mod called_as;

pub(crate) mod devices;

pub mod kube_proxy;

pub(crate) mod lenient;

pub mod node_ports;

pub mod opt_out;

pub mod servers;

/// The feature gate of kube-proxy that has a meaning here.
pub(crate) const EXTERNAL_IPS_GATE: Gate = Gate { name: "AllowServiceExternalIPs", stage: "DEPRECATED" };

/// A feature gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// Name of the gate.
    pub(crate) name: &'static str,
    /// Stage of the gate, in the words of Kubernetes.
    pub(crate) stage: &'static str,
}

/// Source of the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// A Kubernetes API server. Without both fields, the server of the cluster that this process runs in as a pod.
    Kubernetes {
        /// File that names the server and our credentials.
        kubeconfig: Option<PathBuf>,
        /// URL of the server, in place of the one in the kubeconfig.
        master: Option<Uri>,
    },
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manifests(dir) => write!(f, "manifests in {}", dir.display()),
            Self::Kubernetes { kubeconfig: Some(file), master: None } => {
                write!(f, "Kubernetes API ({})", file.display())
            }
            Self::Kubernetes { kubeconfig: Some(file), master: Some(server) } => {
                write!(f, "Kubernetes API at {server} ({})", file.display())
            }
            Self::Kubernetes { kubeconfig: None, master: Some(server) } => {
                write!(f, "Kubernetes API at {server}")
            }
            Self::Kubernetes { kubeconfig: None, master: None } => f.write_str("Kubernetes API (in cluster)"),
        }
    }
}

impl Source {
    /// Determines the source for a command that needs nothing else of the configuration.
    ///
    /// # Errors
    ///
    /// The configuration file cannot be used, or the server's URL is invalid.
    pub(crate) fn of(args: &SourceArgs) -> Result<Self, ConfigError> {
        let of_file = match &args.config {
            None => None,
            Some(path) => ConfigFile::read(path)?.decode()?.0.client_connection.kubeconfig,
        };
        let given = args.kubeconfig.as_ref().map(|path| path.to_string_lossy().into_owned());
        source(args.manifests.as_deref(), given.or(of_file).as_deref(), args.master.as_deref())
    }
}

/// Settings as given by file and flags.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    /// kube-proxy's part, with every default.
    pub(crate) configuration: KubeProxyConfiguration,
    /// The file that the settings come from, if there is one.
    pub(crate) file: Option<ConfigFile>,
    /// Ignored settings, with the reasons: sentences for the log.
    pub(crate) notes: Vec<String>,
}

impl Raw {
    /// Reads the configuration file, if one is given. With a file, only the node name and the log settings of
    /// kube-proxy's flags count.
    ///
    /// # Errors
    ///
    /// [`FileError`].
    pub(crate) fn load(args: &RunArgs) -> Result<Self, FileError> {
        let mut flags = args.kube_proxy.to_configuration();
        let mut notes = args.kube_proxy.deprecated();
        let Some(path) = args.kube_proxy.config() else {
            return Ok(Self { configuration: flags.with_defaults(), file: None, notes });
        };
        let file = ConfigFile::read(path)?;
        let (mut configuration, ignored) = file.decode()?;
        notes.extend(ignored.into_iter().map(|note| format!("--config {}: {note}", path.display())));
        if let Some(name) = flags.hostname_override.take().filter(|name| !name.is_empty()) {
            configuration.hostname_override = Some(name);
        }
        let (given, logging) = (std::mem::take(&mut flags.logging), &mut configuration.logging);
        logging.verbosity = given.verbosity.or(logging.verbosity);
        logging.format = given.format.or(logging.format.take());
        logging.vmodule = given.vmodule.or(logging.vmodule.take());
        logging.flush_frequency = given.flush_frequency.or(logging.flush_frequency.take());
        let ignored = fields::flags_given(&flags);
        if !ignored.is_empty() {
            notes.push(format!("{}: ignored because --config is given", ignored.join(", ")));
        }
        Ok(Self { configuration: configuration.with_defaults(), file: Some(file), notes })
    }
}

/// Everything `run` needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// This node's name.
    pub(crate) node_name: Arc<str>,
    /// Source of the objects.
    pub(crate) source: Source,
    /// The cgroup whose processes are served.
    pub(crate) cgroup: PathBuf,
    /// Pin directory.
    pub(crate) pins: PinDir,
    /// File with the state that `status` shows in addition to the maps.
    pub(crate) state_file: PathBuf,
    /// Pod CIDR of each family. (With detect-local by the Node's podCIDRs the agent learns them from the Node.)
    pub(crate) cluster_cidr: [Option<Prefix>; 2],
    /// Addresses that serve nodePorts.
    pub(crate) nodeport_addresses: NodePortAddresses,
    /// Devices of the packet edge, and the way to attach to them.
    pub(crate) devices: devices::Devices,
    /// Rules for the Pods that are left to the packet edge.
    pub(crate) opt_out: opt_out::Rules,
    /// Number of elements of `FLOWS` if the map has to be created.
    pub(crate) flow_table_size: u32,
    /// Whether externalIPs are served (feature gate `AllowServiceExternalIPs`).
    pub(crate) allow_external_ips: bool,
    /// Whether externalIPs and load-balancer addresses that are addresses of this host are not served.
    pub(crate) protect_node_addresses: bool,
    /// Limits for a Service and for a namespace.
    pub(crate) budgets: Budgets,
    /// This node's primary IP, if it replaces the Node's.
    pub(crate) bind_address: Option<Addr>,
    /// The families that this host can serve.
    pub(crate) families: Vec<Family>,
    /// Address of the health server.
    pub(crate) healthz: Option<SocketAddr>,
    /// Address of the metrics server.
    pub(crate) metrics: Option<SocketAddr>,
    /// Reaction when the address of one of the two servers cannot be bound.
    pub(crate) on_bind_failure: OnBindFailure,
    /// Longest time until a failed change is tried again. The agent is unhealthy when a change has waited twice as
    /// long.
    pub(crate) sync_period: Duration,
    /// `oom_score_adj` of this process.
    pub(crate) oom_score_adj: i32,
    /// The configuration file, which must not change while the agent runs.
    pub(crate) file: Option<ConfigFile>,
    /// kube-proxy's part with every default, as `/configz` shows it.
    pub(crate) effective: KubeProxyConfiguration,
    /// Messages for the user about the configuration: sentences for the log.
    pub(crate) notes: Vec<String>,
}

/// Error in the command line or the configuration file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The node has no name.
    #[error("this node's name is empty; give it with --hostname-override")]
    NoName,
    /// Fields that cannot be used.
    #[error("{}", sentences(.0))]
    Invalid(Vec<Invalid>),
    /// Device settings that cannot be used.
    #[error(transparent)]
    Devices(#[from] SettingsError),
    /// Opt-out rules that cannot be used.
    #[error(transparent)]
    OptOut(#[from] opt_out::RuleError),
    /// A configuration file that cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// `--master` is not a URL.
    #[error("--master `{0}`: must be a URL such as https://192.0.2.1:6443")]
    Master(String),
}

fn sentences(invalid: &[Invalid]) -> String {
    let sentences: Vec<String> = invalid.iter().map(Invalid::to_string).collect();
    sentences.join("; ")
}

impl Config {
    /// Resolves the given settings on this host.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names every field that is wrong, its flag and its value.
    pub(crate) fn resolve(args: &RunArgs, raw: Raw, host: &Host) -> Result<Self, ConfigError> {
        let Raw { configuration: given, file, mut notes } = raw;
        let mut wrong = validate(&given);
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let detect_local = DetectLocal::parse(
            &text(&given.detect_local_mode),
            &text(&given.detect_local.bridge_interface),
            &text(&given.detect_local.interface_name_prefix),
        );
        let detect_local = or_wrong(detect_local, &mut wrong);
        let server = |field, address: &Option<String>, port| match bind_address(&text(address), port) {
            Ok(address) => Ok(address),
            Err(error) => Err(Invalid::new(field, text(address), error.to_string())),
        };
        let healthz = server("healthzBindAddress", &given.healthz_bind_address, HEALTH_PORT);
        let metrics = server("metricsBindAddress", &given.metrics_bind_address, METRICS_PORT);
        let [healthz, metrics] = [healthz, metrics].map(|address| or_wrong(address, &mut wrong));
        let bind_address = or_wrong(primary_ip(&text(&given.bind_address)), &mut wrong);
        let cluster_cidr = or_wrong(cluster_cidr(&text(&given.cluster_cidr)), &mut wrong);
        let node_ports = given.node_port_addresses.clone().unwrap_or_default();
        let nodeport_addresses = or_wrong(NodePortAddresses::parse(&node_ports), &mut wrong);
        if !host.ipv6 {
            let by_source = detect_local == DetectLocal::ClusterCidr;
            match cluster_cidr {
                [None, Some(cidr)] if by_source => wrong.push(Invalid::new("clusterCIDR", cidr, NO_IPV6)),
                _ => {}
            }
            if let Some(ip) = bind_address.filter(|ip| ip.family() == Family::V6) {
                wrong.push(Invalid::new("bindAddress", ip, NO_IPV6));
            }
            notes.extend(of_no_use(&given));
        }
        if !wrong.is_empty() {
            return Err(ConfigError::Invalid(wrong));
        }

        notes.extend(without_effect(&given));
        let pins = PinDir::new(&args.pins.pin_dir);
        Ok(Self {
            node_name: node_name(&text(&given.hostname_override), &host.name)?,
            source: source(
                args.manifests.as_deref(),
                given.client_connection.kubeconfig.as_deref(),
                args.kube_proxy.master.as_deref(),
            )?,
            cgroup: host.cgroup.clone(),
            pins: pins.clone(),
            state_file: state_file(&args.pins.run_dir, &args.pins.pin_dir),
            cluster_cidr,
            nodeport_addresses,
            devices: devices::Devices {
                settings: Settings {
                    devices: Selection::parse("--devices", &args.devices, false)?,
                    pods: Selection::parse("--pod-interfaces", &args.pod_interfaces, true)?,
                    detect_local,
                },
                no_tcx: args.no_tcx,
                pins,
            },
            opt_out: opt_out::Rules::parse(&args.socket_opt_out)?,
            flow_table_size: args.flow_table_size,
            allow_external_ips: allows_external_ips(&given),
            protect_node_addresses: args.tenants.protect_node_addresses,
            budgets: args.tenants.budgets(),
            bind_address,
            families: Family::ALL.into_iter().filter(|family| *family == Family::V4 || host.ipv6).collect(),
            healthz,
            metrics,
            on_bind_failure: match given.bind_address_hard_fail {
                Some(true) => OnBindFailure::Fail,
                Some(false) | None => OnBindFailure::Retry(BIND_RETRY),
            },
            sync_period: given.sync_periods().period.to_std(),
            oom_score_adj: given.oom_score_adj.unwrap_or_default(),
            file,
            effective: given,
            notes,
        })
    }
}

/// Returns whether externalIPs are served.
pub(crate) fn allows_external_ips(given: &KubeProxyConfiguration) -> bool {
    let gate = given.feature_gates.as_ref().and_then(|gates| gates.get(EXTERNAL_IPS_GATE.name));
    gate.is_none_or(|allowed| *allowed)
}

const NO_IPV6: &str = "is IPv6, which is switched off on this host";

/// Returns the value. On an error, returns the default and adds the error to `wrong`.
fn or_wrong<T: Default>(result: Result<T, Invalid>, wrong: &mut Vec<Invalid>) -> T {
    result.unwrap_or_else(|invalid| {
        wrong.push(invalid);
        T::default()
    })
}

/// Returns the state file that belongs to a pin directory.
pub(crate) fn state_file(run_dir: &Path, pin_dir: &Path) -> PathBuf {
    let name = pin_dir.to_string_lossy().trim_matches('/').replace('/', "-");
    run_dir.join(format!("{name}.json"))
}

/// Determines the node name. An empty name counts as not given; a name of blanks is an error.
fn node_name(given: &str, host: &str) -> Result<Arc<str>, ConfigError> {
    let name = if given.is_empty() { host } else { given }.trim().to_lowercase();
    if name.is_empty() { Err(ConfigError::NoName) } else { Ok(name.into()) }
}

fn source(
    manifests: Option<&Path>,
    kubeconfig: Option<&str>,
    master: Option<&str>,
) -> Result<Source, ConfigError> {
    if let Some(dir) = manifests {
        return Ok(Source::Manifests(dir.to_owned()));
    }
    let kubeconfig = kubeconfig.filter(|text| !text.is_empty()).map(PathBuf::from);
    let master = match master.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => match text.parse::<Uri>() {
            Ok(url) if url.scheme().is_some() && url.host().is_some() => Some(url),
            _ => return Err(ConfigError::Master(text.to_owned())),
        },
    };
    Ok(Source::Kubernetes { kubeconfig, master })
}

/// Parses `bindAddress`. Returns `None` for an unspecified address.
fn primary_ip(text: &str) -> Result<Option<Addr>, Invalid> {
    if text.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_unspecified()) {
        return Ok(None);
    }
    lenient::addr(text).map(Some).map_err(|what| Invalid::new("bindAddress", text, what))
}

fn cluster_cidr(given: &str) -> Result<[Option<Prefix>; 2], Invalid> {
    const MUST: &str = "must be one CIDR, or one IPv4 and one IPv6 CIDR separated by a comma";
    let mut cidrs = [None; 2];
    for text in given.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let prefix = lenient::prefix(text).map_err(|_what| Invalid::new("clusterCIDR", given, MUST))?;
        let slot = cidrs.get_mut(prefix.family().index()).filter(|slot| slot.is_none());
        *slot.ok_or_else(|| Invalid::new("clusterCIDR", given, MUST))? = Some(prefix);
    }
    Ok(cidrs)
}

/// Returns notes about IPv6 settings on a host without IPv6.
fn of_no_use(given: &KubeProxyConfiguration) -> Vec<String> {
    let settings = [
        ("clusterCIDR", listed(given.cluster_cidr.as_ref())),
        ("healthzBindAddress", listed(given.healthz_bind_address.as_ref())),
        ("metricsBindAddress", listed(given.metrics_bind_address.as_ref())),
        ("nodePortAddresses", given.node_port_addresses.clone().unwrap_or_default()),
    ];
    settings
        .into_iter()
        .flat_map(|(field, values)| {
            let of_ipv6 = values.into_iter().filter(|value| value.matches(':').count() > 1);
            of_ipv6.map(move |value| Invalid::new(field, value, NO_IPV6).to_string())
        })
        .collect()
}

fn listed(text: Option<&String>) -> Vec<String> {
    text.into_iter().flat_map(|text| text.split(',')).map(|text| text.trim().to_owned()).collect()
}

/// Returns one sentence about all settings that are valid but have no meaning here.
fn without_effect(given: &KubeProxyConfiguration) -> Option<String> {
    let mut settings = fields::without_effect(given);
    let gates = given.feature_gates.iter().flatten().filter(|(name, _)| *name != EXTERNAL_IPS_GATE.name);
    settings.extend(gates.map(|(name, value)| format!("featureGates.{name}={value}")));
    (!settings.is_empty())
        .then(|| format!("settings of kube-proxy without effect here: {}", settings.join(", ")))
}

#[cfg(test)]
mod tests;
