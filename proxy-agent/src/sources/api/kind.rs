//! Kinds of objects that are watched, and their events.

use kube::Resource as _;

use super::follow::Event;
use super::received::Received;
use crate::sources::objects::{EndpointSlice, Node, Pod, Service, ServiceCidr};

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Services,
    EndpointSlices,
    Node,
    ServiceCidrs,
    Pods,
}

impl Kind {
    /// Returns resource and API group, as RBAC rules name them.
    pub(super) fn resource(self) -> (&'static str, &'static str) {
        match self {
            Self::Services => ("services", ""),
            Self::EndpointSlices => ("endpointslices", "discovery.k8s.io"),
            Self::Node => ("nodes", ""),
            Self::ServiceCidrs => ("servicecidrs", "networking.k8s.io"),
            Self::Pods => ("pods", ""),
        }
    }

    /// Returns whether the agent works without this kind. ServiceCIDRs, and the RBAC rules that allow reading them, are
    /// newer than the other kinds. The RBAC rules of kube-proxy do not allow reading Pods.
    pub(super) fn is_optional(self) -> bool {
        matches!(self, Self::ServiceCidrs | Self::Pods)
    }
}

/// An event of one of the watches.
pub(super) enum KindEvent {
    Service(Event<Received<Service>>),
    Slice(Event<Received<EndpointSlice>>),
    Node(Event<Received<Node>>),
    ServiceCidr(Event<Received<ServiceCidr>>),
    Pod(Event<Received<Pod>>),
}

impl KindEvent {
    /// Returns whether the event only confirms that nothing is missing.
    pub(super) fn is_mark(&self) -> bool {
        matches!(
            self,
            Self::Service(Event::UpToDate)
                | Self::Slice(Event::UpToDate)
                | Self::Node(Event::UpToDate)
                | Self::ServiceCidr(Event::UpToDate)
                | Self::Pod(Event::UpToDate)
        )
    }

    /// Returns `metadata.creationTimestamp` of an applied Service or slice in seconds since 1970, and `i64::MAX` for
    /// any other event.
    pub(super) fn created(&self) -> i64 {
        let time = match self {
            Self::Service(Event::Applied(received)) => received.meta().creation_timestamp.as_ref(),
            Self::Slice(Event::Applied(received)) => received.meta().creation_timestamp.as_ref(),
            Self::Service(_) | Self::Slice(_) | Self::Node(_) | Self::ServiceCidr(_) | Self::Pod(_) => None,
        };
        time.map_or(i64::MAX, |time| time.0.as_second())
    }
}
