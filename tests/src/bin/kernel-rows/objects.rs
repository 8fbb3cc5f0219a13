//! The objects that the agent reads.

use serde_json::{Value, json};

/// A pod that serves, or a machine that acts as one.
#[derive(Clone, Copy)]
pub(super) struct Backend {
    /// The backend's name in answers.
    pub(super) name: &'static str,
    /// Node of the backend's slice.
    pub(super) node: &'static str,
    /// IPv4 address.
    pub(super) v4: &'static str,
    /// IPv6 address; empty for none.
    pub(super) v6: &'static str,
}

/// A pod of the node under test.
pub(super) const HERE: Backend = Backend { name: "L1", node: "n1", v4: "10.64.1.11", v6: "fd00:64:0:1::11" };
/// A pod of another node.
pub(super) const THERE: Backend = Backend { name: "R1", node: "n2", v4: "10.64.2.21", v6: "fd00:64:0:2::21" };
/// A pod of another node, behind a link with a small MTU.
pub(super) const NARROW: Backend =
    Backend { name: "M1", node: "n2", v4: "10.64.2.22", v6: "fd00:64:0:2::22" };

/// A Service of the namespace `k`. Its addresses follow from its number: see [`cluster_ip`], [`balancer`],
/// [`external_ip`] and [`node_port`].
#[derive(Clone, Copy)]
pub(super) struct Service {
    /// Name.
    pub(super) name: &'static str,
    /// Number of the Service, below 28: nodePorts end with 32767.
    pub(super) number: u16,
    /// The Service's endpoints.
    pub(super) backends: &'static [Backend],
}

/// Formats the address and port of a Service from the prefix of its family.
fn at(v6: bool, v4_prefix: &str, v6_prefix: &str, number: u16, port: u16) -> String {
    if v6 { format!("[{v6_prefix}{number}]:{port}") } else { format!("{v4_prefix}{number}:{port}") }
}

/// Returns the clusterIP of Service `number`, with a port.
pub(super) fn cluster_ip(number: u16, v6: bool, port: u16) -> String {
    at(v6, "10.96.0.", "fd00:96::", number, port)
}

/// Returns the load-balancer address of Service `number`, with a port.
pub(super) fn balancer(number: u16, v6: bool, port: u16) -> String {
    at(v6, "198.18.5.", "2001:db8:5::", number, port)
}

/// Returns the externalIP of Service `number`, with a port.
pub(super) fn external_ip(number: u16, v6: bool, port: u16) -> String {
    at(v6, "198.18.9.", "2001:db8:9::", number, port)
}

/// Returns the nodePort of Service `number`, with the node's address.
pub(super) fn node_port(number: u16, v6: bool, port: u16) -> String {
    let port = 30_000 + 100 * number + port;
    if v6 { format!("[2001:db8:1::10]:{port}") } else { format!("192.0.2.10:{port}") }
}

/// Name, protocol, port and target port of every Service port. Endpoints of 82 and 83 send back the data that they get.
const PORTS: [(&str, &str, u16, u16); 6] = [
    ("tcp", "TCP", 80, 8080),
    ("udp", "UDP", 80, 8080),
    ("sctp", "SCTP", 80, 8080),
    ("second", "TCP", 81, 8081),
    ("udp-echo", "UDP", 82, 9082),
    ("echo", "TCP", 83, 9083),
];

/// Returns the Service and its slices; `patch` replaces fields of its `spec`.
pub(super) fn service(service: Service, patch: Value) -> Vec<Value> {
    let Service { name, number, backends } = service;
    let ports: Vec<Value> = PORTS
        .iter()
        .map(|(name, protocol, port, _)| {
            json!({ "name": name, "protocol": protocol, "port": port, "nodePort": 30_000 + 100 * number + port })
        })
        .collect();
    let mut spec = json!({
        "type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": both(number, cluster_ip)[0],
        "clusterIPs": both(number, cluster_ip), "externalIPs": both(number, external_ip), "ports": ports,
    });
    for (field, value) in patch.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let ingress: Vec<Value> = both(number, balancer).into_iter().map(|ip| json!({ "ip": ip })).collect();
    let mut objects = vec![json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "k", "name": name }, "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    })];
    for (family, address) in
        [("IPv4", (|one| one.v4) as fn(&Backend) -> &'static str), ("IPv6", |one| one.v6)]
    {
        objects.push(slice(name, family, backends, address));
    }
    objects
}

/// Returns a Service's addresses of one kind.
fn both(number: u16, of: fn(u16, bool, u16) -> String) -> [String; 2] {
    [bare(of(number, false, 0)), bare(of(number, true, 0))]
}

fn bare(address: String) -> String {
    address.rsplit_once(':').map_or_else(String::new, |(ip, _)| ip.trim_matches(['[', ']']).to_owned())
}

fn slice(service: &str, family: &str, backends: &[Backend], address: fn(&Backend) -> &'static str) -> Value {
    let ports: Vec<Value> = PORTS
        .iter()
        .map(|(name, protocol, _, target)| json!({ "name": name, "protocol": protocol, "port": target }))
        .collect();
    let endpoints: Vec<Value> = backends
        .iter()
        .filter(|one| !address(one).is_empty())
        .map(|one| json!({ "addresses": [address(one)], "nodeName": one.node, "conditions": { "ready": true } }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {
            "namespace": "k", "name": format!("{service}-{}", family.to_lowercase()),
            "labels": { "kubernetes.io/service-name": service },
        },
        "ports": ports, "endpoints": endpoints,
    })
}

/// Returns the ServiceCIDR object with the prefixes of clusterIPs.
pub(super) fn service_cidr() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16", "fd00:96::/112"] },
    })
}
