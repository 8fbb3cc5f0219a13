//! Addresses and ports at which a Service port can be reached, and the set that each kind of client gets there.

use std::collections::BTreeMap;

use proxy_common::abi::FrontendKey;
use proxy_common::abi::frontend::flags;
use proxy_common::addr::{Addr, Family, Prefix};
use proxy_common::be::Be16;

use super::context::Context;
use crate::reconcile::cluster::{Service, ServicePort, ServiceType, TrafficPolicy};

/// The addresses of a Service in one family, with the flags of their frontends. All ports of the Service share them.
pub(super) struct OfFamily {
    family: Family,
    cluster_ip: Addr,
    addresses: BTreeMap<Addr, u16>,
    /// Flags of nodePorts.
    external: u16,
    source_ranges: Vec<Prefix>,
}

/// `loadBalancerSourceRanges` in one family.
#[derive(Default)]
struct Filter {
    /// Additional flags of load-balancer addresses.
    flags: u16,
    /// Sources that may use load-balancer addresses, in order; empty if nothing is filtered.
    ranges: Vec<Prefix>,
}

impl OfFamily {
    /// Collects the addresses of `service` in `family`, where its clusterIP is `cluster_ip`.
    pub(super) fn new(
        service: &Service,
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
                    // Near clients need no detour over a node that has an endpoint: they get the cluster set. Without
                    // detect-local, a pod cannot be told from a far client.
                    flags::FAR_LOCAL
                        | match context.cluster_cidr[family.index()] {
                            None if !context.pods_by_interface => flags::POD_LOCAL,
                            _ => 0,
                        }
                }
                TrafficPolicy::Local | TrafficPolicy::Cluster => 0,
            };
        let vips = load_balancer_ips(service, family, context, problems);
        let filter = filter(service, family, &vips, context, problems);
        // One address in two roles is one frontend: the first role decides the policy, and the filter always applies.
        let mut addresses = BTreeMap::from([(cluster_ip, internal)]);
        for addr in external_ips(service, family, cluster_ip, context, problems) {
            addresses.entry(addr).or_insert(external);
        }
        for addr in vips {
            *addresses.entry(addr).or_insert(external) |= filter.flags | flags::LOAD_BALANCER;
        }
        Self { family, cluster_ip, addresses, external, source_ranges: filter.ranges }
    }

    /// As [`super::state::DesiredPort::source_ranges`].
    pub(super) fn source_ranges(&self) -> &[Prefix] {
        &self.source_ranges
    }

    /// Returns the number of frontends that these ports have together, each with its nodePort.
    pub(super) fn count(&self, ports: &[(&ServicePort, u16)]) -> usize {
        let node_ports = ports.iter().filter(|(_, node_port)| *node_port != 0);
        self.addresses.len() * ports.len() + node_ports.count()
    }

    /// Returns the frontend of the clusterIP as such.
    pub(super) const fn address(&self) -> FrontendKey {
        FrontendKey::address(self.cluster_ip)
    }

    /// Returns the frontends of `port`, by key. `node_port` 0 means that the port has no nodePort.
    pub(super) fn of_port(&self, port: &ServicePort, node_port: u16) -> Vec<(FrontendKey, u16)> {
        let mut frontends = Vec::with_capacity(self.addresses.len() + 1);
        frontends.extend(
            self.addresses
                .iter()
                .map(|(addr, flags)| (FrontendKey::exact(*addr, Be16::new(port.port), port.proto), *flags)),
        );
        if node_port != 0 {
            frontends.push((
                FrontendKey::node_port(Addr::unspecified_of(self.family), Be16::new(node_port), port.proto),
                self.external,
            ));
            frontends.sort_unstable();
        }
        frontends
    }
}

