//! Tests case by case. Ids refer to the list of behaviour cases; the node is `n1`.

use std::sync::Arc;

use proxy_common::addr::{Addr, Family};
use serde_json::{Value, json};

use super::*;
use crate::config::opt_out::ANNOTATION;
use crate::reconcile::cluster::{Endpoint, Hints, Service, ServiceType, Slice, TrafficPolicy};

#[test]
fn a_full_service() {
    let got = service(
        &json!({
            "type": "LoadBalancer",
            "externalIPs": ["198.18.9.9"],
            "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Cluster",
            "healthCheckNodePort": 31999,
            "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": ["203.0.113.0/25"],
            "ports": [{"name": "web", "protocol": "TCP", "port": 80, "nodePort": 31080, "targetPort": "http"}],
        }),
        &json!({"loadBalancer": {"ingress": [{"ip": "198.18.5.5"}]}}),
    )
    .unwrap();
    let want = Service {
        key: ObjectKey::new("a", "s"),
        created: 1_767_225_600,
        service_type: ServiceType::LoadBalancer,
        cluster_ips: [Some(addr("10.96.0.10")), None],
        ports: vec![crate::reconcile::cluster::ServicePort {
            name: "web".into(),
            proto: 6,
            port: 80,
            node_port: 31080,
        }],
        external_ips: vec![addr("198.18.9.9")],
        load_balancer_ips: vec![addr("198.18.5.5")],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Local,
        affinity_seconds: Some(10800),
        source_ranges: vec![lenient::prefix("203.0.113.0/25").unwrap()],
        health_check_node_port: 31999,
        problems: vec![],
    };
    assert_eq!(got, want);
}

#[test]
fn p001_headless_is_not_ours() {
    assert_eq!(service(&json!({"clusterIP": "None", "clusterIPs": ["None"]}), &Value::Null), None);
}

#[test]
fn p002_empty_cluster_ip_serves_nothing() {
    let got = service(&json!({"clusterIP": "", "clusterIPs": null}), &Value::Null).unwrap();
    assert_eq!(got.cluster_ips, [None, None]);
    assert_eq!(got.problems, ["spec.clusterIP is not set: the Service is not served"]);
}

#[test]
fn p003_external_name_has_no_cluster_ip_even_if_stale() {
    let got = service(&json!({"type": "ExternalName", "clusterIP": "10.96.0.10"}), &Value::Null).unwrap();
    assert_eq!((got.service_type, got.cluster_ips), (ServiceType::ExternalName, [None, None]));
    assert_eq!(got.problems, [""; 0]);
}

#[test]
fn p004_p005_another_proxys_service_is_not_ours() {
    for (value, ours) in [(Some("other"), false), (Some(""), false), (None, true)] {
        let mut object = service_json(&json!({}), &Value::Null);
        if let Some(value) = value {
            object["metadata"]["labels"] = json!({PROXY_NAME_LABEL: value});
        }
        let object = serde_json::from_value(object).unwrap();
        assert_eq!(Converter::new("n1").service(&object).unwrap().is_some(), ours, "{value:?}");
    }
}

