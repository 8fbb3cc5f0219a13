//! The command line, as given. [`crate::config`] resolves it.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::bpf::dataplane::FLOW_ENTRIES;
use crate::config::called_as;
use crate::config::kube_proxy::Flags;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{Budget, Budgets};

/// Maximal number of elements of `FLOWS` that may be requested; the kernel needs twice as many for its index.
const FLOW_ENTRIES_MAX: u32 = 1 << 26;
/// Maximal budget of a Service: no map is made for more.
const BUDGET_MAX: u32 = 1 << 25;

/// Makes Kubernetes Services work on this node, in place of kube-proxy, by eBPF and with any CNI.
///
/// `run` is the agent: one per node, in the host's network namespace. The other commands read the pinned BPF maps
/// and work while no agent runs. Flags without a command are those of `run`, so that kube-proxy's command line works as
/// it is.
#[derive(Debug, Parser)]
#[command(name = "proxy-agent", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Command to run.
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    ///
    /// The error of clap. Help and version are such errors, too.
    pub(crate) fn from_command_line(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut args = called_as::command_line(args.into_iter().collect())
            .map_err(|what| Self::command().error(clap::error::ErrorKind::InvalidValue, what))?;
        // Go's flags accept underscores, and `--version=raw`.
        for arg in args.iter_mut().skip(1) {
            if let Some(text) = arg.to_str().filter(|text| text.starts_with("--")) {
                let (flag, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                let flag = flag.replace('_', "-");
                let is_version = flag == "--version" && ["=true", "=raw"].contains(&value);
                *arg = if is_version { flag.into() } else { format!("{flag}{value}").into() };
            }
        }
        // kube-proxy has no commands.
        const ABOUT_ALL: [&str; 4] = ["-h", "--help", "-V", "--version"];
        let first = args.get(1).map(|first| first.to_string_lossy());
        if first.is_some_and(|first| first.starts_with('-') && !ABOUT_ALL.contains(&&*first)) {
            args.insert(1, "run".into());
        }
        Self::try_parse_from(args)
    }
}

