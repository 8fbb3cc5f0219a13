//! Proxied Services, their frontends, and the clients that may use them.

use super::*;

fn dual_stack(endpoints: &str) -> World {
    s(endpoints).with(|w| w.service.cluster_ips[1] = Some(addr("fd00:96::10")))
}

#[test]
fn p001_p002_without_a_cluster_ip_there_is_nothing() {
    let world = s_lb("L1").with(|w| w.service.cluster_ips = [None, None]);
    assert_eq!(world.desired(), DesiredService::default());
}

#[test]
fn p003_p011_an_external_name_is_nothing_whatever_else_it_has() {
    let world = s_lb("L1").with(|w| w.service.service_type = ServiceType::ExternalName);
    assert_eq!(world.desired(), DesiredService::default());
    world.check("P>CIP = PASS\nX>NP = PASS");
}

#[test]
fn p006_p007_p008_each_family_has_its_own_cluster_ip() {
    let v6 = dual_stack("V1").with(|w| {
        w.service.cluster_ips[0] = None;
        w.service.external_ips = vec![addr("198.18.9.9")];
    });
    assert_eq!(listed(&v6.desired(), Family::V4), [""; 0]);
    v6.check("P>[fd00:96::10]:80 = V1\nX>EXT = PASS");

    let both = dual_stack("V1").with(|w| w.slices.push(slice("s2", "web TCP 8080", "L1")));
    both.check("P>CIP = L1\nP>[fd00:96::10]:80 = V1");
    assert_eq!(listed(&s("L1").desired(), Family::V6), [""; 0]);
}

#[test]
fn p009_p010_every_port_stands_for_itself() {
    let two = s_with(vec![slice("s1", "web TCP 8080, adm TCP 8443", "L1")]);
    two.with(|w| w.service.ports = ports("web TCP 80, adm TCP 443"))
        .check("P>CIP = L1\nP>10.96.0.10:443 = L1:8443");
    let dns = s_with(vec![slice("s1", "du UDP 1053, dt TCP 2053, ds SCTP 3053", "L1")]);
    dns.with(|w| w.service.ports = ports("du UDP 53, dt TCP 53, ds SCTP 53")).check(
        "P>10.96.0.10:53/UDP = L1:1053
         P>10.96.0.10:53/TCP = L1:2053
         P>10.96.0.10:53/SCTP = L1:3053",
    );
}

#[test]
fn p014_p032_p142_exactly_the_frontends_that_the_service_has() {
    assert_eq!(
        listed(&s_lb("L1").desired(), Family::V4),
        ["10.96.0.10", "10.96.0.10:80/6", "198.18.5.5:80/6", "198.18.9.9:80/6", "node:31080/6"]
    );
    let no_vip = s_lb("L1").with(|w| w.service.load_balancer_ips.clear());
    assert_eq!(
        listed(&no_vip.desired(), Family::V4),
        ["10.96.0.10", "10.96.0.10:80/6", "198.18.9.9:80/6", "node:31080/6"]
    );
    let no_node_port = s_lb("L1").with(|w| w.service.ports[0].node_port = 0);
    assert_eq!(
        listed(&no_node_port.desired(), Family::V4),
        ["10.96.0.10", "10.96.0.10:80/6", "198.18.5.5:80/6", "198.18.9.9:80/6"]
    );
    s_lb("L1").check(
        "P>10.96.0.10:81 = REJECT
         P>10.96.0.10:80/UDP = REJECT
         X>198.18.5.5:81 = PASS
         X>192.0.2.10:31099 = PASS",
    );
}

#[test]
fn p020_p021_external_ips_of_the_family() {
    let world =
        s("L1").with(|w| w.service.external_ips = ["198.18.9.9", "2001:db8:99::9"].map(addr).to_vec());
    assert_eq!(listed(&world.desired(), Family::V4), ["10.96.0.10", "10.96.0.10:80/6", "198.18.9.9:80/6"]);
    assert_eq!(listed(&world.desired(), Family::V6), [""; 0]);
    world.check("P>EXT = L1\nX>EXT = L1");
}

/// An address that may become another Service's clusterIP tomorrow must not be served today.
#[test]
fn external_ips_among_cluster_ips_are_refused_by_name() {
    let world = s("L1").with(|w| {
        w.context.service_cidrs = vec![prefix("10.96.0.0/16"), prefix("fd00:96::/112")];
        // The first address is the Service's own clusterIP.
        let external = ["10.96.0.10", "10.96.7.7", "198.18.9.9", "fd00:96::77"];
        w.service.external_ips = external.map(addr).to_vec();
    });
    let desired = world.desired();
    assert_eq!(listed(&desired, Family::V4), ["10.96.0.10", "10.96.0.10:80/6", "198.18.9.9:80/6"]);
    let told: Vec<&str> =
        desired.problems.iter().map(|problem| &problem[..problem.find(':').unwrap_or(0)]).collect();
    assert_eq!(told, ["spec.externalIPs"], "{:?}", desired.problems);
    assert!(desired.problems[0].contains("10.96.7.7") && desired.problems[0].contains("10.96.0.0/16"));
}

