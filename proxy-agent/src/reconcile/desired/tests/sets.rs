//! Endpoint selection: slice intake, conditions, policies, hints.

use super::*;

#[test]
fn p040_p041_only_ready_endpoints_serve() {
    s("L1").check("P>CIP = L1");
    s("L1/nr, R1").check("P>CIP = R1");
}

#[test]
fn p042_p043_slices_are_one_union_without_double_weight() {
    let web = "web TCP 8080";
    s_with(vec![slice("s1", web, "L1, R1"), slice("s2", web, "R2")]).check("P>CIP = L1, R1, R2");
    s_with(vec![slice("s1", web, "L1, R1"), slice("s2", web, "R1, R2")]).check("P>CIP = L1, R1, R2");
}

#[test]
fn p044_a_terminating_entry_never_replaces_another() {
    let world = s("L1/st, L1, L1/t");
    world.check("P>CIP = L1");
    assert_eq!(world.desired().ports[0].backends.len(), 1);
    // The first of several terminating entries stays.
    s("L1/st, L1/t").check("P>CIP = L1");
    s("L1/t, L1/st").check("P>CIP = REJECT");
    // Of two entries that are not terminating the ready one stays, in either order.
    s("L1, L1/nr").check("P>CIP = L1");
    s("L1/nr, L1").check("P>CIP = L1");
    s("L1/st, L1/nr").check("P>CIP = REJECT");
}

#[test]
fn p047_p048_p049_ports_are_joined_by_name_and_protocol() {
    let unnamed = s_with(vec![slice("s1", "- TCP 8080", "L1")]);
    unnamed.with(|w| w.service.ports = ports("- TCP 80")).check("P>CIP = L1");
    s_with(vec![slice("s1", "http TCP 8080", "L1")]).check("P>CIP = REJECT");
    s_with(vec![slice("s1", "web UDP 8080", "L1")]).check("P>CIP = REJECT");
    // P045, P046: a slice port without name or number is dropped.
    s("L1").with(|w| w.slices[0].ports.clear()).check("P>CIP = REJECT");
}

#[test]
fn p050_p051_one_name_may_have_several_numbers() {
    two("L1", "L2").check("P>CIP = L1, L2:9090");
    two("L1", "L1").check("P>CIP = L1, L1:9090");
    assert_eq!(two("L1", "L1").desired().ports[0].backends.len(), 2);
}

fn two(a: &str, b: &str) -> World {
    s_with(vec![slice("s1", "web TCP 8080", a), slice("s2", "web TCP 9090", b)])
}

#[test]
fn p062_an_endpoint_without_a_node_is_not_local() {
    s("L1").with(|w| w.slices[0].endpoints[0].local = false).internal_local().check("P>CIP = DROP");
}

#[test]
fn p063_a_published_terminating_endpoint_counts_as_ready() {
    s("L1")
        .with(|w| {
            let endpoint = &mut w.slices[0].endpoints[0];
            (endpoint.ready, endpoint.serving, endpoint.terminating) = (true, false, true);
        })
        .check("P>CIP = L1");
}

#[test]
fn p070_to_p073_terminating_endpoints_serve_only_when_no_other_does() {
    s("L1, R1/st").check("P>CIP = L1");
    s("L1/st, R1/st, R2/t").check("P>CIP = L1, R1");
    s("L1/t, R1/t").check("P>CIP = REJECT");
    s("L1/sn").check("P>CIP = REJECT");
}

#[test]
fn p074_to_p078_internal_policy_local() {
    s("L1, L2, R1").internal_local().check("P>CIP = L1, L2\nH>CIP = L1, L2\nX>CIP = L1, L2");
    s("R1, R2").internal_local().check("P>CIP = DROP\nH>CIP = DROP");
    s("L1/st, R1").internal_local().check("P>CIP = L1");
    s("L1/t, R1").internal_local().check("P>CIP = DROP");
    s("L1/t, R1/t").internal_local().check("P>CIP = REJECT");
}

#[test]
fn p079_internal_policy_does_not_touch_external_frontends() {
    s_lb("L1, R1").internal_local().check("P>VIP = L1, R1\nX>NP = L1, R1\nP>CIP = L1");
}

#[test]
fn p080_to_p083_external_policy_local() {
    s_lb("L1, R1").external_local().check(
        "X>VIP = L1
         X>EXT = L1
         X>NP = L1
         P>VIP = L1, R1
         P>EXT = L1, R1
         P>NP = L1, R1
         H>VIP = L1, R1
         H>NP = L1, R1
         X>CIP = L1, R1
         P>CIP = L1, R1",
    );
}

#[test]
fn p084_p085_without_a_local_endpoint_far_clients_hear_nothing() {
    s_lb("R1").external_local().check(
        "X>VIP = DROP
         P>VIP = R1
         H>VIP = R1
         X>NP = DROP
         P>NP = R1",
    );
}

#[test]
fn p086_to_p089_the_two_sets_fall_back_independently() {
    s_lb("L1/st, L2/st, R1").external_local().check("X>VIP = L1, L2\nP>CIP = R1");
    s_lb("L1, L2/st, R1").external_local().check("X>VIP = L1");
    s_lb("R1/st").external_local().check("X>VIP = DROP\nP>CIP = R1");
    s_lb("L1/t, R1/t").external_local().check("X>VIP = REJECT\nP>CIP = REJECT");
}

