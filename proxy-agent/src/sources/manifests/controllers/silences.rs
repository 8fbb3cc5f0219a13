//! Problems that would otherwise go unnoticed: names that do not match, and selectors that match nothing.
//!
//! A control plane makes slices that fit their Service. In files, nothing ensures that.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::proto;
use proxy_common::addr::Family;

use super::slices::{ENDPOINTS_MAX, Found};
use crate::reconcile::cluster::{Service, Slice};
use crate::sources::convert::Findings;
use crate::sources::manifests::id::Id;
use crate::sources::manifests::labels::Labelled;
use crate::sources::manifests::parts::ServicePart;
use crate::sources::update::Problem;

/// Position of a slice in the files, and the slice.
pub(super) type Written<'a> = (&'a str, &'a Slice);

/// Returns the problems of slices that do not fit their Service. Slices without endpoints are ignored.
pub(super) fn of_slices(service: &Service, place: &str, slices: &[Written<'_>]) -> Vec<Problem> {
    let ports: BTreeSet<(&str, u8)> = service.ports.iter().map(|port| (&*port.name, port.proto)).collect();
    let mut offered = BTreeSet::new();
    // An Endpoints object makes several slices at one place.
    let mut by_place: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (place, slice) in slices.iter().filter(|(_, slice)| !slice.endpoints.is_empty()) {
        let reasons = by_place.entry(place).or_default();
        if service.cluster_ips[slice.family.index()].is_none() {
            reasons.insert(format!(
                "it has {} endpoints, but Service {} has no clusterIP of that family: they are not served",
                slice.family, service.key
            ));
        }
        for port in &slice.ports {
            let name = (&*port.name, port.proto);
            offered.insert(name);
            if !ports.contains(&name) {
                reasons.insert(format!(
                    "ports: {} is no port of Service {} by name and protocol: it is not served",
                    shown(&port.name, port.proto),
                    service.key
                ));
            }
        }
    }
    let of_service = service.ports.iter().filter(|port| !offered.contains(&(&*port.name, port.proto)));
    let any = !by_place.is_empty();
    for port in of_service.filter(|_| any) {
        by_place.entry(place).or_default().insert(format!(
            "spec.ports: {} is in none of its slices by name and protocol: it has no endpoints",
            shown(&port.name, port.proto)
        ));
    }
    let mut problems = Vec::new();
    for (place, reasons) in by_place {
        let mut findings = Findings::default();
        reasons.iter().for_each(|reason| findings.sentence(format_args!("{reason}")));
        let reasons = findings.finish().into_iter();
        problems.extend(reasons.map(|reason| Problem { object: place.to_owned(), reason }));
    }
    problems
}

/// Returns the reasons why the selector of a Service without slices leads to no endpoints, for all or some of its
/// ports.
pub(super) fn of_selector(
    service: &Service,
    part: &ServicePart,
    found: &Found,
    workloads: &Labelled<'_, &Id>,
) -> Vec<String> {
    let mut findings = Findings::default();
    if found.is_beyond {
        findings.sentence(format_args!(
            "spec.selector leads to more endpoints than what is left of the {ENDPOINTS_MAX} for a namespace: it has none"
        ));
    } else if found.usable > 0 {
        for port in found.portless.iter().filter_map(|index| service.ports.get(*index)) {
            findings.sentence(format_args!(
                "spec.ports: {} has targetPort {:?}, which is no port of the Pods that spec.selector matches, by name and \
                 protocol: it has no endpoints",
                shown(&port.name, port.proto),
                part.target_name(port)
            ));
        }
    } else if found.matching > 0 {
        let families: Vec<_> = Family::ALL
            .into_iter()
            .filter(|family| service.cluster_ips[family.index()].is_some())
            .map(|family| family.to_string())
            .collect();
        findings.sentence(format_args!(
            "spec.selector matches {} Pods, none of which runs and has an {} address (status.podIPs), and there is no \
             EndpointSlice: it has no endpoints",
            found.matching,
            families.join(" or ")
        ));
    } else if let Some(workload) = workloads.selected(&part.selector).next() {
        findings.sentence(format_args!(
            "spec.selector matches what {workload} would make, but no Pod in the files, and there is no EndpointSlice: it \
             has no endpoints. Add the Pods with their addresses (kubectl get pods -o yaml)"
        ));
    } else {
        findings.sentence(format_args!(
            "spec.selector matches no Pod in the files, and there is no EndpointSlice: it has no endpoints"
        ));
    }
    findings.finish()
}

/// Returns the name of a port for messages.
fn shown(name: &str, proto: u8) -> String {
    let proto = proto::name(proto);
    if name.is_empty() { format!("the one without a name ({proto})") } else { format!("{name:?} ({proto})") }
}
