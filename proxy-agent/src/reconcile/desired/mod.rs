//! What should be programmed: a pure and total function of the cluster's state.
//!
//! [`desired_service`] looks at one Service, its slices and this node, nothing else: a change that touches one
//! Service costs one Service's work. A bad object costs only itself.
//!
//! [`frontends`] says where a Service port can be reached and what its policies mean there, [`endpoints`] which
//! endpoints are in which set. The claims index and the plan read the result.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use proxy_common::abi::{FrontendKey, SlotRange};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use budget::Demand;

use crate::reconcile::cluster::{Node, ObjectKey, Service, ServicePort, ServiceType, Slice};

mod budget;
mod endpoints;
mod frontends;

#[cfg(test)]
mod tests;

pub use budget::{Budget, Budgets};
pub use endpoints::{Reason, Standing};

/// A Service port in one family: the unit that gets an id in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The Service.
    pub service: ObjectKey,
    /// Port name; empty when unnamed.
    pub port_name: Arc<str>,
    /// IP protocol number.
    pub proto: u8,
    /// Family.
    pub family: Family,
}

/// Facts about this node and its configuration that endpoint selection and frontends depend on.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// This node's name, lower case.
    pub node_name: Arc<str>,
    /// What the Node object tells.
    pub node: Node,
    /// detect-local by source: the pod CIDR of each family, `None` where detect-local is not implemented.
    pub cluster_cidr: [Option<Prefix>; 2],
    /// detect-local by interface: pods are told apart in both families, whatever `cluster_cidr` says.
    pub pods_by_interface: bool,
    /// Every address of this host, loopback included.
    pub host_addresses: BTreeSet<Addr>,
    /// The prefixes that clusterIPs are given from.
    pub service_cidrs: Vec<Prefix>,
    /// The feature gate `AllowServiceExternalIPs` is off: externalIPs are no frontends.
    pub ignore_external_ips: bool,
    /// externalIPs and load-balancer addresses that are addresses of this host are no frontends.
    pub protect_node_addresses: bool,
    /// The packet edge judges what pods send where their sockets cannot be told.
    pub pods_in_packets: bool,
    /// How much one Service may ask for.
    pub budget: Budget,
}

/// A backend of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// Where the endpoint listens.
    pub addr: Addr,
    /// Its port.
    pub port: Be16,
    /// Bits of [`proxy_common::abi::backend::flags`].
    pub flags: u32,
}

/// What one Service port in one family wants programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredPort {
    /// Which.
    pub key: PortKey,
    /// Frontends with their flags ([`proxy_common::abi::frontend::flags`]), by key, each once. That a clusterIP as such is
    /// active is said by the last port of the family: its other ports are refused once those that it has are there.
    pub frontends: Vec<(FrontendKey, u16)>,
    /// Endpoints that are in a set or serving, by address and port, each once.
    pub backends: Vec<DesiredBackend>,
    /// Verdict while the local set is empty: [`SlotRange::REJECT`] or [`SlotRange::DROP`]. (An empty cluster set
    /// always rejects.)
    pub empty_local: SlotRange,
    /// Session affinity timeout; 0 for none.
    pub affinity_seconds: u32,
    /// Sources that frontends with [`proxy_common::abi::frontend::flags::SOURCE_RANGES`] admit; in order, each once.
    /// Empty when there is no such frontend.
    pub source_ranges: Vec<Prefix>,
}

/// What one Service wants programmed. Without ports when there is nothing to proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredService {
    /// By [`PortKey`].
    pub ports: Vec<DesiredPort>,
    /// What a user should know: fields of the Service and its slices that were skipped, frontends that cannot be
    /// served everywhere.
    pub problems: Vec<String>,
}

