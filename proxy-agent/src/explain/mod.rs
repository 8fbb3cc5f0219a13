//! `proxy-agent explain`: what becomes of a connection, and why.
//!
//! [`explain`] is a pure function of the maps' contents: the datapath's own lookup and selection run on copies of the
//! maps ([`crate::sim`]), once for each kind of client ([`clients`]). [`print()`] reads the pinned maps and puts the
//! result into words. It works while no agent runs; one that runs adds what the maps do not hold ([`reasons`]).

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use aya::maps::{HashMap, Map, MapData, MapError};
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::flags::SOURCE_RANGES;
use proxy_common::abi::{AffinityKey, AffinityValue, Device, FrontendKey, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::EdgeTables as _;
use proxy_common::datapath::lookup::{self, Target};
use proxy_common::datapath::tables::Tables as _;
use serde::Serialize;

use crate::args::{ClientName, ExplainArgs, Pins, Protocol};
use crate::bpf::maps::{KernelMaps, OpenError};
use crate::bpf::pins::PinDir;
use crate::config::{ConfigError, Source, state_file};
use crate::flows::now;
use crate::inspect::{FrontendView, InspectError, endpoint, frontend_view, print_data, table};
use crate::model::{Model, PortBackend};
use crate::node::Host;
use crate::proto_name;
use crate::report;
use crate::sim::Simulator;

pub mod question;

pub mod clients;

pub mod pod;

pub mod reasons;

#[cfg(test)]
mod tests;

pub use clients::Answer;
pub use pod::{ClientPod, PodError, PodView};
pub use question::Question;

use reasons::EndpointReasons;

/// Whose the address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// A Service port.
    Frontend,
    /// A clusterIP, but of no Service port with this number and protocol.
    UnusedPort,
    /// Of a ServiceCIDR, but no Service's.
    InactiveAddress,
    /// None of ours.
    Other,
}

impl Owner {
    const fn words(self) -> &'static str {
        match self {
            Self::Frontend => "a frontend",
            Self::UnusedPort => "an unused port of a clusterIP",
            Self::InactiveAddress => "an address of a ServiceCIDR that no Service has",
            Self::Other => "no address of a Service: Vipr does not touch it",
        }
    }
}

/// Everything that is known about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// What was asked: `ADDRESS:PORT`.
    pub target: SocketAddr,
    /// TCP, UDP or SCTP.
    pub protocol: &'static str,
    /// The client's address, if one was given.
    pub from: Option<IpAddr>,
    /// The client, if it was given as a Pod.
    pub pod: Option<PodView>,
    /// What is to be known of the client: how far the answer holds for it.
    pub client_note: Option<String>,
    /// Whose the address is.
    pub owner: Owner,
    /// What else a user may have meant.
    pub note: Option<String>,
    /// The frontend that matches.
    pub frontend: Option<FrontendView>,
    /// The Service port behind it.
    pub service: Option<ServiceView>,
    /// What each kind of client is told.
    pub clients: Vec<Answer>,
}

/// The Service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Port name; empty when unnamed.
    pub port: String,
    /// Index into `SERVICES`.
    pub id: u32,
    /// Session affinity timeout; 0 for none.
    pub affinity_seconds: u32,
    /// Who may use this frontend; empty where everybody may.
    pub source_ranges: Vec<String>,
    /// Whether the client is in those; none without a client, or without ranges.
    pub client_in_source_ranges: Option<bool>,
    /// Whether an agent has answered: without one, endpoints that do not serve are missing, and reasons are general.
    pub agent_answered: bool,
    /// Its endpoints.
    pub backends: Vec<BackendView>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    /// Address and port.
    pub endpoint: SocketAddr,
    /// Whether it is in the cluster set: that of clients whose policy is Cluster.
    pub in_cluster: bool,
    /// Whether it is in the local set: that of clients whose policy is Local.
    pub in_local: bool,
    /// Whether its pod serves; if not, only UDP flows that are there already would notice.
    pub serving: bool,
    /// Whether it is on this node.
    pub on_this_node: bool,
    /// Why it is not in both sets.
    pub reason: String,
}