#[test]
fn p090_to_p094_policies_together_and_where_they_mean_nothing() {
    s_lb("R1").internal_local().external_local().check("P>CIP = DROP\nX>VIP = DROP\nP>VIP = R1");
    s("L1, R1").external_local().check("P>CIP = L1, R1");
    // A nodePort left over in a ClusterIP Service is served, and the policy has no meaning.
    let stale = s("L1, R1").external_local().with(|w| w.service.ports = ports("web TCP 80 31080"));
    stale.check("X>NP = L1, R1");
    let external = s("L1, R1").external_local().with(|w| w.service.external_ips = vec![addr("198.18.9.9")]);
    external.check("X>EXT = L1");
    s_lb("L1/st, R1/st").check("X>VIP = L1, R1");
    s_lb("L1/st, L2, R1").external_local().check("X>VIP = L2");
}

#[test]
fn p095_without_detect_local_a_pod_is_a_far_client() {
    let world = s_lb("L1, R1").external_local().with(|w| w.context.cluster_cidr = [None, None]);
    world.check("P>VIP = L1\nP>NP = L1\nH>VIP = L1, R1\nX>VIP = L1");
    // Pods that are recognized by their interface are near clients again.
    let world = world.with(|w| w.context.pods_by_interface = true);
    world.check("P>VIP = L1, R1\nP>NP = L1, R1\nH>VIP = L1, R1\nX>VIP = L1");
}

#[test]
fn p100_to_p106_zone_hints() {
    let hinted = "L1 z(za), R1 z(zb), R2 z(za)";
    s(hinted).check("P>CIP = L1, R2");
    s("L1 z(za), R1, R2 z(za)").check("P>CIP = L1, R1, R2");
    s("R1 z(zb)").check("P>CIP = R1");
    // P103, P104: an empty zone label is converted to `None`.
    s(hinted).with(|w| w.context.node.zone = None).check("P>CIP = L1, R1, R2");
    s("L1/nr z(za), R1 z(zb), R2 z(zb)").check("P>CIP = R1, R2");
    s("L1/nr, R1 z(za), R2 z(zb)").check("P>CIP = R1");
    s("L1 z(za,zb), R1 z(zb,zc), R2 z(zc,za)").check("P>CIP = L1, R2");
}

#[test]
fn p107_to_p109_node_hints_come_before_zone_hints() {
    s("L1 z(za) n(n1), R1 z(zb) n(n2), R2 z(za) n(n3)").check("P>CIP = L1");
    s("R1 z(zb) n(n2), R2 z(za) n(n3)").check("P>CIP = R2");
    s("L1 z(za) n(n1), R1, R2 z(za) n(n3)").check("P>CIP = L1, R1, R2");
    // A node hint needs no zone.
    s("L1 n(n1), R1 n(n2)").with(|w| w.context.node.zone = None).check("P>CIP = L1");
}

#[test]
fn p110_p111_hints_narrow_the_cluster_set_only() {
    let hinted = "L1 z(zb), L2 z(za), R1 z(zb), R2 z(za)";
    s_lb(hinted).external_local().check("X>VIP = L1, L2\nP>VIP = L2, R2\nP>CIP = L2, R2");
    s("L1 z(zb), L2 z(za), R2 z(za)").internal_local().check("P>CIP = L1, L2");
    // Terminating endpoints are selected in any zone.
    s("L1/st z(za), R1/st z(zb)").check("P>CIP = L1, R1");
}

#[test]
fn p114_the_zone_of_the_node_decides() {
    for (zone, want) in [("zb", "P>CIP = R1"), ("zc", "P>CIP = L1, R1, R2")] {
        s("L1 z(za), R1 z(zb), R2 z(za)").with(|w| w.context.node.zone = Some(zone.into())).check(want);
    }
}

#[test]
fn an_endpoint_in_no_set_is_kept_while_it_serves() {
    // UDP flows to a terminating endpoint go on, so its state must stay visible.
    assert_eq!(
        flags_of_backends(s("L1/st, L2/t, R1")),
        [
            (addr("10.64.1.11"), backend::IN_LOCAL | backend::SERVING | backend::ON_THIS_NODE),
            (addr("10.64.2.21"), backend::IN_CLUSTER | backend::SERVING),
        ]
    );
    assert_eq!(
        flags_of_backends(s("L1 z(zb), R1/sn, R2 z(za)")),
        [
            (addr("10.64.1.11"), backend::IN_LOCAL | backend::SERVING | backend::ON_THIS_NODE),
            (addr("10.64.2.21"), backend::SERVING),
            (addr("10.64.3.31"), backend::IN_CLUSTER | backend::SERVING),
        ]
    );
}

fn flags_of_backends(world: World) -> Vec<(Addr, u32)> {
    world.desired().ports[0].backends.iter().map(|b| (b.addr, b.flags)).collect()
}

/// Returns the CPU time of this thread, which excludes other work of the machine.
fn cpu_time() -> std::time::Duration {
    let told = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    std::time::Duration::try_from(told).unwrap()
}

/// Eight times the ports in as many slices cost about eight times the time: a Service as large as the API allows must
/// not delay all others. (Once each port searched all ports of all slices, which cost sixty-four times the time.)
#[test]
fn the_work_grows_with_the_ports_and_not_with_their_square() {
    let (few, many) = (time_of(1_000), time_of(8_000));
    assert!(many < few * 24, "{few:?} became {many:?}");
}

/// Returns the least CPU time of three for eight slices with this number of ports.
fn time_of(ports: u16) -> std::time::Duration {
    let mut world = s("L1");
    world.slices[0].ports = (0..ports)
        .map(|number| SlicePort { name: format!("p{number}").into(), proto: proto::TCP, port: number + 1 })
        .collect();
    world.service.ports = ports_of_slice(&world.slices[0]);
    world.slices = vec![world.slices.remove(0); 8];
    let times = (0..3).map(|_| {
        let start = cpu_time();
        assert_eq!(
            world.desired().ports.iter().filter(|port| !port.backends.is_empty()).count(),
            usize::from(ports)
        );
        cpu_time() - start
    });
    times.min().unwrap()
}