#[test]
fn p006_p007_p008_p015_cluster_ips() {
    const V4: &str = "10.96.0.10";
    const V6: &str = "fd00:96::10";
    for (id, spec, want, problem) in [
        ("p006", json!({"clusterIP": V6, "ipFamilies": ["IPv6"], "clusterIPs": [V6]}), [None, Some(V6)], ""),
        (
            "p007",
            json!({"clusterIP": V6, "ipFamilies": ["IPv6", "IPv4"], "clusterIPs": [V6, V4]}),
            [Some(V4), Some(V6)],
            "",
        ),
        ("p008", json!({"clusterIP": V4}), [Some(V4), None], ""),
        ("p015", json!({"clusterIP": "010.096.000.010"}), [Some(V4), None], ""),
        ("one family, list absent", json!({"clusterIP": V4, "ipFamilies": ["IPv4"]}), [Some(V4), None], ""),
        (
            "second address missing",
            json!({"clusterIP": V4, "ipFamilies": ["IPv4", "IPv6"], "clusterIPs": [V4]}),
            [Some(V4), None],
            "",
        ),
        ("only the list", json!({"clusterIP": null, "clusterIPs": [V4, V6]}), [Some(V4), Some(V6)], ""),
        (
            "wrong family",
            json!({"clusterIP": V4, "ipFamilies": ["IPv6"], "clusterIPs": [V4]}),
            [None, None],
            "spec.clusterIPs[0] \"10.96.0.10\" is not IPv6, which spec.ipFamilies[0] names; it is ignored",
        ),
        (
            "garbage",
            json!({"clusterIP": "pending"}),
            [None, None],
            "spec.clusterIPs[0] \"pending\" is not an IP address; it is ignored",
        ),
        (
            "third address",
            json!({"clusterIP": V4, "ipFamilies": ["IPv4"], "clusterIPs": [V4, V6]}),
            [Some(V4), None],
            "spec.clusterIPs[1] \"fd00:96::10\" has no family in spec.ipFamilies; it is ignored",
        ),
    ] {
        let got = service(&spec, &Value::Null).unwrap();
        assert_eq!(got.cluster_ips, want.map(|ip| ip.map(addr)), "{id}");
        assert_eq!(got.problems.join("|"), problem, "{id}");
    }
}

#[test]
fn p009_p010_every_port_stands_alone() {
    let ports = json!([
        {"name": "du", "port": 53, "protocol": "UDP"},
        {"name": "dt", "port": 53, "protocol": "TCP"},
        {"name": "ds", "port": 53, "protocol": "SCTP"},
        {"name": "adm", "port": 443},
    ]);
    let got = service(&json!({"ports": ports}), &Value::Null).unwrap();
    let got: Vec<_> =
        got.ports.iter().map(|port| (&*port.name, port.proto, port.port, port.node_port)).collect();
    assert_eq!(got, [("du", 17, 53, 0), ("dt", 6, 53, 0), ("ds", 132, 53, 0), ("adm", 6, 443, 0)]);
}

#[test]
fn bad_ports_cost_only_themselves() {
    let long = "p".repeat(64);
    let ports = json!([
        {"name": "zero", "port": 0},
        {"name": "big", "port": 65536},
        {"name": "icmp", "port": 1, "protocol": "ICMP"},
        {"name": long, "port": 2},
        {"name": "np", "port": 3, "nodePort": -1},
        {"name": "np", "port": 4},
        {"port": 80},
    ]);
    let got = service(&json!({"ports": ports, "healthCheckNodePort": 70000}), &Value::Null).unwrap();
    let names: Vec<_> = got.ports.iter().map(|port| (&*port.name, port.port, port.node_port)).collect();
    assert_eq!(names, [("np", 3, 0), ("", 80, 0)]);
    assert_eq!(
        got.problems,
        [
            "spec.ports[0].port 0 is not in 1..65535; the port is ignored",
            "spec.ports[1].port 65536 is not in 1..65535; the port is ignored",
            "spec.ports[2].protocol \"ICMP\" is not TCP, UDP or SCTP; the port is ignored",
            "spec.ports[3].name has 64 bytes, more than the 63 that Kubernetes allows; the port is ignored",
            "spec.ports[4].nodePort -1 is not in 1..65535; it is ignored",
            "spec.ports[5] has the name and protocol of an earlier port and is ignored",
            "spec.healthCheckNodePort 70000 is not in 1..65535; it is ignored",
        ]
    );
}

#[test]
fn p014_p023_p024_p025_load_balancer_addresses() {
    for (id, ingress, want, problems) in [
        ("p014", json!([{"hostname": "lb.example"}]), vec![], 0),
        ("p023", json!([{"ip": "198.18.5.5", "ipMode": "VIP"}]), vec!["198.18.5.5"], 0),
        ("p024", json!([{"ip": "198.18.5.5", "ipMode": "Proxy"}]), vec![], 0),
        ("p025", json!([{"ip": "198.18.5.5"}, {"ip": "198.18.5.7"}]), vec!["198.18.5.5", "198.18.5.7"], 0),
        ("empty", json!([{"ip": ""}]), vec![], 0),
        ("garbage", json!([{"ip": "198.18.5"}, {"ip": "198.18.5.5", "ipMode": "vip"}]), vec![], 2),
        ("null", Value::Null, vec![], 0),
    ] {
        let got = service(&json!({}), &json!({"loadBalancer": {"ingress": ingress}})).unwrap();
        assert_eq!(got.load_balancer_ips, addrs(&want), "{id}");
        assert_eq!(got.problems.len(), problems, "{id}: {:?}", got.problems);
    }
}

