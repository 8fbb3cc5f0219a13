//! Conversion of Kubernetes objects into the types of [`crate::reconcile::cluster`]: pure, total, and lenient field by
//! field.
//!
//! A field that cannot be used is skipped, a sentence names the field, and the rest of the object is served. An object
//! is refused only if its name cannot be used (for a slice also its Service name or address type, for a Pod also its
//! uid). The filters that the API server applies to watches are applied here too, so that manifests and a server that
//! ignores selectors behave alike.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::Prefix;

use super::objects;
use super::share::Shared;
use crate::config::lenient;
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::{Node, ObjectKey, Pod};
use crate::sources::update::Problem;

mod service;
mod slice;

#[cfg(test)]
mod fields;
#[cfg(test)]
mod tests;

/// Maximum length of a namespace, a Service name and a port name, bytes: a DNS label.
const LABEL_MAX: usize = 63;
/// Maximum length of any other name, bytes: a DNS subdomain.
const SUBDOMAIN_MAX: usize = 253;
/// Maximum number of sentences about one object; further ones are only counted.
const FINDINGS_MAX: usize = 16;

/// Label of Services that another proxy serves.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label of slices that are not for proxies.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Label that names the Service of a slice.
pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Taint of a node that the cluster autoscaler is about to delete.
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// Annotation of the mirror object of a static pod: the identifier by which kubelet knows the pod itself.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Sentence about a Service without a clusterIP. With a control plane, no Service is without one for long.
pub(super) const CLUSTER_IP_MISSING: &str = "spec.clusterIP is not set: the Service is not served";
/// Label with the zone of a node.
pub(super) const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Converts objects for one node; equal strings and hints in all results share memory.
#[derive(Debug)]
pub struct Converter {
    node_name: String,
    opt_out: Rules,
    shared: Shared,
}

/// A ServiceCIDR.
#[derive(Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Name of the ServiceCIDR.
    pub name: Arc<str>,
    /// Valid prefixes of `spec.cidrs`.
    pub prefixes: Vec<Prefix>,
    /// Sentences about fields that cannot be used.
    pub(crate) problems: Vec<String>,
}

impl Converter {
    /// Creates a converter for the node with this name (lower case).
    pub fn new(node_name: &str) -> Self {
        Self { node_name: node_name.to_owned(), opt_out: Rules::default(), shared: Shared::default() }
    }

    /// Sets the rules by which Pods opt out of the socket edge. Without rules, no Pod opts out.
    pub(crate) fn with_opt_out(self, opt_out: Rules) -> Self {
        Self { opt_out, ..self }
    }

    /// Converts the object of this node; returns `None` for any other Node. Invalid addresses are skipped.
    pub fn node(&mut self, object: &objects::Node) -> Option<Node> {
        if object.metadata.name.as_deref() != Some(&self.node_name) {
            return None;
        }
        let zone = label(&object.metadata, ZONE_LABEL).filter(|zone| !zone.is_empty());
        let mut taints = object.spec.iter().flat_map(|spec| &spec.taints);
        let mut node = Node {
            zone: zone.map(|zone| self.shared.string(zone)),
            ips: [None; 2],
            primary: None,
            pod_cidrs: pod_cidrs(object),
            leaving: object.metadata.deletion_timestamp.is_some()
                || taints.any(|taint| taint.key.as_deref() == Some(LEAVING_TAINT)),
        };
        let addresses = object.status.iter().flat_map(|status| &status.addresses);
        for kind in ["InternalIP", "ExternalIP"] {
            for address in addresses.clone().filter(|address| address.type_.as_deref() == Some(kind)) {
                if let Ok(addr) = lenient::addr(address.address.as_deref().unwrap_or_default()) {
                    node.ips[addr.family().index()].get_or_insert(addr);
                    node.primary.get_or_insert(addr.family());
                }
            }
        }
        Some(node)
    }

    /// Converts a Pod of this node that has not ended and opts out of the socket edge; returns `None` for any other
    /// Pod.
    ///
    /// # Errors
    /// The object has no usable name or uid.
    pub(crate) fn pod(&mut self, object: &objects::Pod) -> Result<Option<Pod>, Problem> {
        let (meta, spec) = (&object.metadata, object.spec.as_ref());
        let phase = object.status.as_ref().and_then(|status| status.phase.as_deref());
        let class = spec.and_then(|spec| spec.runtime_class_name.as_deref());
        if spec.and_then(|spec| spec.node_name.as_deref()).is_none_or(|node| node != self.node_name)
            || matches!(phase, Some("Succeeded" | "Failed"))
            || !self.opt_out.hold(meta.annotations.as_ref(), class)
        {
            return Ok(None);
        }
        let key = self.key("Pod", meta, SUBDOMAIN_MAX)?;
        let Some(uid) = cgroup_uid(meta) else {
            let reason =
                "metadata.uid is missing, so that its cgroup cannot be found; its sockets are served";
            return Err(Problem { object: format!("Pod {key}"), reason: reason.to_owned() });
        };
        let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
        Ok(Some(Pod { key, uid: uid.into(), host_network }))
    }

