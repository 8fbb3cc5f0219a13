//! Properties of the result for any slices.

use proptest::prelude::*;

use super::*;

/// Generates an endpoint. As in a cluster, its node and its hints follow from its address. Its conditions are free,
/// so that slices may contradict each other about them.
fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    (0..12_u8, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(id, ready, serving, terminating)| {
        let hints = match id % 6 {
            0 => None,
            1 => Some(Hints { zones: vec!["zb".into()], nodes: Vec::new() }),
            2 => Some(Hints { zones: vec!["za".into()], nodes: vec!["n1".into()] }),
            _ => Some(Hints { zones: vec!["za".into()], nodes: Vec::new() }),
        };
        let addr = match id % 4 {
            3 => addr(&format!("fd00:64::{id}")),
            _ => addr(&format!("10.64.0.{id}")),
        };
        Endpoint { addr, ready, serving, terminating, local: id % 3 == 0, hints: hints.map(Arc::new) }
    })
}

fn any_slices() -> impl Strategy<Value = Vec<Slice>> {
    let one = (prop::collection::vec(any_endpoint(), 0..8), any::<bool>(), any::<bool>()).prop_map(
        |(mut endpoints, v6, other_number)| {
            let family = if v6 { Family::V6 } else { Family::V4 };
            endpoints.retain(|e| e.addr.family() == family);
            let mut slice = slice("s", if other_number { "web TCP 9090" } else { "web TCP 8080" }, "");
            (slice.family, slice.endpoints) = (family, endpoints);
            slice
        },
    );
    prop::collection::vec(one, 0..5)
}

fn world(slices: Vec<Slice>) -> World {
    s_with(slices).with(|w| w.service.cluster_ips[1] = Some(addr("fd00:96::10")))
}

proptest! {
    #[test]
    fn sets_are_sound(slices in any_slices()) {
        let world = world(slices);
        let desired = world.desired();
        prop_assert_eq!(desired.ports.len(), 2);
        for port in &desired.ports {
            let keys: Vec<_> = port.backends.iter().map(|b| (b.addr, b.port.get())).collect();
            prop_assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "sorted, each once: {:?}", keys);
            let keys: Vec<_> = port.frontends.iter().map(|(key, _)| key).collect();
            prop_assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "sorted, each once: {:?}", keys);
            for b in &port.backends {
                prop_assert_eq!(b.addr.family(), port.key.family);
                prop_assert!(b.flags & backend::IN_LOCAL == 0 || b.flags & backend::ON_THIS_NODE != 0);
                let used = backend::IN_CLUSTER | backend::IN_LOCAL | backend::SERVING;
                prop_assert!(b.flags & used != 0);
            }
            let flags = port.backends.iter().fold(0, |flags, b| flags | b.flags);
            let [in_cluster, in_local] = [backend::IN_CLUSTER, backend::IN_LOCAL].map(|bit| flags & bit != 0);
            // An empty local set is silent if, and only if, another node could answer.
            prop_assert_eq!(in_cluster, port.empty_local == SlotRange::DROP);
            let of_family = world.slices.iter().filter(|s| s.family == port.key.family);
            let mut ready = of_family.flat_map(|s| &s.endpoints).filter(|e| e.ready && !e.terminating);
            prop_assert!(ready.clone().count() == 0 || in_cluster);
            prop_assert!(!ready.any(|e| e.local) || in_local);
        }
    }

    /// Slices of different names have no order. Two slices may contradict each other about an endpoint's readiness
    /// only: for other contradictions the order decides, upstream as well.
    #[test]
    fn the_order_of_slices_does_not_matter(slices in any_slices(), seed in any::<usize>()) {
        let mut slices = slices;
        for endpoint in slices.iter_mut().flat_map(|slice| &mut slice.endpoints) {
            (endpoint.serving, endpoint.terminating) = (true, false);
        }
        let mut turned = slices.clone();
        if !turned.is_empty() {
            let middle = seed % turned.len();
            turned.rotate_left(middle);
            turned.swap(0, middle);
        }
        prop_assert_eq!(world(slices).desired(), world(turned).desired());
    }

    #[test]
    fn the_last_entry_that_does_not_terminate_wins(states in prop::collection::vec(0..3_u8, 1..6)) {
        let text: Vec<&str> = states.iter().map(|s| ["L1/nr", "L1/t", "L1/st"][usize::from(*s)]).collect();
        let served = s(&text.join(", ")).answer(&s(&text.join(", ")).desired(), "P", "CIP");
        // While all entries are terminating, only the first one counts. An entry that is not terminating replaces it
        // for good.
        let want = if states.iter().all(|s| *s != 0) && states[0] == 2 { "L1" } else { "REJECT" };
        prop_assert_eq!(served, want);
    }
}
