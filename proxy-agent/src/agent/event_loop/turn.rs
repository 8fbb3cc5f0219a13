//! A turn: plans and writes what has changed, and tells what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use proxy_common::addr::Family;

use super::{Agent, RETRY};
use crate::agent::error::AgentError;
use crate::agent::extent::Extent;
use crate::agent::heavy::Begun;
use crate::agent::kernel::{Kernel, cost};
use crate::agent::knowledge::{Knowledge, NodePlan};
use crate::agent::queue::Queue;
use crate::agent::sweeps::Due;
use crate::bpf::self_test;
use crate::bpf::self_test::SelfTestError;
use crate::bpf::sys;
use crate::host::process::give_back_memory;
use crate::observe::health::checks::Check;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::DesiredService;
use crate::reconcile::plan::{
    LeftAlone, LostClaims, Part, REASONS, Wanted, meets_edges, plan, plan_left, plan_part, ports_beside,
    rivals,
};
use crate::reconcile::store::Op;

/// Weight of the Services that are planned together while the maps are empty, in frontends, endpoints and source
/// ranges. A plan takes memory for all of its Services at once.
const PORTION: usize = 1 << 16;

impl Agent {
    /// Programs what has changed, and tells what came of it. Returns the time of the next attempt after a failure.
    pub(super) async fn turn(&mut self) -> Result<Option<Instant>, AgentError> {
        let retry = match self.sync().await {
            Ok(()) => {
                self.tell_edge().await?;
                None
            }
            Err(AgentError::SelfTest(SelfTestError::Store(error))) => Some(self.failed(&error)),
            Err(AgentError::ReadBack(error)) => Some(self.failed(&error)),
            Err(error) => return Err(error),
        };
        // A client that waits for readiness may look at `status` next.
        self.told.report.write();
        self.telemetry.metrics().problems(self.told.report.count());
        if retry.is_none()
            && let Some(devices) = self.phase.announce()
        {
            tracing::info!(devices, "ready");
            self.told.health.programmed();
        }
        Ok(retry)
    }

    fn failed(&mut self, error: &dyn std::error::Error) -> Instant {
        self.telemetry.sync_ended(false);
        tracing::error!(%error, "programming failed; trying again");
        self.extent = Extent::Everything;
        Instant::now() + RETRY.min(self.config.sync_period)
    }

    /// Tells the packet edge the facts that it cannot see; the first time, starts it.
    async fn tell_edge(&mut self) -> Result<(), AgentError> {
        if !self.edge.is_started() {
            self.told.health.waiting_for("the devices have not been attached yet");
        }
        Ok(self.edge.tell(&self.config.devices, self.known.context.node.ips).await?)
    }

    /// Programs changes, in maps that grow where they have to. Does nothing without changes.
    async fn sync(&mut self) -> Result<(), AgentError> {
        self.sync_changes().await?;
        while self.grow().await {
            self.sync_changes().await?;
        }
        Ok(())
    }

