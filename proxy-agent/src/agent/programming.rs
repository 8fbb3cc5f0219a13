//! From what is known to the maps: what has changed is planned and written, what somebody else has changed is written
//! anew, and maps that run full grow.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use proxy_common::abi::backend::flags::ON_THIS_NODE;
use proxy_common::addr::Family;

use super::sizes::Needs;
use super::{Agent, AgentError};
use crate::bpf::dataplane::{Dataplane, DataplaneError, PROGRAMS, Sizes, chain};
use crate::bpf::maps::KernelMaps;
use crate::bpf::sys;
use crate::cluster::ObjectKey;
use crate::drift::differences;
use crate::explain::reasons::{self, PortReasons};
use crate::health::checks::check;
use crate::model::{Freed, Model};
use crate::plan::{Wanted, lost_claims, plan, plan_left, rivals};
use crate::process::give_back_memory;
use crate::selftest::{self, SelfTestError};
use crate::sockets::{Places, SocketSweeper};
use crate::stale::Serving;
use crate::store::{MapStore, Op, StoreError};

/// Services that are planned together while the maps are empty: what is planned at once takes memory at once.
const PORTION: usize = 1_000;

/// Differences that are named when the maps are found changed.
const DRIFT_LOGGED: usize = 16;

/// What has been set up in the kernel, and what is known of it.
pub(super) struct Programmed {
    pub(super) dataplane: Dataplane,
    pub(super) model: Model,
    sweeper: Option<(Arc<SocketSweeper>, OwnedFd)>,
    /// The programs are attached: before that, nobody looks at what is new in these maps.
    attached: bool,
}

impl Agent {
    /// Compares the maps with what was written. If somebody else has written to them, everything is written anew.
    pub(super) fn audit(&mut self) {
        self.audit_at = Instant::now() + self.config.sync_period;
        let Some(programmed) = self.programmed.as_ref().filter(|_| !self.everything) else { return };
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
        self.everything |= !found.is_empty();
        drop(contents);
        give_back_memory();
    }

    /// Programs what has changed, in maps that grow where they have to. With nothing changed it does nothing.
    pub(super) async fn sync(&mut self) -> Result<(), AgentError> {
        self.sync_changes().await?;
        while self.grow().await {
            self.sync_changes().await?;
        }
        Ok(())
    }

    async fn sync_changes(&mut self) -> Result<(), AgentError> {
        if self.everything {
            self.known.cluster.touch_all();
        }
        let mut dirty = self.known.cluster.take_dirty();
        let again = std::mem::take(&mut self.numbers_came_back) && !self.refused.is_empty();
        if dirty.is_empty() && !self.everything && !self.node_changed && !again {
            return Ok(());
        }
        self.telemetry.sync_begins(self.everything || self.zone_changed);
        dirty.extend(self.refused.iter().cloned());

        let mut programmed = match self.programmed.take() {
            Some(programmed) => programmed,
            None => self.open(self.sizes(dirty.iter())).await?,
        };
        if self.everything {
            programmed.model = read_back(&programmed.dataplane.maps)?;
            // Numbers that the lost knowledge had freed are found free again; a grace period makes them so.
            (self.waiting, self.freed) = (None, Freed::default());
            if let Err(error) = sys::grace_period() {
                tracing::warn!(%error, "waiting for running programs");
            }
            // Services that went while nothing could be programmed are named nowhere else.
            dirty.extend(programmed.model.ports.keys().map(|key| key.service.clone()));
            dirty.extend(self.report.services().into_iter().chain(self.check_ports.known()));
        }
        let programmed = self.programmed.insert(programmed);
        // Whose frontend it is can be told only with all who claim it, and of empty maps nobody is served.
        let empty = programmed.model.frontends.is_empty() && !programmed.attached;
        let touched: Vec<ObjectKey> = dirty.into_iter().collect();
        // What one of the node's own tables refuses is told at the end: nobody's Service waits for it.
        let node = self.program_node();
        let portions = touched.chunks(if empty { PORTION } else { touched.len().max(1) });
        let last = portions.len().saturating_sub(1);
        let mut udp_stale = false;
        for (number, services) in portions.enumerate() {
            udp_stale |= self.program(services, self.everything && number == last)?;
        }
        let first = self.serve(udp_stale)?;
        let took = self.telemetry.sync_ended(true);
        self.open_check_ports(touched);
        if self.everything {
            give_back_memory();
        }
        (self.everything, self.node_changed, self.zone_changed) = (false, false, false);
        if first {
            tracing::info!(?took, "everything is programmed");
        }
        for &family in &self.config.families {
            self.health.updated(family);
        }
        node
    }