/// Returns kube-proxy's flags on a command line, the program's name first; `None` for a command other than `run`.
///
/// # Errors
///
/// The error of clap.
pub fn kube_proxy_flags(line: impl IntoIterator<Item = OsString>) -> Result<Option<Flags>, clap::Error> {
    match Cli::from_command_line(line)?.command {
        Command::Run(args) => Ok(Some(args.kube_proxy)),
        Command::Status(_)
        | Command::Services(_)
        | Command::Backends(_)
        | Command::Flows(_)
        | Command::Monitor(_)
        | Command::Verify(_)
        | Command::Explain(_)
        | Command::Cleanup { .. }
        | Command::Completion { .. } => Ok(None),
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Watch Services and keep the BPF maps in sync, until SIGTERM or SIGINT.
    ///
    /// The dataplane stays in place when the agent ends, also by SIGKILL: connections go on, new ones are served
    /// from the last state. `proxy-agent cleanup` removes it.
    Run(Box<RunArgs>),
    /// Print what is programmed, attached and counted, and the problems that a user should fix.
    Status(Inspect),
    /// Print every Service port: frontends, endpoints, affinity.
    Services(Inspect),
    /// Print every backend with its state.
    Backends(Inspect),
    /// Print every flow that the packet edge translates: clients from outside, and pods whose sockets are not seen.
    Flows(FlowsArgs),
    /// Print the decisions of the datapath as it makes them, until SIGINT: connections of sockets, flows of clients
    /// from outside, and refusals with their reason.
    Monitor(MonitorArgs),
    /// Compare the cluster (or the manifests) with the kernel maps, and print every difference.
    ///
    /// Takes the flags of `run`, needs no running agent, and writes nothing. Ends with 1 if anything differs.
    Verify(Box<VerifyArgs>),
    /// Explain what happens to a connection to an address and port, and why: its Service, the endpoints that it may
    /// get, and the verdict for each kind of client.
    ///
    /// The verdicts come from the datapath's own code on the current maps. Nothing is sent.
    Explain(ExplainArgs),
    /// Detach the programs and remove everything pinned. Services stop working on this node.
    Cleanup {
        /// Directories of the pins and of the agent's state.
        #[command(flatten)]
        pins: Pins,
    },
    /// Print a script that completes this command line in a shell.
    Completion {
        /// The shell.
        shell: Shell,
    },
}

/// Directories of the pins and of the agent's state.
#[derive(Args, Clone, Debug)]
pub(crate) struct Pins {
    /// Directory on a BPF file system in which maps and links are pinned. If it is missing, it is created, and the
    /// file system is mounted. One agent per directory.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/vipr")]
    pub(crate) pin_dir: PathBuf,
    /// Directory for the state that `status` shows in addition to the maps: the agent's source, and problems by
    /// object.
    #[arg(long, value_name = "DIR", default_value = "/run/vipr")]
    pub(crate) run_dir: PathBuf,
}

/// Options of the inspection commands.
#[derive(Args, Clone, Debug)]
pub(crate) struct Inspect {
    /// Directories of the pins and of the agent's state.
    #[command(flatten)]
    pub(crate) pins: Pins,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Options of `flows`.
#[derive(Args, Clone, Debug)]
pub(crate) struct FlowsArgs {
    /// Options of every inspection command.
    #[command(flatten)]
    pub(crate) inspect: Inspect,
    /// Only flows of this Service.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) service: Option<String>,
}

/// Options of `monitor`.
#[derive(Args, Clone, Debug)]
pub(crate) struct MonitorArgs {
    /// Options of every inspection command. In JSON each event is a line, in YAML a document.
    #[command(flatten)]
    pub(crate) inspect: Inspect,
    /// Only events of this Service. A refusal before the Service is known belongs to no Service.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) service: Option<String>,
    /// Also one in N packets of ongoing flows; 1 for every packet.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) sample: u32,
}

/// Options of `verify`.
#[derive(Args, Clone, Debug)]
pub(crate) struct VerifyArgs {
    /// Options of `run`.
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Options of `explain`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ExplainArgs {
    /// Options of every inspection command.
    #[command(flatten)]
    pub(crate) inspect: Inspect,
    /// Client: an address (of this host, of a pod, or of a machine outside) or a Pod. Without it: every kind of
    /// client.
    #[arg(long, value_name = "ADDRESS|NAMESPACE/POD", value_parser = client)]
    pub(crate) from: Option<ClientName>,
    /// Source in which that Pod is looked up.
    #[command(flatten, next_help_heading = "Where the Pod of --from is looked up")]
    pub(crate) source: SourceArgs,
    /// Protocol of the connection.
    #[arg(ignore_case = true)]
    pub(crate) protocol: Protocol,
    /// Destination of the connection: `10.96.0.10:53`, `[fd00::10]:53`.
    #[arg(value_name = "ADDRESS:PORT")]
    pub(crate) target: SocketAddr,
}

/// Source in which objects are looked up, with the same flags as for `run`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SourceArgs {
    /// Directory of Kubernetes manifests that include the Pod's status.
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: Option<PathBuf>,
    /// kube-proxy's configuration file, for the kubeconfig that it names.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["manifests", "kubeconfig"])]
    pub(crate) config: Option<PathBuf>,
    /// Kubeconfig file of a user who may read pods. Without any of these options: the cluster that this process runs
    /// in as a pod.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// URL of the Kubernetes API server, in place of the one in the kubeconfig.
    #[arg(long, value_name = "URL")]
    pub(crate) master: Option<String>,
}

/// Client of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClientName {
    /// Client with this address.
    Address(IpAddr),
    /// Pod with this name.
    Pod(ObjectKey),
}

fn client(text: &str) -> Result<ClientName, String> {
    if let Ok(address) = text.parse() {
        return Ok(ClientName::Address(address));
    }
    match text.split_once('/') {
        Some((namespace, name)) if is_name(namespace, "") && is_name(name, ".") => {
            Ok(ClientName::Pod(ObjectKey::new(namespace, name)))
        }
        _ => Err("must be an address, or NAMESPACE/POD".to_owned()),
    }
}

fn is_name(text: &str, more: &str) -> bool {
    !text.is_empty()
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || more.contains(c))
}