#[test]
fn p021_external_ips_are_taken_one_by_one() {
    let ips = json!(["198.18.9.9", "2001:db8:99::9", "not-an-ip", "", "0.0.0.0"]);
    let got = service(&json!({"externalIPs": ips}), &Value::Null).unwrap();
    assert_eq!(got.external_ips, addrs(&["198.18.9.9", "2001:db8:99::9"]));
    assert_eq!(
        got.problems,
        [
            "spec.externalIPs[2] \"not-an-ip\" is not an IP address; it is ignored",
            "spec.externalIPs[4] \"0.0.0.0\" is the unspecified address; it is ignored",
        ]
    );
}

#[test]
fn p150_p154_p155_source_ranges() {
    let ranges =
        json!(["  203.0.113.9/25 ", "", " ", "0.0.0.0/0", "2001:db8::/32", "10.0.0.0/33", "10.0.0.1"]);
    let got = service(&json!({"loadBalancerSourceRanges": ranges}), &Value::Null).unwrap();
    let texts: Vec<_> = got.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["203.0.113.0/25", "0.0.0.0/0", "2001:db8::/32"]);
    assert_eq!(
        got.problems,
        [
            "spec.loadBalancerSourceRanges[5] \"10.0.0.0/33\" is not a CIDR; it is ignored",
            "spec.loadBalancerSourceRanges[6] \"10.0.0.1\" is not a CIDR; it is ignored",
        ]
    );
}

#[test]
fn affinity_and_policies() {
    for (spec, want, problems) in [
        (json!({}), None, 0),
        (json!({"sessionAffinity": "None"}), None, 0),
        (json!({"sessionAffinity": "ClientIP"}), Some(10800), 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}), Some(10800), 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {}}}), Some(10800), 0),
        (timeout(1), Some(1), 0),
        (timeout(86400), Some(86400), 0),
        (timeout(0), Some(10800), 1),
        (timeout(-5), Some(10800), 1),
        (timeout(86401), Some(10800), 1),
        (json!({"sessionAffinity": "Cookie"}), None, 1),
        (json!({"type": "Other", "externalTrafficPolicy": "x", "internalTrafficPolicy": "y"}), None, 3),
    ] {
        let got = service(&spec, &Value::Null).unwrap();
        assert_eq!(got.affinity_seconds, want, "{spec}");
        assert_eq!(got.problems.len(), problems, "{spec}: {:?}", got.problems);
    }
    let got = service(&json!({"internalTrafficPolicy": "Local"}), &Value::Null).unwrap();
    assert_eq!((got.internal_policy, got.external_policy), (TrafficPolicy::Local, TrafficPolicy::Cluster));
}

fn timeout(seconds: i64) -> Value {
    json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}})
}

#[test]
fn unusable_names_are_refused() {
    for (meta, reason) in [
        (json!({"name": "s"}), "metadata.namespace is missing"),
        (json!({"namespace": "a"}), "metadata.name is missing"),
        (
            json!({"namespace": "a", "name": "s".repeat(64)}),
            "metadata.name has 64 bytes, more than the 63 that Kubernetes allows",
        ),
        (
            json!({"namespace": "a", "name": "s\0"}),
            r#"metadata.name is "s\0", which has others than letters, digits, `-`, `.` and `_` in it"#,
        ),
        (
            json!({"namespace": "a/b", "name": "s"}),
            r#"metadata.namespace is "a/b", which has others than letters, digits, `-`, `.` and `_` in it"#,
        ),
    ] {
        let mut object = service_json(&json!({}), &Value::Null);
        object["metadata"] = meta;
        let object = serde_json::from_value(object).unwrap();
        assert_eq!(Converter::new("n1").service(&object).unwrap_err().reason, reason);
    }
    // The name of a slice may be as long as a DNS subdomain.
    let mut object = slice_json();
    object["metadata"]["name"] = json!("s".repeat(253));
    assert!(Converter::new("n1").slice(&serde_json::from_value(object).unwrap()).unwrap().is_some());
}

