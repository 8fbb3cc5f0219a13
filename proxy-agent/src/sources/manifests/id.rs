//! Kinds of manifests, and the names of objects.

use std::fmt;

use crate::reconcile::cluster::ObjectKey;

/// The namespace of an object that names none.
pub(super) const DEFAULT_NAMESPACE: &str = "default";

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
    Node,
    ServiceCidr,
    Pod,
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    ReplicationController,
}

impl Kind {
    pub(super) const ALL: [Self; 11] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Endpoints,
        Self::Node,
        Self::ServiceCidr,
        Self::Pod,
        Self::Deployment,
        Self::ReplicaSet,
        Self::StatefulSet,
        Self::DaemonSet,
        Self::ReplicationController,
    ];
    /// The kinds that create Pods from a template.
    pub(super) const WORKLOADS: [Self; 5] =
        [Self::Deployment, Self::ReplicaSet, Self::StatefulSet, Self::DaemonSet, Self::ReplicationController];

    /// Returns `kind`, API group and version.
    pub(super) fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Service => ("Service", "", "v1"),
            Self::EndpointSlice => ("EndpointSlice", "discovery.k8s.io/", "v1"),
            Self::Endpoints => ("Endpoints", "", "v1"),
            Self::Node => ("Node", "", "v1"),
            Self::ServiceCidr => ("ServiceCIDR", "networking.k8s.io/", "v1"),
            Self::Pod => ("Pod", "", "v1"),
            Self::Deployment => ("Deployment", "apps/", "v1"),
            Self::ReplicaSet => ("ReplicaSet", "apps/", "v1"),
            Self::StatefulSet => ("StatefulSet", "apps/", "v1"),
            Self::DaemonSet => ("DaemonSet", "apps/", "v1"),
            Self::ReplicationController => ("ReplicationController", "", "v1"),
        }
    }

    /// Returns the value of the field `kind`.
    pub(super) fn name(self) -> &'static str {
        self.names().0
    }

    pub(super) fn is_namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::ServiceCidr)
    }
}

/// Identity of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id {
    pub(super) kind: Kind,
    /// Namespace and name; the namespace is empty for kinds without namespaces.
    pub(super) key: ObjectKey,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        if self.kind.is_namespaced() {
            write!(f, "{kind} {}", self.key)
        } else {
            write!(f, "{kind} {}", self.key.name)
        }
    }
}