/// Protocols of Service ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

/// Options of `run`: kube-proxy's flags, and settings that kube-proxy does not have. The latter count beside a
/// configuration file, too.
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub(crate) struct RunArgs {
    /// Directory of Kubernetes manifests (YAML or JSON) to serve instead of a cluster, followed live.
    ///
    /// The agent reads Services, EndpointSlices, Endpoints, this Node and ServiceCIDRs.
    #[arg(long, value_name = "DIR", help_heading = "Cluster")]
    pub(crate) manifests: Option<PathBuf>,
    /// Flags of kube-proxy.
    #[command(flatten)]
    pub(crate) kube_proxy: Flags,
    /// Devices that lead to clients and to other nodes: interface names separated by commas, `NAME+` for all names
    /// that begin with NAME, `auto` or `none`.
    ///
    /// `auto` takes the topmost devices (a bond or bridge, not its ports) that carry addresses or routes, and overlay
    /// devices. `proxy-agent status` shows the chosen devices and the reasons.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "auto",
        help_heading = "Devices"
    )]
    pub(crate) devices: Vec<String>,
    /// The host's side of pods, for pods whose sockets are not seen (such as VMs): prefixes of interface names
    /// separated by commas, `auto` or `none`.
    ///
    /// `auto` takes veth and tap devices that are ports of a bridge for pods, or that a host route leads to.
    #[arg(
        long,
        value_name = "PREFIXES",
        value_delimiter = ',',
        default_value = "auto",
        help_heading = "Devices"
    )]
    pub(crate) pod_interfaces: Vec<String>,
    /// Pods of this node whose sockets are left alone, so that their packets are served instead: `annotation` (Pods
    /// annotated `vipr.dev/socket-edge: "off"`), `runtime-class=NAME`, or, for processes outside of Pods,
    /// `cgroup=PATH` below the root of the hierarchy. Several rules are separated by commas [default: none].
    ///
    /// Meant for service meshes that must see the requested address, and for clusters in containers of this node.
    /// Needs the pods' interfaces and, for the first two rules, the permission to list and watch pods.
    #[arg(long, value_name = "RULES", value_delimiter = ',', help_heading = "Devices")]
    pub(crate) socket_opt_out: Vec<String>,
    /// Attach to devices by clsact filters even if the kernel has TCX. On the way out they run behind the filters of
    /// others.
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set, help_heading = "Devices")]
    pub(crate) no_tcx: bool,
    /// cgroup v2 directory whose processes are served [default: the root of the mounted hierarchy].
    #[arg(long, value_name = "DIR", help_heading = "Process")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// Number of connections and UDP flows of outside clients that are certain to be kept. More are served, but a
    /// flood may evict them.
    ///
    /// Memory is allocated as flows appear, up to 450 bytes for each. An existing table keeps its size until
    /// `proxy-agent cleanup` or a reboot.
    #[arg(long, value_name = "NUMBER", default_value_t = FLOW_ENTRIES, help_heading = "Devices")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOW_ENTRIES_MAX)))]
    pub(crate) flow_table_size: u32,
    /// Limits for tenants.
    #[command(flatten, next_help_heading = "Tenants")]
    pub(crate) tenants: Tenants,
    /// Directories of the pins and of the agent's state.
    #[command(flatten, next_help_heading = "Process")]
    pub(crate) pins: Pins,
}

