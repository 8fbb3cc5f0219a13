//! Kubernetes objects, reduced to the fields that are read.
//!
//! A field that the agent does not read is skipped, whatever its value: it cannot make an object unusable, and it costs
//! neither memory nor code. In fields that are read, null counts as absent, also in lists. Fields have the names,
//! meanings and defaults of the API (Kubernetes 1.36).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::{ClusterResourceScope, Metadata, NamespaceResourceScope, Resource};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer};
use serde_json::{Number, Value};

/// Implements the traits that the API client requires of a kind.
macro_rules! kind {
    ($object:ident, $kind:literal, $group:literal, $version:literal, $api_version:literal, $plural:literal, $scope:ident) => {
        impl Resource for $object {
            const API_VERSION: &'static str = $api_version;
            const GROUP: &'static str = $group;
            const KIND: &'static str = $kind;
            const VERSION: &'static str = $version;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = $scope;
        }

        impl Metadata for $object {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

kind!(Service, "Service", "", "v1", "v1", "services", NamespaceResourceScope);
kind!(
    EndpointSlice,
    "EndpointSlice",
    "discovery.k8s.io",
    "v1",
    "discovery.k8s.io/v1",
    "endpointslices",
    NamespaceResourceScope
);
kind!(Endpoints, "Endpoints", "", "v1", "v1", "endpoints", NamespaceResourceScope);
kind!(Node, "Node", "", "v1", "v1", "nodes", ClusterResourceScope);
kind!(
    ServiceCidr,
    "ServiceCIDR",
    "networking.k8s.io",
    "v1",
    "networking.k8s.io/v1",
    "servicecidrs",
    ClusterResourceScope
);
kind!(Pod, "Pod", "", "v1", "v1", "pods", NamespaceResourceScope);

/// Declares structs whose fields may all be missing or null.
macro_rules! fields {
    ($($(#[doc = $doc:literal])+ $name:ident { $($(#[$attribute:meta])* $field:ident: $type:ty,)* })+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $($(#[$attribute])* pub(crate) $field: $type,)*
        }
    )+};
}

fields! {
    /// A Service.
    Service {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        spec: Option<ServiceSpec>,
        status: Option<ServiceStatus>,
    }
    /// Desired state of a Service.
    ServiceSpec {
        #[serde(rename = "type")]
        type_: Option<String>,
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs", deserialize_with = "list")]
        cluster_ips: Vec<String>,
        #[serde(deserialize_with = "list")]
        ip_families: Vec<String>,
        #[serde(deserialize_with = "list")]
        ports: Vec<ServicePort>,
        #[serde(rename = "externalIPs", deserialize_with = "list")]
        external_ips: Vec<String>,
        internal_traffic_policy: Option<String>,
        external_traffic_policy: Option<String>,
        #[serde(deserialize_with = "integer")]
        health_check_node_port: Option<i32>,
        #[serde(deserialize_with = "list")]
        load_balancer_source_ranges: Vec<String>,
        session_affinity: Option<String>,
        session_affinity_config: Option<SessionAffinityConfig>,
    }
    /// A port of a Service.
    ServicePort {
        name: Option<String>,
        protocol: Option<String>,
        #[serde(deserialize_with = "integer")]
        port: Option<i32>,
        #[serde(deserialize_with = "integer")]
        node_port: Option<i32>,
    }
    /// Settings of session affinity.
    SessionAffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIpConfig>,
    }
    /// Settings of session affinity by the client's address.
    ClientIpConfig {
        #[serde(deserialize_with = "integer")]
        timeout_seconds: Option<i32>,
    }
    /// Observed state of a Service.
    ServiceStatus {
        load_balancer: Option<LoadBalancerStatus>,
    }
    /// Addresses assigned to a load balancer.
    LoadBalancerStatus {
        #[serde(deserialize_with = "list")]
        ingress: Vec<LoadBalancerIngress>,
    }
    /// An address of a load balancer.
    LoadBalancerIngress {
        ip: Option<String>,
        ip_mode: Option<String>,
    }

    /// An EndpointSlice.
    EndpointSlice {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        address_type: Option<String>,
        #[serde(deserialize_with = "list")]
        ports: Vec<EndpointPort>,
        #[serde(deserialize_with = "list")]
        endpoints: Vec<Endpoint>,
    }
    /// A port of a slice's endpoints, or of a subset.
    EndpointPort {
        name: Option<String>,
        protocol: Option<String>,
        #[serde(deserialize_with = "integer")]
        port: Option<i32>,
    }
    /// An endpoint of a slice.
    Endpoint {
        #[serde(deserialize_with = "list")]
        addresses: Vec<String>,
        conditions: Option<EndpointConditions>,
        node_name: Option<String>,
        hints: Option<EndpointHints>,
    }
    /// The state of an endpoint.
    EndpointConditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }
    /// Topology hints: zones and nodes that an endpoint is meant for.
    EndpointHints {
        #[serde(deserialize_with = "list")]
        for_zones: Vec<Named>,
        #[serde(deserialize_with = "list")]
        for_nodes: Vec<Named>,
    }
    /// A zone or node by its name.
    Named {
        name: Option<String>,
    }

    /// An Endpoints object, the predecessor of EndpointSlices.
    Endpoints {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        #[serde(deserialize_with = "list")]
        subsets: Vec<EndpointSubset>,
    }
    /// Endpoints with the same ports.
    EndpointSubset {
        #[serde(deserialize_with = "list")]
        addresses: Vec<EndpointAddress>,
        #[serde(deserialize_with = "list")]
        not_ready_addresses: Vec<EndpointAddress>,
        #[serde(deserialize_with = "list")]
        ports: Vec<EndpointPort>,
    }
    /// An endpoint of a subset.
    EndpointAddress {
        ip: Option<String>,
        node_name: Option<String>,
    }

    /// A Node.
    Node {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        spec: Option<NodeSpec>,
        status: Option<NodeStatus>,
    }
    /// Desired state of a Node.
    NodeSpec {
        #[serde(rename = "podCIDR")]
        pod_cidr: Option<String>,
        #[serde(rename = "podCIDRs", deserialize_with = "list")]
        pod_cidrs: Vec<String>,
        #[serde(deserialize_with = "list")]
        taints: Vec<Taint>,
    }
    /// A taint, which keeps pods away from a Node.
    Taint {
        key: Option<String>,
    }
    /// Observed state of a Node.
    NodeStatus {
        #[serde(deserialize_with = "list")]
        addresses: Vec<NodeAddress>,
    }
    /// An address of a Node.
    NodeAddress {
        #[serde(rename = "type")]
        type_: Option<String>,
        address: Option<String>,
    }

    /// A range of addresses for Services.
    ServiceCidr {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        spec: Option<ServiceCidrSpec>,
    }
    /// Desired state of a ServiceCIDR.
    ServiceCidrSpec {
        #[serde(deserialize_with = "list")]
        cidrs: Vec<String>,
    }

    /// A Pod.
    Pod {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        spec: Option<PodSpec>,
        status: Option<PodStatus>,
    }
    /// Desired state of a Pod.
    PodSpec {
        node_name: Option<String>,
        runtime_class_name: Option<String>,
        host_network: Option<bool>,
    }
    /// Observed state of a Pod.
    PodStatus {
        phase: Option<String>,
        #[serde(rename = "podIP")]
        pod_ip: Option<String>,
        #[serde(rename = "podIPs", deserialize_with = "list")]
        pod_ips: Vec<Ip>,
        #[serde(rename = "hostIP")]
        host_ip: Option<String>,
        #[serde(rename = "hostIPs", deserialize_with = "list")]
        host_ips: Vec<Ip>,
    }
    /// An address of a Pod or of its node.
    Ip {
        ip: Option<String>,
    }

    /// Fields of a Service that a control plane acts on. Read only from manifests, where there is no control plane.
    ServiceRequest {
        spec: Option<ServiceRequestSpec>,
    }
    /// The fields of `spec` that a control plane turns into addresses, nodePorts and slices.
    ServiceRequestSpec {
        selector: Option<BTreeMap<String, String>>,
        #[serde(deserialize_with = "list")]
        ports: Vec<PortRequest>,
        ip_family_policy: Option<String>,
        allocate_load_balancer_node_ports: Option<bool>,
        publish_not_ready_addresses: Option<bool>,
        traffic_distribution: Option<String>,
    }
    /// Port of a Pod that a port of a Service leads to.
    PortRequest {
        name: Option<String>,
        protocol: Option<String>,
        target_port: Option<TargetPort>,
    }
    /// Fields of a Pod that slices are made from, in addition to those of [`Pod`].
    PodDetails {
        spec: Option<PodDetailsSpec>,
        status: Option<PodDetailsStatus>,
    }
    /// The containers of a Pod.
    PodDetailsSpec {
        #[serde(deserialize_with = "list")]
        containers: Vec<Container>,
        #[serde(deserialize_with = "list")]
        init_containers: Vec<Container>,
    }
    /// A container.
    Container {
        restart_policy: Option<String>,
        #[serde(deserialize_with = "list")]
        ports: Vec<ContainerPort>,
    }
    /// A port of a container.
    ContainerPort {
        name: Option<String>,
        protocol: Option<String>,
        #[serde(deserialize_with = "integer")]
        container_port: Option<i32>,
    }
    /// The state of a Pod.
    PodDetailsStatus {
        #[serde(deserialize_with = "list")]
        conditions: Vec<Condition>,
    }
    /// A condition of a Pod.
    Condition {
        #[serde(rename = "type")]
        type_: Option<String>,
        status: Option<String>,
    }
    /// A Deployment, or an object of another kind that creates Pods from a template.
    Workload {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
        spec: Option<WorkloadSpec>,
    }
    /// Desired state of a workload.
    WorkloadSpec {
        template: Option<PodTemplate>,
    }
    /// Template of a workload's Pods.
    PodTemplate {
        #[serde(deserialize_with = "meta")]
        metadata: ObjectMeta,
    }

    /// Metadata that is read.
    Meta {
        namespace: Option<String>,
        name: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        labels: Option<Texts>,
        annotations: Option<Texts>,
    }
}

/// A port of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetPort {
    /// Number of the port.
    Number(i32),
    /// Name of the port in the Pod.
    Name(String),
}

