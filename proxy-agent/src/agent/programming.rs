//! Programming of the maps: plans and writes changes, writes anew what somebody else has changed, and has full maps
//! grow.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use proxy_common::abi::backend::flags::ON_THIS_NODE;
use proxy_common::abi::proto;

use super::extent::Extent;
use super::grace::Grace;
use super::programmed::Programmed;
use super::queue::{Begun, Queue};
use super::sweeps::{Due, Sweep};
use super::{Agent, AgentError};
use crate::agent::knowledge::NodePlan;
use crate::bpf::chain;
use crate::bpf::dataplane::{Dataplane, DataplaneError, PROGRAMS, Sizes};
use crate::bpf::maps::KernelMaps;
use crate::bpf::self_test;
use crate::bpf::self_test::SelfTestError;
use crate::bpf::sys;
use crate::host::cgroups::Place;
use crate::host::process::give_back_memory;
use crate::host::sockets::{Places, SocketSweeper};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::DesiredService;
use crate::reconcile::drift::differences;
use crate::reconcile::model::{Model, Port};
use crate::reconcile::plan::{
    LeftAlone, Part, REASONS, Wanted, meets_edges, plan, plan_left, plan_part, ports_beside, rivals,
};
use crate::reconcile::stale::Serving;
use crate::reconcile::store::{MapStore, Op, StoreError};

/// Weight of the Services that are planned together while the maps are empty, in frontends, endpoints and source
/// ranges. A plan takes memory for all of its Services at once.
const PORTION: usize = 1 << 16;

/// Number of differences that are logged when the maps are found changed.
const DRIFT_LOGGED: usize = 16;

impl Agent {
    /// Compares the maps with what was written, and the links with what was attached. If somebody else has written to
    /// the maps, everything is written anew. Detached programs are attached again.
    pub(super) fn audit(&mut self) {
        self.audit_at = Instant::now() + self.config.sync_period;
        self.sweeps.add(Due { streams: true, follow: false });
        self.begin_sweep();
        let Some(programmed) = self.programmed.as_mut().filter(|_| self.extent < Extent::Everything) else {
            return;
        };
        let detached = programmed.dataplane.detached(&self.config.cgroup);
        if programmed.attached && !detached.is_empty() {
            tracing::warn!(programs = ?detached, "somebody else has detached programs; attaching them again");
            self.metrics.drifted(detached.iter().map(|_| "links"));
            // A program that cannot be attached now is tried again at the next audit: packets are served meanwhile.
            let failed = programmed.dataplane.attach(&self.config.cgroup).err();
            let problem = failed.map(|error| format!("sockets are not served: {}", chain(&error)));
            self.report.set("cgroup".to_owned(), problem.into_iter().collect());
        }
        let contents = match programmed.dataplane.maps.contents() {
            Ok(contents) => contents,
            Err(error) => return tracing::warn!(%error, "the maps cannot be read back"),
        };
        let found = differences(&programmed.model, &contents, &programmed.dataplane.maps.filter());
        for difference in found.iter().take(DRIFT_LOGGED) {
            tracing::warn!(%difference, "somebody else has changed a map; writing everything anew");
        }
        if found.len() > DRIFT_LOGGED {
            tracing::warn!(differences = found.len(), "more has been changed than is named here");
        }
        self.metrics.drifted(found.iter().map(|difference| difference.map));
        if !found.is_empty() {
            self.extent = Extent::Everything;
        }
        drop(contents);
        give_back_memory();
    }

    /// Begins the sweep that is due, if it may begin.
    pub(super) fn begin_sweep(&mut self) {
        self.sweeps.begin(Instant::now(), |due| {
            let Programmed { model, sweeper, .. } = self.programmed.as_ref()?;
            let (sweeper, sockets) = sweeper.as_ref()?;
            let sctp = model.ports.iter().filter(|(key, _)| key.proto == proto::SCTP);
            let in_force = |cgroup| self.opted_out.as_ref().is_some_and(|cgroups| cgroups.contains(cgroup));
            let pods = self.found.iter().flat_map(|found| &found.pods);
            let opted_out =
                pods.filter(|(_, place)| matches!(place, Place::Cgroup(cgroup) if in_force(cgroup)));
            let sweep = Sweep {
                sweeper: Arc::clone(sweeper),
                sockets: Arc::clone(sockets),
                metrics: Arc::clone(&self.metrics),
                families: self.config.families.clone(),
                serving: due.follow.then(|| Serving::of(model)),
                opted_out: opted_out.map(|(uid, _)| Arc::clone(uid)).collect(),
                sctp: due.streams.then(|| sctp.map(|(_, port)| port.id).collect()),
            };
            Some(tokio::task::spawn_blocking(|| sweep.run()))
        });
    }

