//! The behaviour of a Service proxy as one table of cases: Kubernetes objects as input, outcomes of connections as
//! output.
//!
//! A case does not define how it is run. One runner may turn the objects into maps and ask the pure datapath, another
//! may start the agent and open real sockets. Each step of a case gives the whole cluster; objects that a step leaves
//! out are deleted.
//!
//! All cases share one world (RFC 5737 and RFC 2544 addresses):
//!
//! - Node **n1** is under test: zone `za`, 192.0.2.10 and 2001:db8:1::10, further local addresses 198.51.100.10 and
//!   2001:db8:2::10. Other nodes are n2 (zone `zb`, 192.0.2.20) and n3 (zone `za`, 192.0.2.30).
//! - Pods have addresses in 10.64.0.0/12 and fd00:64::/48, Services in 10.96.0.0/16 and fd00:96::/112.
//! - Endpoints and senders: [`ENDPOINTS`] and [`Sender`].
//! - Service `a/s` has clusterIP 10.96.0.10 and one port `web`, TCP 80, to port 8080 of the endpoints.
//!
//! The table describes kube-proxy. Differences of the socket edge without a packet edge after it are in a table of
//! their own, [`Case::on_sockets`]. So are the source addresses that endpoints see, in [`masquerade`].

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use proxy_common::addr::Family;
use serde_json::Value;

mod checks;
mod falsified;
pub mod masquerade;
mod objects;
mod smoke;
mod sockets;
mod suites;

mod affinity;
mod eligibility;
mod flows;
mod frontends;
mod intake;
mod no_endpoints;
mod policies;
mod source_ranges;
mod sources;
mod topology;

pub use falsified::falsified;
pub use smoke::{at_the_node, not_allowed, smoke};
pub use suites::{Pods, lab_tests, pure_tests};

#[cfg(test)]
mod tests;

/// Name of the node under test.
pub const NODE: &str = "n1";

/// Returns every case, by id.
pub fn all() -> Vec<Case> {
    let groups = [
        eligibility::cases(),
        frontends::cases(),
        intake::cases(),
        policies::cases(),
        topology::cases(),
        sources::cases(),
        no_endpoints::cases(),
        source_ranges::cases(),
        affinity::cases(),
        flows::cases(),
    ];
    groups.into_iter().flatten().collect()
}

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Case {
    /// Stable id, like `P041`: the letter P, the group in hundreds and tens.
    pub id: &'static str,
    /// Subject of the case, in a few words.
    pub title: &'static str,
    /// Configuration of the proxy.
    pub config: Config,
    /// Steps, in order. The proxy keeps running from one to the next.
    pub steps: Vec<Step>,
}

/// Configuration that differs between cases.
#[derive(Clone, Debug)]
pub struct Config {
    /// Value of `clusterCIDR`. Empty: detect-local by source is not implemented.
    pub cluster_cidr: Vec<&'static str>,
    /// `nodePortAddresses`: CIDRs, or the one word `primary`.
    pub node_port_addresses: Vec<&'static str>,
    /// Feature gate `AllowServiceExternalIPs`.
    pub allow_external_ips: bool,
    /// Mode of detect-local.
    pub detect_local: DetectLocal,
    /// `masqueradeAll`.
    pub masquerade_all: bool,
}

/// detect-local: property that distinguishes pods' packets from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectLocal {
    /// Source address within `clusterCIDR`.
    #[default]
    ClusterCidr,
    /// Arrival through this bridge.
    Bridge(&'static str),
    /// Arrival through an interface whose name begins with this prefix.
    Prefix(&'static str),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster_cidr: vec!["10.64.0.0/12", "fd00:64::/48"],
            node_port_addresses: vec!["primary"],
            allow_external_ips: true,
            detect_local: DetectLocal::default(),
            masquerade_all: false,
        }
    }
}