    /// What the maps need for these Services.
    fn sizes<'a>(&self, services: impl Iterator<Item = &'a ObjectKey>) -> Sizes {
        let mut needs = Needs::default();
        for wanted in services.filter_map(|service| self.known.wanted(service)) {
            needs.add(&wanted.desired);
        }
        needs.sizes(self.config.flow_table_size)
    }

    /// Makes or takes over maps that are large enough, and loads the programs. Nothing is attached: what an earlier agent
    /// has attached, or this one, serves on from the maps as they were.
    async fn open(&mut self, sizes: Sizes) -> Result<Programmed, AgentError> {
        let pins = self.config.pins.clone();
        // It takes the kernel's verifier a while, and probes are to be answered meanwhile.
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
        self.report.refused(&PROGRAMS, &dataplane.refused);
        let sweeper = match SocketSweeper::new(Places::default()) {
            Ok(sweeper) => Some((Arc::new(sweeper), dataplane.sockets()?)),
            Err(error) => {
                self.report.set("node".to_owned(), vec![error.to_string()]);
                None
            }
        };
        let model = Model::new(dataplane.maps.capacity());
        Ok(Programmed { dataplane, model, sweeper, attached: false })
    }

    /// Moves into larger maps when something did not fit, or soon would not. True when there is something to be programmed
    /// or told because of that.
    async fn grow(&mut self) -> bool {
        let Some(programmed) = &self.programmed else { return false };
        if self.refused.is_empty() && !programmed.model.is_tight() || Instant::now() < self.grow_at {
            return false;
        }
        let capacity = programmed.dataplane.maps.capacity();
        let sizes = self.sizes(self.known.cluster.services().map(|service| &service.key));
        let grown = match sizes.least.fits_into(capacity) {
            // Nothing is gained by maps of the same size.
            true => Ok(None),
            false => self.open(sizes).await.map(Some),
        };
        let mut problems = Vec::new();
        match grown {
            Ok(Some(larger)) => {
                self.programmed = Some(larger);
                self.everything = true;
                self.facts.maps += 1;
            }
            not => {
                if let Err(error) = not {
                    let error = chain(&error);
                    tracing::warn!(%error, retry_in = ?self.config.sync_period, "maps cannot be made larger");
                    problems.push(format!(
                        "cannot be made larger: {error}; Services that do not fit are not served"
                    ));
                }
                self.grow_at = Instant::now() + self.config.sync_period;
                // Those that were refused are told so.
                self.numbers_came_back = true;
            }
        }
        self.report.set("maps".to_owned(), problems);
        true
    }

    /// Writes the node's own tables.
    fn program_node(&mut self) -> Result<(), AgentError> {
        let Some(Programmed { dataplane, model, .. }) = &mut self.programmed else { return Ok(()) };
        if !self.node_changed && !self.everything {
            return Ok(());
        }
        let (mut ops, problems) = self.known.plan_node(&self.config.nodeport_addresses, model);
        self.report.set("node tables".to_owned(), problems);
        ops.extend(plan_left(model, self.pods_attached, self.opted_out.as_ref()));
        self.telemetry.writing(&ops, |ops| carry_out(&mut dataplane.maps, ops))?;
        let host = self.known.context.host_addresses.iter().copied().collect();
        let warnings = self.config.nodeport_addresses.warnings(&self.known.context.node.ips, &host);
        self.report.set("--nodeport-addresses".to_owned(), warnings);
        Ok(())
    }

    /// Plans and writes these Services. True when connected UDP sockets may lead to where they should not any more.
    fn program(&mut self, services: &[ObjectKey], full: bool) -> Result<bool, AgentError> {
        let mut wanted: BTreeMap<ObjectKey, Option<Wanted>> =
            services.iter().map(|key| (key.clone(), self.known.wanted(key))).collect();
        for (service, wanted) in &wanted {
            self.telemetry.desired(service, wanted.as_ref().map(|wanted| &wanted.desired));
        }
        self.remember_remote(&wanted);
        let Some(Programmed { dataplane, model, .. }) = &mut self.programmed else { return Ok(false) };
        for rival in rivals(model, &wanted) {
            let unchanged = self.known.wanted(&rival);
            wanted.insert(rival, unchanged);
        }
        let plan = plan(model, &wanted, full);
        tracing::debug!(services = wanted.len(), operations = plan.ops.len(), "programming");
        self.telemetry.writing(&plan.ops, |ops| carry_out(&mut dataplane.maps, ops))?;
        self.freed.append(plan.freed);
        // Before the maps have grown, or could not, it is too early to complain.
        let may_grow = Instant::now() >= self.grow_at;
        for (service, wanted) in wanted {
            let mut reasons = wanted.map(|wanted| wanted.desired.problems).unwrap_or_default();
            match plan.refused.get(&service) {
                Some(refused) => {
                    reasons.extend(refused.iter().filter(|_| !may_grow).cloned());
                    self.refused.insert(service.clone());
                }
                None => {
                    self.refused.remove(&service);
                }
            }
            reasons.extend(lost_claims(model, &service));
            self.report.service(&service, reasons);
        }
        Ok(plan.udp_stale)
    }

    /// Has clients served by what has been written: attaches the programs, if they are not, and tidies up behind the
    /// change. True when they were not.
    fn serve(&mut self, udp_stale: bool) -> Result<bool, AgentError> {
        let Some(programmed) = &mut self.programmed else { return Ok(false) };
        let first = !programmed.attached;
        if first {
            programmed.dataplane.attach(&self.config.cgroup)?;
            selftest::run(&mut programmed.dataplane.maps)?;
            selftest::settle(&programmed.dataplane.maps)?;
            programmed.attached = true;
        }
        self.begin_grace();
        self.sweep_again |= udp_stale || first;
        self.begin_sweep();
        Ok(first)
    }

    /// Any backend on another node will do: the way to it shows which source the kernel prefers.
    fn remember_remote(&mut self, wanted: &BTreeMap<ObjectKey, Option<Wanted>>) {
        let ports = wanted.values().flatten().flat_map(|wanted| &wanted.desired.ports);
        let mut backends = ports.flat_map(|port| &port.backends).filter(|b| b.flags & ON_THIS_NODE == 0);
        while self.facts.remote.contains(&None)
            && let Some(backend) = backends.next()
        {
            if let Some(remote) = self.facts.remote.get_mut(backend.addr.family().index()) {
                remote.get_or_insert(backend.addr);
            }
        }
    }

    /// What becomes of the endpoints of a Service, and why.
    pub(super) fn reasons(&self, key: &ObjectKey) -> Vec<PortReasons> {
        let service = self.known.cluster.service(key);
        let reasons =
            |service| reasons::of_service(service, self.known.cluster.slices(key), &self.known.context);
        service.map(reasons).unwrap_or_default()
    }

    /// Has the health of these Services told to load balancers, on the addresses that serve nodePorts.
    fn open_check_ports(&self, services: Vec<ObjectKey>) {
        if self.node_changed || self.everything {
            let host = self.known.context.host_addresses.iter().copied().collect();
            let ips = &self.known.context.node.ips;
            let listen_on = |family| self.config.nodeport_addresses.listen_on(family, ips, &host);
            self.check_ports.listen_on(Family::ALL.map(listen_on));
        }
        let checks = |service: &ObjectKey| {
            let object = self.known.cluster.service(service);
            Family::ALL.map(|family| {
                let object = object.filter(|_| self.config.families.contains(&family))?;
                check(object, self.known.cluster.slices(service), family)
            })
        };
        self.check_ports.services(services.into_iter().map(|service| {
            let checks = checks(&service);
            (service, checks)
        }));
    }

    /// Waits for running programs beside the loop, unless that is under way.
    fn begin_grace(&mut self) {
        if self.waiting.is_none() && !self.freed.is_empty() {
            let freed = std::mem::take(&mut self.freed);
            self.waiting = Some((tokio::task::spawn_blocking(sys::grace_period), freed));
        }
    }

    pub(super) fn release(&mut self) {
        if let (Some((_, freed)), Some(programmed)) = (self.waiting.take(), &mut self.programmed) {
            programmed.model.release(freed);
            self.numbers_came_back = true;
        }
        self.begin_grace();
    }

    /// Destroys sockets that are connected to UDP backends which have left, beside the loop.
    fn begin_sweep(&mut self) {
        if !self.sweep_again || self.sweep.is_some() {
            return;
        }
        let Some(Programmed { model, sweeper: Some((sweeper, sockets)), .. }) = &self.programmed else {
            return;
        };
        let Ok(sockets) = sockets.try_clone() else { return };
        self.sweep_again = false;
        let (sweeper, metrics) = (Arc::clone(sweeper), Arc::clone(&self.metrics));
        let serving = Serving::of(model);
        let families = self.config.families.clone();
        self.sweep = Some(tokio::task::spawn_blocking(move || {
            use std::os::fd::AsFd as _;
            let start = Instant::now();
            match sweeper.destroy_stale(sockets.as_fd(), |record| serving.is_stale(record)) {
                Ok(report) => {
                    metrics.swept(&families, start.elapsed(), report.destroyed_by_family);
                    if report.destroyed > 0 {
                        tracing::info!(
                            destroyed = report.destroyed,
                            "destroyed sockets of UDP backends that have left"
                        );
                    }
                    for error in &report.errors {
                        tracing::warn!(%error, "sweeping stale UDP sockets");
                    }
                    tracing::debug!(?report, "stale UDP sockets swept");
                }
                Err(error) => tracing::warn!(%error, "stale UDP sockets could not be swept"),
            }
        }));
    }
}

fn read_back(maps: &KernelMaps) -> Result<Model, AgentError> {
    let contents = maps.contents()?;
    maps.refresh_filter(&contents).map_err(SelfTestError::from)?;
    Ok(Model::restore(maps.capacity(), &contents))
}

fn carry_out(maps: &mut impl MapStore, ops: &[Op]) -> Result<(), SelfTestError> {
    ops.iter().try_for_each(|op| maps.apply(op)).map_err(|error: StoreError| error.into())
}
