//! Limits on the size of one Service.

use super::*;

/// Returns the Service with this number of ports, each in one slice with L1 and R1.
fn of_ports(number: u16) -> World {
    s("L1, R1").with(|w| {
        w.slices[0].ports = (1..=number)
            .map(|port| SlicePort { name: format!("p{port}").into(), proto: proto::TCP, port })
            .collect();
        w.service.ports = ports_of_slice(&w.slices[0]);
    })
}

fn external_ips(number: u32) -> Vec<Addr> {
    (0..number).map(|number| Addr::v4((0xc612_0000 + number).to_be_bytes())).collect()
}

/// Checks that `world` fits exactly into `exactly`. With the budget `less` it must be refused with `words`, and
/// nothing of it must be served.
#[track_caller]
fn wants(world: World, exactly: Budget, less: Budget, words: &str) {
    let world = world.with(|w| w.context.budget = exactly);
    let desired = world.desired();
    assert_eq!(desired.problems, [""; 0]);
    assert!(!desired.ports.is_empty());
    let refused = world.with(|w| w.context.budget = less).desired();
    assert_eq!((refused.ports, refused.problems), (Vec::new(), vec![words.to_owned()]));
}

#[test]
fn frontends_are_ports_at_addresses_and_node_ports() {
    // 3 ports at 4 addresses over IPv4 and at 1 over IPv6, and one nodePort in each family.
    let world = of_ports(3).with(|w| {
        w.service.cluster_ips[1] = Some(addr("fd00:96::10"));
        w.service.external_ips = external_ips(2);
        // One address in two roles, and one address that is named twice.
        w.service.load_balancer_ips = vec![w.service.external_ips[0], addr("198.18.5.5"), addr("198.18.5.5")];
        w.service.ports[1].node_port = 31080;
    });
    let made = world.desired().ports.iter().map(|port| port.frontends.len()).sum::<usize>();
    assert_eq!(made, 17 + 2, "and each clusterIP as such");
    wants(
        world,
        Budget { frontends: 17, ..Budget::DEFAULT },
        Budget { frontends: 16, ..Budget::DEFAULT },
        "spec.ports at spec.clusterIPs, spec.externalIPs and status.loadBalancer make 17 frontends, more than the 16 of \
         --max-service-frontends: the Service is not served",
    );
}

#[test]
fn endpoints_are_those_of_all_ports_as_slices_name_them() {
    // An endpoint in two slices is one endpoint, but work for both.
    let world = of_ports(3).with(|w| w.slices.push(slice("s2", "p2 TCP 2, other TCP 7", "L1")));
    wants(
        world,
        Budget { endpoints: 7, ..Budget::DEFAULT },
        Budget { endpoints: 6, ..Budget::DEFAULT },
        "spec.ports in its EndpointSlices make 7 endpoints, more than the 6 of --max-service-endpoints: the Service is not \
         served",
    );
}

#[test]
fn source_ranges_are_those_of_all_ports() {
    let world = of_ports(3).source_ranges(&["203.0.113.0/25", "10.64.0.0/12"]).with(|w| {
        w.service.load_balancer_ips = vec![addr("198.18.5.5")];
    });
    wants(
        world,
        Budget { source_ranges: 6, ..Budget::DEFAULT },
        Budget { source_ranges: 5, ..Budget::DEFAULT },
        "spec.ports with spec.loadBalancerSourceRanges make 6 source ranges, more than the 5 of --max-service-source-ranges: \
         the Service is not served",
    );
}

/// The sizes that the defaults are made for.
#[test]
fn large_services_are_served() {
    let ports = of_ports(16_000).with(|w| {
        w.service.cluster_ips[1] = Some(addr("fd00:96::10"));
        w.service.load_balancer_ips = vec![addr("198.18.5.5"), addr("2001:db8:5::5")];
    });
    let desired = ports.desired();
    assert_eq!((desired.ports.len(), desired.problems), (32_000, Vec::new()));

    let endpoints = s_with(vec![slice("s1", "a TCP 1, b TCP 2, c TCP 3", "L1"); 10]).with(|w| {
        w.service.ports = ports_of_slice(&w.slices[0]);
        for (index, slice) in (0_u32..).zip(&mut w.slices) {
            let template = slice.endpoints[0].clone();
            slice.endpoints = (0x0a40_0000 + index * 1_000..)
                .take(1_000)
                .map(|bits: u32| Endpoint { addr: Addr::v4(bits.to_be_bytes()), ..template.clone() })
                .collect();
        }
    });
    let desired = endpoints.desired();
    assert_eq!(desired.ports.iter().map(|port| port.backends.len()).collect::<Vec<_>>(), [10_000; 3]);
    assert_eq!(desired.problems, [""; 0]);
}

/// Before the limit, a Service of 63 KiB made a million frontends, 438 MiB, in 18 seconds.
#[test]
fn a_million_frontends_are_refused_before_they_are_made() {
    let world = of_ports(1_000).with(|w| w.service.external_ips = external_ips(1_000));
    let start = std::time::Instant::now();
    let desired = world.desired();
    let took = start.elapsed();
    assert_eq!(desired.ports, []);
    assert_eq!(
        desired.problems,
        [
            "spec.ports at spec.clusterIPs, spec.externalIPs and status.loadBalancer make 1001000 frontends, more than the \
          65536 of --max-service-frontends: the Service is not served"
        ]
    );
    assert!(took < std::time::Duration::from_millis(100), "{took:?}");
}
