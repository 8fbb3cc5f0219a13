//! Tests case by case. Ids refer to the list of behaviour cases; the node is `n1`.

use std::sync::Arc;

use proxy_common::addr::{Addr, Family};
use serde_json::{Value, json};

use super::*;
use crate::config::opt_out::ANNOTATION;
use crate::reconcile::cluster::{Endpoint, Hints, Service, ServiceType, Slice, TrafficPolicy};

mod service;
mod slice;

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
fn many_faults_are_counted() {
    let endpoints: Vec<_> = (0..100).map(|i| json!({"addresses": [format!("bad-{i}")]})).collect();
    let got = slice(&json!({"endpoints": endpoints})).unwrap();
    assert_eq!(got.problems.len(), FINDINGS_MAX + 1);
    assert_eq!(got.problems.last().unwrap(), "and 84 more of the kind");
}

#[test]
fn p230_p231_node_addresses_and_zone() {
    let mut converter = Converter::new("n1");
    let ips = [Some(addr("192.0.2.10")), Some(addr("2001:db8:1::10"))];
    for (labels, zone) in
        [(json!({ZONE_LABEL: "za"}), Some("za".into())), (json!({ZONE_LABEL: ""}), None), (Value::Null, None)]
    {
        assert_eq!(
            converter.node(&node("n1", labels)),
            Some(Node { zone, ips, primary: Some(Family::V4), ..Node::default() })
        );
    }
    assert_eq!(converter.node(&node("n2", Value::Null)), None);
    assert_eq!(converter.node(&objects::Node::default()), None);
}

fn node(name: &str, labels: Value) -> objects::Node {
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

fn pod(object: Value) -> Result<Option<Pod>, Problem> {
    let rules = Rules::parse(&["annotation".to_owned(), "runtime-class=gvisor".to_owned()]).unwrap();
    Converter::new("n1").with_opt_out(rules).pod(&serde_json::from_value(object).unwrap())
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
