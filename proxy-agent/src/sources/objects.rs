//! A Pod, as far as it is read. Code that decodes all of a Pod would be the largest part of the agent, and a field that
//! nobody reads could make a Pod unusable.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{Metadata, NamespaceResourceScope, Resource};
use serde::Deserialize;

/// A Pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PodObject {
    /// Name, labels and so on.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it should be.
    pub spec: Option<PodSpec>,
    /// What it is.
    pub status: Option<PodStatus>,
}

/// What a Pod should be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node that it is bound to.
    pub node_name: Option<String>,
    /// The class of its runtime.
    pub runtime_class_name: Option<String>,
    /// Whether it lives in the host's network namespace.
    pub host_network: Option<bool>,
}

/// What a Pod is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Where it is in its life.
    pub phase: Option<String>,
    /// Its first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// Its addresses.
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<Ip>>,
    /// The first address of its node.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<String>,
    /// The addresses of its node.
    #[serde(rename = "hostIPs")]
    pub host_ips: Option<Vec<Ip>>,
}

/// An address.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Ip {
    /// In text.
    #[serde(default)]
    pub ip: String,
}

impl Resource for PodObject {
    const API_VERSION: &'static str = "v1";
    const GROUP: &'static str = "";
    const KIND: &'static str = "Pod";
    const VERSION: &'static str = "v1";
    const URL_PATH_SEGMENT: &'static str = "pods";
    type Scope = NamespaceResourceScope;
}

impl Metadata for PodObject {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
