//! What the socket edge leaves to the packet edge: `OPT_OUT`, and the flags in `NODE`.

use std::collections::BTreeSet;

use proxy_common::abi::node::{OPTED_OUT, PODS_IN_PACKETS};

use crate::model::Model;
use crate::store::Op;

/// Plans both. `pods_in_packets` tells whether the packet edge has interfaces of pods, without which nothing can be left to
/// it, `opted_out` the cgroups of pods that want to be. While either is not known, what an earlier agent has left stays
/// in force, as do the programs that it has attached.
pub fn plan_left(
    model: &mut Model,
    pods_in_packets: Option<bool>,
    opted_out: Option<&BTreeSet<u64>>,
) -> Vec<Op> {
    let pods_in_packets = pods_in_packets.unwrap_or(model.node_flags & PODS_IN_PACKETS != 0);
    let opted_out = opted_out.unwrap_or(&model.opt_out).clone();
    let mut flags = 0;
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
            assert_eq!(plan_left(&mut model, pods, Some(&BTreeSet::new())), ops, "{pods:?}");
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
            assert_eq!(plan_left(&mut model, pods, opted_out.as_ref()), want);
            assert_eq!(plan_left(&mut model, pods, opted_out.as_ref()), [], "once is enough");
        }
    }
}