    /// Programs changes, in maps that grow where they have to. Does nothing without changes.
    pub(super) async fn sync(&mut self) -> Result<(), AgentError> {
        self.sync_changes().await?;
        while self.grow().await {
            self.sync_changes().await?;
        }
        Ok(())
    }

    async fn sync_changes(&mut self) -> Result<(), AgentError> {
        self.try_refused_again();
        let everything = self.extent == Extent::Everything;
        if everything {
            self.known.cluster.touch_all();
            self.queue = Queue::default();
            self.said.clear();
        }
        let mut dirty = self.known.cluster.take_dirty();
        if dirty.is_empty() && self.extent == Extent::Services && !self.is_busy() {
            return Ok(());
        }
        self.telemetry.sync_begins(self.extent >= Extent::Zone);

        let mut programmed = match self.programmed.take() {
            Some(programmed) => programmed,
            None => self.open(self.sizes(dirty.iter())).await?,
        };
        if everything {
            programmed.model = read_back(&programmed.dataplane.maps)?;
            // Numbers that the lost model had freed are found free again; a grace period makes them so.
            programmed.grace = Grace::default();
            if let Err(error) = sys::grace_period() {
                tracing::warn!(%error, "waiting for running programs");
            }
            // Only these name Services that were deleted while nothing could be programmed.
            dirty.extend(programmed.model.ports.keys().map(|key| key.service.clone()));
            dirty.extend(self.report.services().into_iter().chain(self.check_ports.known()));
        }
        let programmed = self.programmed.insert(programmed);
        // The owner of a frontend is known only with all Services that claim it. Empty maps serve nobody yet, so they
        // may be written in portions.
        let empty = programmed.model.frontends.is_empty() && !programmed.attached;
        // A failure in one of the node's own tables is returned at the end: no Service waits for these tables.
        let node = self.program_node(&mut dirty);
        let touched: Vec<ObjectKey> = dirty.into_iter().collect();
        let udp_stale = match everything {
            true => self.program_everything(&touched, empty)?,
            false => self.take_turn(&touched)?,
        };
        let first = self.serve(udp_stale)?;
        let took = self.telemetry.sync_ended(true);
        self.tell_health();
        if everything {
            give_back_memory();
        }
        self.extent = Extent::Services;
        if first {
            tracing::info!(?took, "everything is programmed");
        }
        for &family in &self.config.families {
            self.health.updated(family);
        }
        node
    }

    /// Makes or takes over maps that are large enough, and loads the programs. Attaches nothing: programs that this
    /// agent or an earlier one has attached go on with the maps as they were.
    pub(super) async fn open(&mut self, sizes: Sizes) -> Result<Programmed, AgentError> {
        let pins = self.config.pins.clone();
        // The kernel's verifier takes a while, and probes have to be answered meanwhile.
        let first = self.edge.is_none();
        let health = self.health.clone();
        let loading = move |program: &str| {
            if first {
                health.waiting_for(format!("the kernel verifies BPF program {program}"));
            }
        };
        let opening = tokio::task::spawn_blocking(move || Dataplane::open(pins, sizes, loading));
        let dataplane = opening.await.map_err(DataplaneError::Panic)??;
        self.report.verified(&dataplane.verified);
        self.report.reasons_for_sockets(dataplane.set_retval);
        self.report.refused(&PROGRAMS, &dataplane.refused);
        let sweeper = match SocketSweeper::new(Places::default()) {
            Ok(sweeper) => Some((Arc::new(sweeper), Arc::new(dataplane.sockets()?))),
            Err(error) => {
                self.report.set("node".to_owned(), vec![error.to_string()]);
                None
            }
        };
        let model = Model::new(dataplane.maps.capacity());
        Ok(Programmed { dataplane, model, grace: Grace::default(), sweeper, attached: false })
    }

