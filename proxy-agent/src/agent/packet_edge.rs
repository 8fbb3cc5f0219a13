//! The packet edge as the loop knows it: the facts that it is told, and the findings that the socket edge depends on.

use std::collections::BTreeMap;

use proxy_common::abi::backend::flags::ON_THIS_NODE;
use proxy_common::abi::{FrontendKey, FrontendValue};
use proxy_common::addr::{Addr, Prefix};

use crate::config::devices::Devices;
use crate::devices::reserved_ports::DatagramPorts;
use crate::devices::sources::Facts;
use crate::devices::{DeviceState, DeviceTask, State};
use crate::host::FollowError;
use crate::reconcile::plan::Wanted;
use crate::reconcile::store::Op;

/// The packet edge, the facts that it is told, and its findings.
#[derive(Debug)]
pub(super) struct PacketEdge {
    /// The task, from the first programming on.
    task: Option<DeviceTask>,
    facts: Facts,
    datagram_ports: DatagramPorts,
    /// Whether any interface of a pod is attached; `None` until that is known.
    pods_attached: Option<bool>,
    /// Destinations of the routes that lead past the packet edge; `None` until its first pass.
    elsewhere: Option<Vec<Prefix>>,
}

/// Findings that differ from those of the pass before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Differs {
    /// Whether any interface of a pod is attached.
    pub(super) pods_attached: bool,
    /// Destinations of the routes that lead past the packet edge.
    pub(super) elsewhere: bool,
}

impl PacketEdge {
    /// Makes the state before the start. Without interfaces of pods it is known that none is attached, otherwise the
    /// first pass finds out what an earlier agent has attached.
    pub(super) fn new(no_pods: bool) -> Self {
        Self {
            task: None,
            facts: Facts::default(),
            datagram_ports: DatagramPorts::default(),
            pods_attached: no_pods.then_some(false),
            elsewhere: None,
        }
    }

    /// Returns whether the task has been started.
    pub(super) fn is_started(&self) -> bool {
        self.task.is_some()
    }

    /// Tells the task the facts that it cannot see; the first time, starts it.
    ///
    /// # Errors
    ///
    /// When the network cannot be read at the start.
    pub(super) async fn tell(
        &mut self,
        config: &Devices,
        node_ips: [Option<Addr>; 2],
    ) -> Result<(), FollowError> {
        self.facts.node_ips = node_ips;
        let task = match &mut self.task {
            Some(task) => task,
            none => none.insert(DeviceTask::start(config.clone(), self.facts.clone()).await?),
        };
        task.tell(&self.facts, &self.datagram_ports);
        Ok(())
    }

