//! The loop: takes in what has happened, and has each part take its share of it. Then a `turn` programs what follows.
//!
//! One task owns everything, so nothing has to be locked. Work that blocks (waiting for a grace period, sweeping
//! sockets, computing the wanted state of a heavy Service) runs beside the task and reports back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::addr::{Family, Prefix};
use tokio::sync::{mpsc, watch};

use super::error::AgentError;
use super::extent::Extent;
use super::first_wait::{Decision, Patience};
use super::kernel::Kernel;
use super::knowledge::Knowledge;
use super::opt_out::OptOut;
use super::packet_edge::PacketEdge;
use super::phase::Phase;
use super::queue::Queue;
use super::shortage::Shortage;
use super::sweeps::Sweeps;
use super::telemetry::{Arrival, Telemetry};
use super::told::Told;

use crate::config::devices::DetectLocal;
use crate::config::{Config, Source};
use crate::devices;
use crate::host::HostAddresses;
use crate::host::cgroups::{Follower, Found};
use crate::host::process::give_back_memory;
use crate::observe::metrics::Metrics;
use crate::observe::reasons;
use crate::observe::reasons::{Asked, PortReasons};
use crate::reconcile::cluster::{Change, ObjectKey, Scope};
use crate::reconcile::model::Freed;
use crate::reconcile::node_ips::NodeIps;
use crate::sources::Update;

mod turn;
mod upkeep;

/// Time after a failed map operation until everything is read back and planned anew; the sync period instead, if that
/// is shorter.
const RETRY: Duration = Duration::from_secs(1);

/// The parts that the loop owns.
pub(super) struct Agent {
    config: Config,
    known: Knowledge,
    phase: Phase,
    extent: Extent,
    /// The maps and programs, from the first programming on.
    kernel: Option<Kernel>,
    queue: Queue,
    shortage: Shortage,
    edge: PacketEdge,
    opt_out: OptOut,
    sweeps: Sweeps,
    told: Told,
    telemetry: Telemetry,
}

/// News from the tasks beside the loop, except those that a part of the loop has started.
pub(super) struct Inbox {
    /// Updates from the source.
    pub(super) updates: mpsc::Receiver<Update>,
    /// Addresses of this host.
    pub(super) addresses: watch::Receiver<HostAddresses>,
    /// Questions of `proxy-agent explain`.
    pub(super) asked: mpsc::Receiver<Asked>,
}

impl Agent {
    /// Makes an agent that has not been told anything.
    pub(super) fn new(config: Config, metrics: Arc<Metrics>, opt_out: Follower, told: Told) -> Self {
        let now = Instant::now();
        Self {
            known: Knowledge::new(&config),
            phase: Phase::Listing,
            extent: Extent::Everything,
            kernel: None,
            queue: Queue::default(),
            shortage: Shortage::new(now),
            edge: PacketEdge::new(config.devices.settings.pods.is_none()),
            opt_out: OptOut::new(opt_out),
            sweeps: Sweeps::new(now),
            told,
            telemetry: Telemetry::new(metrics, config.families.clone()),
            config,
        }
    }