    /// Writes the node's own tables. Adds the Services that depend on the change to `dirty`.
    fn program_node(&mut self, dirty: &mut BTreeSet<ObjectKey>) -> Result<(), AgentError> {
        let Some(Programmed { dataplane, model, .. }) = &mut self.programmed else { return Ok(()) };
        if self.extent < Extent::Node {
            return Ok(());
        }
        let NodePlan { mut ops, concerned, problems } =
            self.known.plan_node(&self.config.nodeport_addresses, model);
        dirty.extend(concerned);
        self.report.set("node tables".to_owned(), problems);
        let host_in_packets = match &self.elsewhere {
            _ if dataplane.set_retval => Some(false),
            elsewhere => elsewhere.as_ref().map(|elsewhere| meets_edges(model, elsewhere)),
        };
        let wanted = LeftAlone {
            pods_in_packets: self.pods_attached,
            host_in_packets,
            opted_out: self.opted_out.as_ref(),
            sandboxes: self.found.as_ref().map(|found| &found.sandboxes),
        };
        ops.extend(plan_left(model, &wanted));
        self.telemetry.writing(&ops, |ops| carry_out(&mut dataplane.maps, ops))?;
        let host = &self.known.context.host_addresses;
        let warnings = self.config.nodeport_addresses.warnings(&self.known.context.node.ips, host);
        self.report.set("--nodeport-addresses".to_owned(), warnings);
        Ok(())
    }

    /// Programs these Services, which are all present and former ones, at once; in empty maps, in portions.
    fn program_everything(&mut self, mut services: &[ObjectKey], empty: bool) -> Result<bool, AgentError> {
        let mut udp_stale = false;
        loop {
            let mut weight = 0;
            let heavier = |service: &ObjectKey| {
                weight += self.known.cluster.weight(service);
                weight > PORTION
            };
            let end = services.iter().position(heavier).filter(|_| empty).unwrap_or(services.len());
            let (portion, rest) = services.split_at(end.max(1).min(services.len()));
            udp_stale |= self.program(portion, rest.is_empty())?;
            if rest.is_empty() {
                return Ok(udp_stale);
            }
            services = rest;
        }
    }