/// Limits that protect tenants from each other.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Tenants {
    /// Maximal number of frontends of one Service: its ports times its addresses, of both families. A Service above
    /// the limit is not served, and is named in `status`.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.frontends, value_parser = budget())]
    pub(crate) max_service_frontends: u32,
    /// Maximal number of endpoints of one Service as its slices name them, counted for each of its ports.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.endpoints, value_parser = budget())]
    pub(crate) max_service_endpoints: u32,
    /// Maximal number of loadBalancerSourceRanges of one Service, counted for each of its ports.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.source_ranges, value_parser = budget())]
    pub(crate) max_service_source_ranges: u32,
    /// Maximal number of frontends of one namespace. Its oldest Services are served, the others are named in
    /// `status`. Has no effect with --manifests.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.frontends, value_parser = budget())]
    pub(crate) max_namespace_frontends: u32,
    /// Maximal number of endpoints of one namespace, counted for each port. Above the limit only its oldest
    /// EndpointSlices count.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.endpoints, value_parser = budget())]
    pub(crate) max_namespace_endpoints: u32,
    /// Maximal number of loadBalancerSourceRanges of one namespace, counted for each port.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.source_ranges, value_parser = budget())]
    pub(crate) max_namespace_source_ranges: u32,
    /// Do not serve externalIPs and load-balancer addresses that are addresses of this host.
    ///
    /// Not for load balancers that assign their addresses to hosts, as kube-vip and keepalived do.
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set)]
    pub(crate) protect_node_addresses: bool,
}

impl Tenants {
    /// Returns the limits for a Service and for a namespace. Each limit of a namespace is at least that of one
    /// Service.
    pub(crate) fn budgets(&self) -> Budgets {
        let service = Budget {
            frontends: self.max_service_frontends,
            endpoints: self.max_service_endpoints,
            source_ranges: self.max_service_source_ranges,
        };
        let namespace = Budget {
            frontends: self.max_namespace_frontends.max(service.frontends),
            endpoints: self.max_namespace_endpoints.max(service.endpoints),
            source_ranges: self.max_namespace_source_ranges.max(service.source_ranges),
        };
        Budgets { service, namespace }
    }
}

fn budget() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(BUDGET_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_addresses_or_pods() {
        for (text, want) in [
            ("10.64.1.50", Some(ClientName::Address("10.64.1.50".parse().unwrap()))),
            ("fd00:64::50", Some(ClientName::Address("fd00:64::50".parse().unwrap()))),
            ("shop/cart-1", Some(ClientName::Pod(ObjectKey::new("shop", "cart-1")))),
            ("kube-system/etcd.n1", Some(ClientName::Pod(ObjectKey::new("kube-system", "etcd.n1")))),
            ("cart-1", None),
            ("10.64.0.0/12", None),
            ("fd00:64::/48", None),
            ("shop/", None),
            ("shop/pod/cart-1", None),
        ] {
            assert_eq!(client(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn each_budget_has_its_flag() {
        let fields = [("frontends", 7), ("endpoints", 8), ("source-ranges", 9)];
        let flags = fields.iter().flat_map(|(field, number)| {
            [format!("--max-service-{field}={number}"), format!("--max-namespace-{field}={number}0")]
        });
        let line = ["proxy-agent", "run"].into_iter().map(str::to_owned).chain(flags).map(OsString::from);
        let Command::Run(args) = Cli::from_command_line(line).unwrap().command else { panic!("not run") };
        let service = Budget { frontends: 7, endpoints: 8, source_ranges: 9 };
        let namespace = Budget { frontends: 70, endpoints: 80, source_ranges: 90 };
        assert_eq!(args.tenants.budgets(), Budgets { service, namespace });
    }

    #[test]
    fn a_pod_is_looked_up_in_one_place() {
        assert!(explain(&["--kubeconfig", "f", "--master", "https://192.0.2.1:6443"]).is_ok());
        for more in [["--kubeconfig", "f", "--manifests", "d"], ["--config", "f", "--kubeconfig", "g"]] {
            assert!(explain(&more).is_err(), "{more:?}");
        }
    }

    fn explain(more: &[&str]) -> Result<Cli, clap::Error> {
        let line = ["proxy-agent", "explain", "--from", "shop/cart-1", "tcp", "10.96.0.10:80"];
        Cli::from_command_line(line.iter().chain(more).map(OsString::from))
    }
}
