//! Builders of Kubernetes objects, in the short form that cases use.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::checks::endpoint;
use super::{Case, Config, Endpoint, Step};

/// A manifest under construction.
#[derive(Clone, Debug)]
pub(super) struct Object(Value);

impl Object {
    /// Sets one field of `spec`.
    pub(super) fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.0["spec"][field] = value.into();
        self
    }

    /// Sets a label.
    pub(super) fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = value.into();
        self
    }

    /// Applies any other change.
    pub(super) fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.0);
        self
    }

    /// Service: sets `spec.clusterIPs`, and the fields that follow from them.
    pub(super) fn cluster_ips(self, ips: &[&str]) -> Self {
        let families: Vec<&str> =
            ips.iter().map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" }).collect();
        self.spec("clusterIP", ips[0]).spec("clusterIPs", ips.to_vec()).spec("ipFamilies", families)
    }

    /// Service: sets `spec.ports`, written `web 80, dns 53/udp 31053` (name or `-`, port, nodePort if any).
    pub(super) fn ports(self, text: &str) -> Self {
        let ports = text.split(',').map(service_port).collect::<Result<Vec<Value>>>();
        self.spec("ports", ports.expect("ports of a Service in the table of cases"))
    }

    /// Service: sets type NodePort with nodePort 31080.
    pub(super) fn node_port(self) -> Self {
        self.spec("type", "NodePort").ports("web 80 31080")
    }

    /// Service: sets `internalTrafficPolicy: Local`.
    pub(super) fn internal_local(self) -> Self {
        self.spec("internalTrafficPolicy", "Local")
    }

    /// Service: sets `externalTrafficPolicy: Local`.
    pub(super) fn external_local(self) -> Self {
        self.spec("externalTrafficPolicy", "Local")
    }

    /// Service: sets the ingress entries of its load balancer.
    pub(super) fn ingress(self, entries: Value) -> Self {
        self.edit(|service| service["status"]["loadBalancer"]["ingress"] = entries)
    }

    fn identity(&self) -> (&Value, &Value, &Value) {
        (&self.0["kind"], &self.0["metadata"]["namespace"], &self.0["metadata"]["name"])
    }
}

/// Returns the Service of the table: `a/s`, ClusterIP 10.96.0.10, port `web` TCP 80.
pub(super) fn s() -> Object {
    Object(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "a", "name": "s" },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"],
            "ports": [{ "name": "web", "protocol": "TCP", "port": 80 }],
        },
    }))
}

/// Returns the Service `a/s` with both families.
pub(super) fn s_dual() -> Object {
    s().cluster_ips(&["10.96.0.10", "fd00:96::10"])
}

/// Returns the Service `a/s` as a LoadBalancer: VIP 198.18.5.5, externalIP 198.18.9.9, nodePort 31080.
pub(super) fn s_lb() -> Object {
    s().node_port()
        .spec("type", "LoadBalancer")
        .spec("externalIPs", vec!["198.18.9.9"])
        .ingress(json!([{ "ip": "198.18.5.5" }]))
}

/// Returns that Service with the external policy Local.
pub(super) fn lb_local() -> Object {
    s_lb().external_local()
}

/// Returns the usual slice: port `web` is 8080.
pub(super) fn web(endpoints: &str) -> Object {
    slice("s1", "web=8080", endpoints)
}

/// Returns a slice of Service `a/s`: ports `web=8080, dns=1053/udp`, endpoints `L1, R1/st z(za,zb) n(n1)`. The states
/// are `/nr` not ready, `/st` serving and terminating, `/t` terminating, `/sn` serving but not ready.
pub(super) fn slice(name: &str, ports: &str, endpoints: &str) -> Object {
    try_slice(name, ports, endpoints).expect("a slice in the table of cases")
}

fn try_slice(name: &str, ports: &str, endpoints: &str) -> Result<Object> {
    let ports = ports.split(',').map(slice_port).collect::<Result<Vec<Value>>>()?;
    let mut family = "IPv4";
    let mut list = Vec::new();
    for text in split_outside_parentheses(endpoints) {
        let (endpoint, json) = slice_endpoint(text).with_context(|| format!("endpoint {text:?}"))?;
        if endpoint.ip.is_ipv6() {
            family = "IPv6";
        }
        list.push(json);
    }
    Ok(Object(json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "a",
            "name": name,
            "labels": { "kubernetes.io/service-name": "s" },
        },
        "addressType": family,
        "ports": ports,
        "endpoints": list,
    })))
}

