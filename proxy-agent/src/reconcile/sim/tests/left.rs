//! Sockets that the socket edge leaves alone.

use super::*;

/// Whatever the verdict would be, it is left to the packet edge.
#[test]
fn sockets_of_a_pod_that_has_opted_out_are_left_alone() {
    let mut sim = world();
    // A served port, a Service without endpoints, an unused port.
    let addresses = [(vip(10), 80), (vip(20), 80), (vip(10), 81)];
    sim.apply(&Op::OptOut(7, Some(EVERYTHING))).unwrap();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    assert_eq!(connect(&mut SimSocket { cgroups: &[1, 7], ..socket(vip(10), 80, TCP) }, &sim), Translated);
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS | OPTED_OUT)).unwrap();
    let deep: [u64; 16] = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7];
    let deep: &'static [u64] = Vec::leak(deep.to_vec());
    for cgroups in [&[7][..], &[1, 7], &[1, 2, 7, 3], deep] {
        assert!(is_left(&sim, cgroups, addresses));
    }
    assert_eq!(sim.counted(Counter::LeftToPackets), 12);
    // Other pods, and addresses that belong to no Service.
    for cgroups in [&[][..], &[1, 2, 3]] {
        let other = SimSocket { cgroups, ..socket(vip(10), 80, TCP) };
        check(&sim, other, Translated, Some(Counter::Connected));
    }
    check(&sim, SimSocket { cgroups: &[7], ..socket(pod(1), 8080, TCP) }, Pass, None);
    // The packet edge does not judge packets of the host.
    let host = SimSocket { netns: HOST_NETNS, cgroups: &[7], ..socket(vip(10), 80, TCP) };
    check(&sim, host, Translated, Some(Counter::Connected));
    // Each datagram is checked, also in a flow that began before the opt-out.
    let mut datagram = socket(vip(10), 80, UDP);
    assert_eq!(sendmsg(&mut datagram, &sim), Translated);
    let mut datagram = SimSocket { cgroups: &[1, 7], ..socket(vip(10), 80, UDP) };
    assert_eq!((sendmsg(&mut datagram, &sim), datagram.addr), (Pass, vip(10)));
    sim.apply(&Op::OptOut(7, None)).unwrap();
    assert!(!is_left(&sim, &[1, 7], addresses));
}

/// Returns whether sockets in these cgroups are left alone, to whichever of the addresses they connect.
fn is_left(sim: &Simulator, cgroups: &'static [u64], addresses: [(Addr, u16); 3]) -> bool {
    let left = addresses.map(|(address, port)| {
        let before = SimSocket { cgroups, ..socket(address, port, TCP) };
        let mut after = before.clone();
        (connect(&mut after, sim), after == before) == (Pass, true)
    });
    assert!(left.iter().all(|other| *other == left[0]), "{cgroups:?}: {left:?}");
    left[0]
}

/// The pod with cgroup 7 has its sandbox in network namespace 70, the pod with cgroup 8 in 80. Nothing is known of
/// cgroup 9.
#[test]
fn sockets_of_networks_inside_a_pod_are_left_alone() {
    let mut sim = world();
    for (netns, cgroup) in [(70, 7), (80, 8)] {
        sim.apply(&Op::Sandbox(netns, Some(cgroup))).unwrap();
        sim.apply(&Op::OptOut(cgroup, Some(INSIDE))).unwrap();
    }
    sim.apply(&Op::OptOut(6, Some(EVERYTHING))).unwrap();
    sim.apply(&Op::NodeFlags(PODS_IN_PACKETS)).unwrap();
    assert!(!is_left_inside(&sim, 71, &[1, 7]), "while nobody is known");
    for (flags, everything) in [(SANDBOXES_KNOWN, false), (SANDBOXES_KNOWN | OPTED_OUT, true)] {
        sim.apply(&Op::NodeFlags(PODS_IN_PACKETS | flags)).unwrap();
        for (netns, cgroups, left) in [
            (70, &[1, 7, 3][..], false),
            (71, &[1, 7, 3], true),
            (71, &[1, 7], true),
            // A pod of an inner cluster.
            (71, &[1, 7, 3, 1, 9], true),
            // Another pod's namespace is not nested in this pod.
            (80, &[1, 7, 3], false),
            // A pod that has just appeared, or whose sandbox cannot be found.
            (90, &[1, 9], false),
            (90, &[], false),
            (HOST_NETNS, &[1, 7, 3], false),
            // In its own namespace a socket is left alone only if its pod has opted out. Without the flag `OPTED_OUT`
            // this is not checked.
            (70, &[1, 6], everything),
        ] {
            assert_eq!(is_left_inside(&sim, netns, cgroups), left, "{netns} {cgroups:?} {flags:#x}");
        }
    }
    sim.apply(&Op::OptOut(7, None)).unwrap();
    assert!(!is_left_inside(&sim, 71, &[1, 7]), "nothing is known any more");
}

/// Returns whether sockets in a network namespace and cgroups are left alone, to whatever they connect or send.
fn is_left_inside(sim: &Simulator, netns: u64, cgroups: &'static [u64]) -> bool {
    let asked = [(vip(10), 80), (vip(20), 80), (vip(10), 81), (vip(77), 80)].map(|(address, port)| {
        let mut socket = SimSocket { netns, cgroups, ..socket(address, port, TCP) };
        (connect(&mut socket, sim), socket.addr == address)
    });
    let datagram = sendmsg(&mut SimSocket { netns, cgroups, ..socket(vip(10), 80, UDP) }, sim);
    let left = asked == [(Pass, true); 4];
    assert_eq!((left, asked[0].0 == Pass), (asked[0].0 == Pass, datagram == Pass), "{asked:?} {datagram:?}");
    left
}
