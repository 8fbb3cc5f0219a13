//! `proxy-agent status | services | backends` ([`super::flows`] has `flows`): reads the pinned maps back and puts them
//! into words.
//!
//! The commands work while no agent runs: names, sets and states are all in the maps. Only problems and the source come
//! from the file that the agent leaves.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::{FrontendKind, flags};
use proxy_common::abi::maps;
use proxy_common::abi::node::{HOST_IN_PACKETS, PODS_IN_PACKETS};
use proxy_common::abi::proto;
use proxy_common::abi::{
    ABI_VERSION, CgroupId, Counter, FrontendKey, FrontendValue, ServiceCounters, ServiceId,
};
use serde::Serialize;

use crate::bpf::dataplane::PROGRAMS;
use crate::bpf::maps::KernelMaps;
use crate::bpf::others::Other;
use crate::bpf::pins::OpenError;
use crate::bpf::pins::PinDir;
use crate::bpf::sys;
use crate::commands::table::{line, table};
use crate::config::args::{Inspect, Output};
use crate::config::state_file;
use crate::observe::report;
use crate::observe::report::{State, program_object};
use crate::reconcile::model::{Model, Port, PortBackend};
use crate::reconcile::plan::FrontendName;

/// Reason why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InspectError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The maps cannot be read.
    #[error("reading the pinned maps: {0}")]
    Read(#[from] aya::maps::MapError),
    /// A client of one family cannot connect to an address of the other.
    #[error("--from {from} and {target} are of different families")]
    Families {
        /// The client.
        from: std::net::IpAddr,
        /// Target of the connection.
        target: SocketAddr,
    },
    /// Standard output is gone.
    #[error("writing: {0}")]
    Write(#[from] io::Error),
}

/// A Service port in one family, as printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceView {
    /// Namespace.
    pub(crate) namespace: String,
    /// Service name.
    pub(crate) name: String,
    /// Port name; empty when unnamed.
    pub(crate) port: String,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: &'static str,
    /// IPv4 or IPv6.
    pub(crate) family: String,
    /// Index into `SERVICES`.
    pub(crate) id: u32,
    /// Frontends by which it can be reached.
    pub(crate) frontends: Vec<FrontendView>,
    /// Endpoints of the cluster set.
    pub(crate) cluster: Vec<SocketAddr>,
    /// Endpoints of the local set.
    pub(crate) local: Vec<SocketAddr>,
    /// Session affinity timeout; 0 for none.
    pub(crate) affinity_seconds: u32,
    /// Sources that frontends with the flag `source-ranges` admit.
    pub(crate) source_ranges: Vec<String>,
    /// Traffic of the packet edge for it. Connections of sockets on this node do not pass there.
    pub(crate) traffic: TrafficView,
}

/// Counts of the packet edge for a Service port since it got its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TrafficView {
    /// Flows that began.
    pub(crate) connections: u64,
    /// Packets from clients.
    pub(crate) request_packets: u64,
    /// Bytes of these packets, with IP headers.
    pub(crate) request_bytes: u64,
    /// Packets from backends.
    pub(crate) reply_packets: u64,
    /// Bytes of these packets, with IP headers.
    pub(crate) reply_bytes: u64,
}

impl From<ServiceCounters> for TrafficView {
    fn from(counters: ServiceCounters) -> Self {
        let ServiceCounters { connections, request_packets, request_bytes, reply_packets, reply_bytes } =
            counters;
        Self { connections, request_packets, request_bytes, reply_packets, reply_bytes }
    }
}

/// A frontend, as printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct FrontendView {
    /// `ADDRESS:PORT/PROTOCOL`, or `nodePort PORT/PROTOCOL (FAMILY)`.
    pub(crate) name: String,
    /// Names of the flags.
    pub(crate) flags: Vec<&'static str>,
}

/// A backend, as printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct BackendView {
    /// Index into `BACKENDS`.
    pub(crate) id: u32,
    /// Namespace and name of the Service.
    pub(crate) service: String,
    /// Port name; empty when unnamed.
    pub(crate) port: String,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: &'static str,
    /// Address and port of the endpoint.
    pub(crate) endpoint: SocketAddr,
    /// Names of the flags.
    pub(crate) flags: Vec<&'static str>,
    /// Number of times that the id has been given out, and that the endpoint has entered a set.
    pub(crate) generation: u32,
}

