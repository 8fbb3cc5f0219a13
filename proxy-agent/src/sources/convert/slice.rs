//! Conversion of EndpointSlices and of the older Endpoints.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::Family;

use super::{
    Converter, Findings, HEADLESS_LABEL, LABEL_MAX, Problem, SERVICE_NAME_LABEL, SUBDOMAIN_MAX, check_name,
    check_port_name, label, lenient, objects,
};
use crate::reconcile::cluster::{Endpoint, Hints, ObjectKey, Slice, SlicePort};

/// Annotation with the time of the change that led to this slice.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

impl Converter {
    /// Converts a slice; returns `None` if the slice is not for a proxy: it is headless, names no Service, or has DNS
    /// names instead of addresses.
    ///
    /// # Errors
    /// The object has no usable namespace, name, Service name or address type.
    pub fn slice(&mut self, object: &objects::EndpointSlice) -> Result<Option<Slice>, Problem> {
        let key = self.key("EndpointSlice", &object.metadata, SUBDOMAIN_MAX)?;
        self.slice_of_key(key, object)
    }

    fn slice_of_key(
        &mut self,
        key: ObjectKey,
        object: &objects::EndpointSlice,
    ) -> Result<Option<Slice>, Problem> {
        let refused = |reason: String| Problem { object: format!("EndpointSlice {key}"), reason };
        if label(&object.metadata, HEADLESS_LABEL).is_some() {
            return Ok(None);
        }
        let Some(name) = label(&object.metadata, SERVICE_NAME_LABEL).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        check_name(name, LABEL_MAX)
            .map_err(|reason| refused(format!("label {SERVICE_NAME_LABEL} {reason}")))?;
        let family = match object.address_type.as_deref().unwrap_or_default() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return Ok(None),
            other => {
                return Err(refused(format!("addressType {other:?} is not IPv4 or IPv6")));
            }
        };
        let service = ObjectKey { namespace: Arc::clone(&key.namespace), name: self.shared.string(name) };
        let mut findings = Findings::default();
        let ports = self.slice_ports(object, &mut findings);
        let endpoints = self.slice_endpoints(object, family, &mut findings);
        Ok(Some(Slice {
            key,
            service,
            family,
            ports,
            endpoints,
            trigger_time: trigger_time(&object.metadata),
            problems: findings.finish(),
        }))
    }

    /// Converts an Endpoints object into slices with the same content: one for each subset and family. The names of
    /// these slices contain slashes, which no slice of a cluster has. Problems are described in terms of slices.
    ///
    /// # Errors
    /// The object has no usable namespace or name.
    pub(crate) fn endpoints(&mut self, object: &objects::Endpoints) -> Result<Vec<Slice>, Problem> {
        let key = self.key("Endpoints", &object.metadata, LABEL_MAX)?;
        let mut slices = Vec::new();
        for (i, subset) in object.subsets.iter().enumerate() {
            for family in Family::ALL {
                let mut slice = slice_of_subset(subset, family);
                if slice.endpoints.is_empty() {
                    continue;
                }
                slice.metadata = object.metadata.clone();
                let name = self.shared.string(&format!("{}/endpoints/{i}/{family}", key.name));
                let labels = slice.metadata.labels.get_or_insert_default();
                labels.insert(SERVICE_NAME_LABEL.to_owned(), key.name.to_string());
                let key = ObjectKey { namespace: Arc::clone(&key.namespace), name };
                slices.extend(self.slice_of_key(key, &slice)?);
            }
        }
        Ok(slices)
    }

    fn slice_ports(&mut self, object: &objects::EndpointSlice, findings: &mut Findings) -> Vec<SlicePort> {
        let mut ports = Vec::new();
        for (i, entry) in object.ports.iter().enumerate() {
            let Some(name) = entry.name.as_deref() else {
                findings
                    .note(format_args!("ports[{i}].name"), format_args!("is missing; the port is ignored"));
                continue;
            };
            if let Err(reason) = check_port_name(name) {
                findings.note(format_args!("ports[{i}].name"), format_args!("{reason}; the port is ignored"));
                continue;
            }
            let Some(proto) = lenient::protocol(entry.protocol.as_deref()) else {
                let given = entry.protocol.as_deref().unwrap_or_default();
                let what = "is not TCP, UDP or SCTP; the port is ignored";
                findings.note(format_args!("ports[{i}].protocol"), format_args!("{given:?} {what}"));
                continue;
            };
            // An absent port means every port, which no proxy implements.
            let Some(port) = lenient::port(entry.port.unwrap_or_default()) else {
                let what = "is missing or not in 1..65535; the port is ignored";
                findings.note(format_args!("ports[{i}].port"), format_args!("{what}"));
                continue;
            };
            ports.push(SlicePort { name: self.shared.string(name), proto, port });
        }
        ports
    }

    fn slice_endpoints(
        &mut self,
        object: &objects::EndpointSlice,
        family: Family,
        findings: &mut Findings,
    ) -> Vec<Endpoint> {
        let mut endpoints = Vec::with_capacity(object.endpoints.len());
        for (i, endpoint) in object.endpoints.iter().enumerate() {
            // The API allows several addresses, but all of them belong to one pod.
            let Some(text) = endpoint.addresses.first() else { continue };
            let addr = match lenient::addr(text) {
                Ok(addr) if addr.family() == family => addr,
                Ok(_) => {
                    let what = format!("is not {family}, the addressType of the slice");
                    findings.quoted(format_args!("endpoints[{i}].addresses[0]"), text, &what);
                    continue;
                }
                Err(what) => {
                    findings.quoted(format_args!("endpoints[{i}].addresses[0]"), text, what);
                    continue;
                }
            };
            // As in the API server: a Service must not give access to addresses that only the node itself can reach.
            if let Some(what) = lenient::special(addr) {
                let what = format!("is {what} address, where no endpoint can be");
                findings.quoted(format_args!("endpoints[{i}].addresses[0]"), text, &what);
                continue;
            }
            let conditions = endpoint.conditions.as_ref();
            endpoints.push(Endpoint {
                addr,
                ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
                serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
                terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
                local: endpoint.node_name.as_deref() == Some(&self.node_name),
                hints: endpoint.hints.as_ref().and_then(|hints| self.hints(hints)),
            });
        }
        endpoints.shrink_to_fit();
        endpoints
    }

    fn hints(&mut self, hints: &objects::EndpointHints) -> Option<Arc<Hints>> {
        let [zones, nodes] = [&hints.for_zones, &hints.for_nodes].map(|given| {
            let names = given.iter().filter_map(|named| named.name.as_deref());
            names.map(|name| self.shared.string(name)).collect::<Vec<_>>()
        });
        (!zones.is_empty() || !nodes.is_empty()).then(|| self.shared.hints(Hints { zones, nodes }))
    }
}