    /// Returns the next state; never returns before the start.
    pub(super) async fn changed(&mut self) -> State {
        match &mut self.task {
            Some(task) => task.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Takes in a pass. Returns which findings differ from those before.
    pub(super) fn take(&mut self, state: &State) -> Differs {
        let pods = state.devices.iter().any(DeviceState::is_attached_pod);
        let elsewhere = self.elsewhere.as_ref() != Some(&state.elsewhere);
        if elsewhere {
            self.elsewhere = Some(state.elsewhere.clone());
        }
        Differs { pods_attached: self.pods_attached.replace(pods) != Some(pods), elsewhere }
    }

    /// Returns whether any interface of a pod is attached; `None` until that is known.
    pub(super) fn pods_attached(&self) -> Option<bool> {
        self.pods_attached
    }

    /// Returns the destinations of the routes that lead past the packet edge; `None` until its first pass.
    pub(super) fn elsewhere(&self) -> Option<&[Prefix]> {
        self.elsewhere.as_deref()
    }

    /// Takes in that other maps are pinned now.
    pub(super) fn maps_replaced(&mut self) {
        self.facts.maps += 1;
    }

    /// Takes in what has been programmed: `ops` just now, `frontends` altogether.
    pub(super) fn programmed(&mut self, ops: &[Op], frontends: &BTreeMap<FrontendKey, FrontendValue>) {
        self.datagram_ports.programmed(ops, frontends);
    }

    /// Remembers a backend on another node for each family. Any will do: the route to it shows which source the kernel
    /// prefers.
    pub(super) fn remember_remote<'a>(&mut self, wanted: impl Iterator<Item = &'a Wanted>) {
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

#[cfg(test)]
mod tests {
    use proxy_common::abi::{SlotRange, proto};
    use proxy_common::addr::Family;
    use proxy_common::be::Be16;

    use super::*;
    use crate::reconcile::cluster::ObjectKey;
    use crate::reconcile::desired::{DesiredBackend, DesiredPort, DesiredService, PortKey};

    fn pass(role: &str, attached: &str, elsewhere: &[Prefix]) -> State {
        let device = DeviceState {
            index: 2,
            name: "eth0".to_owned(),
            role: role.to_owned(),
            reason: String::new(),
            attached: attached.to_owned(),
            others: Vec::new(),
            sources: Vec::new(),
            near: false,
            l3: false,
        };
        State { passes: 1, devices: vec![device], elsewhere: elsewhere.to_vec(), ..State::default() }
    }

    fn address(text: &str) -> Addr {
        text.parse::<std::net::IpAddr>().unwrap().into()
    }

    /// Returns a Service with endpoints at these addresses.
    fn wanted(backends: &[(&str, u32)]) -> Wanted {
        let service = ObjectKey::new("a", "s");
        let backends = backends.iter().map(|(addr, flags)| DesiredBackend {
            addr: address(addr),
            port: Be16::new(80),
            flags: *flags,
        });
        let port = DesiredPort {
            key: PortKey { service, port_name: "".into(), proto: proto::TCP, family: Family::V4 },
            frontends: Vec::new(),
            backends: backends.collect(),
            empty_local: SlotRange::REJECT,
            affinity_seconds: 0,
            source_ranges: Vec::new(),
        };
        Wanted { created: 0, desired: DesiredService { ports: vec![port], problems: Vec::new() } }
    }

    #[test]
    fn one_backend_of_each_family_on_another_node_is_remembered() {
        let mut edge = PacketEdge::new(false);
        let first = [("10.64.1.1", ON_THIS_NODE), ("10.64.2.1", 0), ("10.64.2.2", 0)];
        edge.remember_remote([wanted(&first)].iter());
        let v4 = Some(Addr::v4([10, 64, 2, 1]));
        assert_eq!(edge.facts.remote, [v4, None]);
        // The facts do not change with every change of endpoints: each change costs a pass over the devices.
        let second = [("10.64.3.1", 0), ("fd00:64::1", ON_THIS_NODE), ("fd00:64::2", 0)];
        edge.remember_remote([wanted(&second)].iter());
        let v6 = Some(address("fd00:64::2"));
        assert_eq!(edge.facts.remote, [v4, v6]);
    }

    #[test]
    fn findings_differ_when_they_are_first_known_and_when_they_change() {
        let mut edge = PacketEdge::new(false);
        assert_eq!((edge.pods_attached(), edge.elsewhere()), (None, None));
        let (same, pods) = (Differs { pods_attached: false, elsewhere: false }, pass("pod", "tcx", &[]));
        assert_eq!(edge.take(&pods), Differs { pods_attached: true, elsewhere: true });
        assert_eq!((edge.pods_attached(), edge.elsewhere()), (Some(true), Some(&[][..])));
        assert_eq!(edge.take(&pods), same);
        // A pod's device that is not attached, and an attached one that is no pod's.
        assert_eq!(edge.take(&pass("pod", "", &[])), Differs { pods_attached: true, elsewhere: false });
        assert_eq!(edge.take(&pass("external", "tcx", &[])), same);
        let route = [crate::config::lenient::prefix("10.0.0.0/8").unwrap()];
        assert_eq!(
            edge.take(&pass("external", "tcx", &route)),
            Differs { pods_attached: false, elsewhere: true }
        );
        assert_eq!(edge.elsewhere(), Some(&route[..]));
        // Without interfaces of pods nothing has to be found out.
        let mut edge = PacketEdge::new(true);
        assert!(!edge.take(&pass("external", "tcx", &[])).pods_attached);
    }
}
