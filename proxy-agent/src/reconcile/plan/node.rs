//! The node's own tables: `LOCAL_ADDRESSES`, `SERVICE_CIDRS` and `POD_SOURCES`. Their size does not follow the
//! cluster, so elements that do not fit are left out and reported.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::local_address::NODEPORT;
use proxy_common::abi::maps;
use proxy_common::addr::{Addr, Prefix};

use crate::reconcile::cluster::ObjectKey;
use crate::reconcile::model::Model;
use crate::reconcile::store::Op;

/// Number of elements of `LOCAL_ADDRESSES`: kube-proxy in its IPVS mode gives a node one address for each Service.
pub const LOCAL_ADDRESS_ENTRIES: u32 = 65_536;
/// Number of elements of `SERVICE_CIDRS`, and of `POD_SOURCES`.
pub const PREFIX_ENTRIES: u32 = 16_384;

/// Wanted contents of the tables.
#[derive(Clone, Debug, Default)]
pub struct NodeTables {
    /// `LOCAL_ADDRESSES`: each address of the host with its bits.
    pub addresses: BTreeMap<Addr, u32>,
    /// `SERVICE_CIDRS`.
    pub service_cidrs: BTreeSet<Prefix>,
    /// `POD_SOURCES`.
    pub pod_sources: BTreeSet<Prefix>,
}

impl NodeTables {
    /// Leaves out the elements that do not fit: of the addresses, first those that serve no nodePorts. Returns
    /// sentences about the consequences.
    pub(crate) fn fit(&mut self) -> Vec<String> {
        let Self { addresses, service_cidrs, pod_sources } = self;
        let mut problems = Vec::new();
        let mut too_many = |map, what, found: usize, room: u32, cost| {
            let spare = found.saturating_sub(room as usize);
            if spare > 0 {
                problems.push(format!("{map} has room for {room} of {found} {what}: {cost}"));
            }
            spare
        };
        let mut spare = too_many(
            maps::LOCAL_ADDRESSES,
            "addresses of this host",
            addresses.len(),
            LOCAL_ADDRESS_ENTRIES,
            "the others are taken for another machine's; remove those that nobody needs",
        );
        addresses.retain(|_, bits| {
            let stays = spare == 0 || *bits & NODEPORT != 0;
            spare -= usize::from(!stays);
            stays
        });
        (0..spare).for_each(|_| _ = addresses.pop_last());
        for (map, what, prefixes, cost) in [
            (
                maps::SERVICE_CIDRS,
                "prefixes of ServiceCIDRs",
                service_cidrs,
                "unused addresses of the others are not dropped",
            ),
            (
                maps::POD_SOURCES,
                "prefixes of pods",
                pod_sources,
                "who comes from the others counts as a client outside of the cluster",
            ),
        ] {
            let spare = too_many(map, what, prefixes.len(), PREFIX_ENTRIES, cost);
            (0..spare).for_each(|_| _ = prefixes.pop_last());
        }
        problems
    }
}

/// Plans the tables: additions first, unless there is no room for both. Returns the operations, and the Services with
/// frontends at addresses that begin or cease to serve nodePorts. These Services have to be planned again.
pub fn plan_node(model: &mut Model, wanted: NodeTables) -> (Vec<Op>, BTreeSet<ObjectKey>) {
    let NodeTables { addresses, service_cidrs, pod_sources } = wanted;
    let changed = addresses.iter().filter(|(addr, bits)| model.local_addresses.get(addr) != Some(bits));
    let add = changed.map(|(addr, bits)| Op::LocalAddress(*addr, Some(*bits))).collect();
    let stale = model.local_addresses.keys().filter(|addr| !addresses.contains_key(addr));
    let remove = stale.map(|addr| Op::LocalAddress(*addr, None)).collect();
    let mut ops = in_order(add, remove, addresses.len(), LOCAL_ADDRESS_ENTRIES);
    for (have, want, op) in [
        (&model.service_cidrs, &service_cidrs, Op::ServiceCidr as fn(Prefix, bool) -> Op),
        (&model.pod_sources, &pod_sources, Op::PodSource),
    ] {
        let add = want.difference(have).map(|prefix| op(*prefix, true)).collect();
        let remove = have.difference(want).map(|prefix| op(*prefix, false)).collect();
        ops.extend(in_order(add, remove, want.len(), PREFIX_ENTRIES));
    }
    model.service_cidrs = service_cidrs;
    model.pod_sources = pod_sources;
    (ops, model.take_local_addresses(addresses))
}