impl ServiceView {
    /// Adds what the agent knows of the endpoints.
    pub fn learn(&mut self, endpoints: &[EndpointReasons]) {
        self.agent_answered = true;
        for known in endpoints {
            let reason = match (&known.not_in_cluster, &known.not_in_local) {
                (None, None) => String::new(),
                (Some(why), None) | (None, Some(why)) => why.clone(),
                (Some(cluster), Some(local)) if cluster == local => cluster.clone(),
                (Some(cluster), Some(local)) => format!("{cluster}; {local}"),
            };
            match self.backends.iter_mut().find(|backend| backend.endpoint == known.endpoint) {
                Some(backend) => backend.reason = reason,
                None => self.backends.push(BackendView {
                    endpoint: known.endpoint,
                    in_cluster: false,
                    in_local: false,
                    serving: known.serving,
                    on_this_node: known.on_this_node,
                    reason,
                }),
            }
        }
        self.backends.sort_by_key(|backend| backend.endpoint);
    }
}

/// What becomes of the connection that `question` is about. `maps` holds `AFFINITY` of the client, `DEVICES` and the clock
/// beside what the agent has written, of which `model` is the other reading.
pub fn explain(maps: &Simulator, model: &Model, question: &Question) -> Explanation {
    let Question { proto, addr, port, from, .. } = *question;
    let target = lookup::find(maps, &addr, port, proto);
    let owner = match target {
        Target::Frontend(_) => Owner::Frontend,
        Target::UnusedPort => Owner::UnusedPort,
        Target::InactiveAddress => Owner::InactiveAddress,
        // Copies do not change under their reader.
        Target::Other | Target::Retry => Owner::Other,
    };
    let mut explanation = Explanation {
        target: SocketAddr::new(addr.to_ip(), port.get()),
        protocol: proto_name(proto),
        from: from.map(Addr::to_ip),
        pod: None,
        client_note: None,
        owner,
        note: note(maps, model, question, owner),
        frontend: None,
        service: None,
        clients: Vec::new(),
    };
    let mut among = 0;
    if let Target::Frontend(value) = target {
        let exact = FrontendKey::exact(addr, port, proto);
        let key = match maps.frontend(&exact) {
            Some(_) => exact,
            None => FrontendKey::node_port(addr.unspecified(), port, proto),
        };
        explanation.frontend = Some(frontend_view(&key, &value));
        if let Some((key, port)) = model.ports.iter().find(|(_, port)| port.id == value.service) {
            among = port.backends.len();
            let ranges = || model.source_ranges_of(port.id);
            let filtered = value.flags & SOURCE_RANGES != 0;
            explanation.service = Some(ServiceView {
                namespace: key.service.namespace.to_string(),
                name: key.service.name.to_string(),
                port: key.port_name.to_string(),
                id: port.id,
                affinity_seconds: port.service.affinity.seconds,
                source_ranges: ranges().filter(|_| filtered).map(|range| range.to_string()).collect(),
                client_in_source_ranges: from
                    .filter(|_| filtered)
                    .map(|from| maps.in_source_ranges(port.id, &from)),
                agent_answered: false,
                backends: port.backends.iter().map(backend_view).collect(),
            });
        }
    }
    explanation.clients = clients::answers(maps, question, target, among);
    explanation
}

/// The ports that a clusterIP has, when another is asked for; or that the port is a nodePort, on other addresses.
fn note(maps: &Simulator, model: &Model, question: &Question, owner: Owner) -> Option<String> {
    let Question { proto, addr, port, .. } = *question;
    match owner {
        Owner::UnusedPort => {
            let exact = model.frontends.keys().filter(|key| key.addr == addr && key.port != Be16::default());
            let ports = exact.map(|key| format!("{}/{}", key.port.get(), proto_name(key.proto)));
            Some(format!("it has {}", ports.collect::<Vec<_>>().join(" ")))
        }
        Owner::Other => {
            let node_port = maps.frontend(&FrontendKey::node_port(addr.unspecified(), port, proto));
            node_port.map(|_| {
                format!("{} is a nodePort, but not on this address: --nodeport-addresses decides", port.get())
            })
        }
        Owner::Frontend | Owner::InactiveAddress => None,
    }
}

fn backend_view(backend: &PortBackend) -> BackendView {
    let has = |flag: u32| backend.state.flags & flag != 0;
    let (in_cluster, in_local) = (has(IN_CLUSTER), has(IN_LOCAL));
    let reason = match (in_cluster, in_local) {
        (true, true) => "",
        (true, false) => "not on this node",
        (false, true) => "terminating while others are ready elsewhere, or hinted for others",
        (false, false) => "for flows that it has only: not ready, or terminating, or hinted for others",
    };
    BackendView {
        endpoint: endpoint(backend),
        in_cluster,
        in_local,
        serving: has(SERVING),
        on_this_node: has(ON_THIS_NODE),
        reason: reason.to_owned(),
    }
}

