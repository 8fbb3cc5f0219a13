//! The command line, as given. [`crate::config`] resolves it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::bpf::dataplane::FLOW_ENTRIES;

/// Most elements of `FLOWS` that may be asked for; the kernel needs twice as many for its index.
const FLOW_ENTRIES_MAX: u32 = 1 << 26;

/// Makes Kubernetes Services work on this node, in place of kube-proxy, by eBPF and with any CNI.
///
/// `run` is the agent: one per node, in the host's network namespace. The other commands read the pinned BPF maps
/// and work while no agent runs.
#[derive(Debug, Parser)]
#[command(name = "proxy-agent", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch Services and keep the BPF maps in sync, until SIGTERM or SIGINT.
    ///
    /// The dataplane stays in place when the agent ends, also by SIGKILL: connections go on, new ones are served
    /// from the last state. `proxy-agent cleanup` removes it.
    Run(Box<RunArgs>),
    /// What is programmed, attached and counted, and what a user should mend.
    Status(Inspect),
    /// Every Service port: frontends, endpoints, affinity.
    Services(Inspect),
    /// Every backend with its state.
    Backends(Inspect),
    /// Every flow that the packet edge translates: clients from outside, and pods whose sockets are not seen.
    Flows(FlowsArgs),
    /// What the datapath decides, as it does: connections of sockets, flows of clients from outside, and what is refused,
    /// with the reason. Until SIGINT.
    Monitor(MonitorArgs),
    /// Detach the programs and remove everything pinned. Services stop working on this node.
    Cleanup {
        /// Where everything is pinned.
        #[command(flatten)]
        pins: Pins,
    },
}

/// Where everything is pinned.
#[derive(Args, Clone, Debug)]
pub struct Pins {
    /// Directory on a BPF file system in which maps and links are pinned; made, and the file system mounted, if
    /// missing. One agent per directory.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/vipr")]
    pub pin_dir: PathBuf,
    /// Directory in which the agent keeps what `status` shows beside the maps: its source, and problems by object.
    #[arg(long, value_name = "DIR", default_value = "/run/vipr")]
    pub run_dir: PathBuf,
}

/// Options of the inspection commands.
#[derive(Args, Clone, Debug)]
pub struct Inspect {
    /// Where everything is pinned.
    #[command(flatten)]
    pub pins: Pins,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Options of `flows`.
#[derive(Args, Clone, Debug)]
pub struct FlowsArgs {
    /// As for the other commands.
    #[command(flatten)]
    pub inspect: Inspect,
    /// Only flows of this Service.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
}

/// Options of `monitor`.
#[derive(Args, Clone, Debug)]
pub struct MonitorArgs {
    /// As for the other commands; as JSON, an object for each line.
    #[command(flatten)]
    pub inspect: Inspect,
    /// Only this Service. What is refused before it is clear whose it is belongs to none.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
    /// Also one in N packets of flows that go on; 1 for each.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub sample: u32,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Options of `run`. Names and meanings are kube-proxy's where it has them.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Kubeconfig file of the cluster to watch. Without it and without --manifests: the cluster whose pod this is.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// Directory of Kubernetes manifests (YAML or JSON) to serve instead of a cluster, followed live.
    ///
    /// Read are Services, EndpointSlices, Endpoints, this Node and ServiceCIDRs.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Name of this node, if it is not the host name. Trimmed and lower-cased.
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// cgroup v2 directory whose processes are served [default: the root of the hierarchy that is mounted].
    #[arg(long, value_name = "DIR")]
    pub cgroup_path: Option<PathBuf>,
    /// Pod addresses of the cluster: one CIDR, or one of each family, separated by a comma.
    ///
    /// What lies inside counts as local pod traffic: with externalTrafficPolicy Local it is still served by the
    /// whole cluster's endpoints.
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// Devices that lead to clients and to other nodes: interface names separated by commas, `NAME+` for all that begin
    /// so, `auto` or `none`.
    ///
    /// `auto` takes the topmost devices (a bond or bridge, not its ports) that carry addresses or routes, and overlay
    /// devices. `proxy-agent status` shows what was chosen and why.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "auto")]
    pub devices: Vec<String>,
    /// The host's side of pods, for pods whose sockets are not seen (such as VMs): beginnings of interface names
    /// separated by commas, `auto` or `none`.
    ///
    /// `auto` takes veth and tap devices that are ports of a bridge for pods, or that a host route leads to.
    #[arg(long, value_name = "PREFIXES", value_delimiter = ',', default_value = "auto")]
    pub pod_interfaces: Vec<String>,
    /// What counts as traffic of local pods: ClusterCIDR (what comes from --cluster-cidr), BridgeInterface or
    /// InterfaceNamePrefix.
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR")]
    pub detect_local_mode: String,
    /// With --detect-local-mode BridgeInterface: the bridge that pods are behind.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub pod_bridge_interface: String,
    /// With --detect-local-mode InterfaceNamePrefix: what the names of pods' interfaces on the host begin with.
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub pod_interface_name_prefix: String,
    /// Attach to devices by clsact filters also where the kernel has TCX.
    #[arg(long, hide = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set)]
    pub no_tcx: bool,
    /// Connections and UDP flows of clients outside that are kept for certain; more are served, but a flood may cost them.
    ///
    /// Memory is taken as they come, up to 450 bytes for each. A table that is there keeps its size until `proxy-agent
    /// cleanup` or a reboot.
    #[arg(long, value_name = "NUMBER", default_value_t = FLOW_ENTRIES)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOW_ENTRIES_MAX)))]
    pub flow_table_size: u32,
    /// Addresses of this node that serve nodePorts: CIDRs separated by commas, or `primary` for the Node's own
    /// addresses [default: primary].
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Address of /healthz, /livez and /readyz; empty for none.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,
    /// Address of /metrics and /proxyMode; empty for none.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: String,
    /// Feature gates of kube-proxy as NAME=true or NAME=false, separated by commas.
    ///
    /// Known is AllowServiceExternalIPs (default true); others have no meaning here and are named in the log.
    #[arg(long, value_name = "GATES", value_delimiter = ',')]
    pub feature_gates: Vec<String>,
    /// Where everything is pinned.
    #[command(flatten)]
    pub pins: Pins,
    /// Verbosity of the log on stderr: 0 is normal, 4 and more adds decisions, 6 and more everything.
    #[arg(short, long = "v", value_name = "LEVEL", num_args = 0..=1, default_value_t = 0, default_missing_value = "4")]
    pub verbosity: u8,
}
