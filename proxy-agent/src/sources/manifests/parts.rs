//! Parts of objects that controllers work with, including fields that a proxy does not read.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::{Addr, Family};

use super::labels::Labels;
use crate::config::lenient;
use crate::sources::convert::{Findings, ZONE_LABEL};
use crate::sources::objects;
use crate::sources::objects::TargetPort;

/// Annotations that replace `trafficDistribution`; the first one takes precedence.
const TOPOLOGY_MODE: [&str; 2] =
    ["service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"];

/// Part of one object that controllers work with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
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

/// Fields of a Service that controllers use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServicePart {
    /// Empty if there is none.
    pub(super) selector: Labels,
    /// targetPorts by name and protocol of the Service's port. A port without an entry has its own number as target.
    pub(super) targets: BTreeMap<(String, u8), TargetPort>,
    pub(super) publish_not_ready: bool,
    pub(super) distribution: Distribution,
    /// `spec.ipFamilies` without duplicates.
    pub(super) families: Vec<Family>,
    pub(super) policy: FamilyPolicy,
    /// Number of clusterIPs that the Service names, whether they can be used or not.
    pub(super) named: usize,
    /// Addresses that the Service names: clusterIPs, externalIPs, and addresses of load balancers.
    pub(super) addresses: Vec<Addr>,
    /// nodePorts that the Service names, including `healthCheckNodePort`.
    pub(super) node_ports: Vec<u16>,
    /// Whether a Service of type LoadBalancer wants nodePorts.
    pub(super) balancer_node_ports: bool,
}

/// Fields of a Pod that matter for its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodPart {
    pub(super) labels: Labels,
    /// The first address of each family.
    pub(super) addresses: [Option<Addr>; 2],
    pub(super) node: Option<Arc<str>>,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// Whether the containers have ended for good.
    pub(super) finished: bool,
    /// Named ports of the containers: name, protocol, number. The first entry with a name and protocol counts.
    pub(super) ports: Vec<(String, u8, u16)>,
}

/// Fields of a Node that controllers use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodePart {
    pub(super) zone: Option<Arc<str>>,
}

impl ServicePart {
    /// Returns the part of a Service that the proxy reads as `object`. Problems are added to `findings`.
    pub(super) fn of(
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
                // The number 0 and an empty name count as absent.
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
        // Counted as the proxy reads them.
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
    if TOPOLOGY_MODE
        .iter()
        .find_map(|name| meta.annotations.as_ref().and_then(|all| all.get(*name)))
        .is_some_and(|mode| mode == "Auto" || mode == "auto")
    {
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
    // The API server demands a policy for two families. Without a policy, two families mean RequireDualStack.
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
    /// Returns the part of a Pod that the proxy reads as `object`. Problems are added to `findings`.
    pub(super) fn of(object: &objects::Pod, details: objects::PodDetails, findings: &mut Findings) -> Self {
        let (meta, status) = (&object.metadata, object.status.as_ref());
        let phase = status.and_then(|status| status.phase.as_deref());
        let many = status.iter().flat_map(|status| &status.pod_ips).filter_map(|ip| ip.ip.as_deref());
        let one = status.and_then(|status| status.pod_ip.as_deref());
        let mut addresses = [None; 2];
        for text in many.chain(one).filter(|text| !text.is_empty()) {
            match lenient::addr(text) {
                // As for endpoints of slices: a Service must not give access to addresses that only the node itself can
                // reach.
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
        Self {
            labels: meta.labels.clone().unwrap_or_default(),
            addresses,
            node: object.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).map(Arc::from),
            serving: is_ready(&details.status.unwrap_or_default().conditions),
            terminating: meta.deletion_timestamp.is_some(),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            ports: declared
                .filter_map(|port| {
                    let name = port.name.filter(|name| !name.is_empty())?;
                    let number = lenient::port(port.container_port.unwrap_or_default())?;
                    Some((name, lenient::protocol(port.protocol.as_deref())?, number))
                })
                .collect(),
        }
    }

    /// Returns the number of the port with this name and protocol.
    pub(super) fn port(&self, name: &str, proto: u8) -> Option<u16> {
        let found = self.ports.iter().find(|(own, of, _)| own == name && *of == proto);
        found.map(|(.., number)| *number)
    }
}

/// Returns whether the condition Ready is true. A Pod without any condition was written by hand and counts as ready.
fn is_ready(conditions: &[objects::Condition]) -> bool {
    let ready = conditions.iter().find(|condition| condition.type_.as_deref() == Some("Ready"));
    conditions.is_empty() || ready.is_some_and(|ready| ready.status.as_deref() == Some("True"))
}

impl NodePart {
    /// Returns the part of a Node.
    pub(super) fn of(object: &objects::Node) -> Self {
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
        Self { zone: zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into()) }
    }
}
