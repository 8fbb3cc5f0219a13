//! EndpointSlices, and Endpoints that become slices.

use super::*;

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

fn endpoint(last: u8, hints: Value) -> Value {
    json!({"addresses": [format!("10.64.1.{last}")], "hints": hints})
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
