//! Effects of a plan on the maps: tables of single changes, and random histories with crashes.
//!
//! All checks read the [`Simulator`], which carries out the same operations that the kernel maps get. The names, sets
//! and verdicts in its contents are compared with the wanted state of the Services.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, ON_THIS_NODE, SERVING};
use proxy_common::abi::frontend::flags::SOURCE_RANGES;
use proxy_common::abi::proto::{TCP, UDP};
use proxy_common::abi::{
    BackendId, FilterBit, FrontendKey, FrontendKind, Service, ServiceId, SlotRange, frontend,
};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use proxy_common::datapath::tables::Tables as _;

use super::{
    FrontendName, LostClaims, NodeTables, Part, Plan, Wanted, plan, plan_node, plan_part, ports_beside,
    rivals,
};
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::desired::{DesiredBackend, DesiredPort, DesiredService, PortKey};
use crate::reconcile::model::{Freed, Model, Port, parse_name};
use crate::reconcile::sim::Simulator;
use crate::reconcile::store::{Capacity, Contents, MapStore as _, Op, backend_bits, filter_words};

mod changes;
mod drift;
mod full_maps;
mod histories;
mod machine;
mod node_ports;
mod parts;
mod restart;

/// Flags of an endpoint in the cluster set, in both sets, and in none (it drains).
const REMOTE: u32 = IN_CLUSTER | SERVING;
const HERE: u32 = IN_CLUSTER | IN_LOCAL | SERVING | ON_THIS_NODE;
const DRAINING: u32 = SERVING;

const ROOMY: Capacity =
    Capacity { frontends: 256, services: 64, slots: 512, backends: 256, source_ranges: 64 };

type Services = BTreeMap<ObjectKey, Wanted>;
type Endpoint = (Addr, Be16);

/// Meaning of the maps, without the numbers in them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Meaning {
    /// Service port behind each frontend (`None` for an active clusterIP as such), and the frontend's flags.
    frontends: BTreeMap<FrontendKey, (Option<PortKey>, u16)>,
    ports: BTreeMap<PortKey, PortMeaning>,
}

#[derive(Debug, PartialEq, Eq)]
struct PortMeaning {
    cluster: Set,
    local: Set,
    affinity_seconds: u32,
    flags: BTreeMap<Endpoint, u32>,
    source_ranges: BTreeSet<Prefix>,
}

#[derive(Debug, PartialEq, Eq)]
enum Set {
    Endpoints(Vec<Endpoint>),
    Verdict(SlotRange),
}

/// Reads the meaning of the maps.
#[track_caller]
fn read(contents: &Contents) -> Meaning {
    let names: BTreeMap<ServiceId, PortKey> = contents
        .names
        .iter()
        .map(|(id, name)| (*id, parse_name(name).expect("a name that parses")))
        .collect();
    let mut meaning = Meaning::default();
    for (id, key) in &names {
        let service = element(contents, *id);
        let backends = (0..).zip(&contents.backends).filter(|(_, b)| b.service == *id && b.state.flags != 0);
        let port = PortMeaning {
            cluster: set(contents, service.cluster),
            local: set(contents, service.local),
            affinity_seconds: service.affinity.seconds,
            flags: backends.map(|(_, b)| ((b.addr, b.port), b.state.flags)).collect(),
            source_ranges: ranges_of(contents, *id),
        };
        assert!(meaning.ports.insert(key.clone(), port).is_none(), "two ids are named {key:?}");
    }
    for (id, range) in &contents.source_ranges {
        assert!(names.contains_key(id), "{range} belongs to nobody");
    }
    for (key, value) in &contents.frontends {
        assert!(value.is_for(key));
        let owner = (key.kind != FrontendKind::Address as u8).then(|| names[&value.service].clone());
        meaning.frontends.insert(*key, (owner, value.flags));
    }
    meaning
}

/// Returns an element of `SERVICES`; zero if it was never written.
fn element(contents: &Contents, id: ServiceId) -> Service {
    contents.services.get(id.0 as usize).copied().unwrap_or_default()
}

