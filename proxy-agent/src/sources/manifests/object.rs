//! One object of a file: its own changes, and the part of it that controllers work with.

use kube::Resource;
use proxy_common::addr::Prefix;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::id::{DEFAULT_NAMESPACE, Kind};
use super::labels::Labels;
use super::parts::{NodePart, Part, PodPart, ServicePart};
use crate::reconcile::cluster::{Change, Service, Slice};
use crate::sources::convert::{
    CLUSTER_IP_MISSING, Converter, Findings, SERVICE_NAME_LABEL, is_of_no_service,
};
use crate::sources::objects;
use crate::sources::objects::Pod;

/// Converted object of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Object {
    /// Changes that the object makes by itself: none if this proxy does not serve it, several slices for an Endpoints.
    pub(super) changes: Vec<Change>,
    /// Part of the object that controllers combine with other objects.
    pub(super) part: Option<Part>,
    /// Position of the object, as problems name it.
    pub(super) place: String,
}

impl Object {
    /// Returns the Service as it was written.
    pub(super) fn service(&self) -> Option<&Service> {
        self.changes
            .iter()
            .find_map(|change| if let Change::Service(service) = change { Some(service) } else { None })
    }

    /// Returns the prefixes of a ServiceCIDR.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = Prefix> {
        let lists = self.changes.iter().filter_map(|change| {
            if let Change::ServiceCidr(_, prefixes) = change { Some(prefixes) } else { None }
        });
        lists.flatten().copied()
    }

    /// Returns the slices.
    pub(super) fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.changes
            .iter()
            .filter_map(|change| if let Change::Slice(slice) = change { Some(slice) } else { None })
    }
}

/// Result of a conversion, with sentences about parts of the object.
#[derive(Default)]
pub(super) struct Converted {
    pub(super) changes: Vec<Change>,
    pub(super) part: Option<Part>,
    pub(super) said: Vec<String>,
}

/// Converts an object of a kind. `place` is its position, which precedes each problem of a Service or slice.
///
/// # Errors
/// The reason why nothing of the object can be used.
pub(super) fn convert(
    kind: Kind,
    value: Value,
    place: &str,
    converter: &mut Converter,
) -> Result<Converted, String> {
    let mut converted = Converted::default();
    match kind {
        Kind::Service => converted = service(value, converter)?,
        Kind::EndpointSlice => {
            let object = typed::<objects::EndpointSlice>(kind, value)?;
            let slice = converter.slice(&object).map_err(|problem| problem.reason)?;
            if slice.is_none() && is_of_no_service(&object.metadata) {
                converted
                    .said
                    .push(format!("label {SERVICE_NAME_LABEL} is missing, so it belongs to no Service"));
            }
            converted.changes.extend(slice.map(Change::Slice));
        }
        Kind::Endpoints => {
            let slices = converter
                .endpoints(&typed::<objects::Endpoints>(kind, value)?)
                .map_err(|problem| problem.reason)?;
            converted.changes.extend(slices.into_iter().map(Change::Slice));
        }
        Kind::Node => {
            let object = typed::<objects::Node>(kind, value)?;
            converted.part = Some(Part::Node(NodePart::of(&object)));
            converted.changes.extend(converter.node(&object).map(Change::Node));
        }
        Kind::Pod => converted = pod(value, converter)?,
        Kind::ServiceCidr => {
            let cidr = converter
                .service_cidr(&typed::<objects::ServiceCidr>(kind, value)?)
                .map_err(|problem| problem.reason)?;
            converted.changes.push(Change::ServiceCidr(cidr.name, cidr.prefixes));
            converted.said.extend(cidr.problems);
        }
        Kind::Deployment
        | Kind::ReplicaSet
        | Kind::StatefulSet
        | Kind::DaemonSet
        | Kind::ReplicationController => {
            // Nothing is served from a workload, so its errors do not matter.
            converted.part = fields(&value).ok().map(|object| Part::Workload(template(object)));
        }
    }
    for change in &mut converted.changes {
        let problems = match change {
            Change::Service(service) => &mut service.problems,
            Change::Slice(slice) => &mut slice.problems,
            Change::ServiceGone(_)
            | Change::SliceGone(_)
            | Change::Node(_)
            | Change::ServiceCidr(..)
            | Change::ServiceCidrGone(_)
            | Change::Pod(_)
            | Change::PodGone(_) => continue,
        };
        // The controllers may still assign an address.
        problems.retain(|problem| problem != CLUSTER_IP_MISSING);
        problems.iter_mut().for_each(|problem| problem.insert_str(0, &format!("{place}: ")));
    }
    Ok(converted)
}

/// Converts a Service, and reads what its author asks of the control plane.
fn service(value: Value, converter: &mut Converter) -> Result<Converted, String> {
    let request = fields::<objects::ServiceRequest>(&value);
    let object = typed::<objects::Service>(Kind::Service, value)?;
    let service = converter.service(&object).map_err(|problem| problem.reason)?;
    let mut findings = Findings::default();
    let request = request.unwrap_or_else(|error| {
        findings.sentence(format_args!("{error}; its selector has no effect"));
        objects::ServiceRequest::default()
    });
    let part = Part::Service(ServicePart::of(&object, request, &mut findings));
    let changes = service.map(Change::Service).into_iter().collect();
    Ok(Converted { changes, part: Some(part), said: findings.finish() })
}

/// Converts a Pod, which may be an endpoint, and may opt out.
fn pod(value: Value, converter: &mut Converter) -> Result<Converted, String> {
    let details = fields::<objects::PodDetails>(&value);
    let object = typed::<Pod>(Kind::Pod, value)?;
    let mut converted = Converted::default();
    match converter.pod(&object) {
        Ok(pod) => converted.changes.extend(pod.map(Change::Pod)),
        Err(problem) => converted.said.push(problem.reason),
    }
    match details {
        Ok(details) => {
            let mut findings = Findings::default();
            converted.part = Some(Part::Pod(PodPart::of(&object, details, &mut findings)));
            converted.said.extend(findings.finish());
        }
        Err(error) => converted.said.push(format!("{error}; it is no endpoint of any Service")),
    }
    Ok(converted)
}

/// Returns the labels of the Pods that a workload creates.
fn template(object: objects::Workload) -> Labels {
    let template = object.spec.and_then(|spec| spec.template);
    template.and_then(|template| template.metadata.labels).unwrap_or_default()
}

fn fields<'a, T: Deserialize<'a>>(value: &'a Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| error.to_string())
}

/// Deserializes an object. A namespaced object that names no namespace gets `default`.
///
/// # Errors
/// The field that is wrong, and the reason.
pub(super) fn typed<T: DeserializeOwned + Resource>(kind: Kind, value: Value) -> Result<T, String> {
    let mut object: T = serde_path_to_error::deserialize(value).map_err(|error| error.to_string())?;
    let namespace = &mut object.meta_mut().namespace;
    if kind.is_namespaced() && namespace.as_deref().unwrap_or_default().is_empty() {
        *namespace = Some(DEFAULT_NAMESPACE.to_owned());
    }
    Ok(object)
}