/// The number of sentences about bad addresses must be limited, too.
#[test]
fn what_is_wrong_with_many_addresses_is_counted() {
    let world = s("L1").with(|w| {
        w.context.service_cidrs = vec![prefix("10.96.0.0/16")];
        w.service.external_ips = (0..100).map(|number| Addr::v4([10, 96, 7, number])).collect();
    });
    let problems = world.desired().problems;
    assert_eq!(problems.len(), 17, "{problems:?}");
    assert_eq!(problems[16], "spec.externalIPs: 84 more are not served");
}

#[test]
fn addresses_of_the_node_are_kept_for_the_node_where_that_is_asked_for() {
    let world = s_lb("L1").with(|w| {
        w.service.external_ips.push(addr("192.0.2.10"));
        w.service.load_balancer_ips.push(addr("192.0.3.10"));
        w.context.host_addresses.extend([addr("192.0.3.10")]);
    });
    world.check("X>192.0.2.10:80 = L1\nX>192.0.3.10:80 = L1");
    assert_eq!(world.desired().problems, [""; 0]);
    let protected = world.with(|w| w.context.protect_node_addresses = true);
    protected.check("X>192.0.2.10:80 = PASS\nX>192.0.3.10:80 = PASS\nX>NP = L1\nX>VIP = L1\nX>EXT = L1");
    let why = "is not served: it is an address of this node (--protect-node-addresses)";
    assert_eq!(
        protected.desired().problems,
        [
            format!("status.loadBalancer.ingress: 192.0.3.10 {why}"),
            format!("spec.externalIPs: 192.0.2.10 {why}")
        ]
    );
    // An address that the node no longer has, or does not have yet, is treated like any other.
    protected.with(|w| w.context.host_addresses.clear()).check("X>192.0.3.10:80 = L1\nX>192.0.2.10:80 = L1");
}

#[test]
fn p022_external_ips_can_be_switched_off() {
    let world = s_lb("L1, R1").with(|w| w.context.ignore_external_ips = true);
    world.check("X>EXT = PASS\nP>CIP = L1, R1\nX>VIP = L1, R1");
}

#[test]
fn p025_p026_p034_p035_p036_load_balancer_addresses_and_node_ports() {
    let two = s_lb("L1").with(|w| w.service.load_balancer_ips.push(addr("198.18.5.7")));
    two.check("X>198.18.5.7:80 = L1\nX>VIP = L1");
    s_lb("L1, R1").check("X>NP = L1, R1\nH>NP = L1, R1\nP>NP = L1, R1\nX>198.18.9.9:31080 = PASS");
    let dual = dual_stack("V1").with(|w| w.service.ports = ports("web TCP 80 31080"));
    dual.check("X>[2001:db8:1::10]:31080 = V1\nX>NP = REJECT");
    let udp = s_with(vec![slice("s1", "t TCP 8080, u UDP 9090", "L1")]);
    udp.with(|w| w.service.ports = ports("t TCP 80 31080, u UDP 80 31080"))
        .check("X>NP = L1\nX>192.0.2.10:31080/UDP = L1:9090");
}

#[test]
fn p140_p148_without_endpoints_everyone_is_refused() {
    s_lb("").check(
        "P>CIP = REJECT\nX>EXT = REJECT\nX>VIP = REJECT\nP>NP = REJECT\nX>NP = REJECT\nH>CIP = REJECT",
    );
    s_lb("").external_local().internal_local().check("P>CIP = REJECT\nX>VIP = REJECT");
    s("L1")
        .with(|w| w.service.ports = ports("web TCP 80, adm TCP 443"))
        .check("P>CIP = L1\nP>10.96.0.10:443 = REJECT");
}

#[test]
fn p150_to_p152_p158_source_ranges_filter_the_load_balancer_address_only() {
    let world = s_lb("L1").source_ranges(&["203.0.113.0/25"]);
    let world = world.with(|w| w.service.load_balancer_ips.push(addr("198.18.5.7")));
    world.check(
        "X>VIP = L1
         Y>VIP = DROP
         Y>198.18.5.7:80 = DROP
         P>VIP = DROP
         H>VIP = DROP
         Y>NP = L1
         Y>EXT = L1
         P>CIP = L1",
    );
    let problems = world.desired().problems;
    assert_eq!(problems.len(), 2, "one for each address: {problems:?}");
    assert!(problems[0].contains("198.18.5.5") && problems[0].contains("10.64.0.0/12"), "{problems:?}");
    let served = world.with(|w| w.context.pods_in_packets = true);
    served.check("P>VIP = DROP");
    assert_eq!(served.desired().problems, [""; 0], "they are judged in packets");
}