    async fn sync_changes(&mut self) -> Result<(), AgentError> {
        self.queue.try_again(self.shortage.take_again());
        if self.extent == Extent::Everything {
            self.known.cluster.touch_all();
            self.queue = Queue::default();
            self.told.forget_problems();
        }
        let dirty = self.known.cluster.take_dirty();
        if dirty.is_empty() && self.extent == Extent::Services && !self.is_busy() {
            return Ok(());
        }
        self.telemetry.sync_begins(self.extent >= Extent::Zone);
        let mut kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => self.open(self.sizes(dirty.iter())).await?,
        };
        let done = self.program_changes(&mut kernel, dirty);
        self.kernel = Some(kernel);
        self.begin_sweep();
        done
    }

    /// Programs the node's tables and these Services as far as the extent demands, and has them serve.
    fn program_changes(
        &mut self,
        kernel: &mut Kernel,
        mut dirty: BTreeSet<ObjectKey>,
    ) -> Result<(), AgentError> {
        let everything = self.extent == Extent::Everything;
        if everything {
            kernel.read_back()?;
            // Only these name Services that were deleted while nothing could be programmed.
            dirty.extend(kernel.model.ports.keys().map(|key| key.service.clone()));
            dirty.extend(self.told.services());
        }
        // The owner of a frontend is known only with all Services that claim it. Empty maps serve nobody yet, so they
        // may be written in portions.
        let empty = kernel.model.frontends.is_empty() && !kernel.attached;
        // A failure in one of the node's own tables is returned at the end: no Service waits for these tables.
        let node = self.program_node(kernel, &mut dirty);
        let touched: Vec<ObjectKey> = dirty.into_iter().collect();
        let udp_stale = match everything {
            true => self.program_everything(kernel, &touched, empty)?,
            false => self.program_some(kernel, &touched)?,
        };
        let first = self.serve(kernel)?;
        self.sweeps.add(Due { follow: follows(udp_stale, first, self.extent), streams: false });
        let took = self.telemetry.sync_ended(true);
        self.tell_health(kernel);
        if everything {
            give_back_memory();
        }
        self.extent = Extent::Services;
        if first {
            tracing::info!(?took, "everything is programmed");
        }
        for &family in &self.config.families {
            self.told.health.updated(family);
        }
        node
    }

    /// Writes the node's own tables. Adds the Services that depend on the change to `dirty`.
    fn program_node(
        &mut self,
        kernel: &mut Kernel,
        dirty: &mut BTreeSet<ObjectKey>,
    ) -> Result<(), AgentError> {
        if self.extent < Extent::Node {
            return Ok(());
        }
        let model = &mut kernel.model;
        let NodePlan { mut ops, concerned, problems } =
            self.known.plan_node(&self.config.nodeport_addresses, model);
        dirty.extend(concerned);
        self.told.report.set("node tables".to_owned(), problems);
        let host_in_packets = match self.edge.elsewhere() {
            _ if kernel.dataplane.set_retval => Some(false),
            elsewhere => elsewhere.map(|elsewhere| meets_edges(model, elsewhere)),
        };
        let wanted = LeftAlone {
            pods_in_packets: self.edge.pods_attached(),
            host_in_packets,
            opted_out: self.opt_out.cgroups(),
            sandboxes: self.opt_out.sandboxes(),
        };
        ops.extend(plan_left(model, &wanted));
        self.telemetry.writing(&ops, |ops| kernel.carry_out(ops))?;
        let host = &self.known.context.host_addresses;
        let warnings = self.config.nodeport_addresses.warnings(&self.known.context.node.ips, host);
        self.told.report.set("--nodeport-addresses".to_owned(), warnings);
        Ok(())
    }

    /// Programs these Services, which are all present and former ones, at once; in empty maps, in portions. Returns
    /// whether connected UDP sockets may be connected to the wrong backend now.
    fn program_everything(
        &mut self,
        kernel: &mut Kernel,
        mut services: &[ObjectKey],
        empty: bool,
    ) -> Result<bool, AgentError> {
        let mut udp_stale = false;
        loop {
            let size = match empty {
                true => portion(services.iter().map(|service| self.known.cluster.weight(service))),
                false => services.len(),
            };
            let (portion, rest) = services.split_at(size);
            udp_stale |= self.program(kernel, portion, rest.is_empty())?;
            if rest.is_empty() {
                return Ok(udp_stale);
            }
            services = rest;
        }
    }

    /// Programs some of these Services and of the waiting ones. Returns whether connected UDP sockets may be connected
    /// to the wrong backend now.
    fn program_some(&mut self, kernel: &mut Kernel, dirty: &[ObjectKey]) -> Result<bool, AgentError> {
        let Self { known, queue, shortage, .. } = self;
        for service in dirty {
            queue.add(service.clone(), weight(kernel, known, service));
        }
        let mut light = queue.take_light();
        light.extend(
            queue.take_again(|service| shortage.contains(service).then(|| weight(kernel, known, service))),
        );
        let mut udp_stale = !light.is_empty() && self.program(kernel, &light, false)?;
        let known = &self.known;
        let begun = self.queue.take_heavy(|service| tokio::task::spawn_blocking(known.work_out(service)));
        if let Some(begun) = begun {
            udp_stale |= self.program_part(kernel, begun)?;
        }
        self.told.tell_rivals(|service| kernel.lost(service));
        Ok(udp_stale)
    }

    /// Plans and writes these Services. `full` also removes what no Service claims. Returns whether connected UDP
    /// sockets may be connected to the wrong backend now.
    fn program(
        &mut self,
        kernel: &mut Kernel,
        services: &[ObjectKey],
        full: bool,
    ) -> Result<bool, AgentError> {
        let wanted: BTreeMap<ObjectKey, Option<Wanted>> =
            services.iter().map(|key| (key.clone(), self.known.wanted(key))).collect();
        for (service, wanted) in &wanted {
            self.telemetry.desired(service, wanted.as_ref().map(|wanted| &wanted.desired));
        }
        self.edge.remember_remote(wanted.values().flatten());
        let model = &mut kernel.model;
        for (service, one) in &wanted {
            let ports = one.as_ref().map_or(&[][..], |one| &one.desired.ports);
            let gone = ports_beside(model, service, ports);
            let rivals = rivals(model, service, &Part { created: 0, ports, gone: &gone });
            self.told.add_rivals(rivals.into_iter().filter(|rival| !wanted.contains_key(rival)));
        }
        let mut plan = plan(model, &wanted, full);
        tracing::debug!(services = wanted.len(), operations = plan.ops.len(), "programming");
        self.write(kernel, &plan.ops)?;
        kernel.grace.add(plan.freed);
        for (service, wanted) in wanted {
            let problems = wanted.map(|wanted| wanted.desired.problems).unwrap_or_default();
            let refused = plan.refused.remove(&service).unwrap_or_default();
            self.conclude(&service, problems, refused, kernel.lost(&service));
            self.told.remove_rival(&service);
        }
        self.refuse(plan.refused);
        Ok(plan.udp_stale)
    }

    /// Begins with a heavy Service whose wanted state is known now.
    pub(super) fn begin(&mut self, service: ObjectKey, wanted: Option<Wanted>) {
        self.telemetry.desired(&service, wanted.as_ref().map(|wanted| &wanted.desired));
        self.edge.remember_remote(wanted.iter());
        let Wanted { created, desired } =
            wanted.unwrap_or(Wanted { created: i64::MAX, desired: DesiredService::default() });
        let model = self.kernel.as_ref().map(|kernel| &kernel.model);
        let gone = model.map_or_else(Vec::new, |model| ports_beside(model, &service, &desired.ports));
        self.queue.put_back(Begun::new(service, created, desired.ports, gone, desired.problems));
    }

    /// Plans and writes the next part of a heavy Service. Returns true after the last part, if connected UDP sockets
    /// may be connected to the wrong backend now.
    fn program_part(&mut self, kernel: &mut Kernel, mut begun: Begun) -> Result<bool, AgentError> {
        let model = &mut kernel.model;
        let (ports, gone) = begun.next(|key| model.ports.get(key).map_or(0, cost));
        let part = Part { created: begun.created, ports: &ports, gone: &gone };
        self.told.add_rivals(rivals(model, &begun.service, &part));
        let mut plan = plan_part(model, &begun.service, &part);
        tracing::debug!(service = %begun.service, operations = plan.ops.len(), "programming a part");
        self.write(kernel, &plan.ops)?;
        kernel.grace.add(plan.freed);
        begun.udp_stale |= plan.udp_stale;
        let refused = plan.refused.remove(&begun.service).unwrap_or_default();
        let room = REASONS.saturating_sub(begun.refused.len());
        begun.refused.extend(refused.into_iter().take(room));
        begun.lost.look(&kernel.model, &begun.service, ports.iter().map(|port| &port.key));
        if !begun.refused.is_empty() {
            // This makes the maps grow at once.
            self.shortage.refuse([begun.service.clone()]);
        }
        self.refuse(plan.refused);
        if !begun.is_done() {
            self.queue.put_back(begun);
            return Ok(false);
        }
        // A Service that has taken a claim in between has left a note among the rivals.
        self.conclude(&begun.service, begun.problems, begun.refused, begun.lost);
        Ok(begun.udp_stale)
    }

    /// Carries out the operations of a plan for Services.
    fn write(&mut self, kernel: &mut Kernel, ops: &[Op]) -> Result<(), SelfTestError> {
        self.telemetry.writing(ops, |ops| kernel.carry_out(ops))?;
        self.edge.programmed(ops, &kernel.model.frontends);
        Ok(())
    }

    /// Notes Services whose frontends, newly theirs, had no room. They are told so when they are tried again.
    fn refuse(&mut self, others: BTreeMap<ObjectKey, Vec<String>>) {
        self.queue.try_again(others.keys());
        self.shortage.refuse(others.into_keys());
    }

    /// Tells of a Service that has been programmed as a whole: its problems, those of what had no room (`refused`), and
    /// the claims that others have.
    fn conclude(
        &mut self,
        service: &ObjectKey,
        mut problems: Vec<String>,
        refused: Vec<String>,
        lost: LostClaims,
    ) {
        self.shortage.programmed(service, refused.is_empty());
        if self.shortage.is_told() {
            problems.extend(refused);
        }
        self.told.programmed(service, problems, lost, self.known.held_by_host(service));
    }

    /// Makes the written maps serve clients: attaches the programs if they are not attached, and has freed numbers come
    /// back. Returns whether the programs were not attached before.
    fn serve(&mut self, kernel: &mut Kernel) -> Result<bool, AgentError> {
        let first = !kernel.attached;
        if first {
            // After an error here, programs that an earlier agent has attached at a better place stay there.
            let reach = self_test::reach(&self.config.cgroup)?;
            self.told.report.reach(reach);
            kernel.attach(&self.config.cgroup)?;
        }
        kernel.grace.begin(sys::grace_period);
        Ok(first)
    }

    /// Has the health of programmed Services told to load balancers, on the addresses that serve nodePorts.
    fn tell_health(&mut self, kernel: &Kernel) {
        let (known, families) = (&self.known, &self.config.families);
        if self.extent >= Extent::Node {
            let (ips, host) = (&known.context.node.ips, &known.context.host_addresses);
            let addresses =
                Family::ALL.map(|family| self.config.nodeport_addresses.listen_on(family, ips, host));
            self.told.check_ports.listen_on(addresses);
        }
        self.told.tell_health(|service, family| {
            let check = known.check(service, family).filter(|_| families.contains(&family))?;
            // For a Service that is not served here (beyond its budget, or without room) this node has no endpoint,
            // whatever the slices say.
            let is_served = kernel.model.ports_of(service).any(|key| key.family == family);
            Some(if is_served { check } else { Check { endpoints: 0, ..check } })
        });
    }
}

