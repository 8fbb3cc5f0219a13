//! The rows of the behaviour specification that this function decides, named by their ids (`p006_...`), and
//! properties of random slices.
//!
//! All tests share one world: node n1 in zone za with the addresses 192.0.2.10 and 2001:db8:1::10, pods in
//! 10.64.0.0/12 and fd00:64::/48. Endpoints L1, L2 (and V1 over IPv6) run on n1, R1 and R2 on other nodes. The
//! Service has clusterIP 10.96.0.10 and one port `web`, TCP 80 to 8080.

use std::net::IpAddr;
use std::sync::Arc;

use proxy_common::abi::backend::flags as backend;
use proxy_common::abi::frontend::flags as frontend;
use proxy_common::abi::{FrontendKey, FrontendKind, SlotRange, proto};
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use super::{Budget, Context, DesiredPort, DesiredService, desired_service};
use crate::reconcile::cluster::{
    Endpoint, Hints, Node, ObjectKey, Service, ServicePort, ServiceType, Slice, SlicePort, TrafficPolicy,
};

mod budget;
mod frontends;
mod properties;
mod reasons;
mod sets;

const ENDPOINTS: [(&str, &str, bool); 5] = [
    ("L1", "10.64.1.11", true),
    ("L2", "10.64.1.12", true),
    ("R1", "10.64.2.21", false),
    ("R2", "10.64.3.31", false),
    ("V1", "fd00:64:0:1::11", true),
];

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn prefix(text: &str) -> Prefix {
    let (ip, len) = text.split_once('/').unwrap();
    Prefix::new(addr(ip), len.parse().unwrap()).unwrap()
}

/// Parses ports such as `web TCP 80 31080`: name (`-` for none), protocol, port, and optionally nodePort, separated
/// by commas.
fn ports(text: &str) -> Vec<ServicePort> {
    text.split(',')
        .map(|text| {
            let words: Vec<&str> = text.split_whitespace().collect();
            ServicePort {
                name: words[0].trim_matches('-').into(),
                proto: protocol(words[1]),
                port: words[2].parse().unwrap(),
                node_port: words.get(3).map_or(0, |number| number.parse().unwrap()),
            }
        })
        .collect()
}

/// Returns ports of a Service with the names and protocols of a slice.
fn ports_of_slice(slice: &Slice) -> Vec<ServicePort> {
    slice
        .ports
        .iter()
        .map(|port| ServicePort {
            name: Arc::clone(&port.name),
            proto: port.proto,
            port: port.port,
            node_port: 0,
        })
        .collect()
}

fn protocol(text: &str) -> u8 {
    match text {
        "TCP" => proto::TCP,
        "UDP" => proto::UDP,
        "SCTP" => proto::SCTP,
        other => panic!("no such protocol: {other}"),
    }
}

/// Builds a slice: ports such as `web TCP 8080`, and endpoints such as `L1, R1/st z(za,zb) n(n1)` with the states
/// `/nr`, `/st`, `/t`, `/sn`.
fn slice(name: &str, ports_text: &str, endpoints: &str) -> Slice {
    let mut depth = 0;
    let endpoints: Vec<Endpoint> = endpoints
        .split(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            c == ',' && depth == 0
        })
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(endpoint)
        .collect();
    Slice {
        key: ObjectKey::new("a", name),
        service: ObjectKey::new("a", "s"),
        family: endpoints.first().map_or(Family::V4, |e| e.addr.family()),
        ports: ports(ports_text)
            .into_iter()
            .map(|p| SlicePort { name: p.name, proto: p.proto, port: p.port })
            .collect(),
        endpoints,
        trigger_time: None,
        problems: Vec::new(),
    }
}

fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let (name, state) = {
        let word = words.next().unwrap();
        word.split_once('/').unwrap_or((word, ""))
    };
    let &(_, ip, local) = ENDPOINTS.iter().find(|(known, ..)| *known == name).unwrap();
    let (ready, serving, terminating) = match state {
        "" => (true, true, false),
        "nr" => (false, false, false),
        "st" => (false, true, true),
        "t" => (false, false, true),
        "sn" => (false, true, false),
        other => panic!("no such state: {other}"),
    };
    let mut hints = Hints::default();
    for word in words {
        let (kind, list) = word.trim_end_matches(')').split_once('(').unwrap();
        let list = list.split(',').map(Arc::from).collect();
        match kind {
            "z" => hints.zones = list,
            "n" => hints.nodes = list,
            other => panic!("no such hint: {other}"),
        }
    }
    let hints = (hints != Hints::default()).then(|| Arc::new(hints));
    Endpoint { addr: addr(ip), ready, serving, terminating, local, hints }
}

/// A Service, its slices, and the node that programs them.
struct World {
    service: Service,
    slices: Vec<Slice>,
    context: Context,
}

/// Returns the Service with these slices.
fn s_with(slices: Vec<Slice>) -> World {
    World {
        service: Service {
            key: ObjectKey::new("a", "s"),
            created: 0,
            service_type: ServiceType::ClusterIp,
            cluster_ips: [Some(addr("10.96.0.10")), None],
            ports: ports("web TCP 80"),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity_seconds: None,
            source_ranges: Vec::new(),
            health_check_node_port: 0,
            problems: Vec::new(),
        },
        slices,
        context: Context {
            node_name: "n1".into(),
            node: Node {
                zone: Some("za".into()),
                ips: [Some(addr("192.0.2.10")), Some(addr("2001:db8:1::10"))],
                ..Node::default()
            },
            cluster_cidr: [Some(prefix("10.64.0.0/12")), Some(prefix("fd00:64::/48"))],
            pods_by_interface: false,
            host_addresses: ["127.0.0.1", "::1", "192.0.2.10", "2001:db8:1::10"].map(addr).into(),
            service_cidrs: Vec::new(),
            ignore_external_ips: false,
            pods_in_packets: false,
            protect_node_addresses: false,
            budget: Budget::DEFAULT,
        },
    }
}

/// Returns the Service with one slice, in which `web` is 8080.
fn s(endpoints: &str) -> World {
    s_with(vec![slice("s1", "web TCP 8080", endpoints)])
}

/// Returns the same Service as a LoadBalancer with VIP 198.18.5.5, externalIP 198.18.9.9 and nodePort 31080.
fn s_lb(endpoints: &str) -> World {
    s(endpoints).with(|w| {
        w.service.service_type = ServiceType::LoadBalancer;
        w.service.ports = ports("web TCP 80 31080");
        w.service.external_ips = vec![addr("198.18.9.9")];
        w.service.load_balancer_ips = vec![addr("198.18.5.5")];
    })
}

impl World {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn internal_local(self) -> Self {
        self.with(|w| w.service.internal_policy = TrafficPolicy::Local)
    }

    fn external_local(self) -> Self {
        self.with(|w| w.service.external_policy = TrafficPolicy::Local)
    }

    fn source_ranges(self, ranges: &[&str]) -> Self {
        self.with(|w| w.service.source_ranges = ranges.iter().map(|r| prefix(r)).collect())
    }

    fn desired(&self) -> DesiredService {
        desired_service(&self.service, self.slices.iter(), &self.context)
    }

    /// Asserts the results of connections, one per line: `P>VIP = L1, R1`. Senders: P a pod's socket on this node, H
    /// a process of this host, X 203.0.113.7 and Y 203.0.113.200 outside of the cluster. Results: endpoints, REJECT,
    /// DROP, or PASS if there is no frontend.
    #[track_caller]
    fn check(&self, rows: &str) {
        let desired = self.desired();
        for row in rows.lines().map(str::trim).filter(|row| !row.is_empty()) {
            let (question, want) = row.split_once(" = ").unwrap();
            let (sender, dest) = question.split_once('>').unwrap();
            assert_eq!(self.answer(&desired, sender, dest), want, "{row}\n{desired:#?}");
        }
    }

