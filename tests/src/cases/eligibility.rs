//! P001-P017: Services that are proxied, and Services that are not.

use super::Case;
use super::objects::{Object, case, s, s_dual, s_lb, slice, web};

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    let headless = s().cluster_ips(&["None"]);
    let external_name = s().node_port().spec("type", "ExternalName").spec("externalName", "lb.example");
    vec![
        case("P001", "a headless Service")
            .step([headless, web("L1")], "frontends4 = none; P>10.64.1.11:8080 = PASS")
            .done(),
        case("P002", "no clusterIP yet, but a nodePort")
            .step(
                [s().node_port().edit(no_cluster_ip), web("L1")],
                "frontends4 = none; frontends6 = none; P>NP = PASS; X>NP = PASS",
            )
            .done(),
        case("P003", "ExternalName with a stale clusterIP and nodePort")
            .step(
                [external_name.clone(), web("L1")],
                "frontends4 = none; P>CIP = DROP; P>NP = PASS; X>NP = PASS",
            )
            .done(),
        case("P004", "a Service for another proxy")
            .step([s().label(PROXY_NAME, "other"), web("L1")], "frontends4 = none; P>CIP = DROP")
            .done(),
        case("P005", "handed to another proxy and back")
            .step([s(), web("L1")], "P>CIP = L1")
            .step([s().label(PROXY_NAME, ""), web("L1")], "P>CIP = DROP")
            .step([s(), web("L1")], "P>CIP = L1")
            .done(),
        case("P006", "IPv6 only")
            .step(
                [s().cluster_ips(&["fd00:96::10"]), web("V1")],
                "frontends4 = none; frontends6 = [fd00:96::10]:80; P6>CIP6 = V1 keep",
            )
            .done(),
        case("P007", "both families, IPv6 first")
            .step(
                [s().cluster_ips(&["fd00:96::10", "10.96.0.10"]), slice("s6", "web=8080", "V1"), web("L1")],
                "P>CIP = L1 keep; P6>CIP6 = V1 keep",
            )
            .done(),
        case("P008", "an old Service without ipFamilies")
            .step(
                [s().edit(|service| remove(service, "/spec", &["ipFamilies", "clusterIPs"])), web("L1")],
                "frontends4 = 10.96.0.10:80; frontends6 = none; P>CIP = L1",
            )
            .done(),
        case("P009", "two ports, two targets")
            .step(
                [two_ports(), slice("s1", "web=8080, adm=8443", "L1")],
                "P>CIP = L1; P>10.96.0.10:443 = L1:8443",
            )
            .done(),
        case("P010", "one number, three protocols")
            .step(
                [
                    s().ports("du 53/udp, dt 53, ds 53/sctp"),
                    slice("s1", "du=1053/udp, dt=2053, ds=3053/sctp", "L1"),
                ],
                "P>10.96.0.10:53/udp = L1:1053
                 P>10.96.0.10:53 = L1:2053
                 P>10.96.0.10:53/sctp = L1:3053",
            )
            .done(),
        case("P011", "NodePort becomes ExternalName")
            .step([s().node_port(), web("L1")], "P>CIP = L1; P>NP = L1; X>NP = L1")
            .step([external_name.clone(), web("L1")], "P>CIP = DROP; P>NP = PASS; X>NP = PASS")
            .done(),
        case("P012", "ExternalName becomes ClusterIP")
            .step([external_name, web("L1")], "P>CIP = DROP")
            .step([s(), web("L1")], "P>CIP = L1")
            .done(),
        case("P013", "spec.loadBalancerIP is a wish, not an address")
            .step(
                [s_lb().spec("loadBalancerIP", "198.18.5.6"), web("L1")],
                "P>198.18.5.6:80 = PASS; X>198.18.5.6:80 = PASS; P>VIP = L1 masq; X>VIP = L1 masq",
            )
            .done(),
        case("P014", "a load balancer that has only a host name")
            .step(
                [s_lb().ingress(serde_json::json!([{ "hostname": "lb.example" }])), web("L1")],
                "frontends4 = 10.96.0.10:80, 198.18.9.9:80, node:31080",
            )
            .done(),
        case("P015", "leading zeros are decimal")
            .step(
                [
                    s().cluster_ips(&["010.096.000.010"]),
                    web("L1").edit(|slice| slice["endpoints"][0]["addresses"][0] = "10.64.001.011".into()),
                ],
                "P>CIP = L1",
            )
            .done(),
        case("P016", "a port comes and goes")
            .step([s(), web("L1")], "P>10.96.0.10:443 = REJECT; P>CIP = L1")
            .step(
                [two_ports(), slice("s1", "web=8080, adm=8443", "L1")],
                "P>10.96.0.10:443 = L1:8443; P>CIP = L1",
            )
            .step([s(), web("L1")], "P>10.96.0.10:443 = REJECT; P>CIP = L1")
            .done(),
        case("P017", "the Service is deleted, its slice remains")
            .step([s_dual(), web("L1")], "P>CIP = L1")
            .step([web("L1")], "P>CIP = DROP; frontends4 = none; frontends6 = none")
            .done(),
    ]
}

fn two_ports() -> Object {
    s().ports("web 80, adm 443")
}

fn no_cluster_ip(service: &mut serde_json::Value) {
    service["spec"]["clusterIP"] = "".into();
    remove(service, "/spec", &["clusterIPs", "ipFamilies"]);
}

fn remove(object: &mut serde_json::Value, at: &str, fields: &[&str]) {
    let map = object.pointer_mut(at).and_then(serde_json::Value::as_object_mut);
    let map = map.expect("an object to remove fields from");
    map.retain(|field, _| !fields.contains(&field.as_str()));
}
