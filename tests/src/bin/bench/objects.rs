//! Services and EndpointSlices in any number, as large as those of a real cluster.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use proxy_common::abi::{FrontendKey, proto};
use proxy_common::be::Be16;
use serde_json::{Value, json};

/// Largest number of endpoints in one slice, as in the EndpointSlice controller.
const SLICE_MAX: usize = 100;
/// The port of every filling Service.
const PORT: u16 = 80;
/// Largest number of Services: their clusterIPs come from 10.96.0.0/12, after the first 256.
const SERVICES_MAX: usize = (1 << 20) - 256;
/// Largest number of endpoints altogether: their addresses come from 10.128.0.0/9.
const ENDPOINTS_MAX: usize = 1 << 23;

/// Number of Services, and number of endpoints of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct World {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.services, self.endpoints)
    }
}

impl FromStr for World {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let world = text
            .split_once('x')
            .and_then(|(services, endpoints)| {
                Some(Self { services: services.parse().ok()?, endpoints: endpoints.parse().ok()? })
            })
            .with_context(|| format!("{text:?} is not SERVICESxENDPOINTS, such as 1000x10"))?;
        let fits = world.services <= SERVICES_MAX && world.services * world.endpoints <= ENDPOINTS_MAX;
        ensure!(fits && world.services > 0 && world.endpoints > 0, "{text} is out of range");
        Ok(world)
    }
}

impl World {
    /// Returns every object.
    pub(crate) fn objects(self) -> impl Iterator<Item = Value> {
        (0..self.services).flat_map(move |index| self.service_and_slices(index))
    }

    /// Returns Service `index` with its slices.
    pub(crate) fn service_and_slices(self, index: usize) -> impl Iterator<Item = Value> {
        let slices = (0..self.endpoints.div_ceil(SLICE_MAX)).map(move |slice| self.slice(index, slice, true));
        std::iter::once(service(index)).chain(slices)
    }

    /// Returns one of the slices of Service `index`, with its first endpoint ready or not.
    pub(crate) fn slice(self, index: usize, slice: usize, first_ready: bool) -> Value {
        let first = slice * SLICE_MAX;
        let last = (first + SLICE_MAX).min(self.endpoints);
        let endpoints = (first..last).map(|endpoint| {
            let number = index * self.endpoints + endpoint;
            let ready = endpoint != first || first_ready;
            json!({
                "addresses": [self::endpoint(self, index, endpoint)],
                "conditions": { "ready": ready, "serving": ready, "terminating": false },
                "nodeName": format!("node-{:03}", number % 200),
                "zone": format!("zone-{}", number % 3),
                "targetRef": {
                    "kind": "Pod", "namespace": namespace(index), "name": format!("{}-{endpoint}", name(index)),
                    "uid": uid(2, number),
                },
            })
        });
        let mut metadata = metadata(index, &format!("{}-{slice}", name(index)));
        metadata["labels"]["kubernetes.io/service-name"] = json!(name(index));
        metadata["labels"]["endpointslice.kubernetes.io/managed-by"] =
            json!("endpointslice-controller.k8s.io");
        metadata["ownerReferences"] = json!([{
            "apiVersion": "v1", "kind": "Service", "name": name(index), "uid": uid(1, index),
            "controller": true, "blockOwnerDeletion": true,
        }]);
        metadata["managedFields"] = managed_fields(
            "kube-controller-manager",
            &json!({
                "f:addressType": {}, "f:endpoints": {}, "f:ports": {},
                "f:metadata": {
                    "f:generateName": {},
                    "f:labels": {
                        ".": {}, "f:app": {}, "f:endpointslice.kubernetes.io/managed-by": {},
                        "f:kubernetes.io/service-name": {},
                    },
                    "f:ownerReferences": { ".": {}, "k:{\"uid\":\"00000000\"}": {} },
                },
            }),
        );
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": "IPv4",
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }],
        })
    }
}

/// Returns the address of an endpoint of Service `index`.
pub(crate) fn endpoint(world: World, index: usize, endpoint: usize) -> Ipv4Addr {
    address([10, 128, 0, 0], index * world.endpoints + endpoint)
}

/// Returns the clusterIP and port of Service `index`, as the datapath looks it up.
pub(crate) fn frontend(index: usize) -> FrontendKey {
    FrontendKey::exact(IpAddr::V4(cluster_ip(index)).into(), Be16::new(PORT), proto::TCP)
}

fn service(index: usize) -> Value {
    let mut metadata = metadata(index, &name(index));
    metadata["managedFields"] = managed_fields(
        "kubectl-client-side-apply",
        &json!({
            "f:metadata": { "f:labels": { ".": {}, "f:app": {} } },
            "f:spec": {
                "f:internalTrafficPolicy": {}, "f:selector": {}, "f:sessionAffinity": {}, "f:type": {},
                "f:ports": {
                    ".": {},
                    "k:{\"port\":80,\"protocol\":\"TCP\"}":
                        { ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {} },
                },
            },
        }),
    );
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ip(index), "clusterIPs": [cluster_ip(index)],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None", "selector": { "app": name(index) },
            "ports": [{ "name": "http", "protocol": "TCP", "port": PORT, "targetPort": 8080 }],
        },
        "status": { "loadBalancer": {} },
    })
}

fn metadata(index: usize, object: &str) -> Value {
    json!({
        "namespace": namespace(index), "name": object, "labels": { "app": name(index) },
        "creationTimestamp": "2026-01-05T08:00:00Z",
    })
}

fn managed_fields(manager: &str, fields: &Value) -> Value {
    json!([{
        "manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-01-05T08:00:00Z",
        "fieldsType": "FieldsV1", "fieldsV1": fields,
    }])
}

fn namespace(index: usize) -> String {
    format!("team-{:02}", index % 50)
}

fn name(index: usize) -> String {
    format!("service-{index:05}")
}

fn uid(kind: usize, number: usize) -> String {
    format!("{kind:08x}-0000-4000-8000-{number:012x}")
}

/// Returns the clusterIP of Service `index`.
pub(crate) fn cluster_ip(index: usize) -> Ipv4Addr {
    address([10, 96, 0, 0], 256 + index)
}

fn address(base: [u8; 4], number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes(base) + u32::try_from(number).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worlds_parse() -> Result<()> {
        let world: World = "10000x10".parse()?;
        assert_eq!(world, World { services: 10_000, endpoints: 10 });
        assert_eq!(world.to_string(), "10000x10");
        for wrong in ["", "10", "x", "0x1", "1x0", "2000000x1", "1000000x1000"] {
            assert!(wrong.parse::<World>().is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn slices_are_full_and_toggle_one_endpoint() {
        let world = World { services: 2, endpoints: 250 };
        let objects: Vec<Value> = world.objects().collect();
        assert_eq!(objects.len(), 2 * (1 + 3));
        let sizes: Vec<usize> =
            objects[1..4].iter().map(|slice| slice["endpoints"].as_array().map_or(0, Vec::len)).collect();
        assert_eq!(sizes, [100, 100, 50]);
        let changed = world.slice(1, 0, false);
        let ready = |slice: &Value| {
            let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
            endpoints.iter().filter(|endpoint| endpoint["conditions"]["ready"] == true).count()
        };
        assert_eq!((ready(&objects[5]), ready(&changed)), (100, 99));
    }
}
