//! Reports on Services that have been programmed: problems to users, health to load balancers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proxy_common::abi::IfIndex;
use proxy_common::addr::{Addr, Family};
use rustix::net::netdevice::index_to_name;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::Agent;
use super::extent::Extent;
use super::programmed::Programmed;
use crate::observe::health::checks::{Check, check};
use crate::observe::reasons;
use crate::observe::reasons::PortReasons;
use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::plan::LostClaims;

/// Time in a turn for telling Services which of their claims others have.
const TELLING: Duration = Duration::from_millis(5);

/// Object by which problems name the addresses of this host.
const HOST_ADDRESSES: &str = "addresses of this host";
/// Number of Services that are named because this host has their addresses; kube-proxy in its IPVS mode leaves the
/// addresses of all Services on the host.
const NAMED: usize = 9;

/// Returns one sentence for each Service that has an address of this host, up to [`NAMED`], and one for the others.
fn held_by_host(held: &BTreeMap<ObjectKey, Vec<(Addr, IfIndex)>>) -> Vec<String> {
    let mut sentences: Vec<String> = held
        .iter()
        .take(NAMED)
        .map(|(service, held)| {
            let places = held.iter().map(|(addr, index)| format!("{addr} is configured on {}", device_name(*index)));
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

fn device_name(index: IfIndex) -> String {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let name = socket.and_then(|socket| index_to_name(socket, index.0));
    name.unwrap_or_else(|_gone| format!("the device with the index {index}"))
}

impl Agent {
    /// Tells the problems of a Service that has been programmed in one piece.
    pub(super) fn tell(&mut self, service: &ObjectKey, problems: Vec<String>, refused: &[String]) {
        let lost = self.lost(service);
        self.conclude(service, problems, refused, lost);
        self.retell.remove(service);
    }

    /// Tells the problems of a Service that has been programmed in parts. `lost` was found part by part; a Service that
    /// has taken a claim in between has left a note in `retell`.
    pub(super) fn conclude(
        &mut self,
        service: &ObjectKey,
        mut problems: Vec<String>,
        refused: &[String],
        lost: LostClaims,
    ) {
        self.concluded.push(service.clone());
        match refused.is_empty() {
            true => self.refused.remove(service),
            false => self.refused.insert(service.clone()),
        };
        self.stuck &= !self.refused.is_empty();
        // It is too early to complain before the maps have grown, or could not grow.
        problems.extend(refused.iter().filter(|_| self.stuck).cloned());
        match problems.is_empty() {
            true => self.said.remove(service),
            false => self.said.insert(service.clone(), problems),
        };
        self.report(service, lost);
        self.tell_of_host(service);
    }

    /// Reports clusterIPs of the Service that are addresses of this host: a process that listens there is not reached.
    fn tell_of_host(&mut self, service: &ObjectKey) {
        let held = self.known.held_by_host(service);
        let before = match held.is_empty() {
            true => self.held_by_host.remove(service),
            false => self.held_by_host.insert(service.clone(), held.clone()),
        };
        if before.unwrap_or_default() != held {
            self.report.set(HOST_ADDRESSES.to_owned(), held_by_host(&self.held_by_host));
        }
    }

    fn report(&mut self, service: &ObjectKey, lost: LostClaims) {
        let mut reasons = self.said.get(service).cloned().unwrap_or_default();
        reasons.extend(lost.into_sentences());
        self.report.service(service, reasons);
    }

    /// Returns the claims of a Service that others have.
    fn lost(&self, service: &ObjectKey) -> LostClaims {
        let mut lost = LostClaims::default();
        if let Some(Programmed { model, .. }) = &self.programmed {
            lost.look(model, service, model.ports_of(service).map(AsRef::as_ref));
        }
        lost
    }

    /// Tells Services whose frontends may have come or gone by claims of others; only some of them, if they are many.
    pub(super) fn tell_rivals(&mut self) {
        let start = Instant::now();
        while start.elapsed() < TELLING
            && let Some(service) = self.retell.pop_first()
        {
            let lost = self.lost(&service);
            self.report(&service, lost);
        }
    }

    /// Returns the fate of each endpoint of a Service, with the reasons.
    pub(super) fn reasons(&self, key: &ObjectKey) -> Vec<PortReasons> {
        let service = self.known.cluster.service(key);
        let reasons =
            |service| reasons::of_service(service, self.known.cluster.slices(key), &self.known.context);
        service.map(reasons).unwrap_or_default()
    }

    /// Has the health of programmed Services told to load balancers, on the addresses that serve nodePorts.
    pub(super) fn tell_health(&mut self) {
        if self.extent >= Extent::Node {
            let host = &self.known.context.host_addresses;
            let ips = &self.known.context.node.ips;
            let listen_on = |family| self.config.nodeport_addresses.listen_on(family, ips, host);
            self.check_ports.listen_on(Family::ALL.map(listen_on));
        }
        let concluded = std::mem::take(&mut self.concluded);
        self.check_ports.services(concluded.into_iter().map(|service| {
            let checks = Family::ALL.map(|family| self.check(&service, family));
            (service, checks)
        }));
    }

    /// Returns the check for load balancers. For a Service that is not served here (beyond its budget, or without room)
    /// this node has no endpoint, whatever the slices say.
    fn check(&self, service: &ObjectKey, family: Family) -> Option<Check> {
        let object =
            self.known.cluster.service(service).filter(|_| self.config.families.contains(&family))?;
        let Check { port, endpoints } = check(object, self.known.cluster.slices(service), family)?;
        let Programmed { model, .. } = self.programmed.as_ref()?;
        let is_served = model.ports_of(service).any(|key| key.family == family);
        Some(Check { port, endpoints: if is_served { endpoints } else { 0 } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_at_addresses_of_this_host_are_named_and_counted() {
        // Index 1 is the loopback device of every network namespace.
        let held = |count: u8| -> BTreeMap<_, _> {
            let one =
                |n| (ObjectKey::new("a", &format!("s{n:03}")), vec![(Addr::v4([10, 96, 0, n]), IfIndex(1))]);
            (0..count).map(one).collect()
        };
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
}
