//! Traffic that the socket edge leaves to the packet edge: `OPT_OUT`, `SANDBOXES`, and the flags in `NODE`.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::node::{HOST_IN_PACKETS, OPTED_OUT, PODS_IN_PACKETS, SANDBOXES_KNOWN};
use proxy_common::abi::opt_out::{EVERYTHING, INSIDE};
use proxy_common::abi::{CgroupId, NetnsCookie};
use proxy_common::addr::Prefix;

use crate::reconcile::model::Model;
use crate::reconcile::store::Op;

/// Knowledge of a pod's sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Cookie of the network namespace. `None` if it is nested inside another one, so that none of its sockets is
    /// translated.
    pub(crate) netns: Option<NetnsCookie>,
    /// Ids of the containers' cgroups. Containers of another sandbox of the same pod have other cgroups.
    pub(crate) containers: BTreeSet<CgroupId>,
}

/// Sockets that the socket edge leaves alone, as far as known. For a field that is `None`, the state that an earlier
/// agent left stays in force, as do the programs that it attached.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeftAlone<'a> {
    /// Whether the packet edge is attached to interfaces of pods. Without them nothing can be left to it.
    pub pods_in_packets: Option<bool>,
    /// Whether the refusals of the host's sockets can be left to the packet edge ([`meets_edges`]).
    pub host_in_packets: Option<bool>,
    /// Cgroups that opt out.
    pub opted_out: Option<&'a BTreeSet<CgroupId>>,
    /// Sandboxes of pods, by the cgroups of the pods. A socket of a process in a container's cgroup is left alone if
    /// its network namespace is not a pod's.
    pub sandboxes: Option<&'a BTreeMap<CgroupId, Sandbox>>,
}

/// Plans `SANDBOXES`, `OPT_OUT` and the flags. A sandbox is added before the first cgroup of its pod is marked
/// `INSIDE`, and removed after the last one.
pub fn plan_left(model: &mut Model, wanted: &LeftAlone<'_>) -> Vec<Op> {
    let pods_in_packets = wanted.pods_in_packets.unwrap_or(model.node_flags & PODS_IN_PACKETS != 0);
    let sandboxes: BTreeMap<NetnsCookie, CgroupId> = match wanted.sandboxes {
        Some(found) => found.iter().filter_map(|(cgroup, sandbox)| Some((sandbox.netns?, *cgroup))).collect(),
        None => model.sandboxes.clone(),
    };
    let opted_out: BTreeSet<CgroupId> = match wanted.opted_out {
        Some(cgroups) => cgroups.clone(),
        None => model.opt_out.iter().filter(|(_, what)| **what == EVERYTHING).map(|(id, _)| *id).collect(),
    };
    let mut flags = match wanted.host_in_packets {
        Some(true) => HOST_IN_PACKETS,
        Some(false) => 0,
        None => model.node_flags & HOST_IN_PACKETS,
    };
    let mut opt_out: BTreeMap<CgroupId, u32> = match wanted.sandboxes {
        Some(found) => {
            found.values().flat_map(|sandbox| &sandbox.containers).map(|id| (*id, INSIDE)).collect()
        }
        None => {
            model.opt_out.iter().filter(|(_, what)| **what == INSIDE).map(|(id, what)| (*id, *what)).collect()
        }
    };
    if pods_in_packets {
        flags |= PODS_IN_PACKETS;
        flags |= if opted_out.is_empty() { 0 } else { OPTED_OUT };
        flags |= if sandboxes.is_empty() && opt_out.is_empty() { 0 } else { SANDBOXES_KNOWN };
    }
    opt_out.extend(opted_out.into_iter().map(|cgroup| (cgroup, EVERYTHING)));

    let mut ops = Vec::new();
    let begin = sandboxes.iter().filter(|(netns, cgroup)| model.sandboxes.get(netns) != Some(cgroup));
    ops.extend(begin.map(|(netns, cgroup)| Op::Sandbox(*netns, Some(*cgroup))));
    for (cgroup, what) in opt_out.iter().filter(|(cgroup, what)| model.opt_out.get(cgroup) != Some(what)) {
        // A value is never overwritten.
        ops.extend(model.opt_out.contains_key(cgroup).then_some(Op::OptOut(*cgroup, None)));
        ops.push(Op::OptOut(*cgroup, Some(*what)));
    }
    if flags != model.node_flags {
        ops.push(Op::NodeFlags(flags));
    }
    let end = model.opt_out.keys().filter(|cgroup| !opt_out.contains_key(cgroup));
    ops.extend(end.map(|cgroup| Op::OptOut(*cgroup, None)));
    let end = model.sandboxes.keys().filter(|netns| !sandboxes.contains_key(netns));
    ops.extend(end.map(|netns| Op::Sandbox(*netns, None)));
    (model.node_flags, model.opt_out, model.sandboxes) = (flags, opt_out, sandboxes);
    ops
}