/// A state of the cluster, and the checks that must hold in it.
#[derive(Clone, Debug)]
pub struct Step {
    /// Every object of the cluster, as manifests: Nodes, ServiceCIDRs, Services, EndpointSlices.
    pub objects: Vec<Value>,
    /// Checks, in this order, once the proxy has processed the objects.
    pub checks: Vec<Check>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// New connections (datagrams, for UDP; echo requests, for ping).
    Connect(Connect),
    /// A connection (over UDP, a connected socket with its first datagram) that is kept under a name. Clients try until
    /// they reach one of these endpoints.
    Open(String, Connect),
    /// Outcome of the next datagram (over TCP, the next bytes) of a socket that was opened before.
    Say(String, Expect),
    /// Exactly these frontends exist in the family.
    Frontends(Family, BTreeSet<Frontend>),
    /// Number of endpoints in the cluster set behind a frontend.
    ClusterSet(Dest, usize),
    /// The affinity timeout, in seconds, of the Service port behind a frontend.
    AffinitySeconds(Dest, u32),
}

/// Connections of one kind of client to one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// Client.
    pub sender: Sender,
    /// Destination.
    pub dest: Dest,
    /// Outcome of the connections.
    pub expect: Expect,
    /// Number and pace of the connections, if they matter; otherwise as many as needed, without pause.
    pub pace: Option<Pace>,
}

/// A number of connections of each client, with pauses between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Number of connections that each client makes, one after the other, each from another source port.
    pub connections: u32,
    /// Idle time between two connections.
    pub pause: Duration,
}

/// Client that sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sender {
    /// A pod on n1.
    P,
    /// The IPv6 address of a pod on n1.
    P6,
    /// Each of many pods on n1.
    Pods,
    /// The pod that is the endpoint L1.
    L1,
    /// A pod on n2. Its packets reach n1 with its own source address.
    Q,
    /// A process of the host n1.
    H,
    /// A client outside the cluster, routed to n1; inside 203.0.113.0/25.
    X,
    /// Another client outside the cluster; outside 203.0.113.0/25.
    Y,
    /// An IPv6 client outside the cluster.
    X6,
}

impl Sender {
    /// Returns the clients' addresses.
    pub fn addresses(self) -> Vec<IpAddr> {
        match self {
            Self::P => vec![IpAddr::from([10, 64, 1, 50])],
            Self::P6 => vec![IpAddr::from([0xfd00, 0x64, 0, 1, 0, 0, 0, 0x50])],
            Self::Pods => (100..132).map(|last| IpAddr::from([10, 64, 1, last])).collect(),
            Self::L1 => vec![IpAddr::from([10, 64, 1, 11])],
            Self::Q => vec![IpAddr::from([10, 64, 2, 50])],
            Self::H => vec![IpAddr::from([192, 0, 2, 10])],
            Self::X => vec![IpAddr::from([203, 0, 113, 7])],
            Self::Y => vec![IpAddr::from([203, 0, 113, 200])],
            Self::X6 => vec![IpAddr::from([0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 7])],
        }
    }

    /// Returns whether the sender's sockets are on n1, so that its socket edge sees them. Packets of the other senders
    /// reach n1 over the network.
    pub const fn on_this_node(self) -> bool {
        match self {
            Self::P | Self::P6 | Self::Pods | Self::L1 | Self::H => true,
            Self::Q | Self::X | Self::Y | Self::X6 => false,
        }
    }

    /// Returns whether the sender is a pod on n1, so that its packets reach n1 through the pod's interface.
    pub const fn is_pod_of_this_node(self) -> bool {
        match self {
            Self::P | Self::P6 | Self::Pods | Self::L1 => true,
            Self::H | Self::Q | Self::X | Self::Y | Self::X6 => false,
        }
    }
}

/// A transport protocol, or ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP(v6) echo; the port is ignored.
    Ping,
}

/// Destination of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dest {
    /// Protocol.
    pub proto: Proto,
    /// Address and port.
    pub addr: SocketAddr,
}