/// The whole state, as printed.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StatusView {
    /// Layout version of the maps.
    pub(crate) abi_version: u32,
    /// Whether an agent runs on this pin directory.
    pub(crate) agent_running: bool,
    /// Whether each program is attached.
    pub(crate) programs: BTreeMap<&'static str, bool>,
    /// Used elements and size, by map.
    pub(crate) maps: BTreeMap<&'static str, (u64, u64)>,
    /// The datapath's counters.
    pub(crate) counters: BTreeMap<&'static str, u64>,
    /// Cookie of the host's network namespace.
    pub(crate) host_netns: u64,
    /// Whether pods' sockets leave a connection to the packet edge where a socket cannot be given the answer.
    pub(crate) pods_in_packets: bool,
    /// Whether the packet edge answers for the host's sockets, because this kernel cannot give them the reason of a
    /// refusal.
    pub(crate) host_in_packets: bool,
    /// Errors that sockets get when they are refused at the call, if an agent has left its state.
    pub(crate) refusals: Option<&'static str>,
    /// State that the agent left, if any.
    pub(crate) agent: Option<State>,
}

/// Runs `proxy-agent services`.
///
/// # Errors
///
/// [`InspectError`].
pub(crate) fn services(args: &Inspect, out: &mut impl Write) -> Result<(), InspectError> {
    let maps = KernelMaps::open(&PinDir::new(&args.pins.pin_dir))?;
    let mut views = service_views(&Model::restore(maps.capacity(), &maps.contents()?));
    for view in &mut views {
        view.traffic = maps.service_counters(ServiceId(view.id))?.into();
    }
    print_services(&views, args.output, out)
}

fn list(set: &[SocketAddr]) -> String {
    set.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" ")
}

/// Prints Service ports.
///
/// # Errors
///
/// [`InspectError::Write`].
pub(crate) fn print_services(
    views: &[ServiceView],
    output: Output,
    out: &mut impl Write,
) -> Result<(), InspectError> {
    if print_data(output, &views, out)? {
        return Ok(());
    }
    let rows = views.iter().map(|view| {
        let frontends: Vec<&str> = view.frontends.iter().map(|frontend| frontend.name.as_str()).collect();
        [
            format!("{}/{}", view.namespace, view.name),
            view.port.clone(),
            frontends.join(" "),
            format!("{}: {}", view.cluster.len(), list(&view.cluster)),
            format!("{}: {}", view.local.len(), list(&view.local)),
            if view.affinity_seconds == 0 { "-".to_owned() } else { format!("{}s", view.affinity_seconds) },
            view.traffic.connections.to_string(),
            (view.traffic.request_packets + view.traffic.reply_packets).to_string(),
            (view.traffic.request_bytes + view.traffic.reply_bytes).to_string(),
        ]
    });
    let head =
        ["SERVICE", "PORT", "FRONTENDS", "ENDPOINTS", "LOCAL", "AFFINITY", "CONNECTIONS", "PACKETS", "BYTES"];
    Ok(table(head, rows, out)?)
}

/// Runs `proxy-agent backends`.
///
/// # Errors
///
/// [`InspectError`].
pub(crate) fn backends(args: &Inspect, out: &mut impl Write) -> Result<(), InspectError> {
    print_backends(&backend_views(&read(args)?), args.output, out)
}

/// Prints backends.
///
/// # Errors
///
/// [`InspectError::Write`].
pub(crate) fn print_backends(
    views: &[BackendView],
    output: Output,
    out: &mut impl Write,
) -> Result<(), InspectError> {
    if print_data(output, &views, out)? {
        return Ok(());
    }
    let rows = views.iter().map(|view| {
        [
            view.id.to_string(),
            view.endpoint.to_string(),
            view.protocol.to_owned(),
            view.service.clone(),
            view.port.clone(),
            view.flags.join(","),
            view.generation.to_string(),
        ]
    });
    Ok(table(["ID", "ENDPOINT", "PROTOCOL", "SERVICE", "PORT", "STATE", "GENERATION"], rows, out)?)
}

