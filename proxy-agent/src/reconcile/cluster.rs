//! State of the cluster as the API reports it, reduced to what a service proxy needs.
//!
//! Plain data: the sources ([`crate::sources`]) write it by [`Change`]s, [`crate::reconcile::desired`] reads it.
//! Nothing here does I/O. Nothing is kept that no decision reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use proxy_common::addr::{Addr, Family, Prefix};

/// Namespace and name of a namespaced object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Namespace.
    pub(crate) namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// Builds the key from namespace and name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `spec.type`, as far as it matters: it decides ExternalName, and whether a policy has a meaning (semantics).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServiceType {
    /// Reachable inside the cluster only (unless it has externalIPs).
    ClusterIp,
    /// Reachable on a port of every node, too.
    NodePort,
    /// Reachable on the addresses of a load balancer, too.
    LoadBalancer,
    /// A DNS alias: nothing to proxy.
    ExternalName,
}

/// `internalTrafficPolicy` or `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TrafficPolicy {
    /// Endpoints of the whole cluster.
    #[default]
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// One entry of `spec.ports[]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty when unnamed.
    pub(crate) name: Arc<str>,
    /// IP protocol number ([`proxy_common::abi::proto`]).
    pub(crate) proto: u8,
    /// The port of clusterIP, externalIPs and load-balancer addresses.
    pub port: u16,
    /// nodePort; 0 for none.
    pub(crate) node_port: u16,
}

/// A Service to proxy. Sources also deliver Services in which [`crate::reconcile::desired`] finds nothing to proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.creationTimestamp` in seconds since 1970; `i64::MAX` when absent (manifests). The older Service wins
    /// a frontend that two Services claim.
    pub created: i64,
    /// `spec.type`.
    pub(crate) service_type: ServiceType,
    /// The clusterIP of each family (index: [`Family::index`]), resolved from `ipFamilies`, `clusterIPs` and
    /// `clusterIP`. If both are `None`, the Service is headless or has no clusterIP yet, and is not proxied.
    pub(crate) cluster_ips: [Option<Addr>; 2],
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.externalIPs`, both families.
    pub(crate) external_ips: Vec<Addr>,
    /// `status.loadBalancer.ingress[].ip` where `ipMode` is not `Proxy`, both families.
    pub(crate) load_balancer_ips: Vec<Addr>,
    /// `spec.internalTrafficPolicy`.
    pub(crate) internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub(crate) external_policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP` timeout in seconds; `None` without affinity.
    pub(crate) affinity_seconds: Option<u32>,
    /// `spec.loadBalancerSourceRanges`, both families, the valid ones.
    pub source_ranges: Vec<Prefix>,
    /// `spec.healthCheckNodePort`; 0 for none.
    pub(crate) health_check_node_port: u16,
    /// Errors in the object, one for each field. The bad fields were skipped, the rest is served.
    pub(crate) problems: Vec<String>,
}

/// One usable entry of a slice's `ports[]`: it has a name (maybe empty) and a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlicePort {
    /// Name; matches [`ServicePort::name`].
    pub(crate) name: Arc<str>,
    /// IP protocol number.
    pub(crate) proto: u8,
    /// Port number on the endpoint.
    pub(crate) port: u16,
}

/// Topology hints of an endpoint that is hinted.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hints {
    /// `hints.forZones[].name`.
    pub(crate) zones: Vec<Arc<str>>,
    /// `hints.forNodes[].name`.
    pub(crate) nodes: Vec<Arc<str>>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub(crate) addr: Addr,
    /// `conditions.ready`; nil counts as true.
    pub(crate) ready: bool,
    /// `conditions.serving`; nil counts as true.
    pub(crate) serving: bool,
    /// `conditions.terminating`; nil counts as false.
    pub(crate) terminating: bool,
    /// Whether `nodeName` is this node's name.
    pub local: bool,
    /// Topology hints; `None` when the endpoint has none. Equal hints are shared between slices.
    pub(crate) hints: Option<Arc<Hints>>,
}

/// An EndpointSlice (or the older Endpoints object, split by address family).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Namespace and name of the slice.
    pub key: ObjectKey,
    /// The Service that the slice belongs to (label `kubernetes.io/service-name`, same namespace).
    pub(crate) service: ObjectKey,
    /// `addressType`.
    pub(crate) family: Family,
    /// Usable ports.
    pub(crate) ports: Vec<SlicePort>,
    /// Usable endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, nanoseconds since 1970.
    pub(crate) trigger_time: Option<i64>,
    /// Errors in the object, one for each field.
    pub(crate) problems: Vec<String>,
}

