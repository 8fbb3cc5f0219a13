//! Reports on Services that have been programmed: problems to users, health to load balancers and probes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family};

use crate::host::device_name;
use crate::observe::health::Health;
use crate::observe::health::check_ports::CheckPorts;
use crate::observe::health::checks::Check;
use crate::observe::report::Report;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::plan::LostClaims;

/// Time in a turn for telling Services which of their claims others have.
const TELLING: Duration = Duration::from_millis(5);

/// Object by which problems name the addresses of this host.
const HOST_ADDRESSES: &str = "addresses of this host";
/// Number of Services that are named because this host has their addresses; kube-proxy in its IPVS mode leaves the
/// addresses of all Services on the host.
const NAMED: usize = 9;

/// Addresses of Services that are also addresses of this host, with the index of the device of each.
type Held = Vec<(Addr, IfIndex)>;

/// The reporters, and what they have been told of each Service.
#[derive(Debug)]
pub(super) struct Told {
    /// Problems of everything.
    pub(super) report: Report,
    /// Answers to probes.
    pub(super) health: Health,
    /// Servers of healthCheckNodePorts.
    pub(super) check_ports: CheckPorts,
    /// Services that have been programmed and whose health is not told yet.
    concluded: Vec<ObjectKey>,
    /// Problems of Services, except claims that other Services have.
    problems: BTreeMap<ObjectKey, Vec<String>>,
    /// Services with clusterIPs that are also addresses of this host.
    held_by_host: BTreeMap<ObjectKey, Held>,
    /// Services whose claims other Services may have taken or given back.
    rivals: BTreeSet<ObjectKey>,
}

impl Told {
    /// Makes the state in which nothing has been told.
    pub(super) fn new(report: Report, health: Health, check_ports: CheckPorts) -> Self {
        Self {
            report,
            health,
            check_ports,
            concluded: Vec::new(),
            problems: BTreeMap::new(),
            held_by_host: BTreeMap::new(),
            rivals: BTreeSet::new(),
        }
    }

    /// Forgets the problems of Services before everything is programmed.
    pub(super) fn forget_problems(&mut self) {
        self.problems.clear();
    }

    /// Returns all Services that have been told anything.
    pub(super) fn services(&self) -> impl Iterator<Item = ObjectKey> {
        self.report.services().into_iter().chain(self.check_ports.known())
    }

    /// Tells of a Service that has been programmed: its problems, the claims that others have, and the clusterIPs that
    /// are addresses of this host, where a process that listens is not reached.
    pub(super) fn programmed(
        &mut self,
        service: &ObjectKey,
        problems: Vec<String>,
        lost: LostClaims,
        held: Held,
    ) {
        self.concluded.push(service.clone());
        replace(&mut self.problems, service, problems);
        self.tell_problems(service, lost);
        if replace(&mut self.held_by_host, service, held) {
            self.report.set(HOST_ADDRESSES.to_owned(), held_by_host(&self.held_by_host));
        }
    }

    fn tell_problems(&mut self, service: &ObjectKey, lost: LostClaims) {
        let mut reasons = self.problems.get(service).cloned().unwrap_or_default();
        reasons.extend(lost.into_sentences());
        self.report.service(service, reasons);
    }

    /// Adds Services whose claims other Services may have taken or given back.
    pub(super) fn add_rivals(&mut self, services: impl IntoIterator<Item = ObjectKey>) {
        self.rivals.extend(services);
    }

    /// Removes a Service whose lost claims have just been told.
    pub(super) fn remove_rival(&mut self, service: &ObjectKey) {
        self.rivals.remove(service);
    }

    /// Returns whether there are Services whose claims others may have taken or given back.
    pub(super) fn has_rivals(&self) -> bool {
        !self.rivals.is_empty()
    }

    /// Tells Services whose frontends may have come or gone by claims of others; only some of them, if they are many.
    /// `lost` returns the claims of a Service that others have.
    pub(super) fn tell_rivals(&mut self, lost: impl Fn(&ObjectKey) -> LostClaims) {
        let start = Instant::now();
        while start.elapsed() < TELLING
            && let Some(service) = self.rivals.pop_first()
        {
            self.tell_problems(&service, lost(&service));
        }
    }

    /// Tells load balancers the health of the Services that have been programmed. `check` returns it for each family.
    pub(super) fn tell_health(&mut self, check: impl Fn(&ObjectKey, Family) -> Option<Check>) {
        let concluded = std::mem::take(&mut self.concluded);
        self.check_ports.services(concluded.into_iter().map(|service| {
            let checks = Family::ALL.map(|family| check(&service, family));
            (service, checks)
        }));
    }
}

/// Replaces the values of a Service; without values it has no element. Returns whether they were others.
fn replace<T: PartialEq>(map: &mut BTreeMap<ObjectKey, Vec<T>>, service: &ObjectKey, values: Vec<T>) -> bool {
    if values.is_empty() {
        return map.remove(service).is_some();
    }
    let changed = map.get(service) != Some(&values);
    map.insert(service.clone(), values);
    changed
}

