//! Knowledge of the cluster and the node, and what follows from it for the maps.
//!
//! The agent writes it as news come in; the agent and `proxy-agent verify` read it.

use std::collections::BTreeSet;
use std::sync::Arc;

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family, Prefix};

use crate::config::Config;
use crate::config::node_ports::{NodePortAddresses, local_addresses};
use crate::host::HostAddresses;
use crate::observe::health::checks::{Check, check};
use crate::reconcile::cluster::{Cluster, ObjectKey, Slice};
use crate::reconcile::desired::{Context, desired_service};
use crate::reconcile::model::Model;
use crate::reconcile::node_ips::NodeIps;
use crate::reconcile::plan::{NodeTables, Wanted, plan_node};
use crate::reconcile::store::Op;

/// The objects, and the facts on which decisions about them depend.
#[derive(Debug)]
pub(crate) struct Knowledge {
    /// Objects as the source has told them.
    pub(crate) cluster: Cluster,
    /// The facts of this node.
    pub(crate) context: Context,
    /// The addresses of this host, with the device of each.
    addresses: HostAddresses,
    /// The Node's podCIDRs by which pods are recognized, if they are.
    pod_cidrs: Option<Vec<Prefix>>,
}

impl Knowledge {
    /// Makes the knowledge that the configuration gives.
    pub(crate) fn new(config: &Config) -> Self {
        let context = Context {
            node_name: Arc::clone(&config.node_name),
            cluster_cidr: config.cluster_cidr,
            pods_by_interface: config.devices.settings.detect_local.by_interface(),
            ignore_external_ips: !config.allow_external_ips,
            protect_node_addresses: config.protect_node_addresses,
            budget: config.budgets.service,
            // Assumed until the devices have been looked at, so that no problem is reported too early.
            pods_in_packets: !config.devices.settings.pods.is_none(),
            ..Context::default()
        };
        Self { cluster: Cluster::default(), context, addresses: HostAddresses::new(), pod_cidrs: None }
    }

    /// Takes the Node and the ServiceCIDRs as the source has them.
    pub(crate) fn take_node(&mut self, config: &Config) -> NodeIps {
        self.context.service_cidrs = self.cluster.service_cidrs().collect();
        self.context.node = self.cluster.node().clone();
        let ips = NodeIps::derive(&self.context.node, config.bind_address);
        self.context.node.ips = ips.known();
        ips
    }

    /// Recognizes pods by the Node's podCIDRs from here on. Returns false if none of them is of a family that this host
    /// has.
    pub(crate) fn take_pod_cidrs(&mut self, families: &[Family]) -> bool {
        self.pod_cidrs = Some(self.cluster.node().pod_cidrs.clone());
        for &family in families {
            let mut cidrs = self.cluster.node().pod_cidrs.iter();
            self.context.cluster_cidr[family.index()] = cidrs.find(|cidr| cidr.family() == family).copied();
        }
        self.context.cluster_cidr != [None, None]
    }

    /// Returns the podCIDRs by which pods are recognized, and those that the Node has now, if these are others.
    pub(crate) fn other_pod_cidrs(&self) -> Option<(&[Prefix], &[Prefix])> {
        let (before, now) = (self.pod_cidrs.as_ref()?, &self.cluster.node().pod_cidrs);
        (before != now).then_some((before, now))
    }

    /// Takes the addresses of this host.
    pub(crate) fn take_addresses(&mut self, addresses: &HostAddresses) {
        let before = std::mem::replace(&mut self.addresses, addresses.clone());
        self.context.host_addresses = addresses.keys().copied().collect();
        self.cluster.touch_with_source_ranges();
        let all = before.keys().chain(addresses.keys());
        let differ = all.filter(|addr| before.get(addr) != addresses.get(addr));
        self.cluster.touch_at(&differ.copied().collect());
    }

    /// Returns the clusterIPs of a Service that are also addresses of this host, with their devices.
    pub(crate) fn held_by_host(&self, key: &ObjectKey) -> Vec<(Addr, IfIndex)> {
        let addrs = self.cluster.service(key).into_iter().flat_map(|service| service.cluster_ips);
        addrs.flatten().filter_map(|addr| Some((addr, *self.addresses.get(&addr)?))).collect()
    }

    /// Returns the check for load balancers of a Service in a family, if it has one.
    pub(crate) fn check(&self, key: &ObjectKey, family: Family) -> Option<Check> {
        check(self.cluster.service(key)?, self.cluster.slices(key), family)
    }

    /// Returns the wanted state of a Service; `None` when it is gone.
    pub(crate) fn wanted(&self, key: &ObjectKey) -> Option<Wanted> {
        let service = self.cluster.service(key)?;
        let desired = desired_service(service, self.cluster.slices(key), &self.context);
        Some(Wanted { created: service.created, desired })
    }

    /// Returns a function that computes the same from what is known now, on any thread.
    pub(crate) fn work_out(&self, key: &ObjectKey) -> impl FnOnce() -> Option<Wanted> + Send + use<> {
        let service = self.cluster.service(key).cloned();
        let slices: Vec<Slice> = self.cluster.slices(key).cloned().collect();
        let context = self.context.clone();
        move || {
            let service = service?;
            let desired = desired_service(&service, slices.iter(), &context);
            Some(Wanted { created: service.created, desired })
        }
    }

    /// Plans the node's own tables.
    pub(crate) fn plan_node(&self, node_ports: &NodePortAddresses, model: &mut Model) -> NodePlan {
        let host = &self.context.host_addresses;
        let by_source = !self.context.pods_by_interface;
        let mut tables = NodeTables {
            addresses: local_addresses(node_ports, &self.context.node.ips, host),
            service_cidrs: self.cluster.service_cidrs().collect(),
            pod_sources: self.context.cluster_cidr.iter().flatten().filter(|_| by_source).copied().collect(),
        };
        let problems = tables.fit();
        let (ops, concerned) = plan_node(model, tables);
        NodePlan { ops, concerned, problems }
    }
}

/// Plan of the node's own tables.
#[derive(Debug)]
pub(crate) struct NodePlan {
    /// Operations, to be carried out from first to last.
    pub(crate) ops: Vec<Op>,
    /// Services that have to be planned again.
    pub(crate) concerned: BTreeSet<ObjectKey>,
    /// Problems of what there is no room for.
    pub(crate) problems: Vec<String>,
}
