//! Tests of the numbers that Services are assigned.

use proxy_common::addr::Addr;

use super::super::addresses::{Given, assign};
use super::*;
use crate::config::lenient;
use crate::sources::convert::CLUSTER_IP_MISSING;

/// Returns the numbers that Services a/NAME with these specs are assigned from these ranges, by name. A spec without a
/// selector gets one.
fn given(services: &[(&str, Value)], ranges: &[&str]) -> BTreeMap<String, Given> {
    let mut objects: Vec<_> = services
        .iter()
        .map(|(name, spec)| {
            let mut spec = spec.clone();
            spec.as_object_mut().unwrap().entry("selector").or_insert(json!({"app": "a"}));
            (*name, object(service(name, &spec)).0)
        })
        .collect();
    objects.sort_by_key(|(name, _)| *name);
    let services: Vec<_> =
        objects.iter().map(|(_, object)| (service_part(object), object.service())).collect();
    let ranges: Vec<_> = ranges.iter().map(|text| lenient::prefix(text).unwrap()).collect();
    assign(&services, &ranges).into_iter().map(|(key, given)| (key.name.to_string(), given)).collect()
}

fn addresses(given: &Given) -> Vec<String> {
    given.cluster_ips.iter().flatten().map(ToString::to_string).collect()
}

const BOTH: [&str; 2] = ["10.96.0.0/16", "fd00:96::/108"];

/// People may have written down these numbers, so they must not change with a new version.
#[test]
fn the_same_name_has_the_same_numbers() {
    let spec = json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]});
    let given = given(&[("webapp", spec)], &BOTH);
    assert_eq!(addresses(&given["webapp"]), ["10.96.176.69", "fd00:96::cc84"]);
    assert_eq!(given["webapp"].node_ports, [(0, 30_960)].into());
}

#[test]
fn without_a_selector_a_service_is_as_it_is_written() {
    for kind in ["ClusterIP", "NodePort", "LoadBalancer"] {
        let spec = json!({"type": kind, "selector": {}, "ports": [{"port": 80}]});
        let given = given(&[("webapp", spec)], &BOTH);
        let nothing = Given { problems: vec![CLUSTER_IP_MISSING.to_owned()], ..Given::default() };
        assert_eq!(given["webapp"], nothing, "{kind}");
    }
    let headless = json!({"clusterIP": "None", "selector": {}, "ports": [{"port": 80}]});
    assert_eq!(given(&[("webapp", headless)], &BOTH), BTreeMap::new());
}