    /// Follows what happens.
    ///
    /// # Errors
    ///
    /// Reasons to end the agent.
    pub(super) async fn follow(&mut self, inbox: Inbox) -> Result<(), AgentError> {
        let Inbox { mut updates, mut addresses, mut asked } = inbox;
        self.take_addresses(&addresses.borrow_and_update());
        let mut audit_at = Instant::now() + self.config.sync_period;
        let mut retry: Option<Instant> = None;
        loop {
            let busy = retry.is_none() && self.is_busy();
            tokio::select! {
                // The source task gives the reason, if it has ended.
                Some(update) = updates.recv() => self.take_in(update),
                Ok(()) = addresses.changed() => self.take_addresses(&addresses.borrow_and_update()),
                state = self.edge.changed() => self.take_edge(state),
                found = self.opt_out.changed() => self.take_found(found),
                failures = self.told.check_ports.failures() => self.told.report.check_ports(failures),
                Some(asked) = asked.recv() => {
                    // The asker may have gone.
                    let _ = asked.reply.send(self.reasons(&asked.service));
                    continue;
                }
                (service, wanted) = self.queue.worked_out() => self.begin(service, wanted),
                freed = grace_over(&mut self.kernel) => self.release(freed),
                () = self.sweeps.changed() => self.begin_sweep(),
                () = until(retry) => self.extent = Extent::Everything,
                () = until(Some(audit_at)) => {
                    audit_at = Instant::now() + self.config.sync_period;
                    self.audit();
                }
                // News come first: the tasks that bring them run before the next turn.
                () = tokio::task::yield_now(), if busy => {}
            }
            // News that have arrived meanwhile are programmed together.
            while let Ok(update) = updates.try_recv() {
                self.take_in(update);
            }
            if addresses.has_changed().unwrap_or(false) {
                self.take_addresses(&addresses.borrow_and_update());
            }
            retry = self.go_on().await?;
        }
    }

    /// Goes on as far as the phase permits. Returns the time at which to go on without news, if there is one.
    async fn go_on(&mut self) -> Result<Option<Instant>, AgentError> {
        match self.phase {
            Phase::Listing => return Ok(None),
            Phase::AwaitingNode(patience) => {
                match patience.judge(self.known.cluster.node(), Instant::now()) {
                    Decision::Wait { until, reason } => {
                        self.told.health.waiting_for(reason);
                        return Ok(Some(until));
                    }
                    Decision::GiveUp => return Err(AgentError::NoPodCidrs),
                    Decision::Start => self.start(patience)?,
                }
            }
            Phase::Starting { .. } | Phase::Ready => {
                if let Some((before, after)) = self.known.other_pod_cidrs() {
                    return Err(AgentError::PodCidrsChanged { before: list(before), after: list(after) });
                }
            }
        }
        self.turn().await
    }

    /// Takes the facts of the Node that the first programming has waited for.
    fn start(&mut self, patience: Patience) -> Result<(), AgentError> {
        self.phase = Phase::Starting { attached: None };
        self.told.health.waiting_for("nothing has been programmed yet");
        let ips = NodeIps::derive(self.known.cluster.node(), self.config.bind_address);
        if !self.config.families.contains(&ips.primary()) {
            return Err(AgentError::PrimaryFamily(ips.of(ips.primary())));
        }
        tracing::info!(ipv4 = %ips.of(Family::V4), ipv6 = %ips.of(Family::V6), primary = %ips.primary(), "node IPs");
        self.told.report.node_ips(&ips);
        self.known.take_node(&self.config);
        if patience.pod_cidrs && !self.known.take_pod_cidrs(&self.config.families) {
            return Err(AgentError::PodCidrFamily(list(&self.known.cluster.node().pod_cidrs)));
        }
        Ok(())
    }

    fn take_in(&mut self, update: Update) {
        match update {
            Update::Changes(changes) => {
                for change in changes {
                    self.take_change(change);
                }
            }
            Update::Synced => self.take_synced(),
            Update::Problems(problems) => self.told.report.source(problems),
        }
    }

    fn take_synced(&mut self) {
        let from_files = matches!(self.config.source, Source::Manifests(_));
        self.phase = Phase::AwaitingNode(Patience {
            since: Instant::now(),
            ips: !from_files,
            pod_cidrs: self.config.devices.settings.detect_local == DetectLocal::NodeCidr,
        });
        // Without a cluster there need not be a Node: this node then counts as eligible.
        if from_files && !self.known.cluster.node().leaving {
            self.told.health.node(true);
        }
        self.judge_opt_out();
    }