/// Runs `proxy-agent status`.
///
/// # Errors
///
/// [`InspectError`].
pub(crate) fn status(args: &Inspect, out: &mut impl Write) -> Result<(), InspectError> {
    let pins = PinDir::new(&args.pins.pin_dir);
    let maps = KernelMaps::open(&pins)?;
    let (mut usage, flows) = (maps.usage()?, maps.flow_maps());
    usage.push((maps::FLOWS, flows.flows.count()?, flows.flows.capacity()?));
    usage.push((maps::NEW_FLOWS, flows.new_flows.count()?, flows.new_flows.capacity()?));
    let agent = report::read(&state_file(&args.pins.run_dir, &args.pins.pin_dir)).ok();
    let view = StatusView {
        abi_version: ABI_VERSION,
        agent_running: pins.lock().is_err(),
        programs: PROGRAMS.map(|name| (name, is_attached(&pins.link(name)))).into(),
        maps: usage.into_iter().map(|(map, entries, capacity)| (map, (entries, capacity))).collect(),
        counters: Counter::ALL
            .into_iter()
            .map(|counter| Ok((counter.name(), maps.counter(counter)?)))
            .collect::<Result<_, aya::maps::MapError>>()?,
        host_netns: maps.host_netns().0,
        pods_in_packets: maps.node_flags() & PODS_IN_PACKETS != 0,
        host_in_packets: maps.node_flags() & HOST_IN_PACKETS != 0,
        refusals: agent.as_ref().map(|agent| refusals(agent.reasons_for_sockets, maps.node_flags())),
        agent,
    };
    print_status(&view, args.output, out)
}

/// Prints the whole state.
///
/// # Errors
///
/// [`InspectError::Write`].
pub(crate) fn print_status(
    view: &StatusView,
    output: Output,
    out: &mut impl Write,
) -> Result<(), InspectError> {
    if print_data(output, view, out)? {
        return Ok(());
    }
    writeln!(out, "agent:     {}", if view.agent_running { "running" } else { "not running" })?;
    if let Some(agent) = &view.agent {
        line(out, format_args!("node:      {} ({})", agent.node, agent.node_ips.join(", ")))?;
        line(out, format_args!("source:    {}", agent.source))?;
        let below = agent.cgroup_below_root.map(|id| {
            format!(" (id {id}, not the root of the hierarchy: only processes below it are served)")
        });
        line(out, format_args!("cgroup:    {}{}", agent.cgroup, below.unwrap_or_default()))?;
    }
    let attached = view.programs.values().filter(|attached| **attached).count();
    writeln!(out, "programs:  {attached} of {} attached", view.programs.len())?;
    for (name, _) in view.programs.iter().filter(|(_, attached)| !**attached) {
        let refused =
            view.agent.as_ref().is_some_and(|agent| agent.problems.contains_key(&program_object(name)));
        let what = if refused { "see problems" } else { "restart the agent" };
        writeln!(out, "           {name} is NOT attached: {what}")?;
    }
    if let Some(refusals) = view.refusals {
        writeln!(out, "refusals:  {refusals}")?;
    }
    if let Some(agent) = view.agent.as_ref().filter(|agent| !agent.opted_out.is_empty()) {
        line(out, format_args!("opted out: {}", agent.opted_out.join(", ")))?;
    }
    for (map, (used, size)) in &view.maps {
        writeln!(out, "{:<10} {used} of {size}", format!("{}:", map.to_lowercase()))?;
    }
    writeln!(out, "counters:")?;
    for (name, value) in view.counters.iter().filter(|(_, value)| **value > 0) {
        writeln!(out, "  {name:<24}{value}")?;
    }
    let (devices, problems) = match &view.agent {
        Some(agent) => (agent.devices.as_slice(), agent.problems.iter().collect()),
        None => (&[][..], Vec::new()),
    };
    writeln!(out, "devices:   {}", if devices.is_empty() { "none" } else { "" })?;
    let rows = devices.iter().map(|device| {
        let attached = if device.attached.is_empty() { "NOT attached" } else { &device.attached };
        let role = if device.near { format!("{}, near", device.role) } else { device.role.clone() };
        let others: Vec<String> = device.others.iter().map(Other::to_string).collect();
        let others = if others.is_empty() { "-".to_owned() } else { others.join("; ") };
        [
            format!("  {}", device.name),
            role,
            attached.to_owned(),
            others,
            device.sources.join(" "),
            device.reason.clone(),
        ]
    });
    table(["  DEVICE", "ROLE", "ATTACHED", "OTHERS", "SOURCES", "REASON"], rows, out)?;
    writeln!(out, "problems:  {}", if problems.is_empty() { "none" } else { "" })?;
    for (object, reasons) in problems {
        for reason in reasons {
            line(out, format_args!("  {object}: {reason}"))?;
        }
    }
    Ok(())
}

/// Returns whether a pinned link is still on a cgroup: a link stays pinned when somebody detaches it, or when its
/// cgroup goes.
fn is_attached(pin: &Path) -> bool {
    let link = sys::open_link(pin).and_then(|link| sys::cgroup_link_info(link.as_fd()));
    link.is_ok_and(|link| link.cgroup_id != CgroupId::NONE)
}

