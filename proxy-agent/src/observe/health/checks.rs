//! `healthCheckNodePort`: the Services that have one, and the answers there. Pure.
//!
//! A load balancer in front of a Service with `externalTrafficPolicy: Local` asks every node on that port whether it
//! has an endpoint, and sends traffic to the nodes that say yes.

use std::collections::BTreeSet;

use proxy_common::addr::Family;
use serde::Serialize as _;
use serde::ser::SerializeStruct as _;
use serde_json::ser::PrettyFormatter;

use super::judge::Answer;
use crate::reconcile::cluster::{ObjectKey, Service, ServiceType, Slice, TrafficPolicy};

/// Facts that a Service's `healthCheckNodePort` tells in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// The port.
    pub(crate) port: u16,
    /// Number of addresses of this node that serve the Service and are ready, over all its ports.
    pub(crate) endpoints: usize,
}

/// Returns the check of `service` in `family`; `None` if there is none. `slices` are all slices of the Service.
///
/// Terminating endpoints do not count, though they may still carry traffic: load balancers are to stop sending it.
pub(crate) fn check<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice>,
    family: Family,
) -> Option<Check> {
    let has_one = service.service_type == ServiceType::LoadBalancer
        && service.external_policy == TrafficPolicy::Local
        && service.health_check_node_port != 0
        && service.cluster_ips[family.index()].is_some()
        && !service.ports.is_empty();
    let serving = slices.filter(|slice| slice.family == family && !slice.ports.is_empty());
    let ready =
        serving.flat_map(|slice| &slice.endpoints).filter(|endpoint| endpoint.local && endpoint.ready);
    has_one.then(|| Check {
        port: service.health_check_node_port,
        endpoints: ready.map(|endpoint| endpoint.addr).collect::<BTreeSet<_>>().len(),
    })
}

/// Returns the answer to a check of `service`: kube-proxy's body, to the byte.
pub(crate) fn answer(service: &ObjectKey, endpoints: usize, healthy: bool) -> Answer {
    let mut body = Vec::new();
    let mut json = serde_json::Serializer::with_formatter(&mut body, PrettyFormatter::with_indent(b"\t"));
    // Serializing strings, a number and a boolean into memory cannot fail.
    let _written = Body { service, endpoints, healthy }.serialize(&mut json);
    Answer {
        ok: endpoints > 0 && healthy,
        content_type: "application/json",
        body: String::from_utf8(body).unwrap_or_default(),
    }
}

struct Body<'a> {
    service: &'a ObjectKey,
    endpoints: usize,
    healthy: bool,
}