#[test]
fn p040_p041_p063_conditions() {
    for (conditions, want) in [
        (Value::Null, (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({"ready": false}), (false, true, false)),
        (json!({"ready": false, "serving": false, "terminating": true}), (false, false, true)),
        (json!({"ready": true, "serving": false, "terminating": true}), (true, false, true)),
    ] {
        let got = slice(&json!({"endpoints": [{"addresses": ["10.64.1.11"], "conditions": conditions}]}));
        let [endpoint] = got.unwrap().endpoints.try_into().unwrap();
        let Endpoint { ready, serving, terminating, .. } = endpoint;
        assert_eq!((ready, serving, terminating), want, "{conditions}");
    }
}

#[test]
fn p045_p046_p047_slice_ports() {
    let ports = json!([
        {"port": 8080},
        {"name": "web"},
        {"name": "web", "port": 0},
        {"name": "", "port": 8080},
        {"name": "dns", "port": 1053, "protocol": "UDP"},
        {"name": "x", "port": 70000, "protocol": ""},
        {"name": "y", "port": 1, "protocol": "IPIP"},
    ]);
    let got = slice(&json!({"ports": ports})).unwrap();
    let usable: Vec<_> = got.ports.iter().map(|port| (&*port.name, port.proto, port.port)).collect();
    assert_eq!(usable, [("", 6, 8080), ("dns", 17, 1053)]);
    assert_eq!(
        got.problems,
        [
            "ports[0].name is missing; the port is ignored",
            "ports[1].port is missing or not in 1..65535; the port is ignored",
            "ports[2].port is missing or not in 1..65535; the port is ignored",
            "ports[5].port is missing or not in 1..65535; the port is ignored",
            "ports[6].protocol \"IPIP\" is not TCP, UDP or SCTP; the port is ignored",
        ]
    );
}

#[test]
fn p015_p052_p053_addresses() {
    let endpoints = json!([
        {"addresses": ["10.64.001.011", "10.64.1.99"]},
        {"addresses": []},
        {},
        {"addresses": ["fd00::1"]},
        {"addresses": ["pod-1"]},
        {"addresses": ["10.64.2.21"]},
        // A loopback address, a link-local one (metadata of a cloud), and a multicast one.
        {"addresses": ["127.0.0.1"]},
        {"addresses": ["169.254.169.254"]},
        {"addresses": ["224.0.0.1"]},
    ]);
    let got = slice(&json!({"endpoints": endpoints})).unwrap();
    let got_addrs: Vec<_> = got.endpoints.iter().map(|endpoint| endpoint.addr).collect();
    assert_eq!(got_addrs, addrs(&["10.64.1.11", "10.64.2.21"]));
    assert_eq!(
        got.problems,
        [
            "endpoints[3].addresses[0] \"fd00::1\" is not IPv4, the addressType of the slice; it is ignored",
            "endpoints[4].addresses[0] \"pod-1\" is not an IP address; it is ignored",
            "endpoints[6].addresses[0] \"127.0.0.1\" is a loopback address, where no endpoint can be; it is ignored",
            "endpoints[7].addresses[0] \"169.254.169.254\" is a link-local address, where no endpoint can be; it is ignored",
            "endpoints[8].addresses[0] \"224.0.0.1\" is a multicast address, where no endpoint can be; it is ignored",
        ]
    );
}

#[test]
fn p054_p055_p056_slices_that_are_not_for_a_proxy() {
    for (id, change) in [
        ("p054", json!({"addressType": "FQDN", "endpoints": [{"addresses": ["db.example"]}]})),
        ("p055", json!({"metadata": {"namespace": "a", "name": "x"}})),
        (
            "p055 empty",
            json!({"metadata": {"namespace": "a", "name": "x", "labels": {SERVICE_NAME_LABEL: ""}}}),
        ),
        (
            "p056",
            json!({"metadata": {"namespace": "a", "name": "x", "labels": {SERVICE_NAME_LABEL: "s", HEADLESS_LABEL: ""}}}),
        ),
    ] {
        assert_eq!(slice(&change), None, "{id}");
    }
    let object = serde_json::from_value(merged(slice_json(), &json!({"addressType": "IPv5"}))).unwrap();
    let problem = Converter::new("n1").slice(&object).unwrap_err();
    assert_eq!(problem.object, "EndpointSlice a/s-1");
}

#[test]
fn p062_local_is_our_exact_name() {
    for (node, want) in
        [(Value::Null, false), (json!("n1"), true), (json!("N1"), false), (json!("n10"), false)]
    {
        let got = slice(&json!({"endpoints": [{"addresses": ["10.64.1.11"], "nodeName": node}]})).unwrap();
        assert_eq!(got.endpoints.first().map(|endpoint| endpoint.local), Some(want), "{node}");
    }
}

#[test]
fn hints_are_shared_and_empty_ones_are_none() {
    let endpoint = |last: u8, hints: Value| json!({"addresses": [format!("10.64.1.{last}")], "hints": hints});
    let zone = json!({"forZones": [{"name": "za"}]});
    let got = slice(&json!({"endpoints": [
        endpoint(1, Value::Null),
        endpoint(2, json!({"forZones": [], "forNodes": []})),
        endpoint(3, zone.clone()),
        endpoint(4, zone),
        endpoint(5, json!({"forNodes": [{"name": "n1"}]})),
    ]}))
    .unwrap();
    let hints: Vec<_> = got.endpoints.iter().map(|endpoint| endpoint.hints.as_ref()).collect();
    let [None, None, Some(a), Some(b), Some(node)] = hints[..] else { panic!("{hints:?}") };
    assert_eq!(**a, Hints { zones: vec!["za".into()], nodes: vec![] });
    assert!(Arc::ptr_eq(a, b));
    assert_eq!(**node, Hints { zones: vec![], nodes: vec!["n1".into()] });
}

#[test]
fn p218_trigger_time() {
    for (annotation, want) in [
        ("2026-01-01T00:00:00.5Z", Some(1_767_225_600_500_000_000)),
        ("2026-01-01T01:00:00+01:00", Some(1_767_225_600_000_000_000)),
        ("yesterday", None),
    ] {
        let mut object = slice_json();
        object["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": annotation});
        let got = Converter::new("n1").slice(&serde_json::from_value(object).unwrap()).unwrap().unwrap();
        assert_eq!(got.trigger_time, want, "{annotation}");
    }
}

