//! Carries a history out, operation by operation, and checks everything after each operation.
//!
//! A BPF program that has read a Service uses what it read until it ends, and a grace period waits for that end.
//! Everything that any frontend has led to since the last grace period must therefore stay readable: the machine
//! remembers all of it.

use proxy_common::abi::{BackendId, ServiceId};

use super::*;
use crate::reconcile::drift::differences;

/// State that a BPF program may hold: a service id and a range (base, length), and the backends in it.
type Held = BTreeMap<(ServiceId, u32, u32), Vec<(BackendId, Endpoint)>>;

/// An affinity entry that counts: service id and epoch, backend id and generation.
type Memory = (ServiceId, u32, BackendId, u32);

/// One step: the changed Services, the points at which the agent crashes (fractions of the plan at hand; after each
/// crash the agent starts again and plans everything), and the progress of grace periods afterwards.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) changes: Vec<(ObjectKey, Option<Wanted>)>,
    pub(super) crashes: Vec<u8>,
    pub(super) grace: Grace,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Grace {
    Nothing,
    Begins,
    Ends,
}

pub(super) struct Machine {
    bench: Bench,
    /// Wanted states of each Service port since its last converged state.
    asked: BTreeMap<PortKey, Vec<DesiredPort>>,
    /// State read before the current grace period began, and state read since.
    held: [Held; 2],
    waiting: Option<Freed>,
    freed: Freed,
    memories: BTreeMap<Memory, (PortKey, Endpoint)>,
    forgotten: BTreeSet<Memory>,
    /// Services of which something did not fit in their last plan.
    pub(super) refused: BTreeSet<ObjectKey>,
}

impl Machine {
    pub(super) fn new(capacity: Capacity) -> Self {
        Self {
            bench: Bench::new(capacity),
            asked: BTreeMap::new(),
            held: Default::default(),
            waiting: None,
            freed: Freed::default(),
            memories: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            refused: BTreeSet::new(),
        }
    }

    pub(super) fn step(&mut self, step: &Step) {
        let bystanders = Bystanders::of(&self.bench, &step.changes, &self.refused);
        let ids = self.ids();
        let mut plan_for: BTreeMap<ObjectKey, Option<Wanted>> = BTreeMap::new();
        for (key, wanted) in &step.changes {
            plan_for.insert(key.clone(), wanted.clone());
            for port in wanted.iter().flat_map(|wanted| &wanted.desired.ports) {
                self.asked.entry(port.key.clone()).or_default().push(port.clone());
            }
            match wanted {
                Some(wanted) => self.bench.services.insert(key.clone(), wanted.clone()),
                None => self.bench.services.remove(key),
            };
        }
        let mut crashes = step.crashes.iter();
        let mut full = false;
        loop {
            let plan = plan(&mut self.bench.model, &plan_for, full);
            let crash = crashes.next().map(|at| plan.ops.len() * usize::from(*at) / 255);
            self.carry_out(&plan, crash.unwrap_or(plan.ops.len()), &bystanders);
            if crash.is_none() {
                self.refused.retain(|key| !plan_for.contains_key(key));
                self.refused.extend(plan.refused.into_keys());
                self.freed.append(plan.freed);
                break;
            }
            let capacity = self.bench.model.capacity;
            self.bench.model = Model::restore(capacity, &self.bench.sim.contents());
            // The agent waits for a grace period before it plans from what it read.
            (self.held, self.waiting, self.freed) = Default::default();
            self.observe();
            full = true;
            plan_for = everything(&self.bench.model, &self.bench.services);
            // Refused Services may have been deleted since, and are named nowhere else.
            for key in &self.refused {
                plan_for.entry(key.clone()).or_insert(None);
            }
        }
        self.converged(&ids);
        self.grace(step.grace);
    }

    fn carry_out(&mut self, plan: &Plan, count: usize, bystanders: &Bystanders) {
        let before: BTreeSet<FrontendKey> = self.frontends();
        let after: BTreeSet<FrontendKey> = self.bench.model.frontends.keys().copied().collect();
        self.observe();
        for op in plan.ops.iter().take(count) {
            self.refuse_reuse(op);
            self.bench.sim.apply(op).unwrap();
            self.observe();
            self.readable();
            let now = self.frontends();
            assert!(now.is_superset(&(&before & &after)), "a frontend that stays has vanished with {op:?}");
            assert!(now.is_subset(&(&before | &after)));
            let (contents, capacity) = (self.bench.sim.contents(), self.bench.model.capacity);
            assert!(now.len() <= capacity.frontends as usize, "FRONTENDS overflows with {op:?}");
            let ranges = contents.source_ranges.len();
            assert!(ranges <= capacity.source_ranges as usize, "SOURCE_RANGES overflows with {op:?}");
            bystanders.are_untouched(&contents);
        }
    }