#[test]
fn families() {
    const V4: [&str; 1] = ["10.96.0.0/16"];
    const V6_FIRST: [&str; 2] = ["fd00:96::/108", "10.96.0.0/16"];
    let none: [&str; 0] = [];
    let missing = "spec.clusterIP is not set, and there is no ServiceCIDR in the files to take one from: the Service is not served";
    for (id, spec, ranges, want, problems) in [
        ("the first range's family", json!({}), &BOTH[..], "4", vec![]),
        ("the same, IPv6", json!({}), &V6_FIRST[..], "6", vec![]),
        ("the family that it asks for", json!({"ipFamilies": ["IPv6"]}), &BOTH[..], "6", vec![]),
        ("empty is not set", json!({"clusterIP": ""}), &V4[..], "4", vec![]),
        (
            "whatever the list says",
            json!({"clusterIP": "", "clusterIPs": ["10.9.9.9"]}),
            &V4[..],
            "4",
            vec![],
        ),
        ("both", json!({"ipFamilyPolicy": "RequireDualStack"}), &BOTH[..], "46", vec![]),
        ("both if there are", json!({"ipFamilyPolicy": "PreferDualStack"}), &BOTH[..], "46", vec![]),
        ("both by its families", json!({"ipFamilies": ["IPv6", "IPv4"]}), &BOTH[..], "46", vec![]),
        ("one will do", json!({"ipFamilyPolicy": "PreferDualStack"}), &V4[..], "4", vec![]),
        (
            "one will not do",
            json!({"ipFamilyPolicy": "RequireDualStack"}),
            &V4[..],
            "4",
            vec![
                "spec.clusterIPs has no IPv6 address, and no ServiceCIDR has IPv6 addresses: it is not served in IPv6",
            ],
        ),
        (
            "the second one",
            json!({"clusterIP": "10.9.9.9", "ipFamilyPolicy": "PreferDualStack"}),
            &BOTH[..],
            "6",
            vec![],
        ),
        ("it has one", json!({"clusterIP": "10.9.9.9"}), &BOTH[..], "", vec![]),
        (
            "it has both",
            json!({"clusterIPs": ["10.9.9.9", "fd00::9"], "ipFamilyPolicy": "RequireDualStack"}),
            &BOTH[..],
            "",
            vec![],
        ),
        ("what it has is wrong, and has been named", json!({"clusterIP": "pending"}), &BOTH[..], "", vec![]),
        ("headless", json!({"clusterIP": "None"}), &BOTH[..], "", vec![]),
        ("an alias", json!({"type": "ExternalName", "externalName": "a.example"}), &BOTH[..], "", vec![]),
        ("no range", json!({}), &none[..], "", vec![missing]),
        (
            "no range at all for two",
            json!({"ipFamilyPolicy": "PreferDualStack"}),
            &none[..],
            "",
            vec![missing],
        ),
        (
            "no range of that family",
            json!({"ipFamilies": ["IPv6"]}),
            &V4[..],
            "",
            vec![
                "spec.clusterIP is not set, and no ServiceCIDR has IPv6 addresses: the Service is not served",
            ],
        ),
        (
            "no room",
            json!({}),
            &["10.96.0.0/31"][..],
            "",
            vec![
                "spec.clusterIP is not set, and no IPv4 address of the ServiceCIDRs is free: the Service is not served",
            ],
        ),
    ] {
        let given = given(&[("s", spec)], ranges).remove("s").unwrap_or_default();
        let families: String =
            given.cluster_ips.iter().zip(["4", "6"]).filter_map(|(ip, shown)| ip.map(|_| shown)).collect();
        assert_eq!(
            (families.as_str(), given.problems),
            (want, problems.into_iter().map(str::to_owned).collect()),
            "{id}"
        );
    }
}

/// A number that an object names is assigned to no other Service, and the others keep theirs.
#[test]
fn others_count_as_little_as_possible() {
    let plain = json!({"type": "NodePort", "ports": [{"port": 80}]});
    let names: Vec<String> = (0..100).map(|i| format!("s{i:02}")).collect();
    let mut services: Vec<_> = names.iter().map(|name| (name.as_str(), plain.clone())).collect();
    let alone: BTreeMap<_, _> = services
        .iter()
        .map(|service| (service.0, given(std::slice::from_ref(service), &BOTH)[service.0].clone()))
        .collect();
    let together = given(&services, &BOTH);
    let moved = together.iter().filter(|(name, given)| alone[name.as_str()] != **given).count();
    assert!(moved < 10, "{moved} of 100 have other numbers because of each other");
    assert_eq!(together.values().map(addresses).collect::<BTreeSet<_>>().len(), 100);
    assert_eq!(together.values().map(|given| given.node_ports[&0]).collect::<BTreeSet<_>>().len(), 100);

    let (taken, port) = (addresses(&together["s50"])[0].clone(), together["s50"].node_ports[&0]);
    for (field, value) in [("clusterIP", json!(taken)), ("externalIPs", json!([taken]))] {
        let mut spec = json!({"ports": [{"port": 1}], "clusterIP": "10.9.9.9"});
        spec[field] = value;
        services.push(("zz", spec));
        let after = given(&services, &BOTH);
        assert_ne!(addresses(&after["s50"]), [taken.as_str()], "{field}");
        let differing = together.iter().filter(|(name, given)| after[*name] != **given).count();
        assert_eq!(differing, 1, "{field}");
        services.pop();
    }
    for spec in [
        json!({"clusterIP": "10.9.9.9", "ports": [{"port": 1, "nodePort": port}]}),
        // The port of a Service that is not served here is not free either.
        json!({"clusterIP": "None", "healthCheckNodePort": port}),
    ] {
        services.push(("zz", spec));
        let after = given(&services, &BOTH);
        assert_ne!(after["s50"].node_ports[&0], port);
        services.pop();
    }
}