impl serde::Serialize for Body<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Name<'a> {
            namespace: &'a str,
            name: &'a str,
        }
        let mut body = serializer.serialize_struct("Body", 3)?;
        let ObjectKey { namespace, name } = self.service;
        body.serialize_field("service", &Name { namespace, name })?;
        body.serialize_field("localEndpoints", &self.endpoints)?;
        body.serialize_field("serviceProxyHealthy", &self.healthy)?;
        body.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::sources::convert::Converter;
    use crate::sources::objects;

    /// Returns S-H: a load-balanced Service with eTP Local and healthCheckNodePort 32000, with these fields of its spec
    /// instead.
    fn service(spec: &Value) -> Service {
        let mut object = json!({
            "metadata": {"namespace": "a", "name": "s"},
            "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
                "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"name": "web", "port": 80}, {"name": "adm", "port": 443}],
            },
        });
        for (field, value) in spec.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        let object: objects::Service = serde_json::from_value(object).unwrap();
        Converter::new("n1").service(&object).unwrap().unwrap()
    }

    /// Returns a slice of the ports with endpoints, each given by the last byte of its address, its node, and its
    /// conditions.
    fn slice(name: &str, ports: &[&str], endpoints: &[(u8, &str, &str)]) -> Slice {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(byte, node, state)| {
                let (ready, serving, terminating) = match *state {
                    "ready" => (true, true, false),
                    "nr" => (false, false, false),
                    "st" => (false, true, true),
                    other => panic!("{other}"),
                };
                let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
                json!({"addresses": [format!("10.64.1.{byte}")], "nodeName": node, "conditions": conditions})
            })
            .collect();
        let object = json!({
            "metadata": {"namespace": "a", "name": name, "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": ports.iter().map(|name| json!({"name": name, "port": 8080})).collect::<Vec<_>>(),
        });
        let object: objects::EndpointSlice = serde_json::from_value(object).unwrap();
        Converter::new("n1").slice(&object).unwrap().unwrap()
    }

    /// Checks the number of endpoints of S-H in IPv4.
    #[track_caller]
    fn counts(slices: &[Slice], want: usize) {
        let got = check(&service(&json!({})), slices.iter(), Family::V4);
        assert_eq!(got, Some(Check { port: 32000, endpoints: want }));
    }

    #[test]
    fn p190_p191_ready_endpoints_of_this_node_count() {
        let web = &["web"][..];
        counts(&[slice("s", web, &[(11, "n1", "ready"), (12, "n1", "nr"), (21, "n2", "ready")])], 1);
        counts(&[slice("s", web, &[(21, "n2", "ready")])], 0);
        counts(&[], 0);
    }

    #[test]
    fn p192_terminating_endpoints_do_not_count() {
        counts(&[slice("s", &["web"], &[(11, "n1", "st"), (12, "n1", "st")])], 0);
    }

    #[test]
    fn p193_addresses_count_once() {
        counts(&[slice("s", &["web", "adm"], &[(11, "n1", "ready")])], 1);
        let [web, adm] = [["web"], ["adm"]];
        counts(&[slice("1", &web, &[(11, "n1", "ready")]), slice("2", &adm, &[(11, "n1", "ready")])], 1);
        counts(&[slice("1", &web, &[(11, "n1", "ready")]), slice("2", &adm, &[(12, "n1", "ready")])], 2);
        // Endpoints of the other family, without a port, or in two states.
        assert_eq!(
            check(&service(&json!({})), [slice("s", &web, &[(11, "n1", "ready")])].iter(), Family::V6)
                .unwrap()
                .endpoints,
            0
        );
        counts(&[slice("s", &[], &[(11, "n1", "ready")])], 0);
        counts(&[slice("1", &web, &[(11, "n1", "st")]), slice("2", &web, &[(11, "n1", "ready")])], 1);
    }

    #[test]
    fn p195_p196_only_load_balanced_services_with_local_policy_have_one() {
        for spec in [
            json!({"type": "NodePort"}),
            json!({"type": "ClusterIP", "externalIPs": ["198.18.9.9"]}),
            json!({"externalTrafficPolicy": "Cluster"}),
            json!({"healthCheckNodePort": 0}),
            json!({"ports": []}),
        ] {
            for family in Family::ALL {
                assert_eq!(check(&service(&spec), [].into_iter(), family), None, "{spec}");
            }
        }
        let single = service(&json!({"ipFamilies": ["IPv6"], "clusterIPs": ["fd00:96::10"]}));
        assert_eq!(check(&single, [].into_iter(), Family::V4), None);
        assert_eq!(check(&single, [].into_iter(), Family::V6), Some(Check { port: 32000, endpoints: 0 }));
    }

    #[test]
    fn p190_p191_p194_bodies_to_the_byte() {
        let key = ObjectKey::new("a", "s");
        let got = answer(&key, 1, true);
        assert_eq!((got.ok, got.content_type), (true, "application/json"));
        assert_eq!(
            got.body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"a\",\n\t\t\"name\": \"s\"\n\t},\n\t\"localEndpoints\": 1,\n\t\
             \"serviceProxyHealthy\": true\n}"
        );
        let none = answer(&key, 0, true);
        assert!(!none.ok && none.body.contains("\"localEndpoints\": 0,"), "{none:?}");
        let stuck = answer(&key, 1, false);
        assert!(
            !stuck.ok && stuck.body.ends_with("\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": false\n}")
        );
    }
}
