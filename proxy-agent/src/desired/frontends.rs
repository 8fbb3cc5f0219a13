//! Where a Service port can be reached, and which set each kind of client gets there.

use std::collections::BTreeMap;

use proxy_common::abi::FrontendKey;
use proxy_common::abi::frontend::flags;
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use super::Context;
use crate::cluster::{Service, ServicePort, ServiceType, TrafficPolicy};

/// The addresses of a Service in one family, with the flags of their frontends: the same for all its ports.
pub(super) struct OfFamily<'s> {
    service: &'s Service,
    family: Family,
    cluster_ip: Addr,
    external_ips: Vec<Addr>,
    /// Flags of the clusterIP.
    internal: u16,
    /// Flags of externalIPs, load-balancer addresses and nodePorts.
    external: u16,
    /// What source ranges mean for load-balancer addresses.
    filter: Filter,
}

/// `loadBalancerSourceRanges` in one family.
#[derive(Default)]
struct Filter {
    /// Flags that load-balancer addresses have besides.
    flags: u16,
    /// Who may use them, in order; empty where nothing is filtered.
    ranges: Vec<Prefix>,
}

impl<'s> OfFamily<'s> {
    /// For `service`, whose clusterIP in `family` is `cluster_ip`.
    pub(super) fn new(
        service: &'s Service,
        family: Family,
        cluster_ip: Addr,
        context: &Context,
        problems: &mut Vec<String>,
    ) -> Self {
        let internal = match service.internal_policy {
            TrafficPolicy::Local => flags::NEAR_LOCAL | flags::FAR_LOCAL | flags::POD_LOCAL,
            TrafficPolicy::Cluster => 0,
        };
        let external = flags::EXTERNAL
            | match service.external_policy {
                TrafficPolicy::Local if external_policy_counts(service) => {
                    // Near clients need no detour over a node that has an endpoint: they get the cluster set.
                    // Without detect-local nobody can tell a pod from a far client.
                    flags::FAR_LOCAL
                        | match context.cluster_cidr[family.index()] {
                            None if !context.pods_by_interface => flags::POD_LOCAL,
                            _ => 0,
                        }
                }
                TrafficPolicy::Local | TrafficPolicy::Cluster => 0,
            };
        Self {
            service,
            family,
            cluster_ip,
            external_ips: external_ips(service, family, cluster_ip, context, problems),
            internal,
            external,
            filter: filter(service, family, context, problems),
        }
    }

    /// As [`super::DesiredPort::source_ranges`].
    pub(super) fn source_ranges(&self) -> &[Prefix] {
        &self.filter.ranges
    }

    /// The frontends of `port`, by key. `node_port` 0 means that it has none.
    pub(super) fn of_port(&self, port: &ServicePort, node_port: u16) -> Vec<(FrontendKey, u16)> {
        let exact = |addr| FrontendKey::exact(addr, Be16::new(port.port), port.proto);
        let mut frontends = BTreeMap::from([
            (FrontendKey::address(self.cluster_ip), 0),
            (exact(self.cluster_ip), self.internal),
        ]);
        // One address in two roles is one frontend: the first role decides the policy, and a filter always stays.
        for addr in &self.external_ips {
            frontends.entry(exact(*addr)).or_insert(self.external);
        }
        for addr in in_family(&self.service.load_balancer_ips, self.family) {
            *frontends.entry(exact(addr)).or_insert(self.external) |=
                self.filter.flags | flags::LOAD_BALANCER;
        }
        if node_port != 0 {
            let any = match self.family {
                Family::V4 => Addr::v4([0; 4]),
                Family::V6 => Addr::ZERO,
            };
            frontends.insert(FrontendKey::node_port(any, Be16::new(node_port), port.proto), self.external);
        }
        frontends.into_iter().collect()
    }
}

