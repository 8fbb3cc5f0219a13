//! Assigns numbers to Services with selectors that do not name them: clusterIPs from the ServiceCIDRs, and nodePorts.
//!
//! A Service's number is derived from its name. The Service gets another number only if an object names that number, or
//! if the names of two Services lead to the same number: then the first Service by name has it. So every node that
//! reads the same files assigns the same numbers, and numbers stay while other Services come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proxy_common::addr::{Addr, Family, Prefix};

use crate::reconcile::cluster::{ObjectKey, Service, ServicePort, ServiceType};
use crate::sources::convert::{CLUSTER_IP_MISSING, Findings};
use crate::sources::manifests::parts::{FamilyPolicy, ServicePart};

/// Range of nodePorts, the default of Kubernetes.
const NODE_PORTS: Range<u128> = 30_000..32_768;
/// Number of nodePorts at the start of the range that are left to people who choose theirs, as in Kubernetes.
const NODE_PORTS_BY_HAND: u128 = 86;
/// Maximum number of host bits of a range that are used: more addresses than anybody has Services.
const HOST_BITS_MAX: u32 = 32;

/// Numbers assigned to a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Given {
    pub(super) cluster_ips: [Option<Addr>; 2],
    /// nodePorts by index into [`Service::ports`].
    pub(super) node_ports: BTreeMap<usize, u16>,
    /// Sentences about numbers that could not be assigned.
    pub(super) problems: Vec<String>,
}

impl Given {
    /// Fills in the numbers that `service` lacks.
    pub(super) fn complete(&self, service: &mut Service) {
        for (own, given) in service.cluster_ips.iter_mut().zip(self.cluster_ips) {
            *own = own.or(given);
        }
        for (index, given) in &self.node_ports {
            if let Some(port) = service.ports.get_mut(*index) {
                port.node_port = *given;
            }
        }
    }
}

/// Returns numbers for all Services that lack some. `services` are in the order of their names, each with the Service
/// as written if this proxy serves it. `ranges` are in order of precedence.
pub(super) fn assign(
    services: &[(&ServicePart, Option<&Service>)],
    ranges: &[Prefix],
) -> BTreeMap<ObjectKey, Given> {
    let mut taken = Taken::default();
    let mut ports_taken = Taken::default();
    for (part, _) in services {
        part.addresses.iter().for_each(|addr| taken.insert(number(*addr)));
        part.node_ports.iter().for_each(|port| ports_taken.insert((*port).into()));
    }
    let mut given: BTreeMap<ObjectKey, Given> = BTreeMap::new();
    let pools = Family::ALL.map(|family| {
        let of_family = ranges.iter().filter(|prefix| prefix.family() == family);
        of_family.map(|prefix| Pool::of_prefix(*prefix)).collect::<Vec<_>>()
    });
    let wishes = wishes(services, ranges, &mut given);
    let node_ports = Pool {
        first: NODE_PORTS.start,
        preferred: NODE_PORTS.start + NODE_PORTS_BY_HAND,
        end: NODE_PORTS.end,
    };
    // First, every Service gets the number that its name leads to, if that is free. So no Service loses that number to
    // another one's second choice.
    let mut left = Vec::new();
    for wish in wishes {
        let found = match wish.what {
            What::ClusterIp(family, _) => {
                pools[family.index()].first().and_then(|pool| taken.take_home(pool, &wish.text()))
            }
            What::NodePort(_) => ports_taken.take_home(&node_ports, &wish.text()),
        };
        match found {
            Some(found) => wish.grant(found, given.entry(wish.service.key.clone()).or_default()),
            None => left.push(wish),
        }
    }
    let mut refused: BTreeMap<ObjectKey, Findings> = BTreeMap::new();
    for wish in left {
        let found = match wish.what {
            What::ClusterIp(family, _) => {
                pools[family.index()].iter().find_map(|pool| taken.take_next(pool, &wish.text()))
            }
            What::NodePort(_) => ports_taken.take_next(&node_ports, &wish.text()),
        };
        let key = wish.service.key.clone();
        match found {
            Some(found) => wish.grant(found, given.entry(key).or_default()),
            None => refused.entry(key).or_default().sentence(format_args!("{}", wish.refusal(ranges))),
        }
    }
    for (key, findings) in refused {
        given.entry(key).or_default().problems = findings.finish();
    }
    given
}

