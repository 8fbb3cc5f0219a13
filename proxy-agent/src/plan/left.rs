//! What the socket edge leaves to the packet edge: the flags in `NODE`.

use proxy_common::abi::node::PODS_IN_PACKETS;

use crate::model::Model;
use crate::store::Op;

/// Plans `NODE`. `pods_in_packets` tells whether the packet edge has interfaces of pods; while that is not known, what an
/// earlier agent has left stays in force, as do the programs that it has attached.
pub fn plan_left(model: &mut Model, pods_in_packets: Option<bool>) -> Vec<Op> {
    let flags = match pods_in_packets {
        Some(true) => PODS_IN_PACKETS,
        Some(false) => 0,
        None => model.node_flags & PODS_IN_PACKETS,
    };
    if flags == model.node_flags {
        return Vec::new();
    }
    model.node_flags = flags;
    vec![Op::NodeFlags(flags)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Capacity, Contents};

    #[test]
    fn what_is_left_to_packets_stays_until_the_devices_are_known() {
        let capacity = Capacity { frontends: 1, services: 1, slots: 1, backends: 1, source_ranges: 1 };
        let found = Contents { node_flags: PODS_IN_PACKETS, ..Contents::default() };
        let (empty, found) = (Model::new(capacity), Model::restore(capacity, &found));
        for (model, pods, ops, flags) in [
            (&empty, None, vec![], 0),
            (&empty, Some(false), vec![], 0),
            (&empty, Some(true), vec![Op::NodeFlags(PODS_IN_PACKETS)], PODS_IN_PACKETS),
            (&found, None, vec![], PODS_IN_PACKETS),
            (&found, Some(true), vec![], PODS_IN_PACKETS),
            (&found, Some(false), vec![Op::NodeFlags(0)], 0),
        ] {
            let mut model = model.clone();
            assert_eq!(plan_left(&mut model, pods), ops, "{pods:?}");
            assert_eq!(model.node_flags, flags, "{pods:?}");
        }
    }
}