fn ranges_of(contents: &Contents, service: ServiceId) -> BTreeSet<Prefix> {
    contents.source_ranges.iter().filter(|(id, _)| *id == service).map(|(_, range)| *range).collect()
}

fn set(contents: &Contents, range: SlotRange) -> Set {
    if range.is_empty() {
        return Set::Verdict(range);
    }
    let slots = &contents.slots[range.base as usize..][..range.len as usize];
    let backends = slots.iter().map(|id| contents.backends[id.0 as usize]);
    Set::Endpoints(backends.map(|b| (b.addr, b.port)).collect())
}

/// Returns the set of this bit; `empty` is the verdict of a set without members.
fn set_of(port: &DesiredPort, bit: u32, empty: SlotRange) -> Set {
    let members = members_of(&port.backends, bit);
    if members.is_empty() { Set::Verdict(empty) } else { Set::Endpoints(members) }
}

fn members_of(backends: &[DesiredBackend], bit: u32) -> Vec<Endpoint> {
    backends.iter().filter(|b| b.flags & bit != 0).map(|b| (b.addr, b.port)).collect()
}

/// Returns the rank of a claim, the lower the better: a clusterIP, a load balancer's address, an externalIP. A
/// nodePort competes with nodePorts only.
fn rank(key: &FrontendKey, flags: u16) -> u8 {
    match (flags & frontend::flags::EXTERNAL, flags & frontend::flags::LOAD_BALANCER) {
        _ if key.kind == FrontendKind::NodePort as u8 => 0,
        (0, _) => 0,
        (_, 0) => 2,
        _ => 1,
    }
}

/// Derives the meaning that the maps ought to have from the Services alone, without ids and without an order of
/// events.
fn ought(services: &Services) -> Meaning {
    let mut meaning = Meaning::default();
    let mut best: BTreeMap<FrontendKey, (u8, i64, PortKey, u16)> = BTreeMap::new();
    for wanted in services.values() {
        for port in &wanted.desired.ports {
            for (key, flags) in &port.frontends {
                let claim = (rank(key, *flags), wanted.created, port.key.clone(), *flags);
                let holder = best.entry(*key).or_insert_with(|| claim.clone());
                if (claim.0, claim.1, &claim.2) < (holder.0, holder.1, &holder.2) {
                    *holder = claim;
                }
            }
            meaning.ports.insert(
                port.key.clone(),
                PortMeaning {
                    cluster: set_of(port, IN_CLUSTER, SlotRange::REJECT),
                    local: set_of(port, IN_LOCAL, port.empty_local),
                    affinity_seconds: port.affinity_seconds,
                    flags: port.backends.iter().map(|b| ((b.addr, b.port), b.flags)).collect(),
                    source_ranges: port.source_ranges.iter().copied().collect(),
                },
            );
        }
    }
    for (key, (.., owner, flags)) in best {
        let owner = (key.kind != FrontendKind::Address as u8).then_some(owner);
        meaning.frontends.insert(key, (owner, flags));
    }
    meaning
}

/// Maps and the model of them, brought from one set of Services to the next.
struct Bench {
    model: Model,
    sim: Simulator,
    services: Services,
}

impl Bench {
    fn new(capacity: Capacity) -> Self {
        Self { model: Model::new(capacity), sim: Simulator::default(), services: Services::new() }
    }

    /// Plans a change of some Services and carries it out, without releasing the freed numbers.
    fn change(&mut self, changes: &[(&str, Option<Wanted>)]) -> Plan {
        let mut services = BTreeMap::new();
        for (name, wanted) in changes {
            match wanted {
                Some(wanted) => self.services.insert(service(name), wanted.clone()),
                None => self.services.remove(&service(name)),
            };
            services.insert(service(name), wanted.clone());
        }
        self.carry_out(&services, false)
    }

    /// Restarts as an agent that knows only the contents of the maps.
    fn restart(&mut self) -> Plan {
        self.model = Model::restore(self.model.capacity, &self.sim.contents());
        let services = everything(&self.model, &self.services);
        self.carry_out(&services, true)
    }

    fn carry_out(&mut self, services: &BTreeMap<ObjectKey, Option<Wanted>>, full: bool) -> Plan {
        let plan = plan(&mut self.model, services, full);
        for op in &plan.ops {
            self.sim.apply(op).unwrap();
        }
        plan
    }

