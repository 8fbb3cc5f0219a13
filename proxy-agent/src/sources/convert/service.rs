//! Conversion of Services.

use std::collections::HashSet;
use std::fmt;

use proxy_common::addr::{Addr, Family, Prefix};

use super::{
    CLUSTER_IP_MISSING, Converter, Findings, LABEL_MAX, PROXY_NAME_LABEL, Problem, check_port_name, label,
    lenient, objects,
};
use crate::reconcile::cluster::{Service, ServicePort, ServiceType, TrafficPolicy};

/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`, seconds.
const AFFINITY_DEFAULT: u32 = 10800;
/// Maximum of `sessionAffinityConfig.clientIP.timeoutSeconds` in the API, seconds.
const AFFINITY_MAX: u32 = 86400;

impl Converter {
    /// Converts a Service; returns `None` if this proxy does not serve it: it has no spec, is headless, or has the
    /// label of another proxy.
    ///
    /// # Errors
    /// The object has no usable namespace or name.
    pub fn service(&mut self, object: &objects::Service) -> Result<Option<Service>, Problem> {
        let key = self.key("Service", &object.metadata, LABEL_MAX)?;
        let Some(spec) = &object.spec else { return Ok(None) };
        if label(&object.metadata, PROXY_NAME_LABEL).is_some() || spec.cluster_ip.as_deref() == Some("None") {
            return Ok(None);
        }
        let mut findings = Findings::default();
        let service_type = service_type(spec, &mut findings);
        let service = Service {
            key,
            created: object.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second()),
            service_type,
            cluster_ips: cluster_ips(spec, service_type, &mut findings),
            ports: self.service_ports(spec, &mut findings),
            external_ips: external_ips(spec, &mut findings),
            load_balancer_ips: load_balancer_ips(object, &mut findings),
            internal_policy: policy("internal", spec.internal_traffic_policy.as_deref(), &mut findings),
            external_policy: policy("external", spec.external_traffic_policy.as_deref(), &mut findings),
            affinity_seconds: affinity_seconds(spec, &mut findings),
            source_ranges: source_ranges(spec, &mut findings),
            health_check_node_port: optional_port(
                spec.health_check_node_port,
                format_args!("spec.healthCheckNodePort"),
                &mut findings,
            ),
            problems: Vec::new(),
        };
        Ok(Some(Service { problems: findings.finish(), ..service }))
    }

    fn service_ports(&mut self, spec: &objects::ServiceSpec, findings: &mut Findings) -> Vec<ServicePort> {
        let mut ports: Vec<ServicePort> = Vec::new();
        let mut names = HashSet::new();
        for (i, entry) in spec.ports.iter().enumerate() {
            let name = entry.name.as_deref().unwrap_or_default();
            if let Err(reason) = check_port_name(name) {
                findings.note(
                    format_args!("spec.ports[{i}].name"),
                    format_args!("{reason}; the port is ignored"),
                );
                continue;
            }
            let Some(proto) = lenient::protocol(entry.protocol.as_deref()) else {
                let given = entry.protocol.as_deref().unwrap_or_default();
                let what = "is not TCP, UDP or SCTP; the port is ignored";
                findings.note(format_args!("spec.ports[{i}].protocol"), format_args!("{given:?} {what}"));
                continue;
            };
            let Some(port) = lenient::port(entry.port.unwrap_or_default()) else {
                let what = "is not in 1..65535; the port is ignored";
                findings.note(
                    format_args!("spec.ports[{i}].port"),
                    format_args!("{} {what}", entry.port.unwrap_or_default()),
                );
                continue;
            };
            if !names.insert((name, proto)) {
                let what = "has the name and protocol of an earlier port and is ignored";
                findings.note(format_args!("spec.ports[{i}]"), format_args!("{what}"));
                continue;
            }
            let node_port =
                optional_port(entry.node_port, format_args!("spec.ports[{i}].nodePort"), findings);
            ports.push(ServicePort { name: self.shared.string(name), proto, port, node_port });
        }
        ports
    }
}

fn service_type(spec: &objects::ServiceSpec, findings: &mut Findings) -> ServiceType {
    match spec.type_.as_deref().unwrap_or_default() {
        "" | "ClusterIP" => ServiceType::ClusterIp,
        "NodePort" => ServiceType::NodePort,
        "LoadBalancer" => ServiceType::LoadBalancer,
        "ExternalName" => ServiceType::ExternalName,
        other => {
            findings.note(
                format_args!("spec.type"),
                format_args!("{other:?} is not a known type; it is taken as ClusterIP"),
            );
            ServiceType::ClusterIp
        }
    }
}

/// Returns the first clusterIP of each family. `ipFamilies` gives the family of each entry; without it, the address
/// itself decides. `clusterIP` without `clusterIPs` stands for a list of one (the API server fills in both, a manifest
/// may have either).
fn cluster_ips(
    spec: &objects::ServiceSpec,
    service_type: ServiceType,
    findings: &mut Findings,
) -> [Option<Addr>; 2] {
    let mut ips = [None; 2];
    if service_type == ServiceType::ExternalName {
        return ips;
    }
    let listed = spec.cluster_ips.as_slice();
    let values = match &spec.cluster_ip {
        Some(ip) if ip.is_empty() => &[],
        Some(ip) if listed.is_empty() => std::slice::from_ref(ip),
        Some(_) | None => listed,
    };
    if values.is_empty() {
        findings.sentence(format_args!("{CLUSTER_IP_MISSING}"));
    }
    let families = &spec.ip_families;
    for (i, value) in values.iter().enumerate() {
        let field = format_args!("spec.clusterIPs[{i}]");
        let addr = match lenient::addr(value) {
            Ok(addr) => addr,
            Err(what) => {
                findings.quoted(field, value, what);
                continue;
            }
        };
        let family = match families.get(i).map(String::as_str) {
            Some("IPv4") => Family::V4,
            Some("IPv6") => Family::V6,
            None if families.is_empty() => addr.family(),
            // More addresses than families, or an unknown family: the API gives such an address no meaning.
            Some(_) | None => {
                findings.quoted(field, value, "has no family in spec.ipFamilies");
                continue;
            }
        };
        if addr.family() == family {
            ips[family.index()].get_or_insert(addr);
        } else {
            findings.note(
                field,
                format_args!("{value:?} is not {family}, which spec.ipFamilies[{i}] names; it is ignored"),
            );
        }
    }
    ips
}

fn external_ips(spec: &objects::ServiceSpec, findings: &mut Findings) -> Vec<Addr> {
    let mut ips = Vec::new();
    for (i, value) in spec.external_ips.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
        match lenient::addr(value) {
            Ok(addr) => ips.push(addr),
            Err(what) => findings.quoted(format_args!("spec.externalIPs[{i}]"), value, what),
        }
    }
    ips
}

fn load_balancer_ips(object: &objects::Service, findings: &mut Findings) -> Vec<Addr> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut ips = Vec::new();
    for (i, ingress) in status.iter().flat_map(|status| &status.ingress).enumerate() {
        let Some(value) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(other) => {
                findings.note(
                    format_args!("status.loadBalancer.ingress[{i}].ipMode"),
                    format_args!("{other:?} is not VIP or Proxy; the address is ignored"),
                );
                continue;
            }
        }
        match lenient::addr(value) {
            Ok(addr) => ips.push(addr),
            Err(what) => findings.quoted(format_args!("status.loadBalancer.ingress[{i}].ip"), value, what),
        }
    }
    ips
}

fn source_ranges(spec: &objects::ServiceSpec, findings: &mut Findings) -> Vec<Prefix> {
    let mut ranges = Vec::new();
    for (i, value) in spec.load_balancer_source_ranges.iter().enumerate() {
        match value.trim() {
            "" => {}
            text => match lenient::prefix(text) {
                Ok(prefix) => ranges.push(prefix),
                Err(what) => findings.quoted(format_args!("spec.loadBalancerSourceRanges[{i}]"), value, what),
            },
        }
    }
    ranges
}

fn policy(side: &str, value: Option<&str>, findings: &mut Findings) -> TrafficPolicy {
    match value.unwrap_or_default() {
        "" | "Cluster" => TrafficPolicy::Cluster,
        "Local" => TrafficPolicy::Local,
        other => {
            findings.note(
                format_args!("spec.{side}TrafficPolicy"),
                format_args!("{other:?} is not Cluster or Local; it is taken as Cluster"),
            );
            TrafficPolicy::Cluster
        }
    }
}

fn affinity_seconds(spec: &objects::ServiceSpec, findings: &mut Findings) -> Option<u32> {
    match spec.session_affinity.as_deref().unwrap_or_default() {
        "" | "None" => return None,
        "ClientIP" => {}
        other => {
            findings.note(
                format_args!("spec.sessionAffinity"),
                format_args!("{other:?} is not ClientIP or None; it is taken as None"),
            );
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(given) = config.and_then(|client_ip| client_ip.timeout_seconds) else {
        return Some(AFFINITY_DEFAULT);
    };
    match u32::try_from(given) {
        Ok(seconds) if (1..=AFFINITY_MAX).contains(&seconds) => Some(seconds),
        Ok(_) | Err(_) => {
            findings.note(
                format_args!("spec.sessionAffinityConfig.clientIP.timeoutSeconds"),
                format_args!("{given} is not in 1..{AFFINITY_MAX}; it is taken as {AFFINITY_DEFAULT}"),
            );
            Some(AFFINITY_DEFAULT)
        }
    }
}

/// Returns an optional port; absent and 0 mean none.
fn optional_port(value: Option<i32>, field: fmt::Arguments<'_>, findings: &mut Findings) -> u16 {
    let number = value.unwrap_or_default();
    u16::try_from(number).unwrap_or_else(|_| {
        findings.note(field, format_args!("{number} is not in 1..65535; it is ignored"));
        0
    })
}