/// Returns the errors that sockets get when they are refused at the call. A kernel that does not let programs choose
/// the errno (before 5.18) gives EPERM. After EPERM, the kernel's own NFS client tries again at once and for ever
/// unless it has the fix of CVE-2024-42246.
const fn refusals(set_retval: bool, node_flags: u64) -> &'static str {
    if set_retval {
        "ECONNREFUSED, EHOSTUNREACH"
    } else if node_flags & HOST_IN_PACKETS != 0 {
        "EPERM: the kernel cannot say more before 5.18. A TCP connection of this host to a clusterIP is reset instead"
    } else {
        "EPERM: the kernel cannot say more before 5.18. NFS mounts by a Service that serves nobody may keep a processor busy, unless \
         the kernel has the fix of CVE-2024-42246"
    }
}

fn read(args: &Inspect) -> Result<Model, InspectError> {
    let maps = KernelMaps::open(&PinDir::new(&args.pins.pin_dir))?;
    Ok(Model::restore(maps.capacity(), &maps.contents()?))
}

fn members(port: &Port, set: u32) -> Vec<SocketAddr> {
    port.backends.iter().filter(|backend| backend.state.flags & set != 0).map(endpoint).collect()
}

/// Returns every Service port of `model`, with all traffic at zero.
pub(crate) fn service_views(model: &Model) -> Vec<ServiceView> {
    let mut frontends: BTreeMap<ServiceId, Vec<FrontendView>> = BTreeMap::new();
    for (key, value) in model.frontends.iter().filter(|(key, _)| key.kind != FrontendKind::Address as u8) {
        frontends.entry(value.service).or_default().push(frontend_view(key, value));
    }
    let ports = model.ports.iter().map(|(key, port)| ServiceView {
        namespace: key.service.namespace.to_string(),
        name: key.service.name.to_string(),
        port: key.port_name.to_string(),
        protocol: proto::name(key.proto),
        family: key.family.to_string(),
        id: port.id.0,
        frontends: frontends.remove(&port.id).unwrap_or_default(),
        cluster: members(port, IN_CLUSTER),
        local: members(port, IN_LOCAL),
        affinity_seconds: port.service.affinity.seconds,
        source_ranges: model.source_ranges_of(port.id).map(|range| range.to_string()).collect(),
        traffic: TrafficView::default(),
    });
    ports.collect()
}

/// Returns every backend of `model`, by id.
pub(crate) fn backend_views(model: &Model) -> Vec<BackendView> {
    let all = model.ports.iter().flat_map(|(key, port)| port.backends.iter().map(move |b| (key, b)));
    let mut views: Vec<BackendView> = all
        .map(|(key, backend)| BackendView {
            id: backend.id.0,
            service: key.service.to_string(),
            port: key.port_name.to_string(),
            protocol: proto::name(key.proto),
            endpoint: endpoint(backend),
            flags: names(
                backend.state.flags,
                &[
                    (IN_CLUSTER, "in-cluster"),
                    (IN_LOCAL, "in-local"),
                    (SERVING, "serving"),
                    (ON_THIS_NODE, "on-this-node"),
                ],
            ),
            generation: backend.state.generation,
        })
        .collect();
    views.sort_by_key(|view| view.id);
    views
}

pub(crate) fn frontend_view(key: &FrontendKey, value: &FrontendValue) -> FrontendView {
    let known = [
        (flags::NEAR_LOCAL, "near-local"),
        (flags::FAR_LOCAL, "far-local"),
        (flags::POD_LOCAL, "pod-local"),
        (flags::SOURCE_RANGES, "source-ranges"),
        (flags::DENY_HOST, "deny-host"),
        (flags::DENY_POD, "deny-pod"),
        (flags::EXTERNAL, "external"),
        (flags::PROBE, "probe"),
    ];
    let flags = names(u32::from(value.flags), &known.map(|(bit, name)| (u32::from(bit), name)));
    FrontendView { name: FrontendName(key).to_string(), flags }
}

fn names(bits: u32, known: &[(u32, &'static str)]) -> Vec<&'static str> {
    known.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

pub(crate) fn endpoint(backend: &PortBackend) -> SocketAddr {
    SocketAddr::new(backend.addr.to_ip(), backend.port.get())
}

/// Prints a value as JSON or YAML; returns false if it is to be a table.
pub(crate) fn print_data(
    output: Output,
    value: &impl Serialize,
    out: &mut impl Write,
) -> Result<bool, InspectError> {
    match output {
        Output::Table => return Ok(false),
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Output::Yaml => write!(out, "{}", serde_saphyr::to_string(value).map_err(io::Error::other)?)?,
    }
    Ok(true)
}
