//! Tests with every field of the watched kinds in turn missing, null, and of another type. The objects have all fields
//! that the API server of Kubernetes 1.36 writes.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;

/// Returns values of other types for a field.
fn nonsense() -> [Value; 8] {
    [json!(true), json!(-7), json!(0.5), json!(1e300), json!("?"), json!([7]), json!([null]), json!({"?": 7})]
}

/// Returns metadata as the API server writes it.
fn metadata(name: &str, namespace: Option<&str>) -> Value {
    json!({
        "name": name, "namespace": namespace, "generateName": "s-", "uid": "0b6c", "resourceVersion": "17", "generation": 3,
        "selfLink": "/", "creationTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30,
        "labels": {
            "kubernetes.io/service-name": "s", "topology.kubernetes.io/zone": "za", "app": "s",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        },
        "annotations": {"note": "text", "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
        "ownerReferences": [{
            "apiVersion": "v1", "kind": "Service", "name": "s", "uid": "0b6c", "controller": true, "blockOwnerDeletion": true,
        }],
        "finalizers": ["service.kubernetes.io/load-balancer-cleanup"],
        "managedFields": [{
            "manager": "kubectl", "operation": "Apply", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {"f:ports": {}}}, "subresource": "status",
        }],
    })
}

fn conditions() -> Value {
    json!([{
        "type": "Ready", "status": "True", "reason": "r", "message": "m", "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z", "lastHeartbeatTime": "2026-01-01T00:00:00Z",
    }])
}

fn services() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata("s", Some("a")),
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "s"},
            "ports": [{
                "name": "web", "protocol": "TCP", "appProtocol": "http", "port": 80, "targetPort": 8080, "nodePort": 31080,
            }],
            "externalIPs": ["198.18.9.9"], "externalName": "", "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local", "healthCheckNodePort": 31999, "loadBalancerIP": "198.18.5.5",
            "loadBalancerClass": "c", "loadBalancerSourceRanges": ["203.0.113.0/25"], "allocateLoadBalancerNodePorts": true,
            "publishNotReadyAddresses": false, "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}, "trafficDistribution": "PreferClose",
        },
        "status": {
            "loadBalancer": {"ingress": [{
                "ip": "198.18.5.5", "ipMode": "VIP", "hostname": "h", "ports": [{"port": 80, "protocol": "TCP", "error": "e"}],
            }]},
            "conditions": conditions(),
        },
    })
}

fn slices() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata("s-1", Some("a")),
        "addressType": "IPv4",
        "ports": [{"name": "web", "protocol": "TCP", "port": 8080, "appProtocol": "http"}],
        "endpoints": [{
            "addresses": ["10.64.1.11"], "conditions": {"ready": false, "serving": true, "terminating": true},
            "hostname": "h", "nodeName": "n1", "zone": "za", "deprecatedTopology": {"k": "v"},
            "targetRef": {
                "kind": "Pod", "namespace": "a", "name": "p", "uid": "u", "resourceVersion": "1", "fieldPath": "f", "apiVersion": "v1",
            },
            "hints": {"forZones": [{"name": "za"}], "forNodes": [{"name": "n1"}]},
        }],
    })
}

fn endpoints() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": metadata("s", Some("a")),
        "subsets": [{
            "addresses": [address("10.64.1.11")], "notReadyAddresses": [address("10.64.1.12")],
            "ports": [{"name": "web", "port": 8080, "protocol": "TCP", "appProtocol": "http"}],
        }],
    })
}

fn address(ip: &str) -> Value {
    json!({"ip": ip, "hostname": "h", "nodeName": "n1", "targetRef": {"kind": "Pod", "name": "p"}})
}

fn nodes() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": metadata("n1", None),
        "spec": {
            "podCIDR": "10.64.1.0/24", "podCIDRs": ["10.64.1.0/24"], "providerID": "p", "unschedulable": true, "externalID": "e",
            "configSource": {"configMap": {}},
            "taints": [{"key": "k", "value": "v", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}],
        },
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.10"}], "capacity": {"cpu": "4"},
            "allocatable": {"cpu": "4"}, "conditions": conditions(), "phase": "Running",
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {"machineID": "m", "kernelVersion": "6.18", "swap": {"capacity": 1}},
            "images": [{"names": ["i"], "sizeBytes": 7}], "volumesInUse": ["v"],
            "volumesAttached": [{"name": "v", "devicePath": "d"}], "config": {"error": "e"},
            "runtimeHandlers": [{"name": "r", "features": {"userNamespaces": true}}],
            "features": {"supplementalGroupsPolicy": true}, "declaredFeatures": ["f"],
        },
    })
}

fn service_cidrs() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": metadata("kubernetes", None),
        "spec": {"cidrs": ["10.96.0.0/16"]}, "status": {"conditions": conditions()},
    })
}

fn pods() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata("p", Some("a")),
        "spec": {
            "nodeName": "n1", "runtimeClassName": "c", "hostNetwork": true, "containers": [{"name": "c", "ports": [{"hostPort": 1}]}],
            "tolerations": [{"tolerationSeconds": 1}], "priority": 0, "nodeSelector": {"a": "b"},
        },
        "status": {
            "phase": "Running", "podIP": "10.64.1.11", "podIPs": [{"ip": "10.64.1.11"}], "hostIP": "192.0.2.10",
            "hostIPs": [{"ip": "192.0.2.10"}], "conditions": conditions(), "startTime": "2026-01-01T00:00:00Z",
            "containerStatuses": [{"name": "c", "restartCount": 0}], "qosClass": "Burstable",
        },
    })
}