    fn frontends(&self) -> BTreeSet<FrontendKey> {
        self.bench.sim.contents().frontends.iter().map(|(key, _)| *key).collect()
    }

    /// Follows every frontend as a BPF program would. Each frontend must lead to a named Service port with two good
    /// sets.
    fn observe(&mut self) {
        let contents = self.bench.sim.contents();
        let needed = filter_words(&contents);
        for (word, bits) in (0..).zip(&needed).filter(|(_, bits)| **bits != 0) {
            assert_eq!(self.bench.sim.filter(word) & bits, *bits, "FILTER hides something of ours");
        }
        for backend in contents.backends.iter().filter(|backend| backend.state.flags != 0) {
            for FilterBit { word, mask } in backend_bits(&backend.addr, backend.port) {
                assert_ne!(needed[word as usize] & mask, 0, "the next agent hides a backend");
            }
        }
        let names: BTreeMap<ServiceId, PortKey> =
            contents.names.iter().map(|(id, name)| (*id, parse_name(name).unwrap())).collect();
        for (id, range) in &contents.source_ranges {
            let asked = &self.asked[&names[id]];
            assert!(
                asked.iter().any(|asked| asked.source_ranges.contains(range)),
                "{range} never was a source range of {:?}",
                names[id]
            );
        }
        for (key, value) in &contents.frontends {
            assert!(value.is_for(key));
            if key.kind == FrontendKind::Address as u8 {
                continue;
            }
            let port = &names[&value.service];
            let asked = &self.asked[port];
            assert!(
                asked.iter().any(|asked| asked.frontends.iter().any(|claim| claim == &(*key, value.flags))),
                "{key:?} never was a frontend of {port:?} with flags {}",
                value.flags
            );
            let ranges = ranges_of(&contents, value.service);
            let filtered = asked.iter().any(|asked| {
                let claims = asked.frontends.contains(&(*key, value.flags));
                claims && asked.source_ranges.iter().all(|range| ranges.contains(range))
            });
            assert!(filtered, "{key:?} leads to {port:?} without its ranges: {ranges:?}");
            let service = element(&contents, value.service);
            for (range, bit) in [(service.cluster, IN_CLUSTER), (service.local, IN_LOCAL)] {
                if range.is_empty() {
                    assert!([SlotRange::REJECT, SlotRange::DROP].contains(&range), "{port:?}: {range:?}");
                    continue;
                }
                let mut seen = Vec::new();
                for slot in range.base..range.base + range.len {
                    let id = contents.slots[slot as usize];
                    let backend = contents.backends[id.0 as usize];
                    assert_eq!(backend.service, value.service, "{port:?}: slot {slot} names backend {id}");
                    assert!(
                        backend.state.flags & bit != 0,
                        "{port:?}: backend {id} is offered, but marked dead"
                    );
                    seen.push((id, (backend.addr, backend.port)));
                }
                let members: Vec<Endpoint> = seen.iter().map(|(_, endpoint)| *endpoint).collect();
                assert!(
                    asked.iter().any(|asked| members_of(&asked.backends, bit) == members),
                    "{port:?} never asked for {members:?}"
                );
                let [_, held] = &mut self.held;
                held.insert((value.service, range.base, range.len), seen);
            }
        }
    }

    /// Checks that a reader of a range still finds the backends that the range named.
    fn readable(&self) {
        let contents = self.bench.sim.contents();
        for ((service, base, _), seen) in self.held.iter().flatten() {
            for (slot, (id, endpoint)) in (*base..).zip(seen) {
                assert_eq!(contents.slots[slot as usize], *id, "slot {slot} is reused under readers");
                let backend = contents.backends[id.0 as usize];
                assert_eq!((backend.addr, backend.port), *endpoint, "backend {id} is reused under readers");
                assert_eq!(backend.service, *service, "backend {id} is reused under readers");
            }
        }
    }