/// Puts additions first if there is room for both, else removals. `len` is the number of elements in the end.
fn in_order(mut add: Vec<Op>, mut remove: Vec<Op>, len: usize, room: u32) -> Vec<Op> {
    if len + remove.len() <= room as usize {
        add.append(&mut remove);
        add
    } else {
        remove.append(&mut add);
        remove
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::local_address::HOST;

    use super::*;
    use crate::reconcile::store::{Capacity, Contents};

    fn addr(number: u32) -> Addr {
        Addr::v4((0x0a00_0000 + number).to_be_bytes())
    }

    fn hosts(numbers: std::ops::Range<u32>) -> NodeTables {
        NodeTables {
            addresses: numbers.map(|number| (addr(number), HOST)).collect(),
            ..NodeTables::default()
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_named() {
        let mut tables = hosts(0..LOCAL_ADDRESS_ENTRIES + 3);
        tables.addresses.insert(addr(0), HOST | NODEPORT);
        tables.service_cidrs = (0..PREFIX_ENTRIES + 1).map(prefix).collect();
        tables.pod_sources = (0..PREFIX_ENTRIES + 2).map(prefix).collect();
        let problems = tables.fit();
        assert_eq!(problems.len(), 3, "{problems:?}");
        for (problem, words) in problems.iter().zip(["65536 of 65539", "16384 of 16385", "16384 of 16386"]) {
            assert!(problem.contains(words), "{problem}");
        }
        assert_eq!(tables.addresses.len(), LOCAL_ADDRESS_ENTRIES as usize);
        assert!(tables.addresses.contains_key(&addr(0)), "nodePorts are served on it");
        assert_eq!([tables.service_cidrs.len(), tables.pod_sources.len()], [PREFIX_ENTRIES as usize; 2]);
        assert_eq!(tables.fit(), Vec::<String>::new(), "and then it fits");

        let mut all = hosts(0..LOCAL_ADDRESS_ENTRIES + 1);
        all.addresses.values_mut().for_each(|bits| *bits |= NODEPORT);
        assert_eq!(all.fit().len(), 1);
        assert_eq!(all.addresses.len(), LOCAL_ADDRESS_ENTRIES as usize);
    }

    fn prefix(number: u32) -> Prefix {
        Prefix::new(addr(number << 8), 24).unwrap()
    }

    /// No prefix of the operations holds more elements than there is room for.
    #[test]
    fn a_full_table_loses_before_it_gains() {
        let capacity = Capacity { frontends: 1, services: 1, slots: 1, backends: 1, source_ranges: 1 };
        let mut model = Model::restore(capacity, &Contents::default());
        let mut held = BTreeSet::new();
        for numbers in [0..LOCAL_ADDRESS_ENTRIES, 10..LOCAL_ADDRESS_ENTRIES + 10, 5..6, 0..9] {
            for op in plan_node(&mut model, hosts(numbers.clone())).0 {
                let Op::LocalAddress(addr, bits) = op else { unreachable!("{op:?}") };
                assert!(if bits.is_some() { held.insert(addr) } else { held.remove(&addr) });
                assert!(held.len() <= LOCAL_ADDRESS_ENTRIES as usize);
            }
            assert!(held.iter().copied().eq(numbers.map(addr)));
        }
    }
}