/// Outcome of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Each connection goes to one of these endpoints, at random, so that every one of them is eventually reached.
    Spread(BTreeSet<Target>, Source),
    /// All connections of one client go to the same endpoint of these. Many clients together reach every one of them.
    Sticky(BTreeSet<Target>, Source),
    /// Connection refused.
    Reject,
    /// No answer. (At a socket of the host, or of a pod whose packets no program judges, the call fails instead.)
    Drop,
    /// The proxy does not translate the connections.
    Pass,
}

/// Source address that the endpoint sees with kube-proxy. [`masquerade::seen`] returns the one with Vipr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The client's own address.
    Kept,
    /// An address of this node.
    Masqueraded,
    /// Not specified by the case.
    Unsaid,
}

/// Endpoint and port that a connection reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Port.
    pub port: u16,
}

/// A pod that can be an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// The endpoint's name in the table.
    pub name: &'static str,
    /// The endpoint's address.
    pub ip: IpAddr,
    /// The node that the endpoint runs on.
    pub node: &'static str,
}

/// Every endpoint. Each listens on every port that a slice mentions, and answers with its name.
pub const ENDPOINTS: [Endpoint; 6] = [
    Endpoint { name: "L1", ip: IpAddr::V4(Ipv4Addr::new(10, 64, 1, 11)), node: "n1" },
    Endpoint { name: "L2", ip: IpAddr::V4(Ipv4Addr::new(10, 64, 1, 12)), node: "n1" },
    Endpoint { name: "R1", ip: IpAddr::V4(Ipv4Addr::new(10, 64, 2, 21)), node: "n2" },
    Endpoint { name: "R2", ip: IpAddr::V4(Ipv4Addr::new(10, 64, 3, 31)), node: "n3" },
    Endpoint { name: "V1", ip: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x64, 0, 1, 0, 0, 0, 0x11)), node: "n1" },
    Endpoint { name: "V2", ip: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x64, 0, 2, 0, 0, 0, 0x21)), node: "n2" },
];

/// A frontend of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Frontend {
    /// An address with a port.
    Address(Proto, SocketAddr),
    /// A nodePort.
    NodePort(Proto, u16),
}

impl Case {
    /// Returns id and title as the name of a test: `p080_external_policy_local_far_clients`.
    pub fn test_name(&self) -> String {
        let words = self.title.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        std::iter::once(self.id).chain(words).collect::<Vec<_>>().join("_").to_lowercase()
    }

    /// Returns the case with every pause, and every affinity timeout but the default, divided by `divisor`: a case of
    /// minutes then takes seconds.
    pub fn faster(mut self, divisor: u32) -> Self {
        for step in &mut self.steps {
            for object in &mut step.objects {
                let timeout = object.pointer_mut("/spec/sessionAffinityConfig/clientIP/timeoutSeconds");
                if let Some(timeout) = timeout
                    && let Some(seconds) = timeout.as_u64().filter(|seconds| *seconds != 10_800)
                {
                    *timeout = (seconds / u64::from(divisor)).max(1).into();
                }
            }
            for check in &mut step.checks {
                if let Check::Connect(Connect { pace: Some(pace), .. }) = check {
                    pace.pause /= divisor;
                }
            }
        }
        self
    }

    /// Returns every protocol and port that a slice of this case mentions.
    pub fn listening(&self) -> BTreeSet<(Proto, u16)> {
        let objects = self.steps.iter().flat_map(|step| &step.objects);
        let slices = objects.filter(|object| object["kind"] == "EndpointSlice");
        let ports = slices.filter_map(|slice| slice["ports"].as_array()).flatten();
        ports
            .filter_map(|port| {
                let proto = match port["protocol"].as_str() {
                    Some("UDP") => Proto::Udp,
                    Some("SCTP") => Proto::Sctp,
                    Some(_) | None => Proto::Tcp,
                };
                Some((proto, u16::try_from(port["port"].as_u64()?).ok()?))
            })
            .collect()
    }
}
