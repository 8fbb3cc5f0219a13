//! The resources that the server knows, and the verbs that it counts.

use std::fmt;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// A resource of the API. All of them are served at version `v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// core/v1 `services`.
    Services,
    /// discovery.k8s.io/v1 `endpointslices`.
    EndpointSlices,
    /// core/v1 `nodes`.
    Nodes,
    /// networking.k8s.io/v1 `servicecidrs`.
    ServiceCidrs,
    /// core/v1 `pods`.
    Pods,
    /// core/v1 `endpoints`.
    Endpoints,
    /// core/v1 `namespaces`.
    Namespaces,
    /// core/v1 `events`.
    CoreEvents,
    /// events.k8s.io/v1 `events`.
    Events,
}

impl Resource {
    /// Every resource.
    pub const ALL: [Self; 9] = [
        Self::Services,
        Self::EndpointSlices,
        Self::Nodes,
        Self::ServiceCidrs,
        Self::Pods,
        Self::Endpoints,
        Self::Namespaces,
        Self::CoreEvents,
        Self::Events,
    ];

    /// Returns the API group; empty for the core group.
    pub fn group(self) -> &'static str {
        self.describe().0
    }

    /// Returns the plural name in URLs.
    pub fn plural(self) -> &'static str {
        self.describe().1
    }

    /// Returns the kind in objects.
    pub fn kind(self) -> &'static str {
        self.describe().2
    }

    /// Returns whether the resource's objects live in namespaces.
    pub fn namespaced(self) -> bool {
        !matches!(self, Self::Nodes | Self::ServiceCidrs | Self::Namespaces)
    }

    /// Returns `apiVersion` of the resource's objects.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => "v1".to_owned(),
            group => format!("{group}/v1"),
        }
    }

    /// Returns whether the resource has the subresource `status`, which writes to the object itself do not change.
    pub fn has_status(self) -> bool {
        matches!(self, Self::Services | Self::Nodes | Self::ServiceCidrs | Self::Pods | Self::Namespaces)
    }

    /// Returns whether a field selector of the resource can use `key`.
    pub fn has_field(self, key: &str) -> bool {
        match key {
            "metadata.name" => true,
            "metadata.namespace" => self.namespaced(),
            "spec.clusterIP" | "spec.type" => self == Self::Services,
            "spec.nodeName" | "status.phase" | "status.podIP" => self == Self::Pods,
            _ => false,
        }
    }

    /// Finds the resource of a URL path.
    pub fn find(group: &str, plural: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.group() == group && resource.plural() == plural)
    }

    /// Returns the resource of an object, by its `apiVersion` and `kind`.
    ///
    /// # Errors
    /// If either is missing or not served.
    pub fn of(object: &Value) -> Result<Self> {
        let kind = object["kind"].as_str().context("the object has no kind")?;
        let api_version = object["apiVersion"].as_str().context("the object has no apiVersion")?;
        match Self::ALL.into_iter().find(|r| r.kind() == kind && r.api_version() == api_version) {
            Some(resource) => Ok(resource),
            None => bail!("{api_version} {kind} is not served by the test API server"),
        }
    }

    fn describe(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Services => ("", "services", "Service"),
            Self::EndpointSlices => ("discovery.k8s.io", "endpointslices", "EndpointSlice"),
            Self::Nodes => ("", "nodes", "Node"),
            Self::ServiceCidrs => ("networking.k8s.io", "servicecidrs", "ServiceCIDR"),
            Self::Pods => ("", "pods", "Pod"),
            Self::Endpoints => ("", "endpoints", "Endpoints"),
            Self::Namespaces => ("", "namespaces", "Namespace"),
            Self::CoreEvents => ("", "events", "Event"),
            Self::Events => ("events.k8s.io", "events", "Event"),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.group() {
            "" => f.write_str(self.plural()),
            group => write!(f, "{}.{group}", self.plural()),
        }
    }
}

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// GET of one object.
    Get,
    /// GET of a collection; each page counts.
    List,
    /// GET of a collection with `watch=true`.
    Watch,
    /// POST.
    Create,
    /// PUT.
    Update,
    /// PATCH.
    Patch,
    /// DELETE of one object.
    Delete,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 7] =
        [Self::Get, Self::List, Self::Watch, Self::Create, Self::Update, Self::Patch, Self::Delete];

    /// Returns the verb's name in RBAC rules.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
        }
    }
}

/// A request that reached the server, for assertions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Requested operation.
    pub verb: Verb,
    /// Resource that the request names.
    pub resource: Resource,
    /// Path of the URL.
    pub path: String,
    /// Query of the URL, percent-encoded; empty for none.
    pub query: String,
    /// Time at which the request was read.
    pub at: Instant,
}

impl Request {
    /// Returns whether the request asks for a list: its first page, or a watch that begins with it.
    pub fn is_list(&self) -> bool {
        match self.verb {
            Verb::List => !self.query.contains("continue="),
            Verb::Watch => self.query.contains("sendInitialEvents=true"),
            Verb::Get | Verb::Create | Verb::Update | Verb::Patch | Verb::Delete => false,
        }
    }
}
