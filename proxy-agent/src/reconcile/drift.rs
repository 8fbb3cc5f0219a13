//! Differences between the wanted and the actual contents of the kernel maps: pure.
//!
//! The agent compares its model with the maps at an interval. `proxy-agent verify` derives the wanted contents from
//! the source and needs no running agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL};
use proxy_common::abi::maps;
use proxy_common::abi::proto;
use proxy_common::abi::{Backend, BackendId, FrontendKind, ServiceId, SlotRange};
use proxy_common::addr::Prefix;
use serde::Serialize;

use crate::reconcile::desired::PortKey;
use crate::reconcile::model::{Model, UNKNOWN, service_name};
use crate::reconcile::plan::FrontendName;
use crate::reconcile::store::{Contents, filter_words};

/// One element that differs from its wanted state.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Difference {
    /// The map.
    pub(crate) map: &'static str,
    /// The object of the element: a Service port, or the key itself.
    pub(crate) object: String,
    /// The difference.
    pub(crate) what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.map, self.object, self.what)
    }
}

/// Returns every difference between the wanted contents of the maps and the contents read back, by map. `filter` is
/// `FILTER` without the zeros at its end.
pub(crate) fn differences(model: &Model, contents: &Contents, filter: &[u64]) -> Vec<Difference> {
    let mut all = Differences {
        by_id: model.ports.iter().map(|(key, port)| (port.id, &**key)).collect(),
        found: Vec::new(),
    };
    all.frontends(model, contents);
    all.services(model, contents);
    all.backends(model, contents);
    all.set(maps::SOURCE_RANGES, &model.source_ranges, &contents.source_ranges, |all, (id, range)| {
        format!("{} from {range}", all.port(*id))
    });
    all.entries(maps::LOCAL_ADDRESSES, &model.local_addresses, &contents.local_addresses, |_, addr| {
        addr.to_string()
    });
    all.set(maps::SERVICE_CIDRS, &model.service_cidrs, &contents.service_cidrs, |_, prefix| {
        prefix.to_string()
    });
    all.set(maps::POD_SOURCES, &model.pod_sources, &contents.pod_sources, |_, prefix: &Prefix| {
        prefix.to_string()
    });
    all.entries(maps::OPT_OUT, &model.opt_out, &contents.opt_out, |_, cgroup| format!("cgroup {cgroup}"));
    all.entries(maps::SANDBOXES, &model.sandboxes, &contents.sandboxes, |_, netns| {
        format!("network namespace {netns}")
    });
    if model.node_flags != contents.node_flags {
        let what = format!("is {:#x} in place of {:#x}", contents.node_flags, model.node_flags);
        all.note(maps::NODE, "flags".to_owned(), what);
    }
    let have = filter.iter().copied().chain(std::iter::repeat(0));
    let missing: u32 =
        filter_words(contents).into_iter().zip(have).map(|(need, have)| (need & !have).count_ones()).sum();
    if missing > 0 {
        all.note(maps::FILTER, format!("{missing} bits"), "are not set: packets may be missed".to_owned());
    }
    all.found
}

struct Differences<'a> {
    by_id: BTreeMap<ServiceId, &'a PortKey>,
    found: Vec<Difference>,
}