    /// Checks that no operation writes to a number that still waits for a grace period.
    fn refuse_reuse(&self, op: &Op) {
        let freed = [Some(&self.freed), self.waiting.as_ref()];
        for freed in freed.into_iter().flatten() {
            let reused = match op {
                Op::Backend(id, _) => freed.backends.iter().any(|(freed, _)| freed == id),
                Op::Name(id, Some(_)) | Op::SourceRange(id, _, true) => {
                    freed.services.iter().any(|(freed, _)| freed == id)
                }
                Op::Slots(base, ids) => {
                    let end = base + u32::try_from(ids.len()).unwrap();
                    freed.ranges.iter().any(|range| *base < range.base + range.len && range.base < end)
                }
                Op::Name(_, None)
                | Op::SourceRange(_, _, false)
                | Op::BackendState(..)
                | Op::Service(..)
                | Op::Frontend(..)
                | Op::LocalAddress(..)
                | Op::ServiceCidr(..)
                | Op::PodSource(..)
                | Op::OptOut(..)
                | Op::Sandbox(..)
                | Op::NodeFlags(..) => false,
            };
            assert!(!reused, "{op:?} writes to what is not free yet");
        }
    }

    fn ids(&self) -> BTreeMap<PortKey, ServiceId> {
        self.bench.sim.contents().names.iter().map(|(id, name)| (parse_name(name).unwrap(), *id)).collect()
    }

    /// Checks that the maps are in the wanted state and that the model matches them, with or without crashes on the
    /// way.
    fn converged(&mut self, ids_before: &BTreeMap<PortKey, ServiceId>) {
        let contents = self.bench.sim.contents();
        let freed = {
            let mut all = self.freed.clone();
            all.append(self.waiting.clone().unwrap_or_default());
            all
        };
        account(&self.bench.model, &freed);
        assert_eq!(contents.names.len(), self.bench.model.ports.len());

        // The model is equal to the model that would be read back.
        let mut restored = Model::restore(self.bench.model.capacity, &contents);
        for (key, port) in &mut restored.ports {
            port.claims.clone_from(&self.bench.model.ports[key].claims);
        }
        assert_eq!(restored.ports, self.bench.model.ports);
        assert_eq!(restored.frontends, self.bench.model.frontends);
        assert_eq!(restored.source_ranges, self.bench.model.source_ranges);
        assert_eq!(restored.orphans, Vec::new());
        account(&restored, &Freed::default());
        assert_eq!(differences(&self.bench.model, &contents, &filter_words(&contents)), []);

        let ids = self.ids();
        for (key, id) in ids_before.iter().filter(|(key, _)| ids.contains_key(key)) {
            assert_eq!(ids[key], *id, "{key:?} has another id than before");
        }
        let (read, ought) = (read(&contents), ought(&self.bench.services));
        if self.refused.is_empty() {
            assert_eq!(read, ought);
            let again = plan(
                &mut self.bench.model.clone(),
                &everything(&self.bench.model, &self.bench.services),
                true,
            );
            assert_eq!(again.ops, Vec::new(), "nothing is left to do");
        }
        for (key, port) in &ought.ports {
            if !self.refused.contains(&key.service) {
                assert_eq!(read.ports.get(key), Some(port));
            }
        }
        let refused = &self.refused;
        let services = &self.bench.services;
        self.asked.retain(|key, _| {
            refused.contains(&key.service)
                || services.get(&key.service).is_some_and(|w| w.desired.ports.iter().any(|p| p.key == *key))
        });
        for (key, asked) in &mut self.asked {
            if !refused.contains(&key.service) {
                asked.drain(..asked.len() - 1);
            }
        }
        self.remember(&contents);
    }

    /// Checks that an affinity entry that has ceased to count never counts again, and never changes its owner.
    fn remember(&mut self, contents: &Contents) {
        let mut memories = BTreeMap::new();
        for (id, name) in &contents.names {
            let service = element(contents, *id);
            for (backend, b) in (0..).map(BackendId).zip(&contents.backends) {
                let counts = b.service == *id && b.state.flags & (IN_CLUSTER | IN_LOCAL) != 0;
                if counts && service.affinity.seconds != 0 {
                    let memory = (*id, service.affinity.epoch, backend, b.state.generation);
                    memories.insert(memory, (parse_name(name).unwrap(), (b.addr, b.port)));
                }
            }
        }
        for (memory, who) in &memories {
            assert!(!self.forgotten.contains(memory), "{memory:?} of {who:?} was forgotten");
            assert!(self.memories.get(memory).is_none_or(|before| before == who), "{memory:?} changed hands");
        }
        self.forgotten.extend(self.memories.keys().filter(|memory| !memories.contains_key(memory)));
        self.memories = memories;
    }

    fn grace(&mut self, grace: Grace) {
        match grace {
            Grace::Nothing => {}
            Grace::Begins => {
                if self.waiting.is_none() {
                    self.waiting = Some(std::mem::take(&mut self.freed));
                    let [before, since] = &mut self.held;
                    before.append(since);
                    self.observe();
                }
            }
            Grace::Ends => {
                if let Some(freed) = self.waiting.take() {
                    self.bench.model.release(freed);
                    self.held[0].clear();
                }
            }
        }
    }