#[test]
fn small_ranges_are_used_up_but_for_what_is_nobodys() {
    let names: Vec<String> = (0..300).map(|i| format!("s{i}")).collect();
    let services: Vec<_> = names.iter().map(|name| (name.as_str(), json!({}))).collect();
    let given = given(&services, &["10.96.0.0/24", "10.97.0.0/30"]);
    let addresses: BTreeSet<_> = given.values().flat_map(|given| given.cluster_ips[0]).collect();
    let want: BTreeSet<_> =
        (2..=254).map(|last| Addr::v4([10, 96, 0, last])).chain([Addr::v4([10, 97, 0, 2])]).collect();
    assert_eq!(addresses, want);
    assert_eq!(given.values().filter(|given| !given.problems.is_empty()).count(), 300 - 254);
}

#[test]
fn ranges_of_every_size() {
    for (range, has_one) in [
        ("0.0.0.0/0", true),
        ("10.96.0.0/30", true),
        ("10.96.0.0/32", false),
        ("255.255.255.0/24", true),
        ("::/0", true),
        ("fd00::/64", true),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:0/112", true),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", false),
    ] {
        let given = given(&[("s", json!({}))], &[range]).remove("s").unwrap();
        let prefix = lenient::prefix(range).unwrap();
        let [addr] = &given.cluster_ips.iter().flatten().collect::<Vec<_>>()[..] else {
            assert!(!has_one, "{range}: {given:?}");
            continue;
        };
        assert!(has_one && prefix.contains(**addr) && **addr != prefix.addr(), "{range}: {addr}");
    }
}

#[test]
fn node_ports() {
    let two = json!([{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}, {"name": "m", "port": 9153}]);
    for (id, spec, want) in [
        ("ClusterIP", json!({"ports": two}), vec![]),
        ("NodePort", json!({"type": "NodePort", "ports": two}), vec![0, 1, 2]),
        ("LoadBalancer", json!({"type": "LoadBalancer", "ports": two}), vec![0, 1, 2]),
        (
            "it wants none",
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": two}),
            vec![],
        ),
        (
            "one is named",
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30123}, {"name": "b", "port": 81}]}),
            vec![1],
        ),
    ] {
        let mut spec = spec;
        spec["clusterIP"] = json!("10.9.9.9");
        let given = given(&[("s", spec)], &BOTH).remove("s").unwrap_or_default();
        assert_eq!(given.node_ports.keys().copied().collect::<Vec<_>>(), want, "{id}");
        assert!(given.node_ports.values().all(|port| (30_086..32_768).contains(port)), "{id}: {given:?}");
        if want.len() == 3 {
            assert_eq!(given.node_ports[&0], given.node_ports[&1], "one number for both protocols");
            assert_ne!(given.node_ports[&0], given.node_ports[&2]);
        }
    }
    let ports: Vec<_> = (1..=3_000).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let given = given(&[("s", json!({"type": "NodePort", "clusterIP": "10.9.9.9", "ports": ports}))], &BOTH);
    let given = &given["s"];
    assert_eq!((given.node_ports.len(), given.problems.len()), (2_768, 17));
    assert_eq!(given.node_ports.values().collect::<BTreeSet<_>>().len(), 2_768);
    assert!(
        given.problems[0].ends_with("has no nodePort, and none in 30000..32767 is free"),
        "{}",
        given.problems[0]
    );
}

/// Many Services cannot have the number that their name leads to.
#[test]
fn many_services_in_a_range_that_is_hardly_large_enough() {
    let names: Vec<String> = (0..20_000).map(|i| format!("s{i}")).collect();
    let services: Vec<_> = names.iter().map(|name| (name.as_str(), json!({}))).collect();
    let start = std::time::Instant::now();
    let given = given(&services, &["10.96.0.0/18"]);
    assert_eq!(given.values().filter(|given| given.problems.is_empty()).count(), (1 << 14) - 3);
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
}