impl Differences<'_> {
    fn note(&mut self, map: &'static str, object: String, what: String) {
        self.found.push(Difference { map, object, what });
    }

    /// Returns the name of the Service port with an id.
    fn port(&self, id: ServiceId) -> String {
        self.by_id.get(&id).map_or_else(|| format!("id {id}, which is nobody's"), |key| port_name(key))
    }

    fn entries<K: Ord + Copy, V: PartialEq + Copy>(
        &mut self,
        map: &'static str,
        wanted: &BTreeMap<K, V>,
        found: &[(K, V)],
        name: impl Fn(&Self, &K) -> String,
    ) {
        let mut missing: BTreeSet<K> = wanted.keys().copied().collect();
        for (key, value) in found {
            missing.remove(key);
            let what = match wanted.get(key) {
                Some(wanted) if wanted == value => continue,
                Some(_) => "has another value",
                None => "should not be there",
            };
            self.note(map, name(self, key), what.to_owned());
        }
        for key in missing {
            self.note(map, name(self, &key), "is missing".to_owned());
        }
    }

    fn set<K: Ord + Copy>(
        &mut self,
        map: &'static str,
        wanted: &BTreeSet<K>,
        found: &[K],
        name: impl Fn(&Self, &K) -> String,
    ) {
        let wanted = wanted.iter().map(|key| (*key, ())).collect();
        let found: Vec<(K, ())> = found.iter().map(|key| (*key, ())).collect();
        self.entries(map, &wanted, &found, name);
    }

    fn frontends(&mut self, model: &Model, contents: &Contents) {
        self.entries(maps::FRONTENDS, &model.frontends, &contents.frontends, |all, key| {
            let owner = model.frontends.get(key).filter(|_| key.kind != FrontendKind::Address as u8);
            match owner {
                Some(value) => format!("{} of {}", FrontendName(key), all.port(value.service)),
                None => FrontendName(key).to_string(),
            }
        });
    }

    fn services(&mut self, model: &Model, contents: &Contents) {
        let names = model.ports.iter().map(|(key, port)| (port.id, service_name(key))).collect();
        self.entries(maps::NAMES, &names, &contents.names, |all, id| all.port(*id));
        // Sets that a crash broke and that could not be rewritten for lack of room are reported elsewhere.
        for (key, port) in &model.ports {
            if !port.replaced.is_empty() || [port.service.cluster, port.service.local].contains(&UNKNOWN) {
                continue;
            }
            let found = contents.services.get(port.id.0 as usize);
            if found != Some(&port.service) {
                self.note(maps::SERVICES, port_name(key), "has other sets or another affinity".to_owned());
            }
            for (range, set) in [(port.service.cluster, IN_CLUSTER), (port.service.local, IN_LOCAL)] {
                if !range.is_empty()
                    && slots(contents, range).is_none_or(|slots| !slots.iter().copied().eq(port.members(set)))
                {
                    let which = if set == IN_CLUSTER { "cluster" } else { "local" };
                    self.note(maps::SLOTS, port_name(key), format!("the {which} set names other backends"));
                }
            }
        }
    }

    fn backends(&mut self, model: &Model, contents: &Contents) {
        let mut wanted: BTreeMap<BackendId, Backend> = model
            .ports
            .values()
            .flat_map(|port| {
                port.backends.iter().map(|backend| (backend.id, backend.element(port.id))).collect::<Vec<_>>()
            })
            .collect();
        for (id, found) in (0..).map(BackendId).zip(&contents.backends) {
            let what = match wanted.remove(&id) {
                Some(backend) if backend == *found => continue,
                Some(_) => "has another address or state",
                // Nothing refers to this element.
                None => continue,
            };
            let endpoint = std::net::SocketAddr::new(found.addr.to_ip(), found.port.get());
            self.note(
                maps::BACKENDS,
                format!("{id} ({endpoint}) of {}", self.port(found.service)),
                what.to_owned(),
            );
        }
        for (id, backend) in wanted {
            self.note(
                maps::BACKENDS,
                format!("{id} of {}", self.port(backend.service)),
                "is missing".to_owned(),
            );
        }
    }
}

fn slots(contents: &Contents, range: SlotRange) -> Option<&[BackendId]> {
    let base = range.base as usize;
    contents.slots.get(base..base.checked_add(range.len as usize)?)
}

fn port_name(key: &PortKey) -> String {
    let (service, protocol) = (&key.service, proto::name(key.proto));
    match &*key.port_name {
        "" => format!("{service} {protocol} {}", key.family),
        name => format!("{service} {name}/{protocol} {}", key.family),
    }
}
