//! The agent without a kernel: the work of `proxy_agent::agent` for each change of its source, on [`Simulator`]'s
//! maps and without waiting.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_agent::config::node_ports::{NodePortAddresses, local_addresses};
use proxy_agent::reconcile::cluster;
use proxy_agent::reconcile::cluster::{Change, Cluster, ObjectKey, Scope};
use proxy_agent::reconcile::desired::{Context, desired_service};
use proxy_agent::reconcile::model::Model;
use proxy_agent::reconcile::plan::{LeftAlone, NodeTables, Plan, Wanted, plan, plan_left, plan_node};
use proxy_agent::reconcile::sim::Simulator;
use proxy_agent::reconcile::store::{Capacity, Contents, MapStore as _, Op, filter_words};
use proxy_agent::sources::convert::Converter;
use proxy_agent::sources::objects::{EndpointSlice, Node, Service, ServiceCidr};
use proxy_common::abi;
use proxy_common::abi::{NetnsCookie, ServiceId};
use proxy_common::addr::{Addr, Prefix};
use proxy_common::datapath::lookup;
use proxy_common::datapath::tables::Tables as _;
use proxy_tests::cases::{Config, Dest, DetectLocal};
use serde_json::Value;

use super::clients::{HOST_NETNS, number_of};
use super::show;

/// The node under test, and its addresses.
const NODE: &str = "n1";
const ADDRESSES: [&str; 6] =
    ["192.0.2.10", "2001:db8:1::10", "198.51.100.10", "2001:db8:2::10", "127.0.0.1", "::1"];

/// Room for everything that a test has.
const CAPACITY: Capacity =
    Capacity { frontends: 2048, services: 1024, slots: 4096, backends: 2048, source_ranges: 64 };

/// Kind, namespace and name.
type Id = (String, String, String);

/// An agent that has been running since the first step of its case.
pub(crate) struct Agent {
    converter: Converter,
    objects: BTreeMap<Id, Vec<Change>>,
    cluster: Cluster,
    context: Context,
    node_ports: NodePortAddresses,
    model: Model,
    maps: Simulator,
    first: bool,
}

impl Agent {
    /// Starts the first agent of a node. `pods_in_packets`: whether it is attached to the interfaces of pods.
    pub(crate) fn new(config: &Config, pods_in_packets: bool) -> Result<Self> {
        Self::over(&Contents::default(), config, pods_in_packets)
    }

    /// Starts an agent that finds these maps.
    pub(crate) fn over(found: &Contents, config: &Config, pods_in_packets: bool) -> Result<Self> {
        let mut cluster_cidr = [None; 2];
        for text in &config.cluster_cidr {
            let cidr = prefix(text).with_context(|| format!("cluster CIDR {text}"))?;
            cluster_cidr[cidr.family().index()] = Some(cidr);
        }
        let node_ports = if config.node_port_addresses == ["primary"] {
            NodePortAddresses::Primary
        } else {
            NodePortAddresses::parse(&config.node_port_addresses)?
        };
        let addresses = ADDRESSES.iter().map(|text| Ok(text.parse::<IpAddr>()?.into()));
        let maps = Simulator::of(found, &filter_words(found));
        maps.host_netns.set(NetnsCookie(HOST_NETNS));
        let mut agent = Self {
            converter: Converter::new(NODE),
            objects: BTreeMap::new(),
            cluster: Cluster::default(),
            context: Context {
                node_name: Arc::from(NODE),
                cluster_cidr,
                host_addresses: addresses.collect::<Result<_>>()?,
                ignore_external_ips: !config.allow_external_ips,
                pods_by_interface: config.detect_local != DetectLocal::ClusterCidr,
                pods_in_packets,
                ..Context::default()
            },
            node_ports,
            model: Model::restore(CAPACITY, found),
            maps,
            first: true,
        };
        let known = LeftAlone { pods_in_packets: Some(pods_in_packets), ..LeftAlone::default() };
        let ops = plan_left(&mut agent.model, &known);
        agent.carry_out(&ops)?;
        Ok(agent)
    }

    /// Makes `objects` the whole state of the cluster: tells the cluster the difference from the state before, and
    /// programs what it affects. Returns the operations.
    pub(crate) fn take_in(&mut self, objects: &[Value]) -> Result<Vec<Op>> {
        let mut after = BTreeMap::new();
        for object in objects {
            let id = id(object);
            let changes = self.convert(object).with_context(|| format!("{id:?}"))?;
            ensure!(after.insert(id.clone(), changes).is_none(), "{id:?} is there twice");
        }
        let before = std::mem::replace(&mut self.objects, after);
        let mut node_changed = self.first;
        for change in difference(&before, &self.objects) {
            if self.cluster.apply(change) == Scope::Node {
                self.context.node = self.cluster.node().clone();
                node_changed = true;
            }
        }
        self.program(node_changed)
    }

    fn convert(&mut self, object: &Value) -> Result<Vec<Change>> {
        // Goes through text, like everything that a real agent reads.
        let text = serde_json::to_string(object)?;
        let change = match object["kind"].as_str() {
            Some("Service") => {
                let service: Service = serde_json::from_str(&text)?;
                self.converter.service(&service).map_err(refused)?.map(Change::Service)
            }
            Some("EndpointSlice") => {
                let slice: EndpointSlice = serde_json::from_str(&text)?;
                self.converter.slice(&slice).map_err(refused)?.map(Change::Slice)
            }
            Some("Node") => {
                let node: Node = serde_json::from_str(&text)?;
                self.converter.node(&node).map(Change::Node)
            }
            Some("ServiceCIDR") => {
                let cidr: ServiceCidr = serde_json::from_str(&text)?;
                let cidr = self.converter.service_cidr(&cidr).map_err(refused)?;
                Some(Change::ServiceCidr(cidr.name, cidr.prefixes))
            }
            other => bail!("kind {other:?}"),
        };
        Ok(change.into_iter().collect())
    }

