//! Tests of the slices that selectors lead to.

use super::super::slices::Found;
use super::*;
use crate::sources::manifests::labels::Labels;

/// Returns Service `s` at 10.96.0.10, for the Pods labelled `app: s`; the fields of `spec` replace its own.
fn selecting(spec: &Value) -> Object {
    let mut all = json!({
        "clusterIP": "10.96.0.10", "selector": {"app": "s"}, "ports": [{"name": "web", "port": 80, "targetPort": 8080}],
    });
    for (field, value) in spec.as_object().unwrap() {
        all[field] = value.clone();
    }
    let (object, said) = object(service("s", &all));
    assert_eq!(said, [""; 0], "{all}");
    object
}

/// Returns a Pod labelled `app: s` with an address, without conditions; `spec` and `status` may add more.
fn pod(address: &str, spec: &Value, status: &Value) -> Value {
    let mut status = status.clone();
    if !address.is_empty() {
        status["podIP"] = address.into();
    }
    json!({
        "kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p", "namespace": "a", "labels": {"app": "s", "v": "1"}},
        "spec": spec, "status": status,
    })
}

fn found(service: &Object, pods: &[Value]) -> Found {
    found_with_room(service, pods, ENDPOINTS_MAX)
}

fn found_with_room(service: &Object, pods: &[Value], room: usize) -> Found {
    let zones = [("n1", "za"), ("n2", "zb")].map(|(node, zone)| (node.into(), zone.into())).into();
    let pods: Vec<Object> = pods.iter().map(|pod| object(pod.clone()).0).collect();
    let parts = pods.iter().filter_map(|pod| {
        if let Some(Part::Pod(part)) = &pod.part { Some((&part.labels, part)) } else { None }
    });
    slices_of(&Labelled::new(parts), service.service().unwrap(), service_part(service), &zones, "n1", room)
}

/// Returns slices in short form, such as `IPv4 web/TCP:8080 = 10.64.1.11 RS-L`: ready, serving, terminating, local, and
/// hints.
fn short(found: &Found) -> Vec<String> {
    found
        .slices
        .iter()
        .map(|slice| {
            let ports: Vec<_> = slice
                .ports
                .iter()
                .map(|port| {
                    format!("{}/{}:{}", port.name, proxy_common::abi::proto::name(port.proto), port.port)
                })
                .collect();
            let endpoints: Vec<_> = slice.endpoints.iter().map(endpoint).collect();
            format!("{} {} = {}", slice.family, ports.join(" "), endpoints.join(", "))
        })
        .collect()
}

fn endpoint(endpoint: &crate::reconcile::cluster::Endpoint) -> String {
    let flags =
        [(endpoint.ready, 'R'), (endpoint.serving, 'S'), (endpoint.terminating, 'T'), (endpoint.local, 'L')];
    let flags: String = flags.into_iter().map(|(is, flag)| if is { flag } else { '-' }).collect();
    let hints = endpoint.hints.iter().flat_map(|hints| hints.zones.iter().chain(&hints.nodes));
    let hints: String = hints.map(|hint| format!(" {hint}")).collect();
    format!("{} {flags}{hints}", endpoint.addr)
}

