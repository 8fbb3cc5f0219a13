//! An Event before it is written.

use crate::observe::http::HttpError;
use crate::reconcile::cluster::ObjectKey;

/// Object that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Regarding {
    /// This node.
    Node,
    /// A Service.
    Service(ObjectKey),
}

/// An Event that a user should see.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Event {
    pub(super) regarding: Regarding,
    pub(super) warning: bool,
    pub(super) reason: &'static str,
    pub(super) action: &'static str,
    pub(super) note: String,
}

impl Event {
    /// Returns the Event of an agent that starts.
    pub(crate) fn starting() -> Self {
        let note = concat!("proxy-agent ", env!("CARGO_PKG_VERSION")).to_owned();
        Self { regarding: Regarding::Node, warning: false, reason: "Starting", action: "Start", note }
    }

    /// Returns the Event of an agent that ends because one of its servers cannot serve. (The reason for the health
    /// server is kube-proxy's.)
    pub(crate) fn cannot_serve(error: &HttpError) -> Self {
        let reason = match error.server() {
            crate::observe::health::SERVER => "FailedToStartProxierHealthcheck",
            _ => "FailedToStartMetricsServer",
        };
        Self { regarding: Regarding::Node, warning: true, reason, action: "Start", note: error.to_string() }
    }

    /// Returns the Event of a port for load balancers' health checks that cannot be opened.
    pub(crate) fn check_port_failed(service: ObjectKey, note: String) -> Self {
        Self::about(service, "FailedToStartServiceHealthcheck", "Listen", note)
    }

    /// Returns the Event of a Service that cannot be served as it, or one of its slices, is written.
    pub(crate) fn problem(service: ObjectKey, note: String) -> Self {
        Self::about(service, "ServiceProblem", "Program", note)
    }

    fn about(service: ObjectKey, reason: &'static str, action: &'static str, note: String) -> Self {
        let regarding = Regarding::Service(service);
        Self { regarding, warning: true, reason, action, note }
    }
}
