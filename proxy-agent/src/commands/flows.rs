//! `proxy-agent flows`: every flow of the packet edge, in words.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;

use proxy_common::abi::flow::state::{ASSURED, FIN_REPLY, FIN_REQUEST, REPLIED, RESET};
use proxy_common::abi::proto;
use proxy_common::abi::{Flow, FlowKey, FlowKind, FrontendKey, Nanos, Origin, ServiceId};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::flows::has_snat;
use proxy_common::datapath::edge::timeouts::{closed, expired};
use proxy_common::datapath::tables::since;
use serde::Serialize;

use crate::bpf::flow_maps::FlowMaps;
use crate::bpf::maps::KernelMaps;
use crate::bpf::pins::PinDir;
use crate::commands::inspect::{InspectError, print_data};
use crate::commands::table::table;
use crate::config::args::{FlowsArgs, Output};
use crate::host::clock::now;
use crate::reconcile::desired::PortKey;
use crate::reconcile::model::{Model, Port};

/// A flow, as printed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FlowView {
    /// Namespace and name of the Service; none when the Service that the flow began with is gone.
    pub(crate) service: Option<String>,
    /// Name of its port; empty when unnamed.
    pub(crate) port: String,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: &'static str,
    /// Client, which sends requests.
    pub(crate) client: SocketAddr,
    /// VIP that the client talks to.
    pub(crate) vip: SocketAddr,
    /// Backend, which sends replies.
    pub(crate) backend: SocketAddr,
    /// Source that the backend sees, where that is not the client.
    pub(crate) source: Option<SocketAddr>,
    /// Whether the client came through an external device.
    pub(crate) outside: bool,
    /// State in a word: `new`, `answered`, `established`, `closing`, `closed` or `reset`; `own` for what this host
    /// itself has sent from a frontend's address and port, which is no flow of a Service; `expired` for a record that
    /// counts as absent.
    pub(crate) state: &'static str,
    /// Whether the flow is in `FLOWS`, which never evicts.
    pub(crate) assured: bool,
    /// Seconds since the last packet.
    pub(crate) idle_seconds: f64,
}

/// Runs `proxy-agent flows`.
///
/// # Errors
///
/// [`InspectError`].
pub(crate) fn print(args: &FlowsArgs, out: &mut impl Write) -> Result<(), InspectError> {
    let pins = PinDir::new(&args.inspect.pins.pin_dir);
    let maps = KernelMaps::open(&pins)?;
    let model = Model::restore(maps.capacity(), &maps.contents()?);
    let flows = FlowMaps::open(&pins)?;
    let mut views = flow_views(&flows, &model, now())?;
    if let Some(service) = &args.service {
        views.retain(|view| view.service.as_ref() == Some(service));
    }
    print_flows(&views, args.inspect.output, out)
}

/// Returns the cell of a value that is not known.
fn dash() -> String {
    "-".to_owned()
}

/// Prints flows.
///
/// # Errors
///
/// [`InspectError::Write`].
pub(crate) fn print_flows(
    views: &[FlowView],
    output: Output,
    out: &mut impl Write,
) -> Result<(), InspectError> {
    if print_data(output, &views, out)? {
        return Ok(());
    }
    let rows = views.iter().map(|view| {
        [
            view.service.clone().unwrap_or_else(dash),
            view.port.clone(),
            view.protocol.to_owned(),
            view.client.to_string(),
            view.vip.to_string(),
            view.backend.to_string(),
            view.source.map_or_else(dash, |source| source.to_string()),
            view.state.to_owned(),
            format!("{:.1}s", view.idle_seconds),
        ]
    });
    let head = ["SERVICE", "PORT", "PROTOCOL", "CLIENT", "VIP", "BACKEND", "SOURCE", "STATE", "IDLE"];
    Ok(table(head, rows, out)?)
}