#[test]
fn the_state_of_pods() {
    let ready = condition("Ready", "True");
    let publish = json!({"publishNotReadyAddresses": true});
    for (id, service, status, leaving, want) in [
        ("ready", json!({}), ready.clone(), false, Some("RS--")),
        ("not ready", json!({}), condition("Ready", "False"), false, Some("----")),
        ("unknown", json!({}), condition("Ready", "Unknown"), false, Some("----")),
        ("conditions, but none that tells", json!({}), condition("Initialized", "True"), false, Some("----")),
        ("no condition at all", json!({}), json!({}), false, Some("RS--")),
        ("no condition, null", json!({}), json!({"conditions": null}), false, Some("RS--")),
        ("ready and leaving", json!({}), ready.clone(), true, Some("-ST-")),
        ("not ready and leaving", json!({}), condition("Ready", "False"), true, Some("--T-")),
        ("published", publish.clone(), condition("Ready", "False"), false, Some("R---")),
        ("published and leaving", publish.clone(), ready, true, Some("RST-")),
        ("running", json!({}), phase("Running"), false, Some("RS--")),
        ("pending", json!({}), phase("Pending"), false, Some("RS--")),
        ("succeeded", publish.clone(), phase("Succeeded"), false, None),
        ("failed", publish, phase("Failed"), false, None),
    ] {
        let mut pod = pod("10.64.1.11", &json!({}), &status);
        if leaving {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        let want: Vec<_> =
            want.iter().map(|flags| format!("IPv4 web/TCP:8080 = 10.64.1.11 {flags}")).collect();
        assert_eq!(short(&found(&selecting(&service), &[pod])), want, "{id}");
    }
}

fn phase(phase: &str) -> Value {
    json!({"phase": phase, "conditions": [{"type": "Ready", "status": "True"}]})
}

fn condition(kind: &str, status: &str) -> Value {
    json!({"conditions": [{"type": kind, "status": status}]})
}

#[test]
fn where_pods_are() {
    for (id, distribution, annotation, spec, want) in [
        ("no node", "", "", json!({}), "RS--"),
        ("here", "", "", json!({"nodeName": "n1"}), "RS-L"),
        ("elsewhere", "", "", json!({"nodeName": "n2"}), "RS--"),
        ("on the host's network", "", "", json!({"nodeName": "n1", "hostNetwork": true}), "RS-L"),
        ("zone", "PreferClose", "", json!({"nodeName": "n2"}), "RS-- zb"),
        ("zone by its newer name", "PreferSameZone", "", json!({"nodeName": "n1"}), "RS-L za"),
        ("node and zone", "PreferSameNode", "", json!({"nodeName": "n2"}), "RS-- zb n2"),
        ("a node that is in no file", "PreferSameNode", "", json!({"nodeName": "n3"}), "RS-- n3"),
        ("no zone", "PreferClose", "", json!({"nodeName": "n3"}), "RS--"),
        ("no node, no hint", "PreferSameNode", "", json!({}), "RS--"),
        ("the annotation goes before", "PreferClose", "Auto", json!({"nodeName": "n2"}), "RS--"),
        ("the annotation is off", "PreferClose", "Disabled", json!({"nodeName": "n2"}), "RS-- zb"),
    ] {
        let spec_of_service = json!({
            "clusterIP": "10.96.0.10", "selector": {"app": "s"}, "trafficDistribution": distribution,
            "ports": [{"name": "web", "port": 80, "targetPort": 8080}],
        });
        let mut service = service("s", &spec_of_service);
        service["metadata"]["annotations"] = json!({"service.kubernetes.io/topology-mode": annotation});
        let pods = [pod("10.64.1.11", &spec, &json!({}))];
        let got = short(&found(&object(service).0, &pods));
        assert_eq!(got, [format!("IPv4 web/TCP:8080 = 10.64.1.11 {want}")], "{id}");
    }
    let not_ready = json!({"conditions": [{"type": "Ready", "status": "False"}]});
    let pods = [pod("10.64.1.11", &json!({"nodeName": "n1"}), &not_ready)];
    let got = short(&found(&selecting(&json!({"trafficDistribution": "PreferSameNode"})), &pods));
    assert_eq!(got, ["IPv4 web/TCP:8080 = 10.64.1.11 ---L"], "only who is ready has hints");
}

#[test]
fn target_ports() {
    let containers = json!({
        "containers": [
            {"name": "a", "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9999}]},
            {"name": "b", "ports": [
                {"name": "http", "containerPort": 8081},
                {"name": "dns", "containerPort": 5353, "protocol": "UDP"},
                {"name": "dns", "containerPort": 5354},
            ]},
        ],
        "initContainers": [
            {"name": "c", "ports": [{"name": "setup", "containerPort": 7000}]},
            {"name": "d", "restartPolicy": "Always", "ports": [
                {"name": "mesh", "containerPort": 15001}, {"name": "http", "containerPort": 15002},
            ]},
        ],
    });
    let pods = [pod("10.64.1.11", &containers, &json!({}))];
    for (id, ports, want, portless) in [
        ("a number", json!([{"port": 80, "targetPort": 8080}]), "/TCP:8080", vec![]),
        ("a number as a float", json!([{"port": 80, "targetPort": 8080.0}]), "/TCP:8080", vec![]),
        ("absent is the port", json!([{"port": 80}]), "/TCP:80", vec![]),
        (
            "null, 0 and empty likewise",
            json!([
                {"name": "a", "port": 80, "targetPort": null}, {"name": "b", "port": 81, "targetPort": 0},
                {"name": "c", "port": 82, "targetPort": ""},
            ]),
            "a/TCP:80 b/TCP:81 c/TCP:82",
            vec![],
        ),
        (
            "the first container that has the name",
            json!([{"port": 80, "targetPort": "http"}]),
            "/TCP:8080",
            vec![],
        ),
        (
            "by protocol",
            json!([
                {"name": "u", "port": 53, "targetPort": "dns", "protocol": "UDP"}, {"name": "t", "port": 53, "targetPort": "dns"},
            ]),
            "u/UDP:5353 t/TCP:5354",
            vec![],
        ),
        ("a sidecar", json!([{"port": 80, "targetPort": "mesh"}]), "/TCP:15001", vec![]),
        (
            "an init container is gone when the Pod runs",
            json!([{"port": 80, "targetPort": "setup"}]),
            "",
            vec![0],
        ),
        (
            "the name of no port",
            json!([
                {"name": "a", "port": 80, "targetPort": "http"}, {"name": "b", "port": 81, "targetPort": "https"},
            ]),
            "a/TCP:8080",
            vec![1],
        ),
        ("digits are a name", json!([{"port": 80, "targetPort": "8080"}]), "", vec![0]),
    ] {
        let got = found(&selecting(&json!({"ports": ports})), &pods);
        let want: Vec<_> = [want]
            .into_iter()
            .filter(|want| !want.is_empty())
            .map(|want| format!("IPv4 {want} = 10.64.1.11 RS--"))
            .collect();
        assert_eq!((short(&got), got.portless), (want, portless), "{id}");
    }
}

#[test]
fn pods_with_other_numbers_have_slices_of_their_own() {
    let pods = [
        pod("10.64.1.11", &listening(8080), &json!({})),
        pod("10.64.1.12", &listening(9080), &json!({})),
        pod("10.64.1.13", &listening(8080), &json!({})),
        pod("10.64.1.14", &json!({}), &json!({})),
    ];
    let ports = json!([{"name": "web", "port": 80, "targetPort": "http"}, {"name": "adm", "port": 81}]);
    let got = found(&selecting(&json!({"ports": ports})), &pods);
    assert_eq!(
        short(&got),
        [
            "IPv4 adm/TCP:81 = 10.64.1.14 RS--",
            "IPv4 web/TCP:8080 adm/TCP:81 = 10.64.1.11 RS--, 10.64.1.13 RS--",
            "IPv4 web/TCP:9080 adm/TCP:81 = 10.64.1.12 RS--",
        ]
    );
    assert_eq!((got.portless, got.matching), (vec![], 4));
    let names: BTreeSet<_> = got.slices.iter().map(|slice| &slice.key).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

fn listening(number: u16) -> Value {
    json!({"containers": [{"ports": [{"name": "http", "containerPort": number}]}]})
}

#[test]
fn families_are_those_of_the_service() {
    let both = json!({"podIPs": [{"ip": "fd00::11"}, {"ip": "10.64.1.11"}, {"ip": "10.64.1.99"}]});
    let v4 = "IPv4 web/TCP:8080 = 10.64.1.11 RS--";
    let v6 = "IPv6 web/TCP:8080 = fd00::11 RS--";
    for (service, status, want, usable) in [
        (json!({}), both.clone(), vec![v4], 1),
        (json!({"clusterIP": "fd00:96::10"}), both.clone(), vec![v6], 1),
        (
            json!({"clusterIPs": ["fd00:96::10", "10.96.0.10"], "clusterIP": "fd00:96::10"}),
            both,
            vec![v4, v6],
            1,
        ),
        (
            json!({"clusterIPs": ["10.96.0.10", "fd00:96::10"]}),
            json!({"podIP": "10.64.001.011"}),
            vec![v4],
            1,
        ),
        (json!({}), json!({"podIPs": [{"ip": "fd00::11"}]}), vec![], 0),
        (json!({}), json!({}), vec![], 0),
    ] {
        let got = found(&selecting(&service), &[pod("", &json!({}), &status)]);
        assert_eq!(
            (short(&got), got.usable, got.matching),
            (want.into_iter().map(str::to_owned).collect(), usable, 1),
            "{service}"
        );
    }
}

#[test]
fn labels() {
    for (selector, want) in [
        (json!({"app": "s"}), 1),
        (json!({"app": "s", "v": "1"}), 1),
        (json!({"app": "s", "v": "2"}), 0),
        (json!({"app": "s", "tier": ""}), 0),
        (json!({"tier": "x"}), 0),
        // As in the API server, an empty selector matches nothing.
        (json!({}), 0),
        (Value::Null, 0),
    ] {
        let got =
            found(&selecting(&json!({"selector": selector})), &[pod("10.64.1.11", &json!({}), &json!({}))]);
        assert_eq!(got.matching, want, "{selector}");
    }
}

#[test]
fn one_that_does_not_fit_gets_none() {
    let pods: Vec<_> = (1..=4).map(|last| pod(&format!("10.64.1.{last}"), &json!({}), &json!({}))).collect();
    let ports = json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}]);
    let service = selecting(&json!({"ports": ports}));
    let fits = found_with_room(&service, &pods, 8);
    assert_eq!((fits.endpoints(), fits.is_beyond), (8, false));
    let beyond = found_with_room(&service, &pods, 7);
    assert_eq!((beyond.endpoints(), beyond.is_beyond), (0, true));
}

