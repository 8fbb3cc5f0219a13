//! The command line resolved: names looked up, addresses parsed, contradictions refused.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proxy_common::addr::Prefix;

use crate::args::RunArgs;
use crate::bpf::pins::PinDir;
use crate::edge;
use crate::edge::settings::{DetectLocal, Selection, Settings, SettingsError};
use crate::http::{HttpError, bind_address};
use crate::node::{NodePortAddresses, NodePortAddressesError};
use crate::{health, metrics};

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The cluster that a kubeconfig file names.
    Kubeconfig(PathBuf),
    /// The cluster whose pod this is.
    InCluster,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manifests(dir) => write!(f, "manifests in {}", dir.display()),
            Self::Kubeconfig(file) => write!(f, "Kubernetes API ({})", file.display()),
            Self::InCluster => f.write_str("Kubernetes API (in cluster)"),
        }
    }
}

/// Everything `run` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's name.
    pub node_name: Arc<str>,
    /// Where objects come from.
    pub source: Source,
    /// The cgroup whose processes are served.
    pub cgroup: PathBuf,
    /// Pin directory.
    pub pins: PinDir,
    /// File with what `status` shows beside the maps.
    pub state_file: PathBuf,
    /// Pod CIDR of each family.
    pub cluster_cidr: [Option<Prefix>; 2],
    /// Which addresses serve nodePorts.
    pub nodeport_addresses: NodePortAddresses,
    /// Devices of the packet edge, and how to attach to them.
    pub edge: edge::Config,
    /// Elements of `FLOWS`, if it has to be made.
    pub flow_table_size: u32,
    /// Whether externalIPs are served (feature gate `AllowServiceExternalIPs`).
    pub allow_external_ips: bool,
    /// Address of the health server.
    pub healthz: Option<SocketAddr>,
    /// Address of the metrics server.
    pub metrics: Option<SocketAddr>,
}

/// What is wrong with the command line or this host.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The node has no name.
    #[error("this node's name is empty; give it with --hostname-override")]
    NoName,
    /// Not a CIDR, or too many.
    #[error("--cluster-cidr {0:?}: must be one CIDR, or one IPv4 and one IPv6 CIDR separated by a comma")]
    ClusterCidr(String),
    /// nodePort addresses.
    #[error(transparent)]
    NodePortAddresses(#[from] NodePortAddressesError),
    /// Devices or detect-local.
    #[error(transparent)]
    Devices(#[from] SettingsError),
    /// Not NAME=true or NAME=false.
    #[error("--feature-gates {0:?}: must be NAME=true or NAME=false, separated by commas")]
    FeatureGate(String),
    /// Bind addresses.
    #[error(transparent)]
    Address(#[from] HttpError),
    /// There is no cgroup v2 hierarchy.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) or boot with \
         systemd.unified_cgroup_hierarchy=1"
    )]
    NoCgroup2,
    /// Not a directory of a cgroup v2 hierarchy.
    #[error(
        "--cgroup-path {0}: not a directory of a cgroup v2 hierarchy; give the root of the host's, which is /sys/fs/cgroup \
         or, on hybrid hosts, /sys/fs/cgroup/unified"
    )]
    NotCgroup2(PathBuf),
    /// A file of /proc cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Config {
    /// Resolves the command line against this host.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] names the flag.
    pub fn resolve(args: &RunArgs) -> Result<Self, ConfigError> {
        let source = match (&args.manifests, &args.kubeconfig) {
            (Some(dir), _) => Source::Manifests(dir.clone()),
            (None, Some(file)) => Source::Kubeconfig(file.clone()),
            (None, None) => Source::InCluster,
        };
        Ok(Self {
            node_name: node_name(args.hostname_override.as_deref())?,
            source,
            cgroup: match &args.cgroup_path {
                Some(path) => cgroup2(path)?,
                None => cgroup_root()?,
            },
            pins: PinDir::new(&args.pins.pin_dir),
            state_file: state_file(&args.pins.run_dir, &args.pins.pin_dir),
            cluster_cidr: cluster_cidr(&args.cluster_cidr)?,
            nodeport_addresses: NodePortAddresses::parse(&args.nodeport_addresses)?,
            edge: edge::Config {
                settings: Settings {
                    devices: Selection::parse("--devices", &args.devices, false)?,
                    pods: Selection::parse("--pod-interfaces", &args.pod_interfaces, true)?,
                    detect_local: DetectLocal::parse(
                        &args.detect_local_mode,
                        &args.pod_bridge_interface,
                        &args.pod_interface_name_prefix,
                    )?,
                },
                no_tcx: args.no_tcx,
                pins: PinDir::new(&args.pins.pin_dir),
            },
            flow_table_size: args.flow_table_size,
            allow_external_ips: feature_gate(&args.feature_gates, "AllowServiceExternalIPs", true)?,
            healthz: bind_address(
                "--healthz-bind-address",
                &args.healthz_bind_address,
                health::DEFAULT_PORT,
            )?,
            metrics: bind_address(
                "--metrics-bind-address",
                &args.metrics_bind_address,
                metrics::DEFAULT_PORT,
            )?,
        })
    }
}