/// Returns a slice with the addresses of one family in a subset, without metadata.
fn slice_of_subset(subset: &objects::EndpointSubset, family: Family) -> objects::EndpointSlice {
    let ready = subset.addresses.iter().map(|address| (address, true));
    let not_ready = subset.not_ready_addresses.iter().map(|address| (address, false));
    let endpoints = ready
        .chain(not_ready)
        .filter(|(address, _)| {
            address.ip.as_ref().is_some_and(|ip| ip.contains(':')) == (family == Family::V6)
        })
        .map(|(address, ready)| objects::Endpoint {
            addresses: address.ip.iter().cloned().collect(),
            conditions: Some(objects::EndpointConditions {
                ready: Some(ready),
                serving: Some(ready),
                terminating: Some(false),
            }),
            node_name: address.node_name.clone(),
            ..objects::Endpoint::default()
        })
        .collect();
    objects::EndpointSlice {
        address_type: Some(family.to_string()),
        endpoints,
        ports: subset
            .ports
            .iter()
            .map(|port| objects::EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: port.port,
                protocol: port.protocol.clone(),
            })
            .collect(),
        metadata: ObjectMeta::default(),
    }
}

fn trigger_time(meta: &ObjectMeta) -> Option<i64> {
    let time: Timestamp = meta.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()?;
    i64::try_from(time.as_nanosecond()).ok()
}