    /// Makes a change that fits, waits for the grace period, and checks the meaning of the maps.
    #[track_caller]
    fn becomes(&mut self, changes: &[(&str, Option<Wanted>)]) -> Plan {
        let mut plan = self.change(changes);
        assert_eq!(plan.refused, BTreeMap::new());
        self.model.release(std::mem::take(&mut plan.freed));
        assert_eq!(read(&self.sim.contents()), ought(&self.services));
        account(&self.model, &Freed::default());
        plan
    }

    #[track_caller]
    fn id(&self, name: &str) -> ServiceId {
        self.model.ports[self.model.ports_of(&service(name)).next().expect("a port")].id
    }

    #[track_caller]
    fn element(&self, name: &str) -> Service {
        element(&self.sim.contents(), self.id(name))
    }

    /// Returns id and generation of an endpoint of a Service.
    #[track_caller]
    fn backend(&self, name: &str, endpoint: u8) -> (BackendId, u32) {
        let id = self.id(name);
        let contents = self.sim.contents();
        let mut found = (0..).map(BackendId).zip(&contents.backends).filter(|(_, b)| {
            b.service == id && b.state.flags != 0 && (b.addr, b.port) == self::endpoint(endpoint)
        });
        let (backend, element) = found.next().expect("the endpoint has an id");
        assert!(found.next().is_none(), "the endpoint has two ids");
        (backend, element.state.generation)
    }
}

/// Returns the Services whose problems must be reported anew when a Service becomes `wanted`.
fn concerned(bench: &Bench, name: &str, wanted: Option<Wanted>) -> Vec<String> {
    let service = service(name);
    let wanted = wanted.unwrap_or(Wanted { created: 0, desired: DesiredService::default() });
    let ports = &wanted.desired.ports;
    let gone = ports_beside(&bench.model, &service, ports);
    let part = Part { created: wanted.created, ports, gone: &gone };
    rivals(&bench.model, &service, &part).iter().map(ToString::to_string).collect()
}

/// Returns the input of a full plan: every existing Service, and every Service that the maps still hold.
fn everything(model: &Model, services: &Services) -> BTreeMap<ObjectKey, Option<Wanted>> {
    let gone = model.ports.keys().map(|key| (key.service.clone(), None));
    gone.chain(services.iter().map(|(key, wanted)| (key.clone(), Some(wanted.clone())))).collect()
}

/// Checks that every number is in use, free, or waiting for a grace period.
#[track_caller]
fn account(model: &Model, freed: &Freed) {
    let ids = model.ports.len() + model.orphans.len() + freed.services.len();
    assert_eq!(
        model.service_ids.available() as usize + ids,
        model.capacity.services as usize - 1,
        "service ids"
    );
    let ids: usize = model.ports.values().map(|port| port.backends.len()).sum();
    let ids = ids + freed.backends.len() + model.backend_ids.available() as usize;
    assert_eq!(ids, model.capacity.backends as usize - 1, "backend ids");
    let ranges = model.ports.values().flat_map(Port::ranges);
    let slots: u32 = ranges.chain(freed.ranges.iter().copied()).map(|range| range.len).sum();
    assert_eq!(slots + model.slots.available(), model.capacity.slots - 1, "slots");
}

fn service(name: &str) -> ObjectKey {
    ObjectKey::new("a", name)
}

fn vip(number: u8) -> Addr {
    Addr::v4([10, 96, 0, number])
}

fn endpoint(number: u8) -> Endpoint {
    (Addr::v4([10, 64, 1, number]), Be16::new(8080))
}

fn endpoints(list: &[(u8, u32)]) -> Vec<DesiredBackend> {
    list.iter()
        .map(|&(number, flags)| {
            let (addr, port) = endpoint(number);
            DesiredBackend { addr, port, flags }
        })
        .collect()
}

fn exact(number: u8, port: u16, proto: u8) -> FrontendKey {
    FrontendKey::exact(vip(number), Be16::new(port), proto)
}

