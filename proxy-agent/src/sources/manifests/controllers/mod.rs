//! Work of a cluster's control plane on Services, done here for a directory of manifests: clusterIPs and nodePorts for
//! Services that name none ([`addresses`]), and slices of the Pods that selectors match ([`slices`]).
//!
//! Both are functions of the objects in force. This module keeps their last results, so that only differences are sent.
//! Numbers are assigned for all Services together. Slices are made by namespace: a change in one namespace costs no
//! work for the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::files::Files;
use super::id::{Id, Kind};
use crate::reconcile::cluster::{Change, ObjectKey, Service, ServiceType, Slice};
use crate::sources::update::Problem;

mod addresses;
mod silences;
mod slices;

#[cfg(test)]
mod tests;

use super::labels::Labelled;
use super::parts::Part;
use addresses::Given;
use silences::Written;
use slices::{ENDPOINTS_MAX, slices_of};

/// Name of a cluster's first ServiceCIDR. The family of its first range is the default for Services that ask for none.
const FIRST_SERVICE_CIDR: &str = "kubernetes";

/// Results of the controllers for all objects so far.
#[derive(Debug)]
pub(super) struct Controllers {
    node_name: String,
    given: BTreeMap<ObjectKey, Given>,
    zones: BTreeMap<Arc<str>, Arc<str>>,
    namespaces: BTreeMap<Arc<str>, Namespace>,
}

/// Results for the objects of one namespace.
#[derive(Debug, Default, PartialEq, Eq)]
struct Namespace {
    slices: BTreeMap<ObjectKey, Slice>,
    problems: Vec<Problem>,
}

impl Controllers {
    pub(super) fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
            given: BTreeMap::new(),
            zones: BTreeMap::new(),
            namespaces: BTreeMap::new(),
        }
    }

    /// Fills in the clusterIPs and nodePorts that a Service was assigned.
    pub(super) fn complete(&self, service: &mut Service) {
        if let Some(given) = self.given.get(&service.key) {
            given.complete(service);
        }
    }

    /// Returns the clusterIPs and nodePorts that all Services are to get.
    pub(super) fn assign(&self, files: &Files) -> BTreeMap<ObjectKey, Given> {
        let mut cidrs: Vec<_> = files.all(Kind::ServiceCidr).collect();
        cidrs.sort_by_key(|(id, _)| &*id.key.name != FIRST_SERVICE_CIDR);
        let ranges: Vec<_> = cidrs.into_iter().flat_map(|(_, object)| object.prefixes()).collect();
        let mut services = Vec::new();
        for (_, object) in files.all(Kind::Service) {
            if let Some(Part::Service(part)) = &object.part {
                services.push((part, object.service()));
            }
        }
        addresses::assign(&services, &ranges)
    }

    /// Returns the Services for which `given` differs from the present assignment.
    pub(super) fn differing(&self, given: &BTreeMap<ObjectKey, Given>) -> BTreeSet<ObjectKey> {
        let all = self.given.keys().chain(given.keys());
        all.filter(|key| self.given.get(*key) != given.get(*key)).cloned().collect()
    }

    /// Replaces the present assignment.
    pub(super) fn give(&mut self, given: BTreeMap<ObjectKey, Given>) {
        self.given = given;
    }

    /// Makes slices and problems anew for the namespaces that the `touched` objects affect, and returns the
    /// differences.
    pub(super) fn follow<'a>(&mut self, files: &Files, touched: impl Iterator<Item = &'a Id>) -> Vec<Change> {
        let (mut nodes, mut namespaces) = (false, BTreeSet::new());
        for id in touched {
            if id.kind.is_namespaced() {
                namespaces.insert(Arc::clone(&id.key.namespace));
            } else {
                nodes |= id.kind == Kind::Node;
            }
        }
        let zones = if nodes { zones(files) } else { self.zones.clone() };
        if zones != self.zones {
            self.zones = zones;
            namespaces.extend(self.namespaces.keys().cloned());
        }
        let mut changes = Vec::new();
        for namespace in namespaces {
            let now = self.of_namespace(files, &namespace);
            let before = self.namespaces.remove(&namespace).unwrap_or_default();
            let gone = before.slices.keys().filter(|key| !now.slices.contains_key(*key));
            changes.extend(gone.map(|key| Change::SliceGone(key.clone())));
            let new = now.slices.iter().filter(|(key, slice)| before.slices.get(*key) != Some(slice));
            changes.extend(new.map(|(_, slice)| Change::Slice(slice.clone())));
            if now != Namespace::default() {
                self.namespaces.insert(namespace, now);
            }
        }
        changes
    }

    /// Returns the problems of all namespaces.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.namespaces.values().flat_map(|namespace| &namespace.problems)
    }

    fn of_namespace(&self, files: &Files, namespace: &str) -> Namespace {
        let mut result = Namespace::default();
        let mut written: BTreeMap<&ObjectKey, Vec<Written<'_>>> = BTreeMap::new();
        for kind in [Kind::EndpointSlice, Kind::Endpoints] {
            for (_, object) in files.of_namespace(kind, namespace) {
                for slice in object.slices() {
                    written.entry(&slice.service).or_default().push((&object.place, slice));
                }
            }
        }
        let pods = files.of_namespace(Kind::Pod, namespace).filter_map(|(_, object)| match &object.part {
            Some(Part::Pod(pod)) => Some((&pod.labels, pod)),
            Some(Part::Service(_) | Part::Node(_) | Part::Workload(_)) | None => None,
        });
        let pods = Labelled::new(pods);
        let workloads = Kind::WORKLOADS.into_iter().flat_map(|kind| files.of_namespace(kind, namespace));
        let workloads = workloads.filter_map(|(id, object)| match &object.part {
            Some(Part::Workload(labels)) => Some((labels, id)),
            Some(Part::Service(_) | Part::Pod(_) | Part::Node(_)) | None => None,
        });
        let workloads = Labelled::new(workloads);
        let mut room = ENDPOINTS_MAX;
        for (id, object) in files.of_namespace(Kind::Service, namespace) {
            let (Some(service), Some(Part::Service(part))) = (object.service(), &object.part) else {
                continue;
            };
            let mut service = service.clone();
            let mut say = |reason: String| {
                result.problems.push(Problem { object: object.place.clone(), reason });
            };
            if let Some(given) = self.given.get(&id.key) {
                given.complete(&mut service);
                given.problems.iter().cloned().for_each(&mut say);
            }
            if service.service_type == ServiceType::ExternalName || service.cluster_ips == [None; 2] {
                continue;
            }
            if let Some(slices) = written.get(&id.key) {
                result.problems.extend(silences::of_slices(&service, &object.place, slices));
            } else if !part.selector.is_empty() {
                let found = slices_of(&pods, &service, part, &self.zones, &self.node_name, room);
                // Services after one that does not fit get no endpoints either, so that refusals cost little.
                room = if found.is_beyond { 0 } else { room - found.endpoints().max(found.matching) };
                silences::of_selector(&service, part, &found, &workloads).into_iter().for_each(say);
                result.slices.extend(found.slices.into_iter().map(|slice| (slice.key.clone(), slice)));
            }
        }
        result
    }
}

/// Returns the zone of each Node that has one.
fn zones(files: &Files) -> BTreeMap<Arc<str>, Arc<str>> {
    files
        .all(Kind::Node)
        .filter_map(|(id, object)| match &object.part {
            Some(Part::Node(node)) => Some((Arc::clone(&id.key.name), node.zone.clone()?)),
            Some(Part::Service(_) | Part::Pod(_) | Part::Workload(_)) | None => None,
        })
        .collect()
}