#[test]
fn p153_p155_p156_who_the_source_ranges_let_in() {
    s_lb("L1").source_ranges(&["192.0.2.0/24"]).check("H>VIP = L1\nP>VIP = DROP\nX>VIP = DROP");
    let everyone = s_lb("L1").source_ranges(&["203.0.113.0/25", "0.0.0.0/0"]);
    everyone.check("Y>VIP = L1\nP>VIP = L1\nH>VIP = L1");
    assert_eq!(everyone.desired().problems, [""; 0]);
    // Ranges of the other family filter nothing.
    s_lb("L1").source_ranges(&["2001:db8::/32"]).check("Y>VIP = L1\nP>VIP = L1\nH>VIP = L1");
    // Ranges with a part of the pods are not enough for a socket. Ranges with all pods are enough, also in pieces.
    s_lb("L1").source_ranges(&["10.64.1.0/24"]).check("P>VIP = DROP\nX>VIP = DROP");
    s_lb("L1").source_ranges(&["10.64.0.0/12"]).check("P>VIP = L1\nX>VIP = DROP");
    s_lb("L1").source_ranges(&["10.0.0.0/8"]).check("P>VIP = L1");
    let pieces = ["10.72.0.0/13", "10.64.0.0/14", "10.64.7.0/24", "10.68.0.0/14"];
    s_lb("L1").source_ranges(&pieces).check("P>VIP = L1");
    s_lb("L1").source_ranges(&pieces[..3]).check("P>VIP = DROP");
    s_lb("L1").source_ranges(&["10.64.0.0/13", "10.80.0.0/12"]).check("P>VIP = DROP");
    four_pods(&["10.64.1.2/31", "10.64.1.0/31"]).check("P>VIP = L1");
    four_pods(&["10.64.1.2/31", "10.64.1.0/32"]).check("P>VIP = DROP");
}

fn four_pods(ranges: &[&str]) -> World {
    s_lb("L1").source_ranges(ranges).with(|w| w.context.cluster_cidr[0] = Some(prefix("10.64.1.0/30")))
}

#[test]
fn source_ranges_without_detect_local_or_a_node_address() {
    let world = s_lb("L1").source_ranges(&["0.0.0.0/1", "192.0.2.0/24"]);
    let world = world.with(|w| w.context.cluster_cidr = [None, None]);
    world.check("P>VIP = DROP\nH>VIP = L1");
    assert!(
        world.desired().problems[0].contains("no cluster CIDR for IPv4"),
        "{:?}",
        world.desired().problems
    );
    // 127.0.0.1 is in a range, but loopback addresses do not identify this host.
    let unknown = s_lb("L1").source_ranges(&["127.0.0.0/8"]).with(|w| w.context.node.ips = [None, None]);
    unknown.check("H>VIP = DROP");
    unknown.with(|w| w.context.host_addresses.extend([addr("127.1.2.3")])).check("H>VIP = DROP");
    let known = s_lb("L1").source_ranges(&["192.0.2.0/24"]).with(|w| w.context.node.ips = [None, None]);
    known.check("H>VIP = L1");
}

#[test]
fn p150_to_p158_the_packet_edge_gets_the_ranges_and_may_get_the_address_itself() {
    // Sorted, without duplicates, and of the family only.
    let three =
        s_lb("L1").source_ranges(&["203.0.113.0/25", "198.51.100.0/24", "2001:db8::/32", "203.0.113.9/25"]);
    check_ranges(&three, &["198.51.100.0/24", "203.0.113.0/25"]);
    let two_ports = three.with(|w| w.service.ports = ports("web TCP 80, adm TCP 443"));
    check_ranges(&two_ports, &["198.51.100.0/24", "203.0.113.0/25"]);
    check_ranges(&two_ports.with(|w| w.service.load_balancer_ips.clear()), &[]);
    // Without a filter there are no ranges to look up.
    check_ranges(&s_lb("L1"), &[]);
    check_ranges(&s_lb("L1").source_ranges(&["203.0.113.0/25", "0.0.0.0/0"]), &[]);
    check_ranges(&s_lb("L1").source_ranges(&["2001:db8::/32"]), &[]);

    // The node's primary address is in a range: the host may use the Service's own addresses as source.
    let vips = ["198.18.5.5", "198.18.5.7", "2001:db8:5::5"].map(addr).to_vec();
    let world = dual_stack("L1").source_ranges(&["192.0.2.0/24", "2001:db8:2::/48"]);
    let world = world.with(|w| w.service.load_balancer_ips = vips);
    check_ranges(&world, &["192.0.2.0/24", "198.18.5.5/32", "198.18.5.7/32"]);
    assert_eq!(ranges_of(&world, Family::V6), ["2001:db8:2::/48"], "each family by itself");
    let world = world.source_ranges(&["2001:db8:1::/48"]);
    assert_eq!(ranges_of(&world, Family::V6), ["2001:db8:1::/48", "2001:db8:5::5/128"]);
    // Neither a secondary address of the host counts, nor an unknown one.
    let secondary = s_lb("L1").source_ranges(&["192.0.3.0/24"]);
    check_ranges(
        &secondary.with(|w| w.context.host_addresses.extend([addr("192.0.3.10")])),
        &["192.0.3.0/24"],
    );
    let unknown = s_lb("L1").source_ranges(&["192.0.2.0/24"]).with(|w| w.context.node.ips = [None, None]);
    check_ranges(&unknown, &["192.0.2.0/24"]);
}