    fn answer(&self, desired: &DesiredService, sender: &str, dest: &str) -> String {
        let (dest, proto) = dest.split_once('/').unwrap_or((dest, "TCP"));
        let (ip, number) = match dest {
            "CIP" => ("10.96.0.10", "80"),
            "VIP" => ("198.18.5.5", "80"),
            "EXT" => ("198.18.9.9", "80"),
            "NP" => ("192.0.2.10", "31080"),
            other => other.rsplit_once(':').unwrap(),
        };
        let ip = addr(ip.trim_matches(['[', ']']));
        let (proto, port) = (protocol(proto), Be16::new(number.parse().unwrap()));
        let any = if ip.family() == Family::V4 { Addr::v4([0; 4]) } else { Addr::ZERO };

        let find = |key| desired.ports.iter().find_map(|p| Some((p, flags_of(p, &key)?)));
        let on_this_node = self.context.node.ips.contains(&Some(ip));
        let exact = find(FrontendKey::exact(ip, port, proto));
        let hit = exact.or_else(|| find(FrontendKey::node_port(any, port, proto)).filter(|_| on_this_node));
        let Some((port, flags)) = hit else {
            return find(FrontendKey::address(ip)).map_or("PASS", |_| "REJECT").into();
        };

        let (denied, local) = match sender {
            "P" => (flags & frontend::DENY_POD != 0, flags & frontend::POD_LOCAL != 0),
            "H" => (flags & frontend::DENY_HOST != 0, flags & frontend::NEAR_LOCAL != 0),
            far => {
                let source = addr(if far == "X" { "203.0.113.7" } else { "203.0.113.200" });
                let in_range = self.service.source_ranges.iter().any(|range| range.contains(source));
                (flags & frontend::SOURCE_RANGES != 0 && !in_range, flags & frontend::FAR_LOCAL != 0)
            }
        };
        let (set, empty) = match local {
            true => (backend::IN_LOCAL, port.empty_local),
            false => (backend::IN_CLUSTER, SlotRange::REJECT),
        };
        let names = names(port, set);
        match () {
            () if denied => "DROP".into(),
            () if !names.is_empty() => names,
            () if empty == SlotRange::DROP => "DROP".into(),
            () => "REJECT".into(),
        }
    }
}

fn flags_of(port: &DesiredPort, key: &FrontendKey) -> Option<u16> {
    port.frontends.iter().find(|(known, _)| known == key).map(|&(_, flags)| flags)
}

/// Returns the endpoints that have a flag of `set`, with their ports if these are not 8080.
fn names(port: &DesiredPort, set: u32) -> String {
    let mut names: Vec<String> = port
        .backends
        .iter()
        .filter(|backend| backend.flags & set != 0)
        .map(|backend| {
            let known = ENDPOINTS.iter().find(|(_, ip, _)| addr(ip) == backend.addr);
            let name = known.map_or_else(|| backend.addr.to_string(), |(name, ..)| (*name).to_owned());
            match backend.port.get() {
                8080 => name,
                other => format!("{name}:{other}"),
            }
        })
        .collect();
    names.sort();
    names.join(", ")
}

/// Returns the frontends of a family: `10.96.0.10:80/6`, `node:31080/6`, and `10.96.0.10` for the address itself.
fn listed(desired: &DesiredService, family: Family) -> Vec<String> {
    let of_family = desired.ports.iter().filter(|port| port.key.family == family);
    let mut list: Vec<String> = of_family
        .flat_map(|port| &port.frontends)
        .map(|(key, _)| match key.kind {
            kind if kind == FrontendKind::NodePort as u8 => format!("node:{}/{}", key.port, key.proto),
            kind if kind == FrontendKind::Address as u8 => key.addr.to_string(),
            _ => format!("{}:{}/{}", key.addr, key.port, key.proto),
        })
        .collect();
    list.sort();
    list.dedup();
    list
}