    /// Returns whether the next turn need not wait for news.
    pub(super) fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.retell.is_empty()
    }

    /// Programs some of these Services and of the waiting ones.
    fn take_turn(&mut self, dirty: &[ObjectKey]) -> Result<bool, AgentError> {
        for service in dirty {
            self.queue.add(service.clone(), self.weight(service));
        }
        let mut light = self.queue.take_light();
        light.extend(self.take_refused());
        let mut udp_stale = !light.is_empty() && self.program(&light, false)?;
        let known = &self.known;
        let begun = self.queue.take_heavy(|service| tokio::task::spawn_blocking(known.work_out(service)));
        if let Some(begun) = begun {
            udp_stale |= self.program_part(begun)?;
        }
        self.tell_rivals();
        Ok(udp_stale)
    }

    /// Returns the largest cost of replacing what a Service has by what it wants.
    pub(super) fn weight(&self, service: &ObjectKey) -> usize {
        let Some(Programmed { model, .. }) = &self.programmed else { return 0 };
        model.of_service(service).map(|(_, port)| cost(port)).sum::<usize>()
            + self.known.cluster.weight(service)
    }

    /// Plans and writes the next part of a heavy Service. Returns true after the last part, if connected UDP sockets
    /// may be connected to the wrong backend now.
    fn program_part(&mut self, mut begun: Begun) -> Result<bool, AgentError> {
        let Some(Programmed { dataplane, model, grace, .. }) = &mut self.programmed else { return Ok(false) };
        let (ports, gone) = begun.next(|key| model.ports.get(key).map_or(0, cost));
        let part = Part { created: begun.created, ports: &ports, gone: &gone };
        self.retell.extend(rivals(model, &begun.service, &part));
        let mut plan = plan_part(model, &begun.service, &part);
        tracing::debug!(service = %begun.service, operations = plan.ops.len(), "programming a part");
        self.telemetry.writing(&plan.ops, |ops| carry_out(&mut dataplane.maps, ops))?;
        self.datagram_ports.programmed(&plan.ops, &model.frontends);
        grace.add(plan.freed);
        begun.udp_stale |= plan.udp_stale;
        let refused = plan.refused.remove(&begun.service).unwrap_or_default();
        let room = REASONS.saturating_sub(begun.refused.len());
        begun.refused.extend(refused.into_iter().take(room));
        begun.lost.look(model, &begun.service, ports.iter().map(|port| &port.key));
        if !begun.refused.is_empty() {
            // This makes the maps grow at once.
            self.refused.insert(begun.service.clone());
        }
        self.refuse(plan.refused);
        if !begun.is_done() {
            self.queue.put_back(begun);
            return Ok(false);
        }
        let Begun { service, problems, refused, lost, udp_stale, .. } = begun;
        self.conclude(&service, problems, &refused, lost);
        Ok(udp_stale)
    }

    /// Begins with a heavy Service whose wanted state is known now.
    pub(super) fn begin(&mut self, service: ObjectKey, wanted: Option<Wanted>) {
        self.telemetry.desired(&service, wanted.as_ref().map(|wanted| &wanted.desired));
        self.remember_remote(wanted.iter());
        let Wanted { created, desired } =
            wanted.unwrap_or(Wanted { created: i64::MAX, desired: DesiredService::default() });
        let model = self.programmed.as_ref().map(|programmed| &programmed.model);
        let gone = model.map_or_else(Vec::new, |model| ports_beside(model, &service, &desired.ports));
        self.queue.put_back(Begun::new(service, created, desired.ports, gone, desired.problems));
    }

    /// Plans and writes these Services. Returns whether connected UDP sockets may be connected to the wrong backend
    /// now.
    fn program(&mut self, services: &[ObjectKey], full: bool) -> Result<bool, AgentError> {
        let wanted: BTreeMap<ObjectKey, Option<Wanted>> =
            services.iter().map(|key| (key.clone(), self.known.wanted(key))).collect();
        for (service, wanted) in &wanted {
            self.telemetry.desired(service, wanted.as_ref().map(|wanted| &wanted.desired));
        }
        self.remember_remote(wanted.values().flatten());
        let Some(Programmed { dataplane, model, grace, .. }) = &mut self.programmed else { return Ok(false) };
        for (service, one) in &wanted {
            let ports = one.as_ref().map_or(&[][..], |one| &one.desired.ports);
            let gone = ports_beside(model, service, ports);
            let rivals = rivals(model, service, &Part { created: 0, ports, gone: &gone });
            self.retell.extend(rivals.into_iter().filter(|rival| !wanted.contains_key(rival)));
        }
        let mut plan = plan(model, &wanted, full);
        tracing::debug!(services = wanted.len(), operations = plan.ops.len(), "programming");
        self.telemetry.writing(&plan.ops, |ops| carry_out(&mut dataplane.maps, ops))?;
        self.datagram_ports.programmed(&plan.ops, &model.frontends);
        grace.add(plan.freed);
        for (service, wanted) in wanted {
            let problems = wanted.map(|wanted| wanted.desired.problems).unwrap_or_default();
            self.tell(&service, problems, &plan.refused.remove(&service).unwrap_or_default());
        }
        self.refuse(plan.refused);
        Ok(plan.udp_stale)
    }

    /// Makes the written maps serve clients: attaches the programs if they are not attached, and cleans up after the
    /// change. Returns whether the programs were not attached before.
    fn serve(&mut self, udp_stale: bool) -> Result<bool, AgentError> {
        let Some(programmed) = &mut self.programmed else { return Ok(false) };
        let first = !programmed.attached;
        if first {
            // After an error here, programs that an earlier agent has attached at a better place stay there.
            let reach = self_test::reach(&self.config.cgroup)?;
            self.report.reach(reach);
            programmed.dataplane.attach(&self.config.cgroup)?;
            self_test::run(&mut programmed.dataplane.maps)?;
            self_test::settle(&programmed.dataplane.maps)?;
            programmed.attached = true;
        }
        programmed.grace.begin(sys::grace_period);
        self.sweeps.add(Due { follow: udp_stale || first, streams: false });
        self.begin_sweep();
        Ok(first)
    }

    /// Remembers a backend on another node for each family. Any will do: the route to it shows which source the kernel
    /// prefers.
    fn remember_remote<'a>(&mut self, wanted: impl Iterator<Item = &'a Wanted>) {
        let ports = wanted.flat_map(|wanted| &wanted.desired.ports);
        let mut backends = ports.flat_map(|port| &port.backends).filter(|b| b.flags & ON_THIS_NODE == 0);
        while self.facts.remote.contains(&None)
            && let Some(backend) = backends.next()
        {
            if let Some(remote) = self.facts.remote.get_mut(backend.addr.family().index()) {
                remote.get_or_insert(backend.addr);
            }
        }
    }
}

/// Returns the cost of replacing or removing a port.
fn cost(port: &Port) -> usize {
    1 + port.claims.len() + port.backends.len()
}

fn read_back(maps: &KernelMaps) -> Result<Model, AgentError> {
    let contents = maps.contents()?;
    maps.refresh_filter(&contents).map_err(SelfTestError::from)?;
    Ok(Model::restore(maps.capacity(), &contents))
}

fn carry_out(maps: &mut impl MapStore, ops: &[Op]) -> Result<(), SelfTestError> {
    ops.iter().try_for_each(|op| maps.apply(op)).map_err(|error: StoreError| error.into())
}
