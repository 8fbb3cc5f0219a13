//! What controllers go by, object by object: reduced from the fields that a proxy does not read.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::{Addr, Family};

use super::labels::Labels;
use crate::config::lenient;
use crate::sources::convert::{Findings, ZONE_LABEL};
use crate::sources::objects;
use crate::sources::objects::TargetPort;

/// Annotations that take the place of `trafficDistribution`, the one that counts first.
const TOPOLOGY_MODE: [&str; 2] =
    ["service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"];

/// What controllers go by of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Part {
    Service(ServicePart),
    Pod(PodPart),
    Node(NodePart),
    Workload(Labels),
}

/// `spec.trafficDistribution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distribution {
    Anywhere,
    SameZone,
    SameNode,
}

/// `spec.ipFamilyPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FamilyPolicy {
    Single,
    PreferDual,
    RequireDual,
}

/// What a Service asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct ServicePart {
    /// Empty: none.
    pub(super) selector: Labels,
    /// By name and protocol of the port; without an entry it is the Service's own number.
    pub(super) targets: BTreeMap<(String, u8), TargetPort>,
    pub(super) publish_not_ready: bool,
    pub(super) distribution: Distribution,
    /// `spec.ipFamilies`, each once.
    pub(super) families: Vec<Family>,
    pub(super) policy: FamilyPolicy,
    /// How many clusterIPs it names, whether they can be used or not.
    pub(super) named: usize,
    /// Every address that is its own by its own word.
    pub(super) addresses: Vec<Addr>,
    /// Every nodePort likewise.
    pub(super) node_ports: Vec<u16>,
    /// Whether a load balancer's Service wants nodePorts.
    pub(super) balancer_node_ports: bool,
}

/// What a Pod can be as an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct PodPart {
    pub(super) labels: Labels,
    /// The first address of each family.
    pub(super) addresses: [Option<Addr>; 2],
    pub(super) node: Option<Arc<str>>,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// Its containers have ended for good.
    pub(super) finished: bool,
    /// The named ports of its containers: name, protocol, number. The first of a name and protocol counts.
    pub(super) ports: Vec<(String, u8, u16)>,
}

/// What is to be known of a Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct NodePart {
    pub(super) zone: Option<Arc<str>>,
}

impl ServicePart {
    /// Of a Service that the proxy reads as `object`. What is wrong is told to `findings`.
    pub(in super::super) fn of(
        object: &objects::Service,
        request: objects::ServiceRequest,
        findings: &mut Findings,
    ) -> Self {
        let request = request.spec.unwrap_or_default();
        let mut targets = BTreeMap::new();
        for (i, port) in request.ports.into_iter().enumerate() {
            let (Some(target), Some(proto)) = (port.target_port, lenient::protocol(port.protocol.as_deref()))
            else {
                continue;
            };
            let target = match target {
                // As if it were absent.
                TargetPort::Number(0) => continue,
                TargetPort::Name(name) if name.is_empty() => continue,
                TargetPort::Number(number) if lenient::port(number).is_none() => {
                    findings.note(
                        format_args!("spec.ports[{i}].targetPort"),
                        format_args!("{number} is not in 1..65535; the number of the port itself counts"),
                    );
                    continue;
                }
                TargetPort::Number(_) | TargetPort::Name(_) => target,
            };
            targets.entry((port.name.unwrap_or_default(), proto)).or_insert(target);
        }
        let empty = objects::ServiceSpec::default();
        let spec = object.spec.as_ref().unwrap_or(&empty);
        let mut families = Vec::new();
        for family in &spec.ip_families {
            let family = Family::ALL.into_iter().find(|known| known.to_string() == *family);
            families.extend(family.filter(|family| !families.contains(family)));
        }
        let given = spec.cluster_ip.iter().chain(&spec.cluster_ips).chain(&spec.external_ips);
        let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let ingress =
            status.iter().flat_map(|status| &status.ingress).filter_map(|ingress| ingress.ip.as_ref());
        let addresses = given.chain(ingress).filter_map(|ip| lenient::addr(ip).ok()).collect();
        let node_ports = spec.ports.iter().filter_map(|port| port.node_port);
        let node_ports = node_ports.chain(spec.health_check_node_port).filter_map(lenient::port).collect();
        // As the proxy takes them.
        let named = match spec.cluster_ip.as_deref() {
            Some("") => 0,
            Some(_) => spec.cluster_ips.len().max(1),
            None => spec.cluster_ips.len(),
        };
        Self {
            selector: request.selector.unwrap_or_default(),
            targets,
            publish_not_ready: request.publish_not_ready_addresses.unwrap_or(false),
            distribution: distribution(request.traffic_distribution.as_deref(), &object.metadata, findings),
            policy: family_policy(request.ip_family_policy.as_deref(), &families, findings),
            families,
            named,
            addresses,
            node_ports,
            balancer_node_ports: request.allocate_load_balancer_node_ports.unwrap_or(true),
        }
    }
}