/// The externalIPs of `family` that are served. Anybody may write any address there, so those that clusterIPs are given from
/// are not: one that is free today is another Service's tomorrow.
fn external_ips(
    service: &Service,
    family: Family,
    cluster_ip: Addr,
    context: &Context,
    problems: &mut Vec<String>,
) -> Vec<Addr> {
    if context.ignore_external_ips {
        return Vec::new();
    }
    let mut served = Vec::with_capacity(service.external_ips.len());
    for addr in in_family(&service.external_ips, family).filter(|addr| *addr != cluster_ip) {
        match context.service_cidrs.iter().find(|cidr| cidr.contains(addr)) {
            Some(cidr) => problems.push(format!(
                "spec.externalIPs: {addr} is not served: it is in the ServiceCIDR {cidr}, whose addresses are clusterIPs only"
            )),
            None => served.push(addr),
        }
    }
    served
}

fn in_family(addrs: &[Addr], family: Family) -> impl Iterator<Item = Addr> {
    addrs.iter().copied().filter(move |addr| addr.family() == family)
}

/// `externalTrafficPolicy` means something only for a Service that is meant to be reached from outside.
fn external_policy_counts(service: &Service) -> bool {
    match service.service_type {
        ServiceType::LoadBalancer | ServiceType::NodePort => true,
        ServiceType::ClusterIp => !service.external_ips.is_empty(),
        ServiceType::ExternalName => false,
    }
}

/// What `loadBalancerSourceRanges` mean for the load-balancer addresses of `family`. Without a range of the family,
/// or with one that holds the whole family, nothing is filtered.
fn filter(service: &Service, family: Family, context: &Context, problems: &mut Vec<String>) -> Filter {
    let mut ranges: Vec<Prefix> =
        service.source_ranges.iter().copied().filter(|r| r.family() == family).collect();
    let mut vips = in_family(&service.load_balancer_ips, family).peekable();
    if ranges.is_empty() || ranges.iter().any(Prefix::matches_all) || vips.peek().is_none() {
        return Filter::default();
    }

    let allowed = |addr: &Addr| ranges.iter().any(|range| range.contains(*addr));
    let host_allowed = match &context.node.ips[family.index()] {
        Some(ip) => allowed(ip),
        None => context.host_addresses.iter().any(|addr| !addr.is_loopback() && allowed(addr)),
    };
    let pods = context.cluster_cidr[family.index()];
    let pods_allowed = pods.is_some_and(|pods| cover(&ranges, &pods));

    if !pods_allowed && !context.pods_in_packets {
        let why = match pods {
            Some(pods) => format!("do not contain every pod ({pods})"),
            None => format!("cannot be compared with the addresses of pods (no cluster CIDR for {family})"),
        };
        for vip in in_family(&service.load_balancer_ips, family) {
            problems.push(format!(
                "sockets of pods are refused on load-balancer address {vip} while no interface of a pod is attached \
                 (--pod-interfaces): spec.loadBalancerSourceRanges {why}, and a socket has no source address yet when \
                 it connects"
            ));
        }
    }
    let deny_host = if host_allowed { 0 } else { flags::DENY_HOST };
    let deny_pod = if pods_allowed { 0 } else { flags::DENY_POD };
    if context.node.ips[family.index()].is_some_and(|ip| allowed(&ip)) {
        // Where a load-balancer address is bound to this host, the host may use it as its source.
        ranges.extend(vips.filter_map(alone));
    }
    ranges.sort_unstable();
    ranges.dedup();
    Filter { flags: flags::SOURCE_RANGES | deny_host | deny_pod, ranges }
}

/// The prefix that holds nothing but `addr`.
fn alone(addr: Addr) -> Option<Prefix> {
    let len = match addr.family() {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    Prefix::new(addr, len)
}

/// Whether `ranges` together contain every address of `whole`; all are of one family.
fn cover(ranges: &[Prefix], whole: &Prefix) -> bool {
    let mut spans: Vec<(u128, u128)> = ranges.iter().map(span).collect();
    spans.sort_unstable();
    let (mut next, last) = span(whole);
    for (from, to) in spans {
        if from > next {
            return false;
        }
        if to >= last {
            return true;
        }
        next = next.max(to + 1);
    }
    false
}

/// First and last address, as numbers.
fn span(prefix: &Prefix) -> (u128, u128) {
    let first = u128::from_be_bytes(prefix.addr().bytes);
    let hosts = u128::MAX.checked_shr(u32::from(prefix.mapped_len())).unwrap_or(0);
    (first, first | hosts)
}