    /// Converts a ServiceCIDR.
    ///
    /// # Errors
    /// The object has no usable name.
    pub fn service_cidr(&mut self, object: &objects::ServiceCidr) -> Result<ServiceCidr, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        check_name(name, SUBDOMAIN_MAX).map_err(|reason| Problem {
            object: format!("ServiceCIDR {}", excerpt(name)),
            reason: format!("metadata.name {reason}"),
        })?;
        let mut findings = Findings::default();
        let mut prefixes = Vec::new();
        for (i, cidr) in object.spec.iter().flat_map(|spec| &spec.cidrs).enumerate() {
            match lenient::prefix(cidr.trim()) {
                Ok(prefix) => prefixes.push(prefix),
                Err(what) => findings.quoted(format_args!("spec.cidrs[{i}]"), cidr, what),
            }
        }
        Ok(ServiceCidr { name: self.shared.string(name), prefixes, problems: findings.finish() })
    }

    /// Returns the checked namespace and name. `name_max` is the maximum length of a name of this kind.
    fn key(&mut self, kind: &str, meta: &ObjectMeta, name_max: usize) -> Result<ObjectKey, Problem> {
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let name = meta.name.as_deref().unwrap_or_default();
        for (field, value, max) in [("namespace", namespace, LABEL_MAX), ("name", name, name_max)] {
            check_name(value, max).map_err(|reason| Problem {
                object: format!("{kind} {}/{}", excerpt(namespace), excerpt(name)),
                reason: format!("metadata.{field} {reason}"),
            })?;
        }
        Ok(ObjectKey { namespace: self.shared.string(namespace), name: self.shared.string(name) })
    }
}

/// Returns the identifier in the name of a Pod's cgroup: the Pod's uid, or for a static Pod the digest of its file.
pub(crate) fn cgroup_uid(meta: &ObjectMeta) -> Option<&str> {
    let hash = meta.annotations.as_ref().and_then(|annotations| annotations.get(CONFIG_HASH));
    hash.or(meta.uid.as_ref()).map(String::as_str).filter(|uid| !uid.is_empty())
}

/// Returns namespace and name without checks, to look up an object that is gone.
pub(crate) fn key_of(meta: &ObjectMeta) -> ObjectKey {
    ObjectKey::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// Returns `podCIDRs`, or the older `podCIDR` if only that is set.
fn pod_cidrs(object: &objects::Node) -> Vec<Prefix> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let mut given: Vec<_> = spec.pod_cidrs.iter().filter(|text| !text.is_empty()).collect();
    if given.is_empty() {
        given.extend(spec.pod_cidr.iter().filter(|text| !text.is_empty()));
    }
    given.into_iter().filter_map(|text| lenient::prefix(text).ok()).collect()
}

/// Returns whether a slice is meant for a proxy but does not name its Service.
pub(super) fn is_of_no_service(meta: &ObjectMeta) -> bool {
    label(meta, HEADLESS_LABEL).is_none() && label(meta, SERVICE_NAME_LABEL).is_none_or(str::is_empty)
}

fn label<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(name).map(String::as_str)
}

fn check_name(name: &str, max: usize) -> Result<(), String> {
    match name.len() {
        0 => Err("is missing".to_owned()),
        len if len > max => Err(format!("has {len} bytes, more than the {max} that Kubernetes allows")),
        _ if name.chars().any(|c| !is_of_a_name(c)) => Err(format!(
            "is {:?}, which has others than letters, digits, `-`, `.` and `_` in it",
            excerpt(name)
        )),
        _ => Ok(()),
    }
}

/// Returns whether a name may contain `c`. The API server allows fewer characters; manifests are not checked by anyone
/// else. A name with a zero byte (the end of a name in the maps) or a slash (the separator of namespace and name) would
/// not be found again.
fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')
}

fn check_port_name(name: &str) -> Result<(), String> {
    if name.is_empty() { Ok(()) } else { check_name(name, LABEL_MAX) }
}

/// Returns the first 80 characters of a user's text, enough to recognise it.
fn excerpt(text: &str) -> &str {
    text.char_indices().nth(80).map_or(text, |(end, _)| &text[..end])
}

/// Collects sentences about the problems of an object.
#[derive(Default)]
pub(super) struct Findings {
    sentences: Vec<String>,
    more: usize,
}

impl Findings {
    /// Adds the sentence `field reason`.
    pub(super) fn note(&mut self, field: fmt::Arguments<'_>, reason: fmt::Arguments<'_>) {
        self.sentence(format_args!("{field} {reason}"));
    }

    /// Adds a whole sentence.
    pub(super) fn sentence(&mut self, sentence: fmt::Arguments<'_>) {
        if self.sentences.len() < FINDINGS_MAX {
            self.sentences.push(sentence.to_string());
        } else {
            self.more += 1;
        }
    }

    /// Adds the sentence `field "value" what; it is ignored`.
    pub(super) fn quoted(&mut self, field: fmt::Arguments<'_>, value: &str, what: &str) {
        self.note(field, format_args!("{:?} {what}; it is ignored", excerpt(value)));
    }

    pub(super) fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.sentences.push(format!("and {} more of the kind", self.more));
        }
        self.sentences
    }
}
