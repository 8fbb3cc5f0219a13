//! News that the agent takes in: changes of the cluster, of the node's addresses, of its devices, and of pods that opt
//! out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::extent::Extent;
use super::phase::Phase;
use super::{Agent, AgentError};
use crate::agent::first_wait::Patience;
use crate::agent::telemetry::Arrival;
use crate::config::Source;
use crate::config::devices::DetectLocal;
use crate::devices;
use crate::devices::Edge;
use crate::host::cgroups::{PODS_MAX, Place};
use crate::host::process::give_back_memory;
use crate::reconcile::cluster::{Change, Scope};
use crate::sources::Update;

/// Beginning of the problem of a pod whose sockets are served all the same, and the reason why no pod can opt out.
const CANNOT: &str = "cannot opt out of the socket edge";
const NOBODY_JUDGES: &str =
    "no interface of a pod is attached (--pod-interfaces), so nobody would serve its packets";

impl Agent {
    pub(super) fn take_in(&mut self, update: Update) {
        match update {
            Update::Changes(changes) => {
                for change in changes {
                    self.take_change(change);
                }
            }
            Update::Synced => {
                self.phase = Phase::AwaitingNode(Patience {
                    since: Instant::now(),
                    ips: matches!(self.config.source, Source::Kubernetes { .. }),
                    pod_cidrs: self.config.devices.settings.detect_local == DetectLocal::NodeCidr,
                });
                // Without a cluster there need not be a Node: this node then counts as eligible.
                if matches!(self.config.source, Source::Manifests(_)) && !self.known.cluster.node().leaving {
                    self.health.node(true);
                }
                self.take_addresses();
                self.take_opt_out();
            }
            Update::Problems(problems) => self.report.source(problems),
        }
    }

    pub(super) fn take_change(&mut self, change: Change) {
        if let Change::Node(node) = &change {
            self.health.node(!node.leaving);
        }
        let arrival = Arrival::of(&change);
        let scope = self.known.cluster.apply(change);
        self.telemetry.arrived(arrival, scope, self.phase == Phase::Listing);
        match scope {
            Scope::Nothing => return,
            Scope::Service => {}
            Scope::Node => self.take_node(),
            Scope::Pods => return self.take_opt_out(),
        }
        for &family in &self.config.families {
            self.health.queued(family);
        }
    }

    pub(super) fn take_node(&mut self) {
        let before = self.known.context.node.ips;
        let zone_changed = self.known.context.node.zone != self.known.cluster.node().zone;
        self.extent.widen(if zone_changed { Extent::Zone } else { Extent::Node });
        let ips = self.known.take_node(&self.config);
        self.report.node_ips(&ips);
        if self.programmed.is_some() && before != self.known.context.node.ips {
            tracing::info!(?before, after = ?self.known.context.node.ips, "the node's IPs have changed");
        }
    }

    pub(super) fn take_addresses(&mut self) {
        self.known.take_addresses(&self.addresses.borrow_and_update());
        self.extent.widen(Extent::Node);
    }

    /// Combines the pods that opt out with the cgroups that have been found.
    pub(super) fn take_opt_out(&mut self) {
        let own_network = || self.known.cluster.pods().filter(|pod| !pod.host_network);
        self.opt_out.want(own_network().map(|pod| Arc::clone(&pod.uid)).collect());
        // Until all cgroups are known, the entries of an earlier agent stay.
        let Some(found) = self.found.as_ref().filter(|found| {
            self.phase != Phase::Listing && own_network().all(|pod| found.pods.contains_key(&pod.uid))
        }) else {
            return;
        };
        let (mut cgroups, mut names, mut problems) = (BTreeSet::new(), Vec::new(), BTreeMap::new());
        for (path, cgroup) in &found.cgroups {
            if self.known.context.pods_in_packets && cgroups.len() < PODS_MAX {
                cgroups.insert(*cgroup);
                names.push(format!("cgroup {path}"));
                continue;
            }
            let problem = match self.known.context.pods_in_packets {
                true => "too many opt out",
                false => NOBODY_JUDGES,
            };
            let reason = format!("{CANNOT}: {problem}; its sockets are served");
            problems.insert(format!("cgroup {path}"), vec![reason]);
        }
        for pod in self.known.cluster.pods() {
            let problem = match found.pods.get(&pod.uid) {
                _ if pod.host_network => "it uses the host's network, whose packets nobody judges",
                _ if !self.known.context.pods_in_packets => NOBODY_JUDGES,
                Some(Place::Cgroup(_)) if cgroups.len() >= PODS_MAX => "too many pods opt out",
                Some(Place::Cgroup(cgroup)) => {
                    cgroups.insert(*cgroup);
                    names.push(pod.key.to_string());
                    continue;
                }
                Some(Place::Missing) => "its cgroup is not there (--cgroup-path)",
                Some(Place::NotYet) | None => continue,
            };
            let reason = format!("{CANNOT}: {problem}; its sockets are served");
            problems.insert(format!("Pod {}", pod.key), vec![reason]);
        }
        self.report.opted_out(names, problems);
        if self.opted_out.as_ref() != Some(&cgroups) {
            self.opted_out = Some(cgroups);
            self.extent.widen(Extent::Node);
        }
    }

    /// Tells the packet edge the facts that it cannot see; the first time, starts it.
    pub(super) async fn tell_edge(&mut self) -> Result<(), AgentError> {
        if self.programmed.is_none() {
            return Ok(());
        }
        self.facts.node_ips = self.known.context.node.ips;
        let edge = match &mut self.edge {
            Some(edge) => edge,
            none => {
                self.health.waiting_for("the devices have not been attached yet");
                none.insert(Edge::start(self.config.devices.clone(), self.facts.clone()).await?)
            }
        };
        edge.tell(&self.facts, &self.datagram_ports);
        Ok(())
    }

    /// Takes in the state of the packet edge. Traffic from outside is served once a pass has left no device out, and
    /// only then is the node ready.
    pub(super) fn take_edge(&mut self, state: devices::State) {
        if state.passes == 1 {
            // Loading the programs has taken memory.
            give_back_memory();
        }
        let attached = state.devices.iter().filter(|device| device.is_attached()).count();
        if self.phase.passed(attached, state.holds.is_some())
            && let Some(reason) = &state.holds
        {
            self.health.waiting_for(reason);
        }
        let pods = state.devices.iter().any(devices::DeviceState::is_attached_pod);
        if self.pods_attached != Some(pods) {
            self.pods_attached = Some(pods);
            self.extent.widen(Extent::Node);
        }
        if self.known.context.pods_in_packets != pods {
            self.known.context.pods_in_packets = pods;
            // Services with source ranges report problems that depend on this.
            self.known.cluster.touch_with_source_ranges();
            self.take_opt_out();
        }
        if self.elsewhere.as_ref() != Some(&state.elsewhere) {
            self.elsewhere = Some(state.elsewhere.clone());
            if self.programmed.as_ref().is_some_and(|it| !it.dataplane.set_retval) {
                self.extent.widen(Extent::Node);
            }
        }
        self.report.edge(state);
    }
}
