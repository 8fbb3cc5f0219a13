//! The state to program: a pure and total function of the cluster's state.
//!
//! [`desired_service`] reads one Service, its slices and this node, nothing else: a change that touches one Service
//! costs one Service's work. A bad object affects only itself.
//!
//! [`frontends`] decides at which addresses and ports a Service port can be reached, and the meaning of its policies
//! there. [`endpoints`] decides which endpoints are in which set. The claims index and the plan read the result.

use std::collections::HashSet;
use std::sync::Arc;

use proxy_common::addr::Family;

use budget::Demand;

use crate::reconcile::cluster::{Service, ServicePort, ServiceType, Slice};

mod budget;
mod context;
mod endpoints;
mod frontends;
mod state;

#[cfg(test)]
mod tests;

pub use budget::{Budget, Budgets};
pub use context::Context;
pub(crate) use endpoints::Standing;
pub use state::{DesiredBackend, DesiredPort, DesiredService, PortKey};

/// Computes the state to program for `service` with `slices` on the node that `context` describes.
///
/// The order of `slices` matters only if two slices contradict each other about one endpoint. Pass the slices sorted
/// by name, so that the result does not depend on the order of arrival.
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

/// Returns every endpoint of each port of `desired`, with the reasons for its place in the sets that
/// [`desired_service`] has built.
pub(crate) fn standings<'a>(
    desired: &DesiredService,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    context: &Context,
) -> Vec<Vec<Standing>> {
    let by_port = Family::ALL
        .map(|family| endpoints::ByPort::new(slices.clone().filter(move |slice| slice.family == family)));
    desired
        .ports
        .iter()
        .map(|port| {
            let PortKey { proto, port_name, family, .. } = &port.key;
            endpoints::judge((*proto, port_name), &by_port[family.index()], context)
        })
        .collect()
}

/// Returns the ports that do not contradict an earlier one, each with the nodePort that it may have (0 for none). The
/// API server refuses contradictions, but manifests do not pass through an API server.
fn distinct_ports<'s>(ports: &'s [ServicePort], problems: &mut Vec<String>) -> Vec<(&'s ServicePort, u16)> {
    let mut kept: Vec<(&ServicePort, u16)> = Vec::with_capacity(ports.len());
    // Each with the protocol: numbers, names and nodePorts of the ports kept so far.
    let (mut numbers, mut names, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let proto = proxy_common::abi::proto::name(port.proto);
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