/// Returns every record of `FLOWS` and `NEW_FLOWS`, by Service, client and VIP. A record that is on its way from one
/// map to the other is listed once.
///
/// # Errors
///
/// The kernel's error for a map that cannot be walked.
pub(crate) fn flow_views(maps: &FlowMaps, model: &Model, now: Nanos) -> std::io::Result<Vec<FlowView>> {
    let ports: BTreeMap<ServiceId, (&PortKey, &Port)> =
        model.ports.iter().map(|(key, port)| (port.id, (&**key, port))).collect();
    let mut records: BTreeMap<FlowKey, Flow> = BTreeMap::new();
    for table in [&maps.new_flows, &maps.flows] {
        table.for_each(|(key, flow)| _ = records.insert(key, flow))?;
    }
    let mut views: Vec<FlowView> = records
        .iter()
        .map(|(key, flow)| {
            if key.kind == FlowKind::OwnDatagram as u8 {
                return own_datagram(key, flow, now);
            }
            let owner = ports.get(&flow.service).filter(|(_, port)| owns(model, port, key, flow));
            FlowView {
                service: owner.map(|(owner, _)| owner.service.to_string()),
                port: owner.map(|(owner, _)| owner.port_name.to_string()).unwrap_or_default(),
                protocol: proto::name(key.proto),
                client: address(key.source, flow.client_port),
                vip: address(flow.vip, flow.vip_port),
                backend: address(key.destination, key.destination_port),
                source: source(key, flow),
                outside: key.origin == Origin::OUTSIDE,
                state: state(key, flow, now),
                assured: flow.state & ASSURED != 0,
                idle_seconds: since(flow.last_seen, now) as f64 / 1e9,
            }
        })
        .collect();
    views.sort_by(|a, b| {
        (&a.service, &a.port).cmp(&(&b.service, &b.port)).then_with(|| {
            (a.client, a.vip, a.backend, a.protocol).cmp(&(b.client, b.vip, b.backend, b.protocol))
        })
    });
    Ok(views)
}

/// Returns the view of a datagram of this host's own: its receiver replies to this host.
fn own_datagram(key: &FlowKey, flow: &Flow, now: Nanos) -> FlowView {
    let host = address(key.destination, key.destination_port);
    FlowView {
        service: None,
        port: String::new(),
        protocol: proto::name(key.proto),
        client: address(key.source, key.source_port),
        vip: host,
        backend: host,
        source: None,
        outside: key.origin == Origin::OUTSIDE,
        state: if expired(flow, key.proto, now) { "expired" } else { "own" },
        assured: false,
        idle_seconds: since(flow.last_seen, now) as f64 / 1e9,
    }
}

/// Returns whether the Service port that has the flow's service id is the one that the flow began with: flows outlive
/// Services, and ids are given out anew.
fn owns(model: &Model, port: &Port, key: &FlowKey, flow: &Flow) -> bool {
    let backend = (key.destination, key.destination_port);
    let exact = FrontendKey::exact(flow.vip, flow.vip_port, key.proto);
    let node_port = FrontendKey::node_port(flow.vip.unspecified(), flow.vip_port, key.proto);
    let frontend = model.frontends.get(&exact).or_else(|| model.frontends.get(&node_port));
    port.backends.iter().any(|b| (b.addr, b.port) == backend)
        || frontend.is_some_and(|f| f.service == port.id)
}

/// Returns the source that the backend sees: our own address, or the client with another port where two flows would
/// have met.
fn source(key: &FlowKey, flow: &Flow) -> Option<SocketAddr> {
    if has_snat(flow) {
        Some(address(flow.snat, flow.snat_port))
    } else {
        (flow.client_port != key.source_port).then(|| address(key.source, key.source_port))
    }
}

fn state(key: &FlowKey, flow: &Flow, now: Nanos) -> &'static str {
    if expired(flow, key.proto, now) {
        "expired"
    } else if flow.state & RESET != 0 {
        "reset"
    } else if closed(flow.state) {
        "closed"
    } else if flow.state & (FIN_REQUEST | FIN_REPLY) != 0 {
        "closing"
    } else if flow.state & ASSURED != 0 {
        "established"
    } else if flow.state & REPLIED != 0 {
        "answered"
    } else {
        "new"
    }
}

fn address(addr: Addr, port: Be16) -> SocketAddr {
    SocketAddr::new(addr.to_ip(), port.get())
}
