//! The lab of a case: its endpoints serve, and so does somebody at every other place that a client asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use proxy_tests::cases::{Case, Check, Connect, Dest, ENDPOINTS, Proto, Sender};
use proxy_tests::lab::{Lab, LabSpec, LeafSpec, Node, Place, Serve};

use super::is_runnable;

/// The node under test.
const NODE: &str = "n1";
/// An outside machine that has every address which is nobody else's.
const ELSEWHERE: &str = "elsewhere";

/// Nodes, pods and clients of a case, with all servers running.
///
/// Whatever the proxy does not touch reaches the real owner of the destination: a node's own server, or a machine
/// outside the cluster that has the address of the Service. So a connection that should have been translated, refused
/// or dropped, and was not, is answered by somebody whom the check does not expect.
pub(super) struct World {
    lab: Lab,
}

impl World {
    pub(super) fn build(case: &Case) -> Result<Self> {
        let connects: Vec<&Connect> = case
            .steps
            .iter()
            .flat_map(|step| &step.checks)
            .filter(|check| is_runnable(check))
            .filter_map(connect)
            .collect();
        let mut spec = LabSpec::cases()?;
        if connects.iter().any(|connect| connect.sender == Sender::Pods) {
            for (number, address) in Sender::Pods.addresses().into_iter().enumerate() {
                spec = spec.pod(NODE, &many(number), &[&address.to_string()])?;
            }
        }
        let owners: Vec<(Owner, Dest)> =
            connects.iter().map(|connect| (owner(&spec, connect.dest.addr.ip()), connect.dest)).collect();
        let mut outside: Vec<IpAddr> = owners
            .iter()
            .filter(|(owner, _)| *owner == Owner::Elsewhere)
            .map(|(_, dest)| dest.addr.ip())
            .collect();
        outside.sort_unstable();
        outside.dedup();
        if !outside.is_empty() {
            spec.clients.push(LeafSpec { name: ELSEWHERE.to_owned(), addresses: outside });
        }

        let world = Self { lab: Lab::build(spec)? };
        world.serve_endpoints(case)?;
        world.serve_owners(owners)?;
        Ok(world)
    }

    /// The endpoints listen on every port that a slice mentions.
    fn serve_endpoints(&self, case: &Case) -> Result<()> {
        let listening: Vec<_> =
            case.listening().into_iter().filter_map(|(proto, port)| Some((kind(proto)?, port))).collect();
        if listening.is_empty() {
            return Ok(());
        }
        for endpoint in ENDPOINTS {
            let serve = listening.iter().fold(self.lab.pod(endpoint.name).serve(), |serve, (kind, port)| {
                serve.at(kind, SocketAddr::new(endpoint.ip, *port))
            });
            serve.start()?;
        }
        Ok(())
    }

    /// So do the owners of what clients ask for.
    fn serve_owners(&self, owners: Vec<(Owner, Dest)>) -> Result<()> {
        let mut servers = BTreeMap::<Owner, BTreeSet<(&str, SocketAddr)>>::new();
        for (owner, dest) in owners {
            if let Some(kind) = kind(dest.proto) {
                servers.entry(owner).or_default().insert((kind, dest.addr));
            }
        }
        for (owner, listeners) in servers {
            let place = match owner {
                Owner::Pod => continue,
                Owner::Host(name) => self.lab.node(&name).host().clone(),
                Owner::Elsewhere => self.lab.client(ELSEWHERE),
            };
            let at = |serve: Serve, (kind, address)| serve.at(kind, address);
            listeners.into_iter().fold(place.serve(), at).start()?;
        }
        Ok(())
    }

    /// The node under test.
    pub(super) fn node(&self) -> &Node {
        self.lab.node(NODE)
    }

    /// The places of a sender on this node, each with the addresses that a server may see it by.
    pub(super) fn clients(&self, sender: Sender) -> Vec<(Place, Vec<IpAddr>)> {
        let pod = |name: &str, address| (Place::clone(&self.lab.pod(name)), vec![address]);
        let addresses = sender.addresses().into_iter();
        match sender {
            Sender::Pods => {
                addresses.enumerate().map(|(number, address)| pod(&many(number), address)).collect()
            }
            Sender::P | Sender::P6 => addresses.map(|address| pod("P", address)).collect(),
            Sender::H => {
                let host = self.node().host();
                let mut addresses = host.addresses().to_vec();
                addresses.push(IpAddr::from([127, 0, 0, 1]));
                vec![(host.clone(), addresses)]
            }
            Sender::X | Sender::Y | Sender::X6 => Vec::new(),
        }
    }
}

/// Who really has an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    /// An endpoint, which serves anyway.
    Pod,
    /// A node.
    Host(String),
    /// Nobody in the cluster.
    Elsewhere,
}

fn owner(spec: &LabSpec, ip: IpAddr) -> Owner {
    if ip.is_loopback() {
        return Owner::Host(NODE.to_owned());
    }
    if ENDPOINTS.iter().any(|endpoint| endpoint.ip == ip) {
        return Owner::Pod;
    }
    let node = spec.nodes.iter().find(|node| node.eth0.contains(&ip) || node.eth1.contains(&ip));
    node.map_or(Owner::Elsewhere, |node| Owner::Host(node.name.clone()))
}

fn connect(check: &Check) -> Option<&Connect> {
    match check {
        Check::Connect(connect) => Some(connect),
        Check::Frontends(..) | Check::ClusterSet(..) | Check::AffinitySeconds(..) => None,
    }
}

/// The lab's word for a server; the kernel itself answers ping.
fn kind(proto: Proto) -> Option<&'static str> {
    match proto {
        Proto::Tcp => Some("tcp"),
        Proto::Udp => Some("udp"),
        Proto::Sctp | Proto::Ping => None,
    }
}

fn many(number: usize) -> String {
    format!("pod-{number}")
}
