//! What is told about Services that have been programmed: problems to users, health to load balancers.

use std::time::{Duration, Instant};

use proxy_common::addr::Family;

use super::Agent;
use super::programming::Programmed;
use crate::cluster::ObjectKey;
use crate::explain::reasons::{self, PortReasons};
use crate::health::checks::{Check, check};
use crate::plan::LostClaims;

/// How long a turn may tell Services what others have of them.
const TELLING: Duration = Duration::from_millis(5);

impl Agent {
    /// Tells what is wrong with a Service that has been programmed in one piece.
    pub(super) fn tell(&mut self, service: &ObjectKey, problems: Vec<String>, refused: &[String]) {
        let lost = self.lost(service);
        self.conclude(service, problems, refused, lost);
        self.retell.remove(service);
    }

    /// The same, of one that has been programmed in parts. What it has `lost` was found part by part; who has taken
    /// something in between has left a note in `retell`.
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
        // Before the maps have grown, or could not, it is too early to complain.
        problems.extend(refused.iter().filter(|_| self.stuck).cloned());
        match problems.is_empty() {
            true => self.said.remove(service),
            false => self.said.insert(service.clone(), problems),
        };
        self.report(service, lost);
    }

    fn report(&mut self, service: &ObjectKey, lost: LostClaims) {
        let mut reasons = self.said.get(service).cloned().unwrap_or_default();
        reasons.extend(lost.into_sentences());
        self.report.service(service, reasons);
    }

    /// What a Service claims and others have.
    fn lost(&self, service: &ObjectKey) -> LostClaims {
        let mut lost = LostClaims::default();
        if let Some(Programmed { model, .. }) = &self.programmed {
            lost.look(model, service, model.ports_of(service).map(AsRef::as_ref));
        }
        lost
    }

    /// Tells those whose frontends may have come or gone by what others have got: some of them, if they are many.
    pub(super) fn tell_rivals(&mut self) {
        let start = Instant::now();
        while start.elapsed() < TELLING
            && let Some(service) = self.retell.pop_first()
        {
            let lost = self.lost(&service);
            self.report(&service, lost);
        }
    }

    /// What becomes of the endpoints of a Service, and why.
    pub(super) fn reasons(&self, key: &ObjectKey) -> Vec<PortReasons> {
        let service = self.known.cluster.service(key);
        let reasons =
            |service| reasons::of_service(service, self.known.cluster.slices(key), &self.known.context);
        service.map(reasons).unwrap_or_default()
    }

    /// Has the health of what has been programmed told to load balancers, on the addresses that serve nodePorts.
    pub(super) fn tell_health(&mut self) {
        if self.node_changed || self.everything {
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

    /// What a load balancer is told. Of a Service that is not served here (beyond its budget, or without room) this node has
    /// no endpoint, whatever the slices say.
    fn check(&self, service: &ObjectKey, family: Family) -> Option<Check> {
        let object =
            self.known.cluster.service(service).filter(|_| self.config.families.contains(&family))?;
        let Check { port, endpoints } = check(object, self.known.cluster.slices(service), family)?;
        let Programmed { model, .. } = self.programmed.as_ref()?;
        let is_served = model.ports_of(service).any(|key| key.family == family);
        Some(Check { port, endpoints: if is_served { endpoints } else { 0 } })
    }
}