/// Returns whether all packets that this host sends to a clusterIP meet the packet edge: no prefix of `elsewhere`, to
/// which routes lead past the packet edge, overlaps a ServiceCIDR.
pub(crate) fn meets_edges(model: &Model, elsewhere: &[Prefix]) -> bool {
    !elsewhere
        .iter()
        .any(|prefix| model.service_cidrs.iter().any(|cidr| cidr.covers(prefix) || prefix.covers(cidr)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::store::{Capacity, Contents};

    const BOTH: u64 = PODS_IN_PACKETS | OPTED_OUT;
    const CAPACITY: Capacity =
        Capacity { frontends: 1, services: 1, slots: 1, backends: 1, source_ranges: 1 };

    fn model(node_flags: u64, opt_out: &[(CgroupId, u32)], sandboxes: &[(NetnsCookie, CgroupId)]) -> Model {
        let (opt_out, sandboxes) = (opt_out.to_vec(), sandboxes.to_vec());
        Model::restore(CAPACITY, &Contents { node_flags, opt_out, sandboxes, ..Contents::default() })
    }

    #[test]
    fn what_is_left_to_packets_stays_until_the_devices_are_known() {
        for (found, pods_in_packets, ops, flags) in [
            (0, None, vec![], 0),
            (0, Some(false), vec![], 0),
            (0, Some(true), vec![Op::NodeFlags(PODS_IN_PACKETS)], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, None, vec![], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, Some(true), vec![], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, Some(false), vec![Op::NodeFlags(0)], 0),
        ] {
            let (mut model, nobody) = (model(found, &[], &[]), BTreeSet::new());
            let wanted = LeftAlone {
                pods_in_packets,
                host_in_packets: Some(false),
                opted_out: Some(&nobody),
                sandboxes: None,
            };
            assert_eq!(plan_left(&mut model, &wanted), ops, "{pods_in_packets:?}");
            assert_eq!(model.node_flags, flags, "{pods_in_packets:?}");
        }
    }

    fn opted_out(cgroup: CgroupId) -> Op {
        Op::OptOut(cgroup, Some(EVERYTHING))
    }

    fn opted_in(cgroup: CgroupId) -> Op {
        Op::OptOut(cgroup, None)
    }

    #[test]
    fn who_has_opted_out_is_left_to_packets_if_there_are_any() {
        use Op::NodeFlags;
        for (found, opted_out, pods_in_packets, want) in [
            (
                &[][..],
                Some(&[1, 2][..]),
                Some(true),
                vec![opted_out(CgroupId(1)), opted_out(CgroupId(2)), NodeFlags(BOTH)],
            ),
            (&[1, 2], Some(&[2, 3]), Some(true), vec![opted_out(CgroupId(3)), opted_in(CgroupId(1))]),
            (&[1], Some(&[]), Some(true), vec![NodeFlags(PODS_IN_PACKETS), opted_in(CgroupId(1))]),
            (&[1], None, Some(true), vec![]),
            (&[1], None, None, vec![]),
            (&[1], Some(&[1]), Some(false), vec![NodeFlags(0)]),
            (&[1], None, Some(false), vec![NodeFlags(0)]),
        ] {
            let before: Vec<_> = found.iter().map(|cgroup| (CgroupId(*cgroup), EVERYTHING)).collect();
            let mut model = model(if found.is_empty() { PODS_IN_PACKETS } else { BOTH }, &before, &[]);
            let opted_out =
                opted_out.map(|cgroups| cgroups.iter().copied().map(CgroupId).collect::<BTreeSet<_>>());
            let wanted = LeftAlone { pods_in_packets, opted_out: opted_out.as_ref(), ..LeftAlone::default() };
            assert_eq!(plan_left(&mut model, &wanted), want);
            assert_eq!(plan_left(&mut model, &wanted), [], "once is enough");
        }
    }

    /// Two pods have the cgroups 1 and 2, and the network namespaces 10 and 20, or 30 after a restart.
    /// Returns sandboxes by the number of their pod's cgroup and of their network namespace, 0 for none. Each has one
    /// container, with the number of its pod's cgroup.
    fn known(all: &[(u64, u64)]) -> BTreeMap<CgroupId, Sandbox> {
        let sandbox = |cgroup, netns| Sandbox {
            netns: (netns != 0).then_some(NetnsCookie(netns)),
            containers: [cgroup].into(),
        };
        all.iter().map(|&(cgroup, netns)| (CgroupId(cgroup), sandbox(CgroupId(cgroup), netns))).collect()
    }

    #[test]
    fn what_is_inside_a_known_sandbox_is_left_to_packets() {
        use Op::{NodeFlags, OptOut, Sandbox};
        const KNOWN: u64 = PODS_IN_PACKETS | SANDBOXES_KNOWN;
        let one = (KNOWN, &[(CgroupId(1), INSIDE)][..], &[(NetnsCookie(10), CgroupId(1))][..]);
        for ((flags, opt_out, netns), opted_out, sandboxes, pods, want) in [
            (
                (PODS_IN_PACKETS, &[][..], &[][..]),
                &[][..],
                Some(&[(1, 10)][..]),
                true,
                vec![
                    Sandbox(NetnsCookie(10), Some(CgroupId(1))),
                    OptOut(CgroupId(1), Some(INSIDE)),
                    NodeFlags(KNOWN),
                ],
            ),
            (one, &[], Some(&[(1, 10)]), true, vec![]),
            (one, &[], None, true, vec![]),
            (
                one,
                &[],
                Some(&[(1, 30)]),
                true,
                vec![Sandbox(NetnsCookie(30), Some(CgroupId(1))), Sandbox(NetnsCookie(10), None)],
            ),
            (
                one,
                &[],
                Some(&[]),
                true,
                vec![NodeFlags(PODS_IN_PACKETS), OptOut(CgroupId(1), None), Sandbox(NetnsCookie(10), None)],
            ),
            (one, &[], Some(&[(1, 10)]), false, vec![NodeFlags(0)]),
            // All sockets of the pod are inside.
            (
                (PODS_IN_PACKETS, &[], &[]),
                &[],
                Some(&[(1, 0)]),
                true,
                vec![OptOut(CgroupId(1), Some(INSIDE)), NodeFlags(KNOWN)],
            ),
            ((KNOWN, &[(CgroupId(1), INSIDE)], &[]), &[], None, true, vec![]),
            // `EVERYTHING` takes precedence over `INSIDE`.
            (
                one,
                &[1],
                Some(&[(1, 10), (2, 20)]),
                true,
                vec![
                    Sandbox(NetnsCookie(20), Some(CgroupId(2))),
                    OptOut(CgroupId(1), None),
                    OptOut(CgroupId(1), Some(EVERYTHING)),
                    OptOut(CgroupId(2), Some(INSIDE)),
                    NodeFlags(KNOWN | OPTED_OUT),
                ],
            ),
        ] {
            let mut model = model(flags, opt_out, netns);
            let opted_out: BTreeSet<_> = opted_out.iter().copied().map(CgroupId).collect();
            let sandboxes = sandboxes.map(known);
            let wanted = LeftAlone {
                pods_in_packets: Some(pods),
                host_in_packets: None,
                opted_out: Some(&opted_out),
                sandboxes: sandboxes.as_ref(),
            };
            assert_eq!(plan_left(&mut model, &wanted), want);
            assert_eq!(plan_left(&mut model, &wanted), [], "once is enough");
        }
    }

    #[test]
    fn the_hosts_refusals_are_left_to_packets_if_all_of_them_meet_an_edge() {
        for (found, host, want) in [
            (0, None, 0),
            (0, Some(true), HOST_IN_PACKETS),
            (BOTH, Some(true), PODS_IN_PACKETS | HOST_IN_PACKETS),
            (HOST_IN_PACKETS, None, HOST_IN_PACKETS),
            (HOST_IN_PACKETS, Some(false), 0),
        ] {
            let mut model = model(found, &[], &[]);
            plan_left(&mut model, &LeftAlone { host_in_packets: host, ..LeftAlone::default() });
            assert_eq!(model.node_flags, want, "{found} {host:?}");
        }

        let contents = Contents {
            service_cidrs: vec![prefix("10.96.0.0", 16), prefix("fd00:96::", 112)],
            ..Contents::default()
        };
        let model = Model::restore(CAPACITY, &contents);
        for (elsewhere, len, want) in [
            // Pods, and networks outside of the cluster.
            ("10.64.1.11", 32, true),
            ("172.16.0.0", 12, true),
            ("fd00:64::", 64, true),
            // Around a ServiceCIDR, a part of one, one address, the default routes.
            ("10.0.0.0", 8, false),
            ("10.96.7.0", 24, false),
            ("fd00:96::10", 128, false),
            ("0.0.0.0", 0, false),
            ("::", 0, false),
            ("8000::", 1, false),
        ] {
            assert_eq!(meets_edges(&model, &[prefix(elsewhere, len)]), want, "{elsewhere}/{len}");
        }
        assert!(meets_edges(&model, &[]));
    }

    fn prefix(text: &str, len: u8) -> Prefix {
        Prefix::new(text.parse::<std::net::IpAddr>().unwrap().into(), len).unwrap()
    }
}