/// Returns the largest cost of replacing what a Service has by what it wants.
fn weight(kernel: &Kernel, known: &Knowledge, service: &ObjectKey) -> usize {
    kernel.weight(service) + known.cluster.weight(service)
}

/// Returns whether connected UDP sockets have to be led after a turn. A turn over everything follows a failure, which may
/// have come between a change of the maps and its sweep; the plan does not see that change any more.
fn follows(udp_stale: bool, first: bool, extent: Extent) -> bool {
    udp_stale || first || extent == Extent::Everything
}

/// Returns the number of Services of the next portion: as many as fit into [`PORTION`] by these weights, and at least
/// one, if there is any.
fn portion(weights: impl Iterator<Item = usize>) -> usize {
    let (mut size, mut sum) = (0, 0);
    for weight in weights {
        sum += weight;
        if sum > PORTION && size > 0 {
            break;
        }
        size += 1;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_led_after_a_failure_whatever_the_plan_says() {
        assert!(follows(false, false, Extent::Everything));
        assert!(follows(true, false, Extent::Services) && follows(false, true, Extent::Services));
        assert!(
            ![Extent::Services, Extent::Node, Extent::Zone]
                .iter()
                .any(|extent| follows(false, false, *extent))
        );
    }

    #[test]
    fn a_portion_is_as_many_services_as_fit_and_at_least_one() {
        let half = PORTION / 2;
        for (weights, expected) in [
            (&[][..], 0),
            (&[1, 1, 1], 3),
            (&[half, half, 0], 3),
            (&[half, half, 1, 1], 2),
            (&[half, half + 1, 1], 1),
            (&[PORTION + 1], 1),
            (&[PORTION + 1, 1], 1),
        ] {
            assert_eq!(portion(weights.iter().copied()), expected, "{weights:?}");
        }
    }
}