/// A thousand Services with ten Pods each are looked up by the label that tells them apart, not by the label that all
/// share.
#[test]
fn the_rarest_label_is_looked_at() {
    let labels: Vec<Labels> = (0..10_000)
        .map(|i| [("app", "all".to_owned()), ("of", format!("s{}", i / 10))])
        .map(|labels| labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        .collect();
    let looked_at = std::cell::Cell::new(0);
    let index = Labelled::new(labels.iter().map(|labels| (labels, ())));
    for i in 0..1_000 {
        let selector = [("app".to_owned(), "all".to_owned()), ("of".to_owned(), format!("s{i}"))].into();
        looked_at.set(looked_at.get() + index.candidates(&selector).len());
        assert_eq!(index.selected(&selector).count(), 10);
    }
    assert_eq!(looked_at.get(), 10_000);
}

#[test]
fn what_is_wrong_with_a_pod() {
    let status = json!({"podIPs": [{"ip": "pending"}, {"ip": "127.0.0.1"}, {"ip": "10.64.1.11"}]});
    let (pod, said) = object(pod("", &json!({}), &status));
    assert_eq!(
        said,
        [
            "status.podIPs \"pending\" is not an IP address; it is ignored",
            "status.podIPs \"127.0.0.1\" is a loopback address, where no endpoint can be; it is ignored",
        ]
    );
    let Some(Part::Pod(part)) = pod.part else { panic!("{pod:?}") };
    assert_eq!(
        part.addresses.map(|addr| addr.map(|addr| addr.to_string())),
        [Some("10.64.1.11".to_owned()), None]
    );
    let broken = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p"}, "spec": {"containers": [{"ports": 7}]}});
    let (pod, said) = object(broken);
    assert_eq!(pod.part, None);
    let [reason] = &said[..] else { panic!("{said:?}") };
    assert!(reason.starts_with("spec.containers[0].ports: "), "{reason}");
    assert!(reason.ends_with("; it is no endpoint of any Service"), "{reason}");
}

#[test]
fn what_is_wrong_with_a_service() {
    let spec = json!({
        "clusterIP": "10.96.0.10", "selector": {"version": 1.5}, "ports": [{"port": 80}],
    });
    let (served, said) = object(service("s", &spec));
    assert_eq!(served.service().unwrap().ports.len(), 1, "its slices are served all the same");
    let [reason] = &said[..] else { panic!("{said:?}") };
    assert!(reason.starts_with("spec.selector.version: "), "{reason}");
    assert!(reason.ends_with("; its selector has no effect"), "{reason}");
    let spec = json!({
        "clusterIP": "10.96.0.10", "trafficDistribution": "Near", "ipFamilyPolicy": "Both",
        "ports": [{"port": 80, "targetPort": 70000}],
    });
    assert_eq!(
        object(service("s", &spec)).1,
        [
            "spec.ports[0].targetPort 70000 is not in 1..65535; the number of the port itself counts",
            "spec.trafficDistribution \"Near\" is not PreferSameZone, PreferSameNode or PreferClose; it is ignored",
            "spec.ipFamilyPolicy \"Both\" is not SingleStack, PreferDualStack or RequireDualStack; it is ignored",
        ]
    );
}