/// What `service` with `slices` wants on the node that `context` describes.
///
/// The order of `slices` counts only where two of them contradict each other about one endpoint; give them by
/// name, so that the answer does not depend on their arrival.
pub fn desired_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    context: &Context,
) -> DesiredService {
    let mut problems = service.problems.clone();
    let served =
        service.service_type != ServiceType::ExternalName && service.cluster_ips.iter().any(Option::is_some);
    if !served {
        return DesiredService { ports: Vec::new(), problems };
    }
    for slice in slices.clone() {
        problems.extend(slice.problems.iter().map(|p| format!("EndpointSlice {}: {p}", slice.key.name)));
    }

    let distinct = distinct_ports(&service.ports, &mut problems);
    let mut families = Vec::with_capacity(2);
    let mut demand = Demand::default();
    for family in Family::ALL {
        let Some(cluster_ip) = service.cluster_ips[family.index()] else { continue };
        let frontends = frontends::OfFamily::new(service, family, cluster_ip, context, &mut problems);
        let by_port = endpoints::ByPort::new(slices.clone().filter(|slice| slice.family == family));
        demand.frontends += frontends.count(&distinct);
        demand.endpoints += distinct.iter().map(|(port, _)| by_port.count(port)).sum::<usize>();
        demand.source_ranges += frontends.source_ranges().len() * distinct.len();
        families.push((family, frontends, by_port));
    }
    let beyond = demand.beyond(&context.budget);
    if !beyond.is_empty() {
        problems.splice(0..0, beyond);
        return DesiredService { ports: Vec::new(), problems };
    }

    let mut ports = Vec::with_capacity(distinct.len() * families.len());
    for (family, frontends, by_port) in &families {
        for &(port, node_port) in &distinct {
            let endpoints = endpoints::select(port, by_port, context);
            ports.push(DesiredPort {
                key: PortKey {
                    service: service.key.clone(),
                    port_name: Arc::clone(&port.name),
                    proto: port.proto,
                    family: *family,
                },
                frontends: frontends.of_port(port, node_port),
                backends: endpoints.backends,
                empty_local: endpoints.empty_local,
                affinity_seconds: service.affinity_seconds.unwrap_or(0),
                source_ranges: frontends.source_ranges().to_vec(),
            });
        }
    }
    ports.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    for (family, frontends, _) in &families {
        if let Some(last) = ports.iter_mut().rfind(|port| port.key.family == *family) {
            last.frontends.push((frontends.address(), 0));
            last.frontends.sort_unstable();
        }
    }
    DesiredService { ports, problems }
}

/// Every endpoint of each port of `desired`, with the reasons for what [`desired_service`] has made of it.
pub fn standings<'a>(
    desired: &DesiredService,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    context: &Context,
) -> Vec<Vec<Standing>> {
    let by_port = Family::ALL
        .map(|family| endpoints::ByPort::new(slices.clone().filter(move |slice| slice.family == family)));
    let of_port = |port: &DesiredPort| {
        let PortKey { proto, port_name, family, .. } = &port.key;
        endpoints::judge((*proto, port_name), &by_port[family.index()], context)
    };
    desired.ports.iter().map(of_port).collect()
}

/// The ports that do not contradict an earlier one, each with the nodePort that it may have (0 for none). The API
/// server refuses contradictions; manifests meet no API server.
fn distinct_ports<'s>(ports: &'s [ServicePort], problems: &mut Vec<String>) -> Vec<(&'s ServicePort, u16)> {
    let mut kept: Vec<(&ServicePort, u16)> = Vec::with_capacity(ports.len());
    // By protocol: the numbers, names and nodePorts of those.
    let (mut numbers, mut names, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let proto = proxy_common::abi::proto_name(port.proto);
        if numbers.contains(&(port.proto, port.port)) {
            problems.push(format!(
                "spec.ports[{index}]: an earlier entry has {proto} port {} already; this entry is not served",
                port.port
            ));
        } else if names.contains(&(port.proto, &*port.name)) {
            problems.push(format!(
                "spec.ports[{index}]: an earlier {proto} entry is named {:?} already; this entry is not served",
                &*port.name
            ));
        } else {
            numbers.insert((port.proto, port.port));
            names.insert((port.proto, &*port.name));
            let is_free = port.node_port == 0 || node_ports.insert((port.proto, port.node_port));
            if !is_free {
                problems.push(format!(
                    "spec.ports[{index}].nodePort: an earlier entry has {proto} nodePort {} already; this entry has none",
                    port.node_port
                ));
            }
            kept.push((port, if is_free { port.node_port } else { 0 }));
        }
    }
    kept
}