fn node_port(port: u16, proto: u8) -> FrontendKey {
    FrontendKey::node_port(Addr::v4([0; 4]), Be16::new(port), proto)
}

fn wanted(created: i64, ports: Vec<DesiredPort>) -> Option<Wanted> {
    Some(Wanted { created, desired: DesiredService { ports, problems: Vec::new() } })
}

/// Returns a port of the Service `name`, without session affinity.
fn port(name: &str, proto: u8, frontends: &[FrontendKey], backends: &[(u8, u32)]) -> DesiredPort {
    let frontends: BTreeMap<FrontendKey, u16> = frontends.iter().map(|key| (*key, 0)).collect();
    DesiredPort {
        key: PortKey { service: service(name), port_name: "".into(), proto, family: Family::V4 },
        frontends: frontends.into_iter().collect(),
        backends: endpoints(backends),
        empty_local: SlotRange::REJECT,
        affinity_seconds: 0,
        source_ranges: Vec::new(),
    }
}

/// Returns a Service with TCP port 80 on one clusterIP.
fn web(name: &str, ip: u8, backends: &[(u8, u32)]) -> Option<Wanted> {
    wanted(1, vec![port(name, TCP, &[exact(ip, 80, TCP), FrontendKey::address(vip(ip))], backends)])
}

/// Returns the same Service, for clients from these ranges ([`range`]) only; without ranges, for everybody.
fn guarded(name: &str, ip: u8, ranges: &[u8]) -> Option<Wanted> {
    let mut wanted = web(name, ip, &[(1, HERE)]);
    for port in wanted.iter_mut().flat_map(|wanted| &mut wanted.desired.ports).filter(|_| !ranges.is_empty())
    {
        port.source_ranges = ranges.iter().map(|number| range(*number)).collect();
        for (_, flags) in port.frontends.iter_mut().filter(|(key, _)| *key == exact(ip, 80, TCP)) {
            *flags = SOURCE_RANGES;
        }
    }
    wanted
}

/// 203.0.NUMBER.0/24.
fn range(number: u8) -> Prefix {
    Prefix::new(Addr::v4([203, 0, number, 0]), 24).unwrap()
}

/// Returns the Service of [`web`] with session affinity.
fn sticky(name: &str, ip: u8, backends: &[(u8, u32)], seconds: u32) -> Option<Wanted> {
    let mut wanted = web(name, ip, backends);
    for port in wanted.iter_mut().flat_map(|wanted| &mut wanted.desired.ports) {
        port.affinity_seconds = seconds;
    }
    wanted
}

/// Returns the kinds of operations of a plan, in order: `+` adds or replaces, `-` removes.
fn outline(plan: &Plan) -> Vec<String> {
    plan.ops
        .iter()
        .map(|op| match op {
            Op::Name(_, name) => format!("{}name", sign(name.is_some())),
            Op::Backend(..) => "backend".to_owned(),
            Op::BackendState(_, state) => format!("state {:#x}", state.flags),
            Op::Slots(_, ids) => format!("{} slots", ids.len()),
            Op::Service(..) => "service".to_owned(),
            Op::Frontend(key, value) => format!("{}{}", sign(value.is_some()), FrontendName(key)),
            Op::SourceRange(id, range, add) => format!("{}{range} for {id}", sign(*add)),
            Op::LocalAddress(addr, bits) => format!("{}{addr}", sign(bits.is_some())),
            Op::ServiceCidr(cidr, add) => format!("{}{cidr}", sign(*add)),
            Op::PodSource(pods, add) => format!("{}pods {pods}", sign(*add)),
            Op::OptOut(cgroup, what) => format!("{}cgroup {cgroup}", sign(what.is_some())),
            Op::Sandbox(netns, cgroup) => format!("{}sandbox {netns}", sign(cgroup.is_some())),
            Op::NodeFlags(flags) => format!("flags {flags}"),
        })
        .collect()
}

fn sign(adds: bool) -> char {
    if adds { '+' } else { '-' }
}

fn lost_claims(model: &Model, service: &ObjectKey) -> Vec<String> {
    let mut lost = LostClaims::default();
    lost.look(model, service, model.ports_of(service).map(AsRef::as_ref));
    lost.into_sentences()
}