    /// Moves into maps of this size, and plans everything, as after a crash before the first operation.
    pub(super) fn grow(&mut self, capacity: Capacity) {
        let contents = self.bench.sim.contents();
        let mut larger = Simulator::default();
        contents.elements().for_each(|op| larger.apply(&op).unwrap());
        assert_eq!(format!("{:?}", larger.contents()), format!("{contents:?}"));
        self.bench.sim = larger;
        self.bench.model.capacity = capacity;
        self.step(&Step { changes: Vec::new(), crashes: vec![0], grace: Grace::Nothing });
    }

    /// Lets every grace period pass.
    pub(super) fn settle(&mut self) {
        for grace in [Grace::Ends, Grace::Begins, Grace::Ends] {
            self.grace(grace);
        }
        account(&self.bench.model, &Freed::default());
    }

    /// Removes every Service, and checks that all numbers are free again.
    pub(super) fn clear(&mut self) {
        let keys = everything(&self.bench.model, &self.bench.services).into_keys();
        let changes = keys.map(|key| (key, None)).collect();
        self.step(&Step { changes, crashes: Vec::new(), grace: Grace::Nothing });
        self.settle();
        let Model { capacity, service_ids, backend_ids, slots, frontends, source_ranges, .. } =
            &self.bench.model;
        let free = [service_ids.available(), backend_ids.available(), slots.available()];
        assert_eq!(free, [capacity.services - 1, capacity.backends - 1, capacity.slots - 1]);
        assert_eq!((frontends.len(), source_ranges.len()), (0, 0));
        assert_eq!(read(&self.bench.sim.contents()), Meaning::default());
    }
}

/// Contents of the maps for the Services that a step leaves alone.
struct Bystanders {
    ports: BTreeMap<ServiceId, String>,
    frontends: BTreeMap<FrontendKey, String>,
}

impl Bystanders {
    fn of(bench: &Bench, changes: &[(ObjectKey, Option<Wanted>)], refused: &BTreeSet<ObjectKey>) -> Self {
        let contents = bench.sim.contents();
        // Every full plan tries refused Services again.
        let changed =
            |key: &ObjectKey| refused.contains(key) || changes.iter().any(|(changed, _)| changed == key);
        let old =
            bench.model.claims.iter().filter(|(_, claims)| claims.iter().any(|c| changed(&c.port.service)));
        let waiting = refused.iter().filter_map(|key| bench.services.get(key));
        let new = changes.iter().flat_map(|(_, wanted)| wanted).chain(waiting);
        let new = new.flat_map(|wanted| &wanted.desired.ports);
        let new = new.flat_map(|port| port.frontends.iter().map(|(key, _)| *key));
        let contested: BTreeSet<FrontendKey> = old.map(|(key, _)| *key).chain(new).collect();
        let ports = contents.names.iter().filter(|(_, name)| !changed(&parse_name(name).unwrap().service));
        Self {
            ports: ports.map(|(id, _)| (*id, Self::port(&contents, *id))).collect(),
            frontends: contents
                .frontends
                .iter()
                .filter(|(key, _)| !contested.contains(key))
                .map(|(key, value)| (*key, format!("{value:?}")))
                .collect(),
        }
    }

    fn port(contents: &Contents, id: ServiceId) -> String {
        let service = element(contents, id);
        let backends: Vec<_> = (0..).zip(&contents.backends).filter(|(_, b)| b.service == id).collect();
        let live: Vec<_> = backends.into_iter().filter(|(_, b)| b.state.flags != 0).collect();
        let ranges = ranges_of(contents, id);
        format!(
            "{service:?} {:?} {:?} {live:?} {ranges:?}",
            slots(contents, service.cluster),
            slots(contents, service.local)
        )
    }

    fn are_untouched(&self, contents: &Contents) {
        for (id, port) in &self.ports {
            assert_eq!(&Self::port(contents, *id), port, "a Service that nobody changed");
            assert!(contents.names.iter().any(|(named, _)| named == id));
        }
        for (key, value) in &self.frontends {
            let now =
                contents.frontends.iter().find(|(now, _)| now == key).map(|(_, now)| format!("{now:?}"));
            assert_eq!(now.as_ref(), Some(value), "frontend {key:?}, which nobody changed");
        }
    }
}

fn slots(contents: &Contents, range: SlotRange) -> &[BackendId] {
    if range.is_empty() { &[] } else { &contents.slots[range.base as usize..][..range.len as usize] }
}