fn distribution(value: Option<&str>, meta: &ObjectMeta, findings: &mut Findings) -> Distribution {
    let annotation = |name: &&str| meta.annotations.as_ref().and_then(|all| all.get(*name));
    if TOPOLOGY_MODE.iter().find_map(annotation).is_some_and(|mode| mode == "Auto" || mode == "auto") {
        return Distribution::Anywhere;
    }
    match value.unwrap_or_default() {
        "" => Distribution::Anywhere,
        "PreferClose" | "PreferSameZone" => Distribution::SameZone,
        "PreferSameNode" => Distribution::SameNode,
        other => {
            let what = "is not PreferSameZone, PreferSameNode or PreferClose";
            findings.quoted(format_args!("spec.trafficDistribution"), other, what);
            Distribution::Anywhere
        }
    }
}

fn family_policy(value: Option<&str>, families: &[Family], findings: &mut Findings) -> FamilyPolicy {
    // The API server wants a policy with two families; without one they say it themselves.
    let default = if families.len() > 1 { FamilyPolicy::RequireDual } else { FamilyPolicy::Single };
    match value.unwrap_or_default() {
        "" => default,
        "SingleStack" => FamilyPolicy::Single,
        "PreferDualStack" => FamilyPolicy::PreferDual,
        "RequireDualStack" => FamilyPolicy::RequireDual,
        other => {
            let what = "is not SingleStack, PreferDualStack or RequireDualStack";
            findings.quoted(format_args!("spec.ipFamilyPolicy"), other, what);
            default
        }
    }
}

impl PodPart {
    /// Of a Pod that the proxy reads as `object`. What is wrong is told to `findings`.
    pub(in super::super) fn of(
        object: &objects::Pod,
        details: objects::PodDetails,
        findings: &mut Findings,
    ) -> Self {
        let (meta, status) = (&object.metadata, object.status.as_ref());
        let phase = status.and_then(|status| status.phase.as_deref());
        let many = status.iter().flat_map(|status| &status.pod_ips).filter_map(|ip| ip.ip.as_deref());
        let one = status.and_then(|status| status.pod_ip.as_deref());
        let mut addresses = [None; 2];
        for text in many.chain(one).filter(|text| !text.is_empty()) {
            match lenient::addr(text) {
                // As for endpoints of slices: nobody gets at what only the node itself can reach.
                Ok(addr) => match lenient::special(addr) {
                    None => drop(addresses[addr.family().index()].get_or_insert(addr)),
                    Some(what) => findings.quoted(
                        format_args!("status.podIPs"),
                        text,
                        &format!("is {what} address, where no endpoint can be"),
                    ),
                },
                Err(what) => findings.quoted(format_args!("status.podIPs"), text, what),
            }
        }
        let spec = details.spec.unwrap_or_default();
        let sidecars = spec.init_containers.into_iter();
        let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let declared = spec.containers.into_iter().chain(sidecars).flat_map(|container| container.ports);
        let port = |port: objects::ContainerPort| {
            let name = port.name.filter(|name| !name.is_empty())?;
            let number = lenient::port(port.container_port.unwrap_or_default())?;
            Some((name, lenient::protocol(port.protocol.as_deref())?, number))
        };
        Self {
            labels: meta.labels.clone().unwrap_or_default(),
            addresses,
            node: object.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).map(Arc::from),
            serving: is_ready(&details.status.unwrap_or_default().conditions),
            terminating: meta.deletion_timestamp.is_some(),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            ports: declared.filter_map(port).collect(),
        }
    }

    /// The number of the port that is called so.
    pub(super) fn port(&self, name: &str, proto: u8) -> Option<u16> {
        let found = self.ports.iter().find(|(own, of, _)| own == name && *of == proto);
        found.map(|(.., number)| *number)
    }
}

/// By the condition Ready. A Pod without any condition is one that somebody wrote: its address is there to be used.
fn is_ready(conditions: &[objects::Condition]) -> bool {
    let ready = conditions.iter().find(|condition| condition.type_.as_deref() == Some("Ready"));
    conditions.is_empty() || ready.is_some_and(|ready| ready.status.as_deref() == Some("True"))
}

impl NodePart {
    /// Of a Node.
    pub(in super::super) fn of(object: &objects::Node) -> Self {
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
        Self { zone: zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into()) }
    }
}