    fn program(&mut self, node_changed: bool) -> Result<Vec<Op>> {
        let mut all = Vec::new();
        if self.first {
            self.cluster.touch_all();
        }
        let mut dirty = self.cluster.take_dirty();
        if node_changed {
            let host = &self.context.host_addresses;
            let wanted = NodeTables {
                addresses: local_addresses(&self.node_ports, &self.context.node.ips, host),
                service_cidrs: self.cluster.service_cidrs().collect(),
                pod_sources: self.context.cluster_cidr.iter().flatten().copied().collect(),
            };
            let (ops, concerned) = plan_node(&mut self.model, wanted);
            self.carry_out(&ops)?;
            all.extend(ops);
            dirty.extend(concerned);
        }
        let mut wanted: BTreeMap<ObjectKey, Option<Wanted>> =
            dirty.into_iter().map(|key| (key.clone(), self.wanted(&key))).collect();
        if self.first {
            // Services of an earlier run are named only by the maps.
            for port in self.model.ports.keys() {
                wanted.entry(port.service.clone()).or_insert(None);
            }
        }
        let Plan { ops, freed, refused, .. } = plan(&mut self.model, &wanted, self.first);
        ensure!(refused.is_empty(), "refused: {refused:?}");
        self.carry_out(&ops)?;
        // Nobody reads the maps meanwhile, so the grace period is over.
        self.model.release(freed);
        self.first = false;
        all.extend(ops);
        Ok(all)
    }

    fn wanted(&self, key: &ObjectKey) -> Option<Wanted> {
        let service = self.cluster.service(key)?;
        let desired = desired_service(service, self.cluster.slices(key), &self.context);
        Some(Wanted { created: service.created, desired })
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<()> {
        Ok(ops.iter().try_for_each(|op| self.maps.apply(op))?)
    }

    /// Returns the maps that have been programmed.
    pub(crate) fn maps(&self) -> &Simulator {
        &self.maps
    }

    /// Returns whether packets from `source`, which come from other machines, are near: from a pod, or from this
    /// host.
    pub(crate) fn is_near(&self, source: Addr) -> bool {
        let by_source = self.context.cluster_cidr[source.family().index()];
        let pods = by_source.filter(|_| !self.context.pods_by_interface);
        pods.is_some_and(|pods| pods.contains(source)) || self.context.host_addresses.contains(&source)
    }

    /// Returns whether packets of a pod of this node are near.
    pub(crate) fn is_near_pod(&self, source: Addr) -> bool {
        self.context.pods_by_interface || self.is_near(source)
    }

    /// Returns the Service port behind a frontend.
    pub(crate) fn service_behind(&self, dest: &Dest) -> Result<abi::Service> {
        let (addr, port) = (dest.addr.ip().into(), abi_port(dest));
        match lookup::find(&self.maps, &addr, port, number_of(dest)) {
            lookup::Target::Frontend(frontend) => {
                self.maps.service(frontend.service).context("no such Service port")
            }
            none @ (lookup::Target::UnusedPort
            | lookup::Target::InactiveAddress
            | lookup::Target::Other
            | lookup::Target::Retry) => bail!("{} is {none:?}", show(dest)),
        }
    }

    /// Returns the Service object that has the Service port `id`.
    pub(crate) fn object_of(&self, id: ServiceId) -> Option<&cluster::Service> {
        let (key, _) = self.model.ports.iter().find(|(_, port)| port.id == id)?;
        self.cluster.service(&key.service)
    }

    /// Lets time pass.
    pub(crate) fn pass(&self, time: Duration) {
        let clock = &self.maps.clock;
        clock.set(clock.get() + u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Returns a destination's port in the form of the maps.
pub(crate) fn abi_port(dest: &Dest) -> proxy_common::be::Be16 {
    proxy_common::be::Be16::new(dest.addr.port())
}

fn refused(problem: proxy_agent::sources::Problem) -> anyhow::Error {
    anyhow::anyhow!("{}", problem.reason)
}

fn id(object: &Value) -> Id {
    let pointers = ["/kind", "/metadata/namespace", "/metadata/name"];
    pointers
        .map(|pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned())
        .into()
}

/// Returns the changes that turn `before` into `after`, object by object.
fn difference(before: &BTreeMap<Id, Vec<Change>>, after: &BTreeMap<Id, Vec<Change>>) -> Vec<Change> {
    let no_changes = Vec::new();
    let mut changes = Vec::new();
    for (id, was) in before {
        let is = after.get(id).unwrap_or(&no_changes);
        let kept: Vec<Change> = is.iter().filter_map(Change::gone).collect();
        changes.extend(was.iter().filter_map(Change::gone).filter(|gone| !kept.contains(gone)));
    }
    for (id, is) in after {
        let was = before.get(id).unwrap_or(&no_changes);
        changes.extend(is.iter().filter(|change| !was.contains(change)).cloned());
    }
    changes
}

fn prefix(text: &str) -> Option<Prefix> {
    let (addr, len) = text.split_once('/')?;
    Prefix::new(addr.parse::<IpAddr>().ok()?.into(), len.parse().ok()?)
}