    fn take_change(&mut self, change: Change) {
        if let Change::Node(node) = &change {
            self.told.health.node(!node.leaving);
        }
        let arrival = Arrival::of(&change);
        let scope = self.known.cluster.apply(change);
        self.telemetry.arrived(arrival, scope, self.phase == Phase::Listing);
        match scope {
            Scope::Nothing => return,
            Scope::Service => {}
            Scope::Node => self.take_node(),
            Scope::Pods => return self.judge_opt_out(),
        }
        for &family in &self.config.families {
            self.told.health.queued(family);
        }
    }

    fn take_node(&mut self) {
        let before = self.known.context.node.ips;
        let zone_differs = self.known.context.node.zone != self.known.cluster.node().zone;
        self.extent.widen(if zone_differs { Extent::Zone } else { Extent::Node });
        let ips = self.known.take_node(&self.config);
        self.told.report.node_ips(&ips);
        if self.kernel.is_some() && before != self.known.context.node.ips {
            tracing::info!(?before, after = ?self.known.context.node.ips, "the node's IPs have changed");
        }
    }

    fn take_addresses(&mut self, addresses: &HostAddresses) {
        self.known.take_addresses(addresses);
        self.extent.widen(Extent::Node);
    }

    fn take_found(&mut self, found: Found) {
        if self.opt_out.take(found) {
            self.extent.widen(Extent::Node);
        }
        self.judge_opt_out();
    }

    fn judge_opt_out(&mut self) {
        let (all_listed, pods_in_packets) =
            (self.phase != Phase::Listing, self.known.context.pods_in_packets);
        let judged = self.opt_out.judge(self.known.cluster.pods(), all_listed, pods_in_packets);
        let Some((judgement, differs)) = judged else { return };
        self.told.report.opted_out(judgement.names, judgement.problems);
        if differs {
            self.extent.widen(Extent::Node);
        }
    }

    /// Takes in the state of the packet edge. Traffic from outside is served once a pass has left no device out, and
    /// only then is the node ready.
    fn take_edge(&mut self, state: devices::State) {
        if state.passes == 1 {
            // Loading the programs has taken memory.
            give_back_memory();
        }
        let attached = state.devices.iter().filter(|device| device.is_attached()).count();
        if self.phase.passed(attached, state.holds.is_some())
            && let Some(reason) = &state.holds
        {
            self.told.health.waiting_for(reason);
        }
        let differs = self.edge.take(&state);
        // Refusals of the host's sockets are left to the packet edge only where programs cannot choose their errno.
        let may_leave_host = self.kernel.as_ref().is_some_and(|it| !it.dataplane.set_retval);
        if differs.pods_attached || differs.elsewhere && may_leave_host {
            self.extent.widen(Extent::Node);
        }
        let pods = self.edge.pods_attached().unwrap_or_default();
        if self.known.context.pods_in_packets != pods {
            self.known.context.pods_in_packets = pods;
            // Services with source ranges report problems that depend on this.
            self.known.cluster.touch_with_source_ranges();
            self.judge_opt_out();
        }
        self.told.report.edge(state);
    }

    /// Returns the fate of each endpoint of a Service, with the reasons.
    fn reasons(&self, key: &ObjectKey) -> Vec<PortReasons> {
        let Some(service) = self.known.cluster.service(key) else { return Vec::new() };
        reasons::of_service(service, self.known.cluster.slices(key), &self.known.context)
    }

    /// Returns whether the next turn need not wait for news.
    fn is_busy(&self) -> bool {
        !self.queue.is_empty() || self.told.has_rivals()
    }
}

/// Returns at this time; never returns without one.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Returns the numbers whose grace period is over; never returns while there are none.
async fn grace_over(kernel: &mut Option<Kernel>) -> Freed {
    match kernel {
        Some(kernel) => kernel.grace.over().await,
        None => std::future::pending().await,
    }
}

fn list(cidrs: &[Prefix]) -> String {
    let cidrs: Vec<String> = cidrs.iter().map(Prefix::to_string).collect();
    format!("[{}]", cidrs.join(", "))
}
