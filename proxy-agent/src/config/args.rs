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

/// Most elements of `FLOWS` that may be asked for; the kernel needs twice as many for its index.
const FLOW_ENTRIES_MAX: u32 = 1 << 26;
/// The largest budget of a Service: no map is made for more.
const BUDGET_MAX: u32 = 1 << 25;

/// Makes Kubernetes Services work on this node, in place of kube-proxy, by eBPF and with any CNI.
///
/// `run` is the agent: one per node, in the host's network namespace. The other commands read the pinned BPF maps
/// and work while no agent runs. Flags without a command are those of `run`, so that kube-proxy's command line works as
/// it is.
#[derive(Debug, Parser)]
#[command(name = "proxy-agent", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    ///
    /// What clap says about it, which includes help and version.
    pub fn from_command_line(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut args = called_as::command_line(args.into_iter().collect())
            .map_err(|what| Self::command().error(clap::error::ErrorKind::InvalidValue, what))?;
        // As Go's flags, which know underscores, and `--version=raw`.
        for arg in args.iter_mut().skip(1) {
            if let Some(text) = arg.to_str().filter(|text| text.starts_with("--")) {
                let (flag, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                let flag = flag.replace('_', "-");
                let is_version = flag == "--version" && ["=true", "=raw"].contains(&value);
                *arg = if is_version { flag.into() } else { format!("{flag}{value}").into() };
            }
        }
        // kube-proxy has no commands.
        let about_all =
            |first: &OsString| ["-h", "--help", "-V", "--version"].iter().any(|flag| first == flag);
        if args.get(1).is_some_and(|first| first.to_string_lossy().starts_with('-') && !about_all(first)) {
            args.insert(1, "run".into());
        }
        Self::try_parse_from(args)
    }
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
    /// Compare the cluster (or the manifests) with the kernel maps, and print every difference.
    ///
    /// Takes the flags of `run`, needs no running agent, and writes nothing. Ends with 1 if anything differs.
    Verify(Box<VerifyArgs>),
    /// What becomes of a connection to an address and port, and why: whose it is, which endpoints it may get, and what
    /// each kind of client is told.
    ///
    /// The answer is that of the datapath's own code on the maps as they are. Nothing is sent.
    Explain(ExplainArgs),
    /// Detach the programs and remove everything pinned. Services stop working on this node.
    Cleanup {
        /// Where everything is pinned.
        #[command(flatten)]
        pins: Pins,
    },
    /// Print a script that completes this command line in a shell.
    Completion {
        /// The shell.
        shell: Shell,
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
    /// As for the other commands; as JSON, an object for each line, as YAML, a document.
    #[command(flatten)]
    pub inspect: Inspect,
    /// Only this Service. What is refused before it is clear whose it is belongs to none.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<String>,
    /// Also one in N packets of flows that go on; 1 for each.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub sample: u32,
}

/// Options of `verify`.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// Those of `run`.
    #[command(flatten)]
    pub run: RunArgs,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Options of `explain`.
#[derive(Args, Clone, Debug)]
pub struct ExplainArgs {
    /// As for the other commands.
    #[command(flatten)]
    pub inspect: Inspect,
    /// The client: an address (of this host, of a pod, or of a machine outside) or a Pod. Without it: every kind of
    /// client.
    #[arg(long, value_name = "ADDRESS|NAMESPACE/POD", value_parser = client)]
    pub from: Option<ClientName>,
    /// Where that Pod is looked up.
    #[command(flatten, next_help_heading = "Where the Pod of --from is looked up")]
    pub source: SourceArgs,
    /// How the client connects.
    #[arg(ignore_case = true)]
    pub protocol: Protocol,
    /// Where to: `10.96.0.10:53`, `[fd00::10]:53`.
    #[arg(value_name = "ADDRESS:PORT")]
    pub target: SocketAddr,
}

/// Where objects are looked up, as `run` has it.
#[derive(Args, Clone, Debug, Default)]
pub struct SourceArgs {
    /// Directory of Kubernetes manifests, with the Pod's status.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// kube-proxy's configuration file, for the kubeconfig that it names.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["manifests", "kubeconfig"])]
    pub config: Option<PathBuf>,
    /// Kubeconfig file of a user who may read pods. Without any of these: the cluster whose pod this is.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// URL of the Kubernetes API server, in place of the one in the kubeconfig.
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
}

/// Who a connection comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientName {
    /// Whoever has this address.
    Address(IpAddr),
    /// The Pod of this name.
    Pod(ObjectKey),
}

fn client(text: &str) -> Result<ClientName, String> {
    if let Ok(address) = text.parse() {
        return Ok(ClientName::Address(address));
    }
    let legal = |name: &str, more: &str| {
        let of_a_name =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || more.contains(c);
        !name.is_empty() && name.chars().all(of_a_name)
    };
    match text.split_once('/') {
        Some((namespace, name)) if legal(namespace, "") && legal(name, ".") => {
            Ok(ClientName::Pod(ObjectKey::new(namespace, name)))
        }
        _ => Err("must be an address, or NAMESPACE/POD".to_owned()),
    }
}

/// Protocols of Service ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

