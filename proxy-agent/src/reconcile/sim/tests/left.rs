//! Sockets that the socket edge leaves alone.

use proxy_common::abi::{CgroupId, NetnsCookie};

use super::*;

/// Cgroups: above those of all pods, of a pod, and of its container.
const ABOVE: CgroupId = CgroupId(1);
const OWN: CgroupId = CgroupId(7);
const CONTAINER: CgroupId = CgroupId(3);
/// Cgroups of other pods, and of one that has opted out.
const OTHER: CgroupId = CgroupId(2);
const UNKNOWN: CgroupId = CgroupId(9);
const LEFT: CgroupId = CgroupId(6);

/// Whatever the verdict would be, it is left to the packet edge.
#[test]
fn sockets_of_a_pod_that_has_opted_out_are_left_alone() {
    let mut sim = world();
    // A served port, a Service without endpoints, an unused port.
    let addresses = [(vip(10), 80), (vip(20), 80), (vip(10), 81)];
    sim.apply(&Op::OptOut(OWN, Some(EVERYTHING))).unwrap();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    assert_eq!(
        connect(&mut SimSocket { cgroups: &[ABOVE, OWN], ..socket(vip(10), 80, TCP) }, &sim),
        Translated
    );
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS | OPTED_OUT)).unwrap();
    const DEEP: &[CgroupId] = &[
        ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE, ABOVE,
        ABOVE, OWN,
    ];
    for cgroups in [&[OWN][..], &[ABOVE, OWN], &[ABOVE, OTHER, OWN, CONTAINER], DEEP] {
        assert!(is_left(&sim, cgroups, addresses));
    }
    assert_eq!(sim.counted(Counter::LeftToPackets), 12);
    // Other pods, and addresses that belong to no Service.
    for cgroups in [&[][..], &[ABOVE, OTHER, CONTAINER]] {
        let other = SimSocket { cgroups, ..socket(vip(10), 80, TCP) };
        check(&sim, other, Translated, Some(Counter::Connected));
    }
    check(&sim, SimSocket { cgroups: &[OWN], ..socket(pod(1), 8080, TCP) }, Pass, None);
    // The packet edge does not judge packets of the host.
    let host = SimSocket { netns: HOST_NETNS, cgroups: &[OWN], ..socket(vip(10), 80, TCP) };
    check(&sim, host, Translated, Some(Counter::Connected));
    // Each datagram is checked, also in a flow that began before the opt-out.
    let mut datagram = socket(vip(10), 80, UDP);
    assert_eq!(sendmsg(&mut datagram, &sim), Translated);
    let mut datagram = SimSocket { cgroups: &[ABOVE, OWN], ..socket(vip(10), 80, UDP) };
    assert_eq!((sendmsg(&mut datagram, &sim), datagram.addr), (Pass, vip(10)));
    sim.apply(&Op::OptOut(OWN, None)).unwrap();
    assert!(!is_left(&sim, &[ABOVE, OWN], addresses));
}

/// Returns whether sockets in these cgroups are left alone, to whichever of the addresses they connect.
fn is_left(sim: &Simulator, cgroups: &'static [CgroupId], addresses: [(Addr, u16); 3]) -> bool {
    let left = addresses.map(|(address, port)| {
        let before = SimSocket { cgroups, ..socket(address, port, TCP) };
        let mut after = before.clone();
        (connect(&mut after, sim), after == before) == (Pass, true)
    });
    assert!(left.iter().all(|other| *other == left[0]), "{cgroups:?}: {left:?}");
    left[0]
}

/// The pod with the cgroup [`OWN`] has its sandbox in network namespace 70, the pod with cgroup 8 in 80. Nothing is known of
/// [`UNKNOWN`].
#[test]
fn sockets_of_networks_inside_a_pod_are_left_alone() {
    let mut sim = world();
    for (netns, cgroup) in [(NetnsCookie(70), OWN), (NetnsCookie(80), CgroupId(8))] {
        sim.apply(&Op::Sandbox(netns, Some(cgroup))).unwrap();
        sim.apply(&Op::OptOut(cgroup, Some(INSIDE))).unwrap();
    }
    sim.apply(&Op::OptOut(LEFT, Some(EVERYTHING))).unwrap();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    assert!(!is_left_inside(&sim, NetnsCookie(71), &[ABOVE, OWN]), "while nobody is known");
    for (flags, everything) in [(SANDBOXES_KNOWN, false), (SANDBOXES_KNOWN | OPTED_OUT, true)] {
        sim.apply(&Op::NodeFlags(PODS_IN_PACKETS | flags)).unwrap();
        for (netns, cgroups, left) in [
            (NetnsCookie(70), &[ABOVE, OWN, CONTAINER][..], false),
            (NetnsCookie(71), &[ABOVE, OWN, CONTAINER], true),
            (NetnsCookie(71), &[ABOVE, OWN], true),
            // A pod of an inner cluster.
            (NetnsCookie(71), &[ABOVE, OWN, CONTAINER, ABOVE, UNKNOWN], true),
            // Another pod's namespace is not nested in this pod.
            (NetnsCookie(80), &[ABOVE, OWN, CONTAINER], false),
            // A pod that has just appeared, or whose sandbox cannot be found.
            (NetnsCookie(90), &[ABOVE, UNKNOWN], false),
            (NetnsCookie(90), &[], false),
            (HOST_NETNS, &[ABOVE, OWN, CONTAINER], false),
            // In its own namespace a socket is left alone only if its pod has opted out. Without the flag `OPTED_OUT`
            // this is not checked.
            (NetnsCookie(70), &[ABOVE, LEFT], everything),
        ] {
            assert_eq!(is_left_inside(&sim, netns, cgroups), left, "{netns} {cgroups:?} {flags:#x}");
        }
    }
    sim.apply(&Op::OptOut(OWN, None)).unwrap();
    assert!(!is_left_inside(&sim, NetnsCookie(71), &[ABOVE, OWN]), "nothing is known any more");
}

/// Returns whether sockets in a network namespace and cgroups are left alone, to whatever they connect or send.
fn is_left_inside(sim: &Simulator, netns: NetnsCookie, cgroups: &'static [CgroupId]) -> bool {
    let asked = [(vip(10), 80), (vip(20), 80), (vip(10), 81), (vip(77), 80)].map(|(address, port)| {
        let mut socket = SimSocket { netns, cgroups, ..socket(address, port, TCP) };
        (connect(&mut socket, sim), socket.addr == address)
    });
    let datagram = sendmsg(&mut SimSocket { netns, cgroups, ..socket(vip(10), 80, UDP) }, sim);
    let left = asked == [(Pass, true); 4];
    assert_eq!((left, asked[0].0 == Pass), (asked[0].0 == Pass, datagram == Pass), "{asked:?} {datagram:?}");
    left
}