/// Collects JSON pointers to everything in a value, the outermost first.
fn paths(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => {
            fields.iter().map(|(name, child)| (name.replace('~', "~0").replace('/', "~1"), child)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(i, child)| (i.to_string(), child)).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    };
    for (name, child) in children {
        let path = format!("{at}/{name}");
        found.push(path.clone());
        paths(child, &path, found);
    }
}

/// Returns the object without the field or item at a path.
fn without(object: &Value, path: &str) -> Value {
    let mut object = object.clone();
    let (parent, name) = path.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap() {
        Value::Object(fields) => drop(fields.remove(&name.replace("~1", "/").replace("~0", "~"))),
        Value::Array(items) => drop(items.remove(name.parse().unwrap())),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => unreachable!("{path}"),
    }
    object
}

/// Tries every field of an object. `read` lists the fields that are read, as prefixes of paths.
fn try_all<K: DeserializeOwned, C: Debug + PartialEq>(
    object: &Value,
    read: &[&str],
    convert: impl Fn(&K) -> C,
) {
    let told = |object: &Value| -> Result<C, String> {
        // From text, as received: serde deserializes a `Value` in another way.
        let object = serde_json::from_str(&object.to_string()).map_err(|error| error.to_string())?;
        Ok(convert(&object))
    };
    let whole = told(object).unwrap();
    let mut all = Vec::new();
    paths(object, "", &mut all);
    for path in all {
        let mut changed = object.clone();
        changed.pointer_mut(&path).unwrap().take();
        let (null, missing) =
            (told(&changed).unwrap_or_else(|error| panic!("{path} null: {error}")), without(object, &path));
        assert_eq!(null, told(&missing).unwrap(), "{path}: null is absent");
        if read.iter().any(|prefix| path.starts_with(prefix) || prefix.starts_with(&format!("{path}/"))) {
            continue;
        }
        assert_eq!(null, whole, "{path} is read");
        for value in nonsense() {
            *changed.pointer_mut(&path).unwrap() = value;
            assert_eq!(told(&changed).as_ref(), Ok(&whole), "{path}: {}", changed.pointer(&path).unwrap());
        }
    }
}

const META: [&str; 7] = [
    "/metadata/name",
    "/metadata/namespace",
    "/metadata/uid",
    "/metadata/resourceVersion",
    "/metadata/creationTimestamp",
    "/metadata/labels/kubernetes.io~1service-name",
    "/metadata/labels/topology.kubernetes.io~1zone",
];

fn read<'a>(fields: &[&'a str]) -> Vec<&'a str> {
    META.iter().chain(fields).copied().collect()
}

#[test]
fn what_is_not_read_costs_no_object() {
    let fields = read(&[
        "/spec/type",
        "/spec/clusterIP",
        "/spec/ipFamilies",
        "/spec/ports/0/name",
        "/spec/ports/0/protocol",
        "/spec/ports/0/port",
        "/spec/ports/0/nodePort",
        "/spec/externalIPs",
        "/spec/externalTrafficPolicy",
        "/spec/internalTrafficPolicy",
        "/spec/healthCheckNodePort",
        "/spec/loadBalancerSourceRanges",
        "/spec/sessionAffinity",
        "/status/loadBalancer/ingress/0/ip",
    ]);
    try_all::<objects::Service, _>(&services(), &fields, |object| converter().service(object));

    let fields = read(&[
        "/addressType",
        "/ports/0/name",
        "/ports/0/protocol",
        "/ports/0/port",
        "/endpoints/0/addresses",
        "/endpoints/0/conditions",
        "/endpoints/0/nodeName",
        "/endpoints/0/hints",
        "/metadata/annotations/endpoints.kubernetes.io~1last-change-trigger-time",
    ]);
    try_all::<objects::EndpointSlice, _>(&slices(), &fields, |object| converter().slice(object));

    let mut fields = read(&["/metadata/annotations/endpoints.kubernetes.io~1last-change-trigger-time"]);
    fields.extend([
        "/subsets/0/addresses/0/ip",
        "/subsets/0/addresses/0/nodeName",
        "/subsets/0/notReadyAddresses/0/ip",
    ]);
    fields.extend([
        "/subsets/0/notReadyAddresses/0/nodeName",
        "/subsets/0/ports/0/name",
        "/subsets/0/ports/0/port",
    ]);
    fields.push("/subsets/0/ports/0/protocol");
    try_all::<objects::Endpoints, _>(&endpoints(), &fields, |object| converter().endpoints(object));

    let fields = read(&["/spec/podCIDR", "/spec/taints/0/key", "/status/addresses"]);
    try_all::<objects::Node, _>(&nodes(), &fields, |object| converter().node(object));

    let fields = read(&["/spec/cidrs"]);
    try_all::<objects::ServiceCidr, _>(&service_cidrs(), &fields, |object| converter().service_cidr(object));

    let mut fields =
        read(&["/spec/nodeName", "/spec/runtimeClassName", "/spec/hostNetwork", "/status/phase"]);
    fields.extend(["/status/podIP", "/status/hostIP"]);
    let rules = Rules::parse(&["runtime-class=c".to_owned()]).unwrap();
    try_all::<objects::Pod, _>(&pods(), &fields, |object| {
        converter().with_opt_out(rules.clone()).pod(object)
    });
}

fn converter() -> Converter {
    Converter::new("n1")
}