fn check_ranges(world: &World, want: &[&str]) {
    assert_eq!(ranges_of(world, Family::V4), want);
}

/// Returns the source ranges of the ports of a family, which are the same for all of them.
fn ranges_of(world: &World, family: Family) -> Vec<String> {
    let desired = world.desired();
    let ports: Vec<_> = desired.ports.iter().filter(|port| port.key.family == family).collect();
    assert!(ports.windows(2).all(|pair| pair[0].source_ranges == pair[1].source_ranges), "{desired:#?}");
    ports[0].source_ranges.iter().map(|range| range.to_string()).collect()
}

#[test]
fn one_address_in_two_roles_is_one_frontend() {
    let vip = addr("198.18.5.5");
    let both = s_lb("L1").source_ranges(&["203.0.113.0/25"]).with(|w| w.service.external_ips.push(vip));
    let filter = frontend::SOURCE_RANGES | frontend::DENY_HOST | frontend::DENY_POD;
    assert_eq!(flags_at(&both, vip), frontend::EXTERNAL | frontend::LOAD_BALANCER | filter);
    assert_eq!(flags_at(&both, addr("198.18.9.9")), frontend::EXTERNAL);
    let open = both.source_ranges(&["203.0.113.0/25", "0.0.0.0/0"]);
    assert_eq!(flags_at(&open, vip), frontend::EXTERNAL | frontend::LOAD_BALANCER);
    let cluster_ip = addr("10.96.0.10");
    let same = s_lb("L1").internal_local().with(|w| w.service.external_ips.push(cluster_ip));
    assert_eq!(flags_at(&same, cluster_ip), frontend::NEAR_LOCAL | frontend::FAR_LOCAL | frontend::POD_LOCAL);
}

fn flags_at(world: &World, ip: Addr) -> u16 {
    let desired = world.desired();
    let key = FrontendKey::exact(ip, Be16::new(80), proto::TCP);
    let found: Vec<u16> =
        desired.ports[0].frontends.iter().filter(|(k, _)| *k == key).map(|&(_, flags)| flags).collect();
    assert_eq!(found.len(), 1, "{desired:#?}");
    found[0]
}

#[test]
fn ports_that_contradict_an_earlier_one_are_named_and_left_out() {
    let world = s_with(vec![slice("s1", "web TCP 8080, adm TCP 8443, web UDP 9090", "L1")]).with(|w| {
        w.service.ports =
            ports("web TCP 80 31080, adm TCP 80, web TCP 81, adm TCP 443 31080, web UDP 80 31080");
    });
    world.check(
        "P>CIP = L1
         P>10.96.0.10:81 = REJECT
         P>10.96.0.10:443 = L1:8443
         X>NP = L1
         X>192.0.2.10:31080/UDP = L1:9090",
    );
    let DesiredService { ports, problems } = world.desired();
    assert!(ports.is_sorted_by(|a, b| a.key < b.key), "by key, each once: {ports:#?}");
    let fields: Vec<&str> = problems.iter().filter_map(|p| Some(p.split_once(':')?.0)).collect();
    assert_eq!(fields, ["spec.ports[1]", "spec.ports[2]", "spec.ports[3].nodePort"]);
}

#[test]
fn p160_p169_affinity_and_what_the_objects_had_wrong_are_handed_on() {
    let world = s("L1").with(|w| {
        w.service.affinity_seconds = Some(10800);
        w.service.problems = vec!["spec.externalIPs[2]: not an address".to_owned()];
        w.slices[0].problems = vec!["endpoints[1]: no address".to_owned()];
    });
    let desired = world.desired();
    assert_eq!(desired.ports[0].affinity_seconds, 10800);
    assert_eq!(
        desired.problems,
        ["spec.externalIPs[2]: not an address", "EndpointSlice s1: endpoints[1]: no address"]
    );
    assert_eq!(s("L1").desired().ports[0].affinity_seconds, 0);
}