/// Returns the numbers that Services lack. A Service without a selector is taken as written, with a problem in `given`.
fn wishes<'a>(
    services: &[(&'a ServicePart, Option<&'a Service>)],
    ranges: &[Prefix],
    given: &mut BTreeMap<ObjectKey, Given>,
) -> Vec<Wish<'a>> {
    let mut wishes = Vec::new();
    for (part, service) in services.iter().filter_map(|(part, service)| Some((*part, (*service)?))) {
        if service.service_type == ServiceType::ExternalName {
            continue;
        }
        // A Service without a selector has no Pods here, so it is taken as written.
        if part.selector.is_empty() {
            if service.cluster_ips == [None; 2] && !missing(part, service, ranges).is_empty() {
                let given = given.entry(service.key.clone()).or_default();
                given.problems.push(CLUSTER_IP_MISSING.to_owned());
            }
            continue;
        }
        for (family, is_second) in missing(part, service, ranges) {
            wishes.push(Wish { service, what: What::ClusterIp(family, is_second) });
        }
        let numbers: BTreeSet<u16> = ports_without(part, service).map(|(_, port)| port.port).collect();
        wishes.extend(numbers.into_iter().map(|port| Wish { service, what: What::NodePort(port) }));
    }
    wishes
}

/// Returns the families in which a Service is to get an address, each with whether that is the Service's second
/// address.
fn missing(part: &ServicePart, service: &Service, ranges: &[Prefix]) -> Vec<(Family, bool)> {
    let mut families = part.families.clone();
    if families.is_empty() {
        families
            .extend(Family::ALL.into_iter().filter(|family| service.cluster_ips[family.index()].is_some()));
    }
    if families.is_empty() {
        families.push(ranges.first().map_or(Family::V4, Prefix::family));
    }
    if let [only] = families[..] {
        families.extend(Family::ALL.into_iter().filter(|family| match part.policy {
            FamilyPolicy::Single => false,
            FamilyPolicy::PreferDual => {
                *family != only && ranges.iter().any(|range| range.family() == *family)
            }
            FamilyPolicy::RequireDual => *family != only,
        }));
    }
    // The addresses that a Service names belong to its first families.
    let unnamed = families.into_iter().enumerate().skip(part.named);
    let without = unnamed.filter(|(_, family)| service.cluster_ips[family.index()].is_none());
    without.map(|(place, family)| (family, place > 0)).collect()
}

/// Returns the ports that are to get a nodePort, with their indices.
fn ports_without<'a>(
    part: &ServicePart,
    service: &'a Service,
) -> impl Iterator<Item = (usize, &'a ServicePort)> + use<'a> {
    let wanted = match service.service_type {
        ServiceType::NodePort => true,
        ServiceType::LoadBalancer => part.balancer_node_ports,
        ServiceType::ClusterIp | ServiceType::ExternalName => false,
    };
    service.ports.iter().enumerate().filter(move |(_, port)| wanted && port.node_port == 0)
}

struct Wish<'a> {
    service: &'a Service,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    /// clusterIP of this family, and whether it is the second one of the Service.
    ClusterIp(Family, bool),
    /// nodePort of the ports with this number. Ports that differ only in their protocol share a nodePort, as in
    /// Kubernetes.
    NodePort(u16),
}

