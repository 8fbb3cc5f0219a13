//! The lab of a case: its endpoints serve, and so does the owner of every other address that a client asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use proxy_tests::cases::masquerade::Edge;
use proxy_tests::cases::{Case, Check, Connect, Dest, ENDPOINTS, NODE, Pods, Proto, Sender};
use proxy_tests::lab::{Lab, LabSpec, LeafSpec, Node, Place};

/// An outside machine that has every address that is nobody else's.
const ELSEWHERE: &str = "elsewhere";
/// Networks that n2 sends to n1, if the pod Q is there: the clusterIPs, the externalIPs and load-balancer addresses.
const TO_SERVICES: [&str; 2] = ["10.96.0.0/16", "198.18.0.0/15"];

/// Nodes, pods and clients of a case, with all servers running.
///
/// Connections that the proxy does not touch reach the real owner of the destination: a node's own server, or a
/// machine outside the cluster that has the address of the Service. So a connection that should have been translated,
/// refused or dropped, and was not, is answered by a server that the check does not expect.
pub(super) struct World {
    lab: Lab,
    pods: Pods,
}

impl World {
    /// Builds the lab that `spec` describes, and everything else that the case needs.
    pub(super) fn build(case: &Case, mut spec: LabSpec, pods: Pods) -> Result<Self> {
        let connects: Vec<&Connect> = case
            .steps
            .iter()
            .flat_map(|step| &step.checks)
            .filter(|check| check.is_live(pods))
            .filter_map(connect)
            .collect();
        let senders: BTreeSet<Sender> = connects.iter().map(|connect| connect.sender).collect();
        if senders.contains(&Sender::Pods) {
            for (number, address) in Sender::Pods.addresses().into_iter().enumerate() {
                spec = spec.pod(NODE, &many(number), &[&address.to_string()])?;
            }
        }
        if pods == Pods::Unseen {
            spec.unseen = spec.pods.iter().map(|(_, pod)| pod.name.clone()).collect();
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

        let world = Self { lab: Lab::build(spec)?, pods };
        if senders.contains(&Sender::Q) {
            let routes = TO_SERVICES.map(|prefix| format!("route add {prefix} via 192.0.2.10\n"));
            world.lab.node("n2").host().net().ip(&routes.concat())?;
        }
        world.serve_endpoints(case)?;
        world.serve_owners(owners)?;
        Ok(world)
    }

    /// Starts the endpoints' servers on every port that a slice mentions.
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

    /// Starts the servers of the owners of the clients' destinations.
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
            listeners
                .into_iter()
                .fold(place.serve(), |serve, (kind, address)| serve.at(kind, address))
                .start()?;
        }
        Ok(())
    }

    /// Returns the node under test.
    pub(super) fn node(&self) -> &Node {
        self.lab.node(NODE)
    }

    /// Returns the lab.
    pub(super) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the edge at which the node translates a sender.
    pub(super) fn edge(&self, sender: Sender) -> Edge {
        sender.edge(self.pods == Pods::Seen)
    }

    /// Returns the places of a sender, each with its own addresses.
    pub(super) fn clients(&self, sender: Sender) -> Vec<(Place, Vec<IpAddr>)> {
        let addresses = sender.addresses().into_iter();
        match sender {
            Sender::Pods => {
                addresses.enumerate().map(|(number, address)| self.pod(&many(number), address)).collect()
            }
            Sender::P | Sender::P6 => addresses.map(|address| self.pod("P", address)).collect(),
            Sender::L1 => addresses.map(|address| self.pod("L1", address)).collect(),
            Sender::Q => addresses.map(|address| self.pod("Q", address)).collect(),
            Sender::H => {
                let host = self.node().host();
                let mut addresses = host.addresses().to_vec();
                addresses.push(IpAddr::from([127, 0, 0, 1]));
                vec![(host.clone(), addresses)]
            }
            Sender::X | Sender::X6 => {
                addresses.map(|address| (self.lab.client("X"), vec![address])).collect()
            }
            Sender::Y => addresses.map(|address| (self.lab.client("Y"), vec![address])).collect(),
        }
    }

    fn pod(&self, name: &str, address: IpAddr) -> (Place, Vec<IpAddr>) {
        (Place::clone(&self.lab.pod(name)), vec![address])
    }
}

/// Real owner of an address.
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
        Check::Connect(connect) | Check::Open(_, connect) => Some(connect),
        Check::Say(..) | Check::Frontends(..) | Check::ClusterSet(..) | Check::AffinitySeconds(..) => None,
    }
}

/// Returns the lab's name for a kind of server; the kernel itself answers ping.
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
