//! The explanation of a connection, a pure function of the contents of the maps.

use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::FrontendKey;
use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::flags::SOURCE_RANGES;
use proxy_common::abi::proto;
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::EdgeTables as _;
use proxy_common::datapath::lookup::{self, Target};
use proxy_common::datapath::tables::Tables as _;
use serde::Serialize;

use super::clients::{self, Answer};
use super::pod::PodView;
use super::question::Question;
use crate::commands::inspect::{FrontendView, endpoint, frontend_view};
use crate::observe::reasons::EndpointReasons;
use crate::reconcile::model::{Model, PortBackend};
use crate::reconcile::sim::Simulator;

/// Kind of owner of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Owner {
    /// A Service port.
    Frontend,
    /// A clusterIP, but no Service port with this number and protocol.
    UnusedPort,
    /// A ServiceCIDR, but no Service.
    InactiveAddress,
    /// Nothing that Vipr serves.
    Other,
}

impl Owner {
    pub(super) const fn words(self) -> &'static str {
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
pub(crate) struct Explanation {
    /// Target of the question: `ADDRESS:PORT`.
    pub(crate) target: SocketAddr,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: &'static str,
    /// The client's address, if one was given.
    pub(crate) from: Option<IpAddr>,
    /// The client, if it was given as a Pod.
    pub(crate) pod: Option<PodView>,
    /// Limits of the answer for this client.
    pub(crate) client_note: Option<String>,
    /// Owner of the address.
    pub(crate) owner: Owner,
    /// Other target that a user may have meant.
    pub(crate) note: Option<String>,
    /// The frontend that matches.
    pub(crate) frontend: Option<FrontendView>,
    /// The Service port behind it.
    pub(crate) service: Option<ServiceView>,
    /// Answer to each kind of client.
    pub(crate) clients: Vec<Answer>,
}

/// The Service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceView {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
    /// Port name; empty when unnamed.
    pub(crate) port: String,
    /// Index into `SERVICES`.
    pub(crate) id: u32,
    /// Session affinity timeout; 0 for none.
    pub(crate) affinity_seconds: u32,
    /// Sources that may use this frontend; empty where all may.
    pub(crate) source_ranges: Vec<String>,
    /// Whether the client is in these ranges; none without a client, or without ranges.
    pub(crate) client_in_source_ranges: Option<bool>,
    /// Whether an agent has answered. Without an answer, endpoints that do not serve are missing, and reasons are
    /// general.
    pub(crate) agent_answered: bool,
    /// Endpoints of the Service port.
    pub(crate) backends: Vec<BackendView>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BackendView {
    /// Address and port.
    pub(crate) endpoint: SocketAddr,
    /// Whether it is in the cluster set, for clients whose policy is Cluster.
    pub(crate) in_cluster: bool,
    /// Whether it is in the local set, for clients whose policy is Local.
    pub(crate) in_local: bool,
    /// Whether its pod serves. If not, only existing UDP flows would notice.
    pub(crate) serving: bool,
    /// Whether it is on this node.
    pub(crate) on_this_node: bool,
    /// Reason why it is not in both sets.
    pub(crate) reason: String,
}

impl ServiceView {
    /// Adds the agent's knowledge of the endpoints.
    pub(crate) fn learn(&mut self, endpoints: &[EndpointReasons]) {
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

/// Explains the connection that `question` is about. `maps` holds what the agent has written, and also `AFFINITY` and
/// `NEW_AFFINITY` of the client, `DEVICES` and the clock. `model` is another form of what the agent has written.
pub(crate) fn explain(maps: &Simulator, model: &Model, question: &Question) -> Explanation {
    let Question { proto, addr, port, from, .. } = *question;
    let target = lookup::find(maps, &addr, port, proto);
    let owner = match target {
        Target::Frontend(_) => Owner::Frontend,
        Target::UnusedPort => Owner::UnusedPort,
        Target::InactiveAddress => Owner::InactiveAddress,
        // Copies do not change while they are read.
        Target::Other | Target::Retry => Owner::Other,
    };
    let mut explanation = Explanation {
        target: SocketAddr::new(addr.to_ip(), port.get()),
        protocol: proto::name(proto),
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
            let filtered = value.flags & SOURCE_RANGES != 0;
            explanation.service = Some(ServiceView {
                namespace: key.service.namespace.to_string(),
                name: key.service.name.to_string(),
                port: key.port_name.to_string(),
                id: port.id.0,
                affinity_seconds: port.service.affinity.seconds,
                source_ranges: model
                    .source_ranges_of(port.id)
                    .filter(|_| filtered)
                    .map(|range| range.to_string())
                    .collect(),
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

/// Returns the ports that a clusterIP has, when another port is asked for; or the hint that the port is a nodePort on
/// other addresses.
fn note(maps: &Simulator, model: &Model, question: &Question, owner: Owner) -> Option<String> {
    let Question { proto, addr, port, .. } = *question;
    match owner {
        Owner::UnusedPort => {
            let exact = model.frontends.keys().filter(|key| key.addr == addr && key.port != Be16::default());
            let ports = exact.map(|key| format!("{}/{}", key.port.get(), proto::name(key.proto)));
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