impl<'de> Deserialize<'de> for TargetPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(name) => Ok(Self::Name(name)),
            number @ Value::Number(_) => {
                let number = integer(number).map_err(D::Error::custom)?;
                Ok(Self::Number(number.unwrap_or_default()))
            }
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
                Err(D::Error::custom("is neither a number nor a name"))
            }
        }
    }
}

/// A value of the expected type, or nothing. A value of any other type counts as absent.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Maybe<T> {
    /// Value of the expected type.
    Is(T),
    /// Value of another type.
    IsNot(IgnoredAny),
}

impl<T> Maybe<T> {
    fn get(self) -> Option<T> {
        match self {
            Self::Is(value) => Some(value),
            Self::IsNot(_) => None,
        }
    }
}

/// Labels or annotations.
type Texts = Maybe<BTreeMap<String, Maybe<String>>>;

fn texts(values: Option<Texts>) -> Option<BTreeMap<String, String>> {
    let values = values?.get()?.into_iter();
    Some(values.filter_map(|(key, value)| Some((key, value.get()?))).collect())
}

fn meta<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let meta = Option::<Meta>::deserialize(deserializer)?.unwrap_or_default();
    Ok(ObjectMeta {
        namespace: meta.namespace,
        name: meta.name,
        uid: meta.uid,
        resource_version: meta.resource_version,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        labels: texts(meta.labels),
        annotations: texts(meta.annotations),
        ..ObjectMeta::default()
    })
}

/// Deserializes a list and drops its nulls.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let values = Option::<Vec<Option<T>>>::deserialize(deserializer)?;
    Ok(values.into_iter().flatten().flatten().collect())
}

/// Deserializes a whole number, also if it is written as `80.0`. (A float of 64 bits holds every integer of 32 bits.)
fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i32>, D::Error> {
    let Some(number) = Option::<Number>::deserialize(deserializer)? else { return Ok(None) };
    let value = number.as_f64().unwrap_or(f64::NAN);
    #[expect(clippy::cast_possible_truncation, reason = "compared afterwards")]
    let whole = value as i32;
    let is_whole = f64::from(whole).total_cmp(&value).is_eq();
    if is_whole {
        Ok(Some(whole))
    } else {
        Err(D::Error::custom(format_args!("{number} is no whole number of 32 bits")))
    }
}