/// The state file that belongs to a pin directory.
pub fn state_file(run_dir: &Path, pin_dir: &Path) -> PathBuf {
    let name = pin_dir.to_string_lossy().trim_matches('/').replace('/', "-");
    run_dir.join(format!("{name}.json"))
}

fn node_name(given: Option<&str>) -> Result<Arc<str>, ConfigError> {
    let host = rustix::system::uname();
    let name = given.map_or_else(|| host.nodename().to_string_lossy(), Into::into).trim().to_lowercase();
    if name.is_empty() { Err(ConfigError::NoName) } else { Ok(name.into()) }
}

fn cluster_cidr(given: &[String]) -> Result<[Option<Prefix>; 2], ConfigError> {
    let wrong = || ConfigError::ClusterCidr(given.join(","));
    let mut cidrs = [None; 2];
    for text in given.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
        let prefix = crate::sources::lenient::prefix(text).map_err(|_reason| wrong())?;
        let slot = cidrs.get_mut(prefix.family().index()).filter(|slot| slot.is_none());
        *slot.ok_or_else(wrong)? = Some(prefix);
    }
    Ok(cidrs)
}

/// The value of a feature gate; the last mention counts, as with kube-proxy.
fn feature_gate(given: &[String], name: &str, default: bool) -> Result<bool, ConfigError> {
    let mut value = default;
    for gate in given.iter().filter(|gate| !gate.trim().is_empty()) {
        let wrong = || ConfigError::FeatureGate(gate.clone());
        let (gate_name, gate_value) = gate.split_once('=').ok_or_else(wrong)?;
        let gate_value = gate_value.trim().parse().map_err(|_not_bool: std::str::ParseBoolError| wrong())?;
        if gate_name.trim() == name {
            value = gate_value;
        } else {
            tracing::info!(gate = gate_name, "feature gate without a meaning here");
        }
    }
    Ok(value)
}

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u32 = 0x6367_7270;

fn cgroup2(path: &Path) -> Result<PathBuf, ConfigError> {
    match rustix::fs::statfs(path) {
        Ok(fs) if fs.f_type as u32 == CGROUP2_MAGIC => Ok(path.to_path_buf()),
        _ => Err(ConfigError::NotCgroup2(path.to_path_buf())),
    }
}

/// The shortest mount point of a cgroup v2 hierarchy: `/sys/fs/cgroup`, or on hybrid hosts
/// `/sys/fs/cgroup/unified`.
fn cgroup_root() -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from("/proc/self/mountinfo");
    let mounts = match std::fs::read_to_string(&path) {
        Ok(mounts) => mounts,
        Err(source) => return Err(ConfigError::File { path, source }),
    };
    mount_points(&mounts, "cgroup2").min_by_key(|path| path.as_os_str().len()).ok_or(ConfigError::NoCgroup2)
}

/// Mount points of a file system type in the format of /proc/self/mountinfo (proc(5)).
fn mount_points<'a>(mounts: &'a str, fs_type: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    mounts.lines().filter_map(move |line| {
        let (mount, fs) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        (fs.split(' ').next()? == fs_type).then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_root_is_found_on_unified_and_hybrid_hosts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw\n\
                      32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let unified = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                       40 30 0:27 /sub /mnt/other/cgroup rw - cgroup2 cgroup2 rw\n";
        let root = |mounts| mount_points(mounts, "cgroup2").min_by_key(|path| path.as_os_str().len());
        assert_eq!(root(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(root(unified), Some("/sys/fs/cgroup".into()));
        assert_eq!(root(""), None);
    }

    #[test]
    fn p234_the_node_name_is_trimmed_and_lower_cased() {
        assert_eq!(&*node_name(Some("  Node-A ")).unwrap(), "node-a");
        assert!(matches!(node_name(Some("  ")), Err(ConfigError::NoName)));
    }

    #[test]
    fn p241_cluster_cidrs_are_one_or_a_dual_stack_pair() {
        let parse = |text: &str| cluster_cidr(&text.split(',').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse("").unwrap(), [None, None]);
        let pair = parse("fd00:64::/48, 10.64.0.0/12").unwrap();
        assert_eq!(pair.map(|cidr| cidr.unwrap().to_string()), ["10.64.0.0/12", "fd00:64::/48"]);
        for wrong in ["10.64.0.0/12,10.80.0.0/12", "10.64.0.0/33", "pods"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn p022_feature_gates_are_names_with_a_truth_value() {
        let gate = |text: &str| {
            let given: Vec<String> = text.split(',').map(str::to_owned).collect();
            feature_gate(&given, "AllowServiceExternalIPs", true)
        };
        assert!(gate("").unwrap());
        assert!(!gate("AllowServiceExternalIPs=false").unwrap());
        assert!(gate("Other=false,AllowServiceExternalIPs=false,AllowServiceExternalIPs=true").unwrap());
        for wrong in ["AllowServiceExternalIPs", "AllowServiceExternalIPs=no"] {
            assert!(matches!(gate(wrong), Err(ConfigError::FeatureGate(_))), "{wrong}");
        }
    }
}