/// Options of `run`: kube-proxy's flags, and what kube-proxy has nothing for, which holds beside its configuration file
/// too.
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub struct RunArgs {
    /// Directory of Kubernetes manifests (YAML or JSON) to serve instead of a cluster, followed live.
    ///
    /// Read are Services, EndpointSlices, Endpoints, this Node and ServiceCIDRs.
    #[arg(long, value_name = "DIR", help_heading = "Cluster")]
    pub manifests: Option<PathBuf>,
    /// kube-proxy's.
    #[command(flatten)]
    pub kube_proxy: Flags,
    /// Devices that lead to clients and to other nodes: interface names separated by commas, `NAME+` for all that begin
    /// so, `auto` or `none`.
    ///
    /// `auto` takes the topmost devices (a bond or bridge, not its ports) that carry addresses or routes, and overlay
    /// devices. `proxy-agent status` shows what was chosen and why.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "auto",
        help_heading = "Devices"
    )]
    pub devices: Vec<String>,
    /// The host's side of pods, for pods whose sockets are not seen (such as VMs): beginnings of interface names
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
    pub pod_interfaces: Vec<String>,
    /// Pods of this node whose sockets are left alone, so that their packets are served instead: `annotation` (those
    /// annotated `vipr.dev/socket-edge: "off"`), `runtime-class=NAME`, or for what is no Pod `cgroup=PATH`, below the root of the
    /// hierarchy; several separated by commas [default: none].
    ///
    /// For service meshes that must see the address that was asked for, and for clusters in containers of this node. Needs the pods'
    /// interfaces and, for the first two, the permission to list and watch pods.
    #[arg(long, value_name = "RULES", value_delimiter = ',', help_heading = "Devices")]
    pub socket_opt_out: Vec<String>,
    /// Attach to devices by clsact filters also where the kernel has TCX: behind filters of others on the way out.
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set, help_heading = "Devices")]
    pub no_tcx: bool,
    /// cgroup v2 directory whose processes are served [default: the root of the hierarchy that is mounted].
    #[arg(long, value_name = "DIR", help_heading = "Process")]
    pub cgroup_path: Option<PathBuf>,
    /// Connections and UDP flows of clients outside that are kept for certain; more are served, but a flood may cost them.
    ///
    /// Memory is taken as they come, up to 450 bytes for each. A table that is there keeps its size until `proxy-agent
    /// cleanup` or a reboot.
    #[arg(long, value_name = "NUMBER", default_value_t = FLOW_ENTRIES, help_heading = "Devices")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOW_ENTRIES_MAX)))]
    pub flow_table_size: u32,
    /// What one Service may ask for.
    #[command(flatten, next_help_heading = "Tenants")]
    pub tenants: Tenants,
    /// Where everything is pinned.
    #[command(flatten, next_help_heading = "Process")]
    pub pins: Pins,
}

/// What nobody may take from others.
#[derive(Args, Clone, Copy, Debug)]
pub struct Tenants {
    /// Frontends of one Service at most: its ports times its addresses, of both families. One that asks for more is not
    /// served, and named in `status`.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.frontends, value_parser = budget())]
    pub max_service_frontends: u32,
    /// Endpoints of one Service at most, those of each port counted, as its slices name them.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.endpoints, value_parser = budget())]
    pub max_service_endpoints: u32,
    /// loadBalancerSourceRanges of one Service at most, those of each port counted.
    #[arg(long, value_name = "NUMBER", default_value_t = Budget::DEFAULT.source_ranges, value_parser = budget())]
    pub max_service_source_ranges: u32,
    /// Frontends of one namespace at most. Its oldest Services are served, the others named in `status`. Not with
    /// --manifests.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.frontends, value_parser = budget())]
    pub max_namespace_frontends: u32,
    /// Endpoints of one namespace at most, those of each port counted. Its oldest EndpointSlices count.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.endpoints, value_parser = budget())]
    pub max_namespace_endpoints: u32,
    /// loadBalancerSourceRanges of one namespace at most, those of each port counted.
    #[arg(long, value_name = "NUMBER", default_value_t = Budgets::DEFAULT.namespace.source_ranges, value_parser = budget())]
    pub max_namespace_source_ranges: u32,
    /// Do not serve externalIPs and load-balancer addresses that are addresses of this host.
    ///
    /// Not for load balancers that give their addresses to hosts, as kube-vip and keepalived do.
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    #[arg(action = clap::ArgAction::Set)]
    pub protect_node_addresses: bool,
}

impl Tenants {
    /// What a Service and a namespace may ask for. A namespace may have what one of its Services may have.
    pub fn budgets(&self) -> Budgets {
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
        let address = |text: &str| ClientName::Address(text.parse().unwrap());
        for (text, want) in [
            ("10.64.1.50", Some(address("10.64.1.50"))),
            ("fd00:64::50", Some(address("fd00:64::50"))),
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
        let budget = |tens: u32| Budget { frontends: 7 * tens, endpoints: 8 * tens, source_ranges: 9 * tens };
        assert_eq!(args.tenants.budgets(), Budgets { service: budget(1), namespace: budget(10) });
    }

    #[test]
    fn a_pod_is_looked_up_in_one_place() {
        let line = |more: &[&str]| {
            let line = ["proxy-agent", "explain", "--from", "shop/cart-1", "tcp", "10.96.0.10:80"];
            Cli::from_command_line(line.iter().chain(more).map(OsString::from))
        };
        assert!(line(&["--kubeconfig", "f", "--master", "https://192.0.2.1:6443"]).is_ok());
        for more in [["--kubeconfig", "f", "--manifests", "d"], ["--config", "f", "--kubeconfig", "g"]] {
            assert!(line(&more).is_err(), "{more:?}");
        }
    }
}
