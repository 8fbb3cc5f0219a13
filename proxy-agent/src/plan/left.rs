//! What the socket edge leaves to the packet edge: `OPT_OUT`, and the flags in `NODE`.

use std::collections::BTreeSet;

use proxy_common::abi::node::{HOST_IN_PACKETS, OPTED_OUT, PODS_IN_PACKETS};
use proxy_common::addr::Prefix;

use crate::model::Model;
use crate::store::Op;

/// Plans both. `pods_in_packets` tells whether the packet edge has interfaces of pods, without which nothing can be left to
/// it, `host_in_packets` whether the host's refusals can be ([`meets_edges`]), `opted_out` the cgroups of pods that want to be.
/// While one of them is not known, what an earlier agent has left stays in force, as do the programs that it has attached.
pub fn plan_left(
    model: &mut Model,
    pods_in_packets: Option<bool>,
    host_in_packets: Option<bool>,
    opted_out: Option<&BTreeSet<u64>>,
) -> Vec<Op> {
    let pods_in_packets = pods_in_packets.unwrap_or(model.node_flags & PODS_IN_PACKETS != 0);
    let opted_out = opted_out.unwrap_or(&model.opt_out).clone();
    let mut flags = match host_in_packets {
        Some(true) => HOST_IN_PACKETS,
        Some(false) => 0,
        None => model.node_flags & HOST_IN_PACKETS,
    };
    if pods_in_packets {
        flags |= PODS_IN_PACKETS;
        if !opted_out.is_empty() {
            flags |= OPTED_OUT;
        }
    }
    let mut ops: Vec<Op> =
        opted_out.difference(&model.opt_out).map(|cgroup| Op::OptOut(*cgroup, true)).collect();
    if flags != model.node_flags {
        ops.push(Op::NodeFlags(flags));
    }
    ops.extend(model.opt_out.difference(&opted_out).map(|cgroup| Op::OptOut(*cgroup, false)));
    (model.node_flags, model.opt_out) = (flags, opted_out);
    ops
}

/// Whether what this host sends to a clusterIP meets the packet edge: no route to one leads `elsewhere`, where the edge is not.
pub fn meets_edges(model: &Model, elsewhere: &[Prefix]) -> bool {
    let is_concerned =
        |prefix: &Prefix| model.service_cidrs.iter().any(|cidr| cidr.covers(prefix) || prefix.covers(cidr));
    !elsewhere.iter().any(is_concerned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Capacity, Contents};

    const BOTH: u64 = PODS_IN_PACKETS | OPTED_OUT;

    fn model(node_flags: u64, opt_out: &[u64]) -> Model {
        let capacity = Capacity { frontends: 1, services: 1, slots: 1, backends: 1, source_ranges: 1 };
        let contents = Contents { node_flags, opt_out: opt_out.to_vec(), ..Contents::default() };
        Model::restore(capacity, &contents)
    }

    #[test]
    fn what_is_left_to_packets_stays_until_the_devices_are_known() {
        for (found, pods, ops, flags) in [
            (0, None, vec![], 0),
            (0, Some(false), vec![], 0),
            (0, Some(true), vec![Op::NodeFlags(PODS_IN_PACKETS)], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, None, vec![], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, Some(true), vec![], PODS_IN_PACKETS),
            (PODS_IN_PACKETS, Some(false), vec![Op::NodeFlags(0)], 0),
        ] {
            let mut model = model(found, &[]);
            assert_eq!(plan_left(&mut model, pods, Some(false), Some(&BTreeSet::new())), ops, "{pods:?}");
            assert_eq!(model.node_flags, flags, "{pods:?}");
        }
    }

    #[test]
    fn who_has_opted_out_is_left_to_packets_if_there_are_any() {
        use Op::{NodeFlags, OptOut};
        for (found, opted_out, pods, want) in [
            (&[][..], Some(&[1, 2][..]), Some(true), vec![OptOut(1, true), OptOut(2, true), NodeFlags(BOTH)]),
            (&[1, 2], Some(&[2, 3]), Some(true), vec![OptOut(3, true), OptOut(1, false)]),
            (&[1], Some(&[]), Some(true), vec![NodeFlags(PODS_IN_PACKETS), OptOut(1, false)]),
            (&[1], None, Some(true), vec![]),
            (&[1], None, None, vec![]),
            (&[1], Some(&[1]), Some(false), vec![NodeFlags(0)]),
            (&[1], None, Some(false), vec![NodeFlags(0)]),
        ] {
            let mut model = model(if found.is_empty() { PODS_IN_PACKETS } else { BOTH }, found);
            let opted_out = opted_out.map(|cgroups| cgroups.iter().copied().collect::<BTreeSet<u64>>());
            assert_eq!(plan_left(&mut model, pods, None, opted_out.as_ref()), want);
            assert_eq!(plan_left(&mut model, pods, None, opted_out.as_ref()), [], "once is enough");
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
            let mut model = model(found, &[]);
            plan_left(&mut model, None, host, None);
            assert_eq!(model.node_flags, want, "{found} {host:?}");
        }

        let prefix =
            |text: &str, len| Prefix::new(text.parse::<std::net::IpAddr>().unwrap().into(), len).unwrap();
        let contents = Contents {
            service_cidrs: vec![prefix("10.96.0.0", 16), prefix("fd00:96::", 112)],
            ..Contents::default()
        };
        let capacity = Capacity { frontends: 1, services: 1, slots: 1, backends: 1, source_ranges: 1 };
        let model = Model::restore(capacity, &contents);
        for (elsewhere, len, want) in [
            // Pods, and other networks.
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
}