#[test]
fn many_faults_are_counted() {
    let endpoints: Vec<_> = (0..100).map(|i| json!({"addresses": [format!("bad-{i}")]})).collect();
    let got = slice(&json!({"endpoints": endpoints})).unwrap();
    assert_eq!(got.problems.len(), FINDINGS_MAX + 1);
    assert_eq!(got.problems.last().unwrap(), "and 84 more of the kind");
}

#[test]
fn endpoints_become_slices_by_subset_and_family() {
    let object = json!({
        "metadata": {"namespace": "a", "name": "s"},
        "subsets": [
            {
                "addresses": [{"ip": "10.64.1.11", "nodeName": "n1"}, {"ip": "fd00::11"}],
                "notReadyAddresses": [{"ip": "10.64.1.12"}],
                "ports": [{"port": 8080}],
            },
            {"addresses": [{"ip": "10.64.1.13"}], "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]},
            {"notReadyAddresses": null},
        ],
    });
    let got = Converter::new("n1").endpoints(&serde_json::from_value(object).unwrap()).unwrap();
    let short: Vec<_> = got
        .iter()
        .map(|slice| {
            let endpoints: Vec<_> =
                slice.endpoints.iter().map(|e| (e.addr.to_string(), e.ready, e.serving, e.local)).collect();
            let ports: Vec<_> =
                slice.ports.iter().map(|port| (port.name.to_string(), port.proto, port.port)).collect();
            (slice.key.to_string(), slice.service.to_string(), slice.family, ports, endpoints)
        })
        .collect();
    let web = vec![(String::new(), 6, 8080)];
    assert_eq!(
        short,
        [
            (
                "a/s/endpoints/0/IPv4".to_owned(),
                "a/s".to_owned(),
                Family::V4,
                web.clone(),
                vec![
                    ("10.64.1.11".to_owned(), true, true, true),
                    ("10.64.1.12".to_owned(), false, false, false)
                ],
            ),
            (
                "a/s/endpoints/0/IPv6".to_owned(),
                "a/s".to_owned(),
                Family::V6,
                web,
                vec![("fd00::11".to_owned(), true, true, false)],
            ),
            (
                "a/s/endpoints/1/IPv4".to_owned(),
                "a/s".to_owned(),
                Family::V4,
                vec![("dns".to_owned(), 17, 53)],
                vec![("10.64.1.13".to_owned(), true, true, false)],
            ),
        ]
    );
}

#[test]
fn p230_p231_node_addresses_and_zone() {
    let object = |name: &str, labels: Value| {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "status": {"addresses": [
                {"type": "ExternalIP", "address": "203.0.113.50"},
                {"type": "Hostname", "address": "n1"},
                {"type": "InternalIP", "address": "192.0.2.10"},
                {"type": "InternalIP", "address": "192.0.2.11"},
                {"type": "ExternalIP", "address": "2001:db8:1::10"},
            ]},
        }))
        .unwrap()
    };
    let mut converter = Converter::new("n1");
    let ips = [Some(addr("192.0.2.10")), Some(addr("2001:db8:1::10"))];
    for (labels, zone) in
        [(json!({ZONE_LABEL: "za"}), Some("za".into())), (json!({ZONE_LABEL: ""}), None), (Value::Null, None)]
    {
        assert_eq!(
            converter.node(&object("n1", labels)),
            Some(Node { zone, ips, primary: Some(Family::V4), ..Node::default() })
        );
    }
    assert_eq!(converter.node(&object("n2", Value::Null)), None);
    assert_eq!(converter.node(&objects::Node::default()), None);
}