impl Wish<'_> {
    /// Returns the text from which the number is derived.
    fn text(&self) -> String {
        let ObjectKey { namespace, name } = &self.service.key;
        match self.what {
            What::ClusterIp(..) => format!("{namespace}/{name}"),
            What::NodePort(port) => format!("{namespace}/{name}:{port}"),
        }
    }

    fn grant(&self, found: u128, given: &mut Given) {
        match self.what {
            What::ClusterIp(family, _) => {
                given.cluster_ips[family.index()] = Some(Addr { bytes: found.to_be_bytes() });
            }
            What::NodePort(number) => {
                // The pool has no number above 65535.
                let node_port = u16::try_from(found).unwrap_or_default();
                let indices = self
                    .service
                    .ports
                    .iter()
                    .enumerate()
                    .filter(|(_, port)| port.port == number && port.node_port == 0)
                    .map(|(index, _)| index);
                given.node_ports.extend(indices.map(|index| (index, node_port)));
            }
        }
    }

    fn refusal(&self, ranges: &[Prefix]) -> String {
        let (family, is_second) = match self.what {
            What::ClusterIp(family, is_second) => (family, is_second),
            What::NodePort(number) => {
                let Range { start, end } = NODE_PORTS;
                return format!(
                    "spec.ports: port {number} has no nodePort, and none in {start}..{} is free",
                    end - 1
                );
            }
        };
        let has_range = ranges.iter().any(|range| range.family() == family);
        let why = if has_range {
            format!("no {family} address of the ServiceCIDRs is free")
        } else if ranges.is_empty() {
            "there is no ServiceCIDR in the files to take one from".to_owned()
        } else {
            format!("no ServiceCIDR has {family} addresses")
        };
        if is_second {
            format!("spec.clusterIPs has no {family} address, and {why}: it is not served in {family}")
        } else {
            format!("spec.clusterIP is not set, and {why}: the Service is not served")
        }
    }
}

/// Numbers that can be assigned, `first..end`. Numbers from `preferred` on are used first.
struct Pool {
    first: u128,
    preferred: u128,
    end: u128,
}

impl Pool {
    /// Returns the pool of a prefix, without the network address, the first address (which a cluster uses for the
    /// Service `kubernetes`), and the broadcast address of IPv4. The lowest sixteenth (at least 16 and at most 256
    /// addresses) is used last: it is for people who choose theirs, as in Kubernetes.
    fn of_prefix(prefix: Prefix) -> Self {
        let size = 1_u128 << (128 - u32::from(prefix.mapped_len())).min(HOST_BITS_MAX);
        let start = number(prefix.addr());
        let by_hand = (size / 16).clamp(16, 256);
        let broadcast = u128::from(prefix.family() == Family::V4);
        let (first, end) = (start.saturating_add(2), start.saturating_add(size) - broadcast);
        let preferred =
            Some(start.saturating_add(by_hand)).filter(|preferred| *preferred < end).unwrap_or(first);
        Self { first, preferred, end: end.max(first) }
    }

    /// Returns the number that a text leads to.
    fn home(&self, text: &str) -> Option<u128> {
        // FNV-1a: the same in every version and on every machine.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let size = self.end.saturating_sub(self.preferred);
        (size > 0).then(|| self.preferred + u128::from(hash) % size)
    }
}

fn number(addr: Addr) -> u128 {
    u128::from_be_bytes(addr.bytes)
}

/// Set of numbers, kept as ranges so that the next free number is found at once.
#[derive(Default)]
struct Taken {
    /// First and last number of each range; there is a gap between any two ranges.
    ranges: BTreeMap<u128, u128>,
}

impl Taken {
    fn insert(&mut self, number: u128) {
        if self.next_free(number) != Some(number) {
            return;
        }
        let mut last = number;
        if let Some(behind) = number.checked_add(1).and_then(|next| self.ranges.remove(&next)) {
            last = behind;
        }
        if let Some((_, before)) = self.ranges.range_mut(..number).next_back()
            && before.checked_add(1) == Some(number)
        {
            *before = last;
        } else {
            self.ranges.insert(number, last);
        }
    }

    /// Returns the lowest number from here on that is not taken.
    fn next_free(&self, from: u128) -> Option<u128> {
        match self.ranges.range(..=from).next_back() {
            Some((_, last)) if *last >= from => last.checked_add(1),
            Some(_) | None => Some(from),
        }
    }

    fn take_home(&mut self, pool: &Pool, text: &str) -> Option<u128> {
        let home = pool.home(text)?;
        self.take_in(home..home + 1)
    }

    fn take_next(&mut self, pool: &Pool, text: &str) -> Option<u128> {
        let home = pool.home(text)?;
        let parts = [home..pool.end, pool.preferred..home, pool.first..pool.preferred];
        parts.into_iter().find_map(|part| self.take_in(part))
    }

    fn take_in(&mut self, part: Range<u128>) -> Option<u128> {
        let found = self.next_free(part.start).filter(|found| part.contains(found))?;
        self.insert(found);
        Some(found)
    }
}
