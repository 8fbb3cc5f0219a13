//! Parsed output of `proxy-agent services -o json`.

use std::net::SocketAddr;

use serde::Deserialize;

/// A Service port in one family.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortView {
    /// Namespace.
    pub namespace: String,
    /// Service name.
    pub name: String,
    /// Port name; empty when unnamed.
    pub port: String,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// Index into `SERVICES`.
    pub id: u32,
    /// Addresses and ports of the Service port.
    pub frontends: Vec<FrontendView>,
    /// Endpoints of the cluster set, in order.
    pub cluster: Vec<SocketAddr>,
    /// Endpoints of the local set, in order.
    pub local: Vec<SocketAddr>,
    /// Session affinity timeout; 0 for none.
    pub affinity_seconds: u32,
}

/// A frontend.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FrontendView {
    /// `ADDRESS:PORT/PROTOCOL`, or `nodePort PORT/PROTOCOL (FAMILY)`.
    pub name: String,
    /// Names of the flags.
    pub flags: Vec<String>,
}

impl PortView {
    /// Returns `namespace/name`.
    pub fn service(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Returns the names of the frontends.
    pub fn frontend_names(&self) -> Vec<&str> {
        self.frontends.iter().map(|frontend| frontend.name.as_str()).collect()
    }
}