#[test]
fn p200_p201_p202_a_node_that_is_leaving() {
    for (meta, taints, want) in [
        (json!({"name": "n1"}), Value::Null, false),
        (
            json!({"name": "n1"}),
            json!([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]),
            false,
        ),
        (json!({"name": "n1"}), json!([{"key": "other", "value": "x", "effect": "NoSchedule"}]), false),
        (
            json!({"name": "n1"}),
            json!([{"key": LEAVING_TAINT, "effect": "PreferNoSchedule", "value": "1"}]),
            true,
        ),
        (json!({"name": "n1", "deletionTimestamp": "2026-01-01T00:00:00Z"}), Value::Null, true),
    ] {
        let object = json!({"metadata": meta, "spec": {"taints": taints, "unschedulable": true}});
        let got = Converter::new("n1").node(&serde_json::from_value(object.clone()).unwrap());
        assert_eq!(got.map(|node| node.leaving), Some(want), "{object}");
    }
}

#[test]
fn service_cidrs() {
    let object = serde_json::from_value(json!({
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.1/16", "fd00:96::/112", "10.96.0.0"]},
    }))
    .unwrap();
    let got = Converter::new("n1").service_cidr(&object).unwrap();
    let texts: Vec<_> = got.prefixes.iter().map(ToString::to_string).collect();
    assert_eq!((&*got.name, texts.join(" ").as_str()), ("kubernetes", "10.96.0.0/16 fd00:96::/112"));
    assert_eq!(got.problems, ["spec.cidrs[2] \"10.96.0.0\" is not a CIDR; it is ignored"]);
    Converter::new("n1").service_cidr(&objects::ServiceCidr::default()).unwrap_err();
}