/// Returns the externalIPs of `family` that are served. Users may write any address there, so addresses in a
/// ServiceCIDR are not served: an address that is free today may be another Service's clusterIP tomorrow.
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
    let others = in_family(&service.external_ips, family).filter(|addr| *addr != cluster_ip);
    let why_not = |addr: &Addr| {
        on_this_node(addr, context).or_else(|| {
            let cidr = context.service_cidrs.iter().find(|cidr| cidr.contains(*addr))?;
            Some(format!("it is in the ServiceCIDR {cidr}, whose addresses are clusterIPs only"))
        })
    };
    admitted("spec.externalIPs", others, why_not, problems)
}

/// Returns the load-balancer addresses of `family` that are served.
fn load_balancer_ips(
    service: &Service,
    family: Family,
    context: &Context,
    problems: &mut Vec<String>,
) -> Vec<Addr> {
    let all = in_family(&service.load_balancer_ips, family);
    admitted("status.loadBalancer.ingress", all, |addr| on_this_node(addr, context), problems)
}

/// Returns the reason why no Service may have an address of this host; `None` for other addresses, and if node
/// addresses are not protected.
fn on_this_node(addr: &Addr, context: &Context) -> Option<String> {
    let protected = context.protect_node_addresses && context.host_addresses.contains(addr);
    protected.then(|| "it is an address of this node (--protect-node-addresses)".to_owned())
}

/// Number of sentences about one field; further errors in the field are only counted.
const SENTENCES: usize = 16;

/// Returns the addresses for which `why_not` gives no reason.
fn admitted(
    field: &str,
    addrs: impl Iterator<Item = Addr>,
    why_not: impl Fn(&Addr) -> Option<String>,
    problems: &mut Vec<String>,
) -> Vec<Addr> {
    let mut served = Vec::new();
    let mut refused = 0_usize;
    for addr in addrs {
        let Some(why) = why_not(&addr) else {
            served.push(addr);
            continue;
        };
        refused += 1;
        if refused <= SENTENCES {
            problems.push(format!("{field}: {addr} is not served: {why}"));
        }
    }
    if refused > SENTENCES {
        problems.push(format!("{field}: {} more are not served", refused - SENTENCES));
    }
    served
}

fn in_family(addrs: &[Addr], family: Family) -> impl Iterator<Item = Addr> {
    addrs.iter().copied().filter(move |addr| addr.family() == family)
}

/// Returns whether `externalTrafficPolicy` counts: it does only for a Service that is meant to be reached from
/// outside.
fn external_policy_counts(service: &Service) -> bool {
    match service.service_type {
        ServiceType::LoadBalancer | ServiceType::NodePort => true,
        ServiceType::ClusterIp => !service.external_ips.is_empty(),
        ServiceType::ExternalName => false,
    }
}

/// Returns the filter that `loadBalancerSourceRanges` define for the load-balancer addresses of `family`. Nothing is
/// filtered without a range of the family, or if one range contains the whole family.
fn filter(
    service: &Service,
    family: Family,
    vips: &[Addr],
    context: &Context,
    problems: &mut Vec<String>,
) -> Filter {
    let mut ranges: Vec<Prefix> =
        service.source_ranges.iter().copied().filter(|r| r.family() == family).collect();
    if ranges.is_empty() || ranges.iter().any(Prefix::matches_all) || vips.is_empty() {
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
        for vip in vips {
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
        // If a load-balancer address is bound to this host, the host may use it as its source.
        ranges.extend(vips.iter().copied().filter_map(alone));
    }
    ranges.sort_unstable();
    ranges.dedup();
    Filter { flags: flags::SOURCE_RANGES | deny_host | deny_pod, ranges }
}

/// Returns the prefix that contains only `addr`.
fn alone(addr: Addr) -> Option<Prefix> {
    let len = match addr.family() {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    Prefix::new(addr, len)
}

/// Returns whether `ranges` together contain every address of `whole`. All prefixes are of one family.
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

/// Returns the first and the last address, as numbers.
fn span(prefix: &Prefix) -> (u128, u128) {
    let first = u128::from_be_bytes(prefix.addr().bytes);
    let hosts = u128::MAX.checked_shr(u32::from(prefix.mapped_len())).unwrap_or(0);
    (first, first | hosts)
}