/// This node, as its Node object describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Label `topology.kubernetes.io/zone`; `None` when absent or empty.
    pub zone: Option<Arc<str>>,
    /// The node's IP of each family (index: [`Family::index`]): InternalIPs before ExternalIPs.
    pub ips: [Option<Addr>; 2],
    /// The family of the first address, which is the node's primary family.
    pub(crate) primary: Option<Family>,
    /// `spec.podCIDRs`, the valid ones.
    pub(crate) pod_cidrs: Vec<Prefix>,
    /// Load balancers must not send traffic to this node: the Node is being deleted, or the cluster autoscaler is
    /// about to delete it (taint `ToBeDeletedByClusterAutoscaler`).
    pub(crate) leaving: bool,
}

/// A Pod of this node whose sockets the socket edge leaves alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub key: ObjectKey,
    /// The uid that names the Pod's cgroup. For a static Pod it differs from the uid of its mirror Pod.
    pub(crate) uid: Arc<str>,
    /// `spec.hostNetwork`.
    pub(crate) host_network: bool,
}

/// One change that a source delivers. A deletion carries the key of the deleted object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service appeared or changed.
    Service(Service),
    /// A Service is gone, or is no longer for this proxy.
    ServiceGone(ObjectKey),
    /// A slice appeared or changed.
    Slice(Slice),
    /// A slice is gone, or is no longer for this proxy.
    SliceGone(ObjectKey),
    /// This node's object appeared or changed. (There is no deletion: the last state stays.)
    Node(Node),
    /// A ServiceCIDR appeared or changed.
    ServiceCidr(Arc<str>, Vec<Prefix>),
    /// A ServiceCIDR is gone.
    ServiceCidrGone(Arc<str>),
    /// A Pod that opts out of the socket edge appeared or changed.
    Pod(Pod),
    /// A Pod is gone, or does not opt out any more.
    PodGone(ObjectKey),
}

impl Change {
    /// Returns the change that deletes the object of this change; `None` for a node, which is never deleted, and for
    /// deletions.
    pub fn gone(&self) -> Option<Self> {
        match self {
            Self::Service(service) => Some(Self::ServiceGone(service.key.clone())),
            Self::Slice(slice) => Some(Self::SliceGone(slice.key.clone())),
            Self::ServiceCidr(name, _) => Some(Self::ServiceCidrGone(Arc::clone(name))),
            Self::Pod(pod) => Some(Self::PodGone(pod.key.clone())),
            Self::Node(_)
            | Self::ServiceGone(_)
            | Self::SliceGone(_)
            | Self::ServiceCidrGone(_)
            | Self::PodGone(_) => None,
        }
    }
}

/// Part of the state that a [`Cluster::apply`] changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Nothing that a decision reads.
    Nothing,
    /// One Service, already noted for [`Cluster::take_dirty`].
    Service,
    /// Node or ServiceCIDRs.
    Node,
    /// Pods that opt out.
    Pods,
}

/// The whole known state, and the Services that have changed since the last [`Cluster::take_dirty`].
#[derive(Debug, Default)]
pub struct Cluster {
    services: BTreeMap<ObjectKey, Service>,
    /// Slices of each Service, by name. A Service has one or two: a map of them would take ten times the memory.
    slices: BTreeMap<ObjectKey, Vec<Slice>>,
    owner: BTreeMap<ObjectKey, ObjectKey>,
    node: Node,
    service_cidrs: BTreeMap<Arc<str>, Vec<Prefix>>,
    pods: BTreeMap<ObjectKey, Pod>,
    dirty: BTreeSet<ObjectKey>,
}

impl Cluster {
    /// Applies one change. Redelivery of an equal object changes nothing.
    pub fn apply(&mut self, change: Change) -> Scope {
        match change {
            Change::Service(service) => {
                if self.services.get(&service.key) == Some(&service) {
                    return Scope::Nothing;
                }
                self.dirty.insert(service.key.clone());
                self.services.insert(service.key.clone(), service);
                Scope::Service
            }
            Change::ServiceGone(key) => {
                if self.services.remove(&key).is_none() {
                    return Scope::Nothing;
                }
                self.dirty.insert(key);
                Scope::Service
            }
            Change::Slice(slice) => self.put_slice(slice),
            Change::SliceGone(key) => self.drop_slice(&key),
            Change::Node(node) => {
                if self.node == node {
                    return Scope::Nothing;
                }
                // Endpoint selection reads the zone, source ranges read the addresses.
                if self.node.zone != node.zone {
                    self.touch_all();
                }
                if self.node.ips != node.ips {
                    self.touch_with_source_ranges();
                }
                self.node = node;
                Scope::Node
            }
            Change::ServiceCidr(name, prefixes) => {
                if self.service_cidrs.get(&name) == Some(&prefixes) {
                    return Scope::Nothing;
                }
                self.service_cidrs.insert(name, prefixes);
                self.touch_with_external_ips();
                Scope::Node
            }
            Change::ServiceCidrGone(name) => match self.service_cidrs.remove(&name) {
                Some(_) => {
                    self.touch_with_external_ips();
                    Scope::Node
                }
                None => Scope::Nothing,
            },
            Change::Pod(pod) => match self.pods.insert(pod.key.clone(), pod.clone()) {
                Some(before) if before == pod => Scope::Nothing,
                _ => Scope::Pods,
            },
            Change::PodGone(key) => match self.pods.remove(&key) {
                Some(_) => Scope::Pods,
                None => Scope::Nothing,
            },
        }
    }

