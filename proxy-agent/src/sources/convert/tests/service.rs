//! Services.

use super::*;

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
