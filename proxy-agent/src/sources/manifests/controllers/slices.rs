//! Makes slices from Services with selectors, Pods and Nodes, as the EndpointSlice controller of a cluster does. Pure.
//!
//! Unlike in a cluster, a Pod need not have a Node, and a slice may have any number of endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use proxy_common::addr::Family;

use crate::reconcile::cluster::{Endpoint, Hints, ObjectKey, Service, Slice, SlicePort};
use crate::sources::manifests::labels::Labelled;
use crate::sources::manifests::parts::{Distribution, PodPart, ServicePart};
use crate::sources::objects::TargetPort;

/// Maximum number of endpoints that the Services of one namespace get by their selectors, counted for each port. A few
/// lines could ask for the product of all Services and all Pods.
pub(super) const ENDPOINTS_MAX: usize = 1 << 20;

/// Result of a selector.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) slices: Vec<Slice>,
    /// Number of Pods that match.
    pub(super) matching: usize,
    /// Number of matching Pods that have an address of the Service's families and have not ended.
    pub(super) usable: usize,
    /// Indices of the ports that none of the usable Pods has.
    pub(super) portless: Vec<usize>,
    /// Whether there are more Pods or endpoints than there is room for.
    pub(super) is_beyond: bool,
}

/// Makes the slices of a Service: one for each family and each set of port numbers. A Service with more than `room`
/// endpoints or matching Pods gets none, and its other Pods are not looked at.
pub(super) fn slices_of(
    pods: &Labelled<'_, &PodPart>,
    service: &Service,
    part: &ServicePart,
    zones: &BTreeMap<Arc<str>, Arc<str>>,
    node_name: &str,
    room: usize,
) -> Found {
    let mut found = Found::default();
    let targets: Vec<_> = service.ports.iter().map(|port| part.target(port)).collect();
    let families: Vec<_> =
        Family::ALL.into_iter().filter(|family| service.cluster_ips[family.index()].is_some()).collect();
    // Pods by the number of each port; a Pod may lack some ports.
    let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&PodPart>> = BTreeMap::new();
    let mut endpoints = 0;
    for pod in pods.selected(&part.selector) {
        found.matching += 1;
        if found.matching > room {
            return Found { is_beyond: true, ..found };
        }
        let addresses = families.iter().filter(|family| pod.addresses[family.index()].is_some()).count();
        if pod.finished || addresses == 0 {
            continue;
        }
        found.usable += 1;
        let numbers: Vec<_> = targets.iter().map(|target| target.number(pod)).collect();
        endpoints += addresses * numbers.iter().flatten().count();
        if endpoints > room {
            return Found { is_beyond: true, ..found };
        }
        groups.entry(numbers).or_default().push(pod);
    }
    if found.usable > 0 {
        found.portless = (0..targets.len())
            .filter(|index| groups.keys().all(|numbers| numbers.get(*index) == Some(&None)))
            .collect();
    }
    let mut hints = BTreeMap::new();
    for (i, (numbers, pods)) in groups.iter().enumerate() {
        let ports: Vec<_> = service
            .ports
            .iter()
            .zip(numbers)
            .filter_map(|(port, number)| {
                Some(SlicePort { name: Arc::clone(&port.name), proto: port.proto, port: (*number)? })
            })
            .collect();
        for family in families.iter().filter(|_| !ports.is_empty()) {
            let endpoints: Vec<_> = pods
                .iter()
                .filter_map(|pod| {
                    let ready = part.publish_not_ready || (pod.serving && !pod.terminating);
                    Some(Endpoint {
                        addr: pod.addresses[family.index()]?,
                        ready,
                        serving: pod.serving,
                        terminating: pod.terminating,
                        local: pod.node.as_deref() == Some(node_name),
                        hints: hints_of(pod, part.distribution, zones, &mut hints).filter(|_| ready),
                    })
                })
                .collect();
            if endpoints.is_empty() {
                continue;
            }
            // No slice of a cluster has a slash in its name.
            let name = format!("{}/selector/{i}/{family}", service.key.name);
            found.slices.push(Slice {
                key: ObjectKey { namespace: Arc::clone(&service.key.namespace), name: name.into() },
                service: service.key.clone(),
                family: *family,
                ports: ports.clone(),
                endpoints,
                trigger_time: None,
                problems: Vec::new(),
            });
        }
    }
    found
}

impl Found {
    /// Returns the number of endpoints, counted for each port.
    pub(super) fn endpoints(&self) -> usize {
        self.slices.iter().map(|slice| slice.ports.len() * slice.endpoints.len()).sum()
    }
}

/// Port of a Pod that a port of a Service leads to.
enum Target<'a> {
    Number(u16),
    Named(&'a str, u8),
}

impl Target<'_> {
    fn number(&self, pod: &PodPart) -> Option<u16> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Named(name, proto) => pod.port(name, *proto),
        }
    }
}

impl ServicePart {
    fn target(&self, port: &crate::reconcile::cluster::ServicePort) -> Target<'_> {
        match self.targets.get(&(port.name.to_string(), port.proto)) {
            None => Target::Number(port.port),
            // Numbers out of range have been dropped before.
            Some(TargetPort::Number(number)) => Target::Number(u16::try_from(*number).unwrap_or(port.port)),
            Some(TargetPort::Name(name)) => Target::Named(name, port.proto),
        }
    }

    /// Returns the name that a port has as its targetPort; empty if the targetPort is a number.
    pub(super) fn target_name(&self, port: &crate::reconcile::cluster::ServicePort) -> &str {
        match self.target(port) {
            Target::Number(_) => "",
            Target::Named(name, _) => name,
        }
    }
}

/// Returns the topology hints of an endpoint. Equal hints share memory through `known`.
fn hints_of(
    pod: &PodPart,
    distribution: Distribution,
    zones: &BTreeMap<Arc<str>, Arc<str>>,
    known: &mut BTreeMap<Hints, Arc<Hints>>,
) -> Option<Arc<Hints>> {
    let node = pod.node.as_ref()?;
    let zone = zones.get(node).map(Arc::clone).into_iter().collect();
    let hints = match distribution {
        Distribution::Anywhere => return None,
        Distribution::SameZone => Hints { zones: zone, nodes: Vec::new() },
        Distribution::SameNode => Hints { zones: zone, nodes: vec![Arc::clone(node)] },
    };
    if hints == Hints::default() {
        return None;
    }
    let shared = known.entry(hints).or_insert_with_key(|hints| Arc::new(hints.clone()));
    Some(Arc::clone(shared))
}