/// Returns a Node. n1 has an address of each family.
pub(super) fn node(name: &str) -> Object {
    let (zone, addresses) = match name {
        "n1" => ("za", vec!["192.0.2.10", "2001:db8:1::10"]),
        "n2" => ("zb", vec!["192.0.2.20"]),
        _ => ("za", vec!["192.0.2.30"]),
    };
    let addresses: Vec<Value> =
        addresses.into_iter().map(|a| json!({ "type": "InternalIP", "address": a })).collect();
    let labels = json!({ "kubernetes.io/hostname": name, ZONE: zone });
    Object(json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name, "labels": labels },
        "status": { "addresses": addresses },
    }))
}

/// Label of a node's zone.
pub(super) const ZONE: &str = "topology.kubernetes.io/zone";

fn service_cidr() -> Object {
    Object(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16", "fd00:96::/112"] },
    }))
}

fn service_port(text: &str) -> Result<Value> {
    let mut words = text.split_whitespace();
    let (Some(name), Some(number)) = (words.next(), words.next()) else { bail!("{text:?}: name and port") };
    let (port, protocol) = numbered(number)?;
    let mut json = json!({ "protocol": protocol, "port": port });
    if name != "-" {
        json["name"] = name.into();
    }
    if let Some(node_port) = words.next() {
        json["nodePort"] = node_port.parse::<u16>()?.into();
    }
    Ok(json)
}

fn slice_port(text: &str) -> Result<Value> {
    let (name, number) = text.trim().split_once('=').with_context(|| format!("{text:?}: name=port"))?;
    let (port, protocol) = numbered(number)?;
    Ok(json!({ "name": name, "protocol": protocol, "port": port }))
}

/// Parses `53/udp`; the default protocol is TCP.
fn numbered(text: &str) -> Result<(u16, String)> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    Ok((port.parse().with_context(|| format!("port {text:?}"))?, protocol.to_uppercase()))
}

fn slice_endpoint(text: &str) -> Result<(Endpoint, Value)> {
    let mut words = text.split_whitespace();
    let word = words.next().context("no name")?;
    let (name, state) = word.split_once('/').unwrap_or((word, ""));
    let endpoint = endpoint(name)?;
    let (ready, serving, terminating) = match state {
        "" => (true, true, false),
        "nr" => (false, false, false),
        "st" => (false, true, true),
        "t" => (false, false, true),
        "sn" => (false, true, false),
        other => bail!("no such state: {other}"),
    };
    let mut json = json!({
        "addresses": [endpoint.ip.to_string()],
        "nodeName": endpoint.node,
        "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
    });
    for word in words {
        let (kind, list) = word.strip_suffix(')').and_then(|w| w.split_once('(')).context("hint")?;
        let field = match kind {
            "z" => "forZones",
            "n" => "forNodes",
            other => bail!("no such hint: {other}"),
        };
        json["hints"][field] = list.split(',').map(|name| json!({ "name": name })).collect();
    }
    Ok((endpoint, json))
}

fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    let parts = text.split(move |c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty())
}

/// A case under construction.
pub(super) struct Builder {
    case: Case,
    base: Vec<Object>,
}

/// Begins a case.
pub(super) fn case(id: &'static str, title: &'static str) -> Builder {
    Builder {
        case: Case { id, title, config: Config::default(), steps: Vec::new() },
        base: vec![node("n1"), node("n2"), node("n3"), service_cidr()],
    }
}

impl Builder {
    /// Changes the configuration.
    pub(super) fn config(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.case.config);
        self
    }

    /// Removes the ServiceCIDR object.
    pub(super) fn without_service_cidr(mut self) -> Self {
        self.base.retain(|object| object.0["kind"] != "ServiceCIDR");
        self
    }

    /// Adds a step: the nodes, the ServiceCIDR and `objects` (which may replace a node), and the checks that
    /// [`super::checks::parse`] reads from `checks`.
    pub(super) fn step(mut self, objects: impl IntoIterator<Item = Object>, checks: &str) -> Self {
        let mut all = self.base.clone();
        for object in objects {
            all.retain(|earlier| earlier.identity() != object.identity());
            all.push(object);
        }
        let checks = super::checks::parse(checks).with_context(|| format!("case {}", self.case.id));
        self.case.steps.push(Step {
            objects: all.into_iter().map(|object| object.0).collect(),
            checks: checks.expect("a check in the table of cases"),
        });
        self
    }

    /// Returns the finished case.
    pub(super) fn done(self) -> Case {
        self.case
    }
}