/// The Pod that `--from` names, if it names one.
///
/// # Errors
///
/// [`ExplainError`].
pub async fn client_pod(args: &ExplainArgs) -> Result<Option<ClientPod>, ExplainError> {
    let Some(ClientName::Pod(key)) = &args.from else { return Ok(None) };
    Ok(Some(ClientPod::look_up(&Source::of(&args.source)?, key).await?))
}

/// Why nothing is explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// Where Pods are looked up.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The Pod.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The maps, or standard output.
    #[error(transparent)]
    Inspect(#[from] InspectError),
}

/// `proxy-agent explain`. `pod` is what [`client_pod`] has found.
///
/// # Errors
///
/// [`ExplainError`].
pub fn print(args: &ExplainArgs, pod: Option<&ClientPod>, out: &mut impl Write) -> Result<(), ExplainError> {
    let proto = match args.protocol {
        Protocol::Tcp => proto::TCP,
        Protocol::Udp => proto::UDP,
        Protocol::Sctp => proto::SCTP,
    };
    let addr = Addr::from(args.target.ip());
    let from = match (pod, &args.from) {
        (Some(pod), _) => Some(pod.address(addr.family())?),
        (None, Some(ClientName::Address(address))) => Some(Addr::from(*address)),
        (None, Some(ClientName::Pod(_)) | None) => None,
    };
    if let Some(from) = from.filter(|from| from.family() != addr.family()) {
        return Err(InspectError::Families { from: from.to_ip(), target: args.target }.into());
    }
    let Pins { pin_dir, run_dir } = &args.inspect.pins;
    let state_file = state_file(run_dir, pin_dir);
    let state = report::read(&state_file).ok();
    let cgroup = pod.filter(|pod| !pod.host_network).and_then(|pod| {
        let root = match &state {
            Some(state) => PathBuf::from(&state.cgroup),
            None => Host::look(None).ok()?.cgroup,
        };
        pod.cgroup(&root)
    });
    let question = Question { proto, addr, port: Be16::new(args.target.port()), from, cgroup };
    let (maps, model) = read(&PinDir::new(pin_dir), &question)?;
    let mut explanation = explain(&maps, &model, &question);
    if let Some(view) = &mut explanation.service
        && let Some(key) = model.ports.iter().find(|(_, port)| port.id == view.id).map(|(key, _)| key)
    {
        let answer = reasons::ask(&reasons::socket(&state_file), &key.service);
        if let Some(port) = answer.iter().flatten().find(|port| port.is_of(key)) {
            view.learn(&port.endpoints);
        }
    }
    let opted_out = maps.contents().opt_out;
    explanation.pod = pod.map(|pod| pod.view(cgroup, &opted_out));
    let node = state.as_ref().map(|state| state.node.as_str());
    explanation.client_note = client_note(&explanation, node, opted_out.len());
    if print_data(args.inspect.output, &explanation, out)? {
        return Ok(());
    }
    Ok(words(&explanation, out)?)
}

/// What limits the answer: `here` is the name of this node, if it is known.
fn client_note(explanation: &Explanation, here: Option<&str>, opted_out: usize) -> Option<String> {
    let pod = explanation.pod.as_ref();
    if let Some((node, here)) = pod.and_then(|pod| pod.node.as_deref()).zip(here)
        && node != here
    {
        return Some(format!(
            "it runs on node {node}, whose agent decides; this is {here}: ask there what its sockets are told"
        ));
    }
    let by_socket = explanation.clients.iter().any(|answer| answer.client == clients::Client::Pod);
    (by_socket && opted_out > 0 && pod.is_none_or(|pod| pod.opted_out.is_none())).then(|| {
        format!(
            "pods of this node that have opted out of the socket edge ({opted_out}) are told what the line `{}` says, all \
             others what `{}` says",
            clients::Client::PodPackets.words(),
            clients::Client::Pod.words()
        )
    })
}

