//! `proxy-agent explain`: reads the pinned maps, and puts the explanation into words.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use aya::maps::{HashMap, Map, MapData, MapError};
use proxy_common::abi::maps;
use proxy_common::abi::{AffinityKey, AffinityValue, CgroupId, Device, IfIndex, opt_out, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::lookup::{self, Target};
use proxy_common::datapath::tables::{Tables as _, Tier};

use super::clients;
use super::explanation::{Explanation, ServiceView, explain};
use super::pod::{ClientPod, PodError};
use super::question::Question;
use crate::bpf::maps::KernelMaps;
use crate::bpf::pins::OpenError;
use crate::bpf::pins::PinDir;
use crate::commands::inspect::{InspectError, print_data};
use crate::commands::table::{line, table};
use crate::config::args::{ClientName, ExplainArgs, Pins, Protocol};
use crate::config::{ConfigError, Source, state_file};
use crate::host::Host;
use crate::host::clock::now;
use crate::observe::reasons;
use crate::observe::report;
use crate::reconcile::model::Model;
use crate::reconcile::sim::Simulator;

/// Returns the Pod that `--from` names, if it names one.
///
/// # Errors
///
/// [`ExplainError`].
pub(crate) async fn client_pod(args: &ExplainArgs) -> Result<Option<ClientPod>, ExplainError> {
    let Some(ClientName::Pod(key)) = &args.from else { return Ok(None) };
    Ok(Some(ClientPod::look_up(&Source::of(&args.source)?, key).await?))
}

/// Reason why nothing is explained.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExplainError {
    /// The configuration of the source of Pods is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The Pod cannot be found or used.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The maps cannot be read, or standard output is gone.
    #[error(transparent)]
    Inspect(#[from] InspectError),
}

/// Runs `proxy-agent explain`. `pod` is the result of [`client_pod`].
///
/// # Errors
///
/// [`ExplainError`].
pub(crate) fn print(
    args: &ExplainArgs,
    pod: Option<&ClientPod>,
    out: &mut impl Write,
) -> Result<(), ExplainError> {
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
        && let Some(key) = model.ports.iter().find(|(_, port)| port.id.0 == view.id).map(|(key, _)| key)
    {
        let answer = reasons::ask(&reasons::socket(&state_file), &key.service);
        if let Some(port) = answer.iter().flatten().find(|port| port.is_of(key)) {
            view.learn(&port.endpoints);
        }
    }
    let left = maps.contents().opt_out.into_iter().filter(|(_, what)| *what == opt_out::EVERYTHING);
    let opted_out: Vec<CgroupId> = left.map(|(cgroup, _)| cgroup).collect();
    explanation.pod = pod.map(|pod| pod.view(cgroup, &opted_out));
    let node = state.as_ref().map(|state| state.node.as_str());
    explanation.client_note = client_note(&explanation, node, opted_out.len());
    if print_data(args.inspect.output, &explanation, out)? {
        return Ok(());
    }
    Ok(words(&explanation, out).map_err(InspectError::from)?)
}

/// Returns a note on the limits of the answer. `here` is the name of this node, if it is known.
pub(super) fn client_note(explanation: &Explanation, here: Option<&str>, opted_out: usize) -> Option<String> {
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

/// Returns copies of the pinned maps, and the model of them.
fn read(pins: &PinDir, question: &Question) -> Result<(Simulator, Model), InspectError> {
    let kernel = KernelMaps::open(pins)?;
    let contents = kernel.contents()?;
    let maps = Simulator::of(&contents, &kernel.filter());
    maps.host_netns.set(kernel.host_netns());
    maps.clock.set(now().0);
    let devices: HashMap<MapData, IfIndex, Device> = open(pins, maps::DEVICES, Map::HashMap)?;
    maps.edge.devices.replace(devices.iter().collect::<Result<_, _>>()?);

    let model = Model::restore(kernel.capacity(), &contents);
    if let Target::Frontend(value) = lookup::find(&maps, &question.addr, question.port, question.proto) {
        for (tier, name) in [(Tier::Assured, maps::AFFINITY), (Tier::New, maps::NEW_AFFINITY)] {
            let affinity: HashMap<MapData, AffinityKey, AffinityValue> = open(pins, name, Map::LruHashMap)?;
            for client in clients::identities(&maps, question) {
                let key = AffinityKey { client, service: value.service };
                match affinity.get(&key, 0) {
                    Ok(value) => maps.remember(tier, &key, &value),
                    Err(MapError::KeyNotFound) => {}
                    Err(error) => return Err(error.into()),
                }
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

/// Puts an explanation into words.
///
/// # Errors
///
/// When the reader of the output is gone.
pub(crate) fn words(explanation: &Explanation, out: &mut impl Write) -> io::Result<()> {
    let Explanation { target, protocol, from, pod, client_note, owner, note, frontend, service, clients } =
        explanation;
    writeln!(out, "{target}/{protocol} is {}", owner.words())?;
    if let (Some(pod), Some(from)) = (pod, from) {
        line(out, format_args!("client:    {}, {from}", pod.words()))?;
    }
    if let Some(note) = client_note {
        line(out, format_args!("note:      {note}"))?;
    }
    if let Some(note) = note {
        line(out, format_args!("note:      {note}"))?;
    }
    if let Some(frontend) = frontend {
        let flags = if frontend.flags.is_empty() { "none".to_owned() } else { frontend.flags.join(", ") };
        line(out, format_args!("frontend:  {} (flags: {flags})", frontend.name))?;
    }
    if let Some(service) = service {
        service_words(service, *from, out)?;
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

fn mark(set: bool) -> String {
    if set { "yes" } else { "-" }.to_owned()
}

/// Prints a Service port with its backends. `from` is the client's address.
fn service_words(service: &ServiceView, from: Option<IpAddr>, out: &mut impl Write) -> io::Result<()> {
    let port =
        if service.port.is_empty() { "unnamed port".to_owned() } else { format!("port {}", service.port) };
    line(out, format_args!("service:   {}/{}, {port} (id {})", service.namespace, service.name, service.id))?;
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
        line(out, format_args!("sources:   {ranges}{client}"))?;
    }
    writeln!(out, "backends:  {}", if service.backends.is_empty() { "none" } else { "" })?;
    let rows = service.backends.iter().map(|backend| {
        [
            format!("  {}", backend.endpoint),
            mark(backend.in_cluster),
            mark(backend.in_local),
            mark(backend.serving),
            mark(backend.on_this_node),
            backend.reason.clone(),
        ]
    });
    if !service.backends.is_empty() {
        table(["  ENDPOINT", "CLUSTER", "LOCAL", "SERVING", "HERE", "WHY"], rows, out)?;
    }
    if !service.agent_answered {
        writeln!(out, "  (no agent answers: endpoints that do not serve are not known)")?;
    }
    Ok(())
}