    fn put_slice(&mut self, slice: Slice) -> Scope {
        let (key, owner) = (slice.key.clone(), slice.service.clone());
        let of_service = self.slices.entry(owner.clone()).or_default();
        match of_service.binary_search_by(|other| other.key.name.cmp(&key.name)) {
            Ok(place) if of_service[place] == slice => return Scope::Nothing,
            Ok(place) => of_service[place] = slice,
            Err(place) => {
                of_service.reserve_exact(1);
                of_service.insert(place, slice);
            }
        }
        self.dirty.insert(owner.clone());
        if let Some(before) = self.owner.insert(key.clone(), owner.clone())
            && before != owner
        {
            self.forget(&key, &before);
        }
        Scope::Service
    }

    fn drop_slice(&mut self, key: &ObjectKey) -> Scope {
        let Some(owner) = self.owner.remove(key) else { return Scope::Nothing };
        self.forget(key, &owner);
        Scope::Service
    }

    fn forget(&mut self, slice: &ObjectKey, owner: &ObjectKey) {
        if let Some(of_service) = self.slices.get_mut(owner) {
            of_service.retain(|other| other.key.name != slice.name);
            if of_service.is_empty() {
                self.slices.remove(owner);
            }
        }
        self.dirty.insert(owner.clone());
    }

    /// Marks every Service as changed.
    pub fn touch_all(&mut self) {
        self.dirty.extend(self.services.keys().cloned());
    }

    /// Marks every Service that has source ranges: whether they contain this host depends on its addresses.
    pub(crate) fn touch_with_source_ranges(&mut self) {
        let ranged = self.services.values().filter(|service| !service.source_ranges.is_empty());
        self.dirty.extend(ranged.map(|service| service.key.clone()));
    }

    /// Marks every Service that has one of these addresses: its problems depend on whether this host has the address,
    /// too.
    pub(crate) fn touch_at(&mut self, addresses: &BTreeSet<Addr>) {
        if addresses.is_empty() {
            return;
        }
        let concerned = self.services.values().filter(|service| {
            let from_outside = service.external_ips.iter().chain(&service.load_balancer_ips);
            service.cluster_ips.iter().flatten().chain(from_outside).any(|addr| addresses.contains(addr))
        });
        self.dirty.extend(concerned.map(|service| service.key.clone()));
    }

    /// Marks every Service that has externalIPs: whether they are served depends on the ServiceCIDRs.
    fn touch_with_external_ips(&mut self) {
        let external = self.services.values().filter(|service| !service.external_ips.is_empty());
        self.dirty.extend(external.map(|service| service.key.clone()));
    }

    /// Returns the Services that changed or were deleted, or whose endpoints changed, since the last call.
    pub fn take_dirty(&mut self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut self.dirty)
    }

    /// Returns a Service by its key.
    pub fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// Returns all Services, by key.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// Returns a quick upper estimate of the cost to program a Service: its frontends, endpoints and source ranges.
    pub(crate) fn weight(&self, key: &ObjectKey) -> usize {
        let endpoints = self.slices(key).map(|slice| slice.ports.len() * slice.endpoints.len());
        let of_service = self.service(key).map_or(0, |service| {
            let addresses = 4 + service.external_ips.len() + service.load_balancer_ips.len();
            service.ports.len() * (addresses + service.source_ranges.len())
        });
        of_service + endpoints.sum::<usize>()
    }

    /// Returns the slices of a Service, by name.
    pub fn slices(&self, service: &ObjectKey) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(service).into_iter().flatten()
    }

    /// Returns this node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns the Pods of this node that opt out of the socket edge, by key.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> + Clone {
        self.pods.values()
    }

    /// Returns every ServiceCIDR prefix.
    pub fn service_cidrs(&self) -> impl Iterator<Item = Prefix> {
        self.service_cidrs.values().flatten().copied()
    }
}