/// Copies of the pinned maps.
fn read(pins: &PinDir, question: &Question) -> Result<(Simulator, Model), InspectError> {
    let kernel = KernelMaps::open(pins, false)?;
    let contents = kernel.contents()?;
    let maps = Simulator::of(&contents, &kernel.filter());
    maps.host_netns.set(kernel.host_netns());
    maps.clock.set(now());
    let devices: HashMap<MapData, u32, Device> = open(pins, "DEVICES", Map::HashMap)?;
    maps.edge.devices.replace(devices.iter().collect::<Result<_, _>>()?);

    let model = Model::restore(kernel.capacity(), &contents);
    let affinity: HashMap<MapData, AffinityKey, AffinityValue> = open(pins, "AFFINITY", Map::LruHashMap)?;
    if let Target::Frontend(value) = lookup::find(&maps, &question.addr, question.port, question.proto) {
        for client in clients::identities(&maps, question) {
            let key = AffinityKey { client, service: value.service };
            match affinity.get(&key, 0) {
                Ok(value) => drop(maps.clients.borrow_mut().insert(key, value)),
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok((maps, model))
}

fn open<K: aya::Pod, V: aya::Pod>(
    pins: &PinDir,
    name: &str,
    kind: fn(MapData) -> Map,
) -> Result<HashMap<MapData, K, V>, OpenError> {
    let path = pins.map(name);
    let map = MapData::from_pin(&path).and_then(|map| HashMap::try_from(kind(map)));
    map.map_err(|source| OpenError::Pin { path, source })
}

fn words(explanation: &Explanation, out: &mut impl Write) -> Result<(), InspectError> {
    let Explanation { target, protocol, from, pod, client_note, owner, note, frontend, service, clients } =
        explanation;
    writeln!(out, "{target}/{protocol} is {}", owner.words())?;
    if let (Some(pod), Some(from)) = (pod, from) {
        writeln!(out, "client:    {}, {from}", pod.words())?;
    }
    if let Some(note) = client_note {
        writeln!(out, "note:      {note}")?;
    }
    if let Some(note) = note {
        writeln!(out, "note:      {note}")?;
    }
    if let Some(frontend) = frontend {
        let flags = if frontend.flags.is_empty() { "none".to_owned() } else { frontend.flags.join(", ") };
        writeln!(out, "frontend:  {} (flags: {flags})", frontend.name)?;
    }
    if let Some(service) = service {
        let port = if service.port.is_empty() {
            "unnamed port".to_owned()
        } else {
            format!("port {}", service.port)
        };
        writeln!(out, "service:   {}/{}, {port} (id {})", service.namespace, service.name, service.id)?;
        match service.affinity_seconds {
            0 => writeln!(out, "affinity:  none")?,
            seconds => writeln!(out, "affinity:  by client, {seconds}s")?,
        }
        if !service.source_ranges.is_empty() {
            let ranges = service.source_ranges.join(" ");
            let client = match (from, service.client_in_source_ranges) {
                (Some(from), Some(true)) => format!("; {from} is in them"),
                (Some(from), _) => format!("; {from} is not in them"),
                (None, _) => "; packets are judged by their source: ask with --from".to_owned(),
            };
            writeln!(out, "sources:   {ranges}{client}")?;
        }
        let yes = |set: bool| if set { "yes" } else { "-" }.to_owned();
        writeln!(out, "backends:  {}", if service.backends.is_empty() { "none" } else { "" })?;
        let rows = service.backends.iter().map(|backend| {
            [
                format!("  {}", backend.endpoint),
                yes(backend.in_cluster),
                yes(backend.in_local),
                yes(backend.serving),
                yes(backend.on_this_node),
                backend.reason.clone(),
            ]
        });
        if !service.backends.is_empty() {
            table(["  ENDPOINT", "CLUSTER", "LOCAL", "SERVING", "HERE", "WHY"], rows, out)?;
        }
        if !service.agent_answered {
            writeln!(out, "  (no agent answers: endpoints that do not serve are not known)")?;
        }
    }
    writeln!(out, "clients:")?;
    let rows = clients.iter().map(|answer| {
        let mut backends: Vec<String> = answer.backends.iter().map(SocketAddr::to_string).collect();
        if let Some(remembered) = answer.remembered {
            backends = vec![format!("{remembered} (remembered)")];
        }
        let counter = answer.counter.filter(|_| !answer.reason.is_empty());
        let why = counter.map_or(String::new(), |counter| format!("{} ({counter})", answer.reason));
        let answer_and_why =
            format!("{}{}{}", backends.join(" "), if why.is_empty() { "" } else { " " }, why);
        [
            format!("  {}", answer.client.words()),
            answer.verdict.words().to_owned(),
            answer_and_why.trim().to_owned(),
        ]
    });
    table(["  CLIENT", "VERDICT", "BACKENDS OR REASON"], rows, out)
}
