//! Facts about the node and its configuration.

use std::collections::BTreeSet;
use std::sync::Arc;

use proxy_common::addr::{Addr, Prefix};

use super::budget::Budget;
use crate::reconcile::cluster::Node;

/// Facts about this node and its configuration that endpoint selection and frontends depend on.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// This node's name, lower case.
    pub node_name: Arc<str>,
    /// This node, as its Node object describes it.
    pub node: Node,
    /// detect-local by source: the pod CIDR of each family, `None` if detect-local is not implemented.
    pub cluster_cidr: [Option<Prefix>; 2],
    /// detect-local by interface: pods are recognized in both families, whatever `cluster_cidr` says.
    pub pods_by_interface: bool,
    /// Every address of this host, loopback included.
    pub host_addresses: BTreeSet<Addr>,
    /// Prefixes from which clusterIPs are allocated.
    pub service_cidrs: Vec<Prefix>,
    /// The feature gate `AllowServiceExternalIPs` is off: externalIPs are no frontends.
    pub ignore_external_ips: bool,
    /// externalIPs and load-balancer addresses that are addresses of this host are no frontends.
    pub protect_node_addresses: bool,
    /// The packet edge judges the packets of pods whose sockets cannot be given the verdict.
    pub pods_in_packets: bool,
    /// Limits for one Service.
    pub budget: Budget,
}