/// Returns one sentence for each Service that has an address of this host, up to [`NAMED`], and one for the others.
fn held_by_host(held: &BTreeMap<ObjectKey, Held>) -> Vec<String> {
    let mut sentences: Vec<String> = held
        .iter()
        .take(NAMED)
        .map(|(service, held)| {
            let places = held.iter().map(|(addr, index)| {
                let device = device_name(*index).unwrap_or_else(|| format!("the device with the index {index}"));
                format!("{addr} is configured on {device}")
            });
            format!(
                "{} and is a clusterIP of Service {service}: who listens there is not reached at the Service's ports, which \
                 lead to its endpoints, nor at others, which are refused. If that is NodeLocal DNSCache or the like, label \
                 the Service service.kubernetes.io/service-proxy-name, or let it listen at another address; else remove \
                 the address",
                places.collect::<Vec<_>>().join(", ")
            )
        })
        .collect();
    let more = held.len().saturating_sub(NAMED);
    if more > 0 {
        sentences.push(format!("and {more} more Services like these"));
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::events::Events;
    use crate::observe::report::State;

    fn held(count: u8) -> BTreeMap<ObjectKey, Held> {
        // Index 1 is the loopback device of every network namespace.
        (0..count).map(|n| (key(&format!("s{n:03}")), vec![(Addr::v4([10, 96, 0, n]), IfIndex(1))])).collect()
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("a", name)
    }

    #[test]
    fn services_at_addresses_of_this_host_are_named_and_counted() {
        assert_eq!(held_by_host(&held(0)), [""; 0]);
        let sentences = held_by_host(&held(200));
        assert_eq!(sentences.len(), NAMED + 1);
        let begins = "10.96.0.0 is configured on lo and is a clusterIP of Service a/s000: ";
        assert!(sentences[0].starts_with(begins), "{sentences:?}");
        assert_eq!(sentences[NAMED], "and 191 more Services like these");
        // A device that is gone by now.
        let gone =
            BTreeMap::from([(ObjectKey::new("a", "s"), vec![(Addr::v4([10, 96, 0, 1]), IfIndex(u32::MAX))])]);
        assert!(held_by_host(&gone)[0].contains("on the device with the index 4294967295"));
    }

    /// Returns the agent's reporters, and the runtime that they need.
    fn told() -> (Told, tokio::runtime::Runtime) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let health = Health::new(Duration::from_secs(30));
        let check_ports = CheckPorts::start(health.clone(), runtime.handle());
        let report = Report::new("/nonexistent/state".into(), State::default(), Events::nowhere());
        (Told::new(report, health, check_ports), runtime)
    }

    #[test]
    fn problems_stay_when_rivals_are_told_and_go_when_the_service_is_well() {
        let (mut told, _runtime) = told();
        told.programmed(&key("x"), vec!["bad".to_owned()], LostClaims::default(), Vec::new());
        assert_eq!(told.services().collect::<Vec<_>>(), [key("x")]);
        told.add_rivals([key("x"), key("y")]);
        told.remove_rival(&key("y"));
        assert!(told.has_rivals());
        told.tell_rivals(|service| {
            assert_eq!(*service, key("x"), "told already");
            LostClaims::default()
        });
        assert!(!told.has_rivals());
        assert_eq!(told.report.count(), 1, "the problem is still there");
        told.programmed(&key("x"), Vec::new(), LostClaims::default(), Vec::new());
        assert_eq!((told.report.count(), told.services().count()), (0, 0));
    }

    #[test]
    fn the_host_has_the_address_of_a_service_until_it_or_the_service_has_gone() {
        let (mut told, _runtime) = told();
        for (service, held) in held(2) {
            told.programmed(&service, Vec::new(), LostClaims::default(), held);
        }
        assert_eq!((told.report.count(), told.held_by_host.len()), (1, 2));
        told.programmed(&key("s000"), Vec::new(), LostClaims::default(), Vec::new());
        assert_eq!(told.report.count(), 1, "of the other Service");
        told.programmed(&key("s001"), Vec::new(), LostClaims::default(), Vec::new());
        assert_eq!(told.report.count(), 0);
    }

    #[test]
    fn health_is_told_once_for_each_service_that_has_been_programmed() {
        let (mut told, _runtime) = told();
        for name in ["x", "y"] {
            told.programmed(&key(name), Vec::new(), LostClaims::default(), Vec::new());
        }
        told.tell_health(|service, family| {
            (*service == key("x") && family == Family::V4).then_some(Check { port: 30_000, endpoints: 1 })
        });
        assert_eq!(told.check_ports.known(), [key("x")]);
        told.tell_health(|_, _| panic!("told already"));
        assert_eq!(told.check_ports.known(), [key("x")]);
    }
}