#[test]
fn pods_that_opt_out() {
    let pod = |object: Value| {
        let rules = Rules::parse(&["annotation".to_owned(), "runtime-class=gvisor".to_owned()]).unwrap();
        Converter::new("n1").with_opt_out(rules).pod(&serde_json::from_value(object).unwrap())
    };
    let off = json!({ANNOTATION: "off"});
    let meta = json!({"namespace": "a", "name": "p", "uid": "u-1", "annotations": off});
    for (meta, spec, phase, want) in [
        (meta.clone(), json!({"nodeName": "n1"}), "Running", Some(("u-1", false))),
        (meta.clone(), json!({"nodeName": "n1", "hostNetwork": true}), "Pending", Some(("u-1", true))),
        (meta.clone(), json!({"nodeName": "n2"}), "Running", None),
        (meta.clone(), json!({}), "Pending", None),
        (meta.clone(), json!({"nodeName": "n1"}), "Succeeded", None),
        (meta, json!({"nodeName": "n1"}), "Failed", None),
        (
            json!({"namespace": "a", "name": "p", "uid": "u-1", "annotations": {ANNOTATION: "on"}}),
            json!({"nodeName": "n1"}),
            "Running",
            None,
        ),
        (
            json!({"namespace": "a", "name": "p", "uid": "u-1"}),
            json!({"nodeName": "n1", "runtimeClassName": "gvisor"}),
            "Running",
            Some(("u-1", false)),
        ),
        (
            json!({"namespace": "a", "name": "p", "uid": "u-1",
                   "annotations": {ANNOTATION: "off", "kubernetes.io/config.hash": "c0ffee"}}),
            json!({"nodeName": "n1"}),
            "Running",
            Some(("c0ffee", false)),
        ),
    ] {
        let object = json!({"metadata": meta, "spec": spec, "status": {"phase": phase}});
        let got = pod(object.clone()).unwrap();
        let got = got.as_ref().map(|pod| (&*pod.uid, pod.host_network));
        assert_eq!(got, want, "{object}");
        let object = serde_json::from_value(object).unwrap();
        assert_eq!(Converter::new("n1").pod(&object).unwrap(), None, "without rules nobody opts out");
    }
    let nameless =
        json!({"metadata": {"name": "p", "namespace": "a", "annotations": off}, "spec": {"nodeName": "n1"}});
    assert!(pod(nameless).unwrap_err().reason.starts_with("metadata.uid is missing"));
}

#[test]
fn objects_full_of_nothing() {
    let mut converter = Converter::new("n1");
    converter.service(&objects::Service::default()).unwrap_err();
    converter.slice(&Default::default()).unwrap_err();
    converter.endpoints(&Default::default()).unwrap_err();
    let meta = json!({"namespace": "a", "name": "s"});
    let empty: objects::Service = serde_json::from_value(json!({"metadata": meta, "spec": {}})).unwrap();
    assert_eq!(converter.service(&empty).unwrap().unwrap().ports, []);
    let empty = serde_json::from_value(json!({"metadata": meta, "subsets": [{}]})).unwrap();
    assert_eq!(converter.endpoints(&empty).unwrap(), []);
}

/// Returns Service a/s with ClusterIP 10.96.0.10; the fields of `spec` replace its own.
fn service(spec: &Value, status: &Value) -> Option<Service> {
    let object = serde_json::from_value(service_json(spec, status)).unwrap();
    Converter::new("n1").service(&object).unwrap()
}

fn service_json(spec: &Value, status: &Value) -> Value {
    let default = json!({"clusterIP": "10.96.0.10", "ports": [{"name": "web", "port": 80}]});
    json!({
        "metadata": {"namespace": "a", "name": "s", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": merged(default, spec),
        "status": status,
    })
}

/// Returns slice a/s-1 of Service a/s; the fields of `change` replace its own.
fn slice(change: &Value) -> Option<Slice> {
    let object = serde_json::from_value(merged(slice_json(), change)).unwrap();
    Converter::new("n1").slice(&object).unwrap()
}

fn slice_json() -> Value {
    json!({
        "metadata": {"namespace": "a", "name": "s-1", "labels": {SERVICE_NAME_LABEL: "s"}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.64.1.11"], "nodeName": "n1"}],
    })
}

fn merged(mut base: Value, change: &Value) -> Value {
    for (field, value) in change.as_object().into_iter().flatten() {
        base[field] = value.clone();
    }
    base
}

fn addr(text: &str) -> Addr {
    lenient::addr(text).unwrap()
}

fn addrs(texts: &[&str]) -> Vec<Addr> {
    texts.iter().map(|text| addr(text)).collect()
}
