//! `--from NAMESPACE/POD`: looks the Pod up at the API server or in a directory of manifests.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use kube::Api;
use proxy_common::abi::CgroupId;
use proxy_common::addr::{Addr, Family};
use serde::Serialize;
use tokio::time::timeout;

use crate::config::Source;
use crate::host::cgroups;
use crate::reconcile::cluster::ObjectKey;
use crate::sources::convert::cgroup_uid;
use crate::sources::objects;
use crate::sources::{Problem, SourceError, api, manifests};

/// Time that an API server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reason why nothing can be said of a Pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    /// The source cannot be used.
    #[error("--from {pod}: the Pod cannot be looked up (its address does as well)")]
    Source {
        /// The Pod.
        pod: ObjectKey,
        /// Error of the source.
        source: SourceError,
    },
    /// The source has no such Pod.
    #[error("--from {pod}: {place} has no such Pod; `kubectl get pods -n {}` lists those there are", pod.namespace)]
    Missing {
        /// The Pod.
        pod: ObjectKey,
        /// Source that was asked.
        place: String,
    },
    /// Reading the Pod is forbidden. The agent's own rights do not include Pods.
    #[error(
        "--from {pod}: {place} does not let us read the Pod ({code}); give --kubeconfig of a user who may read pods, or \
         the Pod's address"
    )]
    Forbidden {
        /// The Pod.
        pod: ObjectKey,
        /// Source that was asked.
        place: String,
        /// 401 or 403.
        code: u16,
    },
    /// The API server does not answer as it should.
    #[error("--from {pod}: {place}: {reason}; the Pod's address does as well")]
    Api {
        /// The Pod.
        pod: ObjectKey,
        /// Source that was asked.
        place: String,
        /// Reason of the failure.
        reason: String,
    },
    /// The Pod has no address of the target's family.
    #[error("--from {pod}: the Pod has no {family} address ({}); {}", has(addresses), todo(addresses))]
    Address {
        /// The Pod.
        pod: ObjectKey,
        /// The family of the target.
        family: Family,
        /// Addresses in `status.podIPs`.
        addresses: Vec<IpAddr>,
    },
}

fn has(addresses: &[IpAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    if addresses.is_empty() { "status.podIPs is empty".to_owned() } else { addresses.join(", ") }
}

fn todo(addresses: &[IpAddr]) -> &'static str {
    if addresses.is_empty() {
        "ask when it runs, or give an address"
    } else {
        "ask about an address of the other family"
    }
}

/// Facts about a Pod on which its connections depend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientPod {
    /// Namespace and name.
    pub(crate) key: ObjectKey,
    /// `spec.nodeName`.
    pub(crate) node: Option<String>,
    /// `spec.hostNetwork`: its sockets are the node's.
    pub(crate) host_network: bool,
    /// `status.podIPs`; for a Pod in the node's network, also the node's addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// Uid that names its cgroup.
    pub(crate) uid: Option<String>,
}

/// A Pod, as printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodView {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
    /// The node that it runs on.
    pub(crate) node: Option<String>,
    /// Whether it uses that node's network.
    pub(crate) host_network: bool,
    /// Whether its sockets are left alone and its packets are judged; none if its cgroup is not found.
    pub(crate) opted_out: Option<bool>,
}

impl ClientPod {
    /// Looks for the Pod in `source`.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub(crate) async fn look_up(source: &Source, key: &ObjectKey) -> Result<Self, PodError> {
        let (pod, mut place) = (key.clone(), source.to_string());
        let object = match source {
            Source::Manifests(directory) => {
                let (object, unreadable) = manifests::pod(directory, key)
                    .map_err(|source| PodError::Source { pod: key.clone(), source })?;
                for Problem { object, reason } in unreadable {
                    place += &format!(" (where {object} cannot be used: {reason})");
                }
                object
            }
            Source::Kubernetes { kubeconfig, master } => {
                let server = api::Server::configured(kubeconfig.as_deref(), master.as_ref());
                let server = server.map_err(|source| PodError::Source { pod: key.clone(), source })?;
                let pods = Api::<objects::Pod>::namespaced(server.client, &key.namespace);
                let place = format!("the API server {}", server.url);
                match timeout(PATIENCE, pods.get_opt(&key.name)).await {
                    Ok(Ok(object)) => object,
                    Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                        return Err(PodError::Forbidden { pod, place, code: status.code });
                    }
                    Ok(Err(error)) => return Err(PodError::Api { pod, place, reason: error.to_string() }),
                    Err(_elapsed) => {
                        let reason = format!("no answer within {PATIENCE:?}");
                        return Err(PodError::Api { pod, place, reason });
                    }
                }
            }
        };
        object.map(|object| Self::of(key, &object)).ok_or(PodError::Missing { pod, place })
    }

    /// Takes the facts from an object.
    pub(crate) fn of(key: &ObjectKey, object: &objects::Pod) -> Self {
        let (spec, status) = (object.spec.as_ref(), object.status.as_ref());
        let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
        let listed =
            |ips: Vec<&str>| -> Vec<IpAddr> { ips.into_iter().filter_map(|ip| ip.parse().ok()).collect() };
        let own = status.into_iter().flat_map(|status| {
            let many = status.pod_ips.iter().filter_map(|ip| ip.ip.as_deref());
            many.chain(status.pod_ip.as_deref())
        });
        let mut addresses = listed(own.collect());
        if host_network {
            let of_node = status.into_iter().flat_map(|status| {
                let many = status.host_ips.iter().filter_map(|ip| ip.ip.as_deref());
                many.chain(status.host_ip.as_deref())
            });
            addresses.extend(listed(of_node.collect()));
        }
        let mut seen = std::collections::BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        Self {
            key: key.clone(),
            node: spec.and_then(|spec| spec.node_name.clone()),
            host_network,
            addresses,
            uid: cgroup_uid(&object.metadata).map(str::to_owned),
        }
    }

    /// Returns its address of `family`.
    ///
    /// # Errors
    ///
    /// [`PodError::Address`].
    pub(crate) fn address(&self, family: Family) -> Result<Addr, PodError> {
        let mut addresses = self.addresses.iter().map(|ip| Addr::from(*ip));
        addresses.find(|address| address.family() == family).ok_or_else(|| PodError::Address {
            pod: self.key.clone(),
            family,
            addresses: self.addresses.clone(),
        })
    }

    /// Returns the id of its cgroup below the root `root` of the hierarchy, if it is on this node and has a cgroup of
    /// its own.
    pub(crate) fn cgroup(&self, root: &Path) -> Option<CgroupId> {
        cgroups::look(root).pods.get(self.uid.as_ref()?).map(|pod| pod.id)
    }

    /// Returns the Pod as printed. `cgroup` is its own, `opted_out` are the cgroups of the Pods that have opted out.
    pub(crate) fn view(&self, cgroup: Option<CgroupId>, opted_out: &[CgroupId]) -> PodView {
        let opted_out = match cgroup {
            // Packets from the node's network are never judged.
            _ if self.host_network || opted_out.is_empty() => Some(false),
            Some(cgroup) => Some(opted_out.contains(&cgroup)),
            None => None,
        };
        PodView {
            namespace: self.key.namespace.to_string(),
            name: self.key.name.to_string(),
            node: self.node.clone(),
            host_network: self.host_network,
            opted_out,
        }
    }
}

impl PodView {
    /// Returns a description in words.
    pub(crate) fn words(&self) -> String {
        let place = self.node.as_ref().map_or(String::new(), |node| format!(" on node {node}"));
        let sockets = match (self.host_network, self.opted_out) {
            (true, _) => "; in that node's network: a process of it",
            (false, Some(true)) => "; opted out of the socket edge: its packets are judged",
            (false, Some(false)) => "",
            (false, None) => {
                "; whether it has opted out of the socket edge is not known: its cgroup is not found"
            }
        };
        format!("Pod {}/{}{place}{sockets}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value, status: Value) -> ClientPod {
        let meta = json!({"namespace": "shop", "name": "cart-1", "uid": "u-1"});
        let object = json!({"metadata": meta, "spec": spec, "status": status});
        ClientPod::of(&ObjectKey::new("shop", "cart-1"), &serde_json::from_value(object).unwrap())
    }

    fn told(pod: &ClientPod, family: Family) -> String {
        pod.address(family).map_or_else(|error| error.to_string(), |address| address.to_string())
    }

    #[test]
    fn the_address_of_the_targets_family() {
        let both = json!({"podIP": "10.64.1.50", "podIPs": [{"ip": "10.64.1.50"}, {"ip": "fd00:64::50"}]});
        let dual = pod(json!({"nodeName": "n1"}), both);
        assert_eq!(Family::ALL.map(|family| told(&dual, family)), ["10.64.1.50", "fd00:64::50"]);
        assert_eq!(dual.addresses.len(), 2);
        let single = pod(json!({}), json!({"podIP": "10.64.1.50"}));
        assert_eq!(
            told(&single, Family::V6),
            "--from shop/cart-1: the Pod has no IPv6 address (10.64.1.50); ask about an address of the other family"
        );
        assert_eq!(
            told(&pod(json!({"nodeName": "n1"}), json!({"phase": "Pending"})), Family::V4),
            "--from shop/cart-1: the Pod has no IPv4 address (status.podIPs is empty); ask when it runs, or give an address"
        );
    }

    #[test]
    fn a_pod_in_the_nodes_network_has_the_nodes_addresses() {
        let host = json!({"hostNetwork": true, "nodeName": "n1"});
        let status =
            json!({"hostIP": "192.0.2.10", "hostIPs": [{"ip": "192.0.2.10"}, {"ip": "2001:db8::10"}]});
        let of_host = pod(host, status.clone());
        assert_eq!(Family::ALL.map(|family| told(&of_host, family)), ["192.0.2.10", "2001:db8::10"]);
        // The node's addresses do not belong to a Pod with a network of its own.
        assert_eq!(pod(json!({}), status).addresses, [] as [IpAddr; 0]);
        assert_eq!(of_host.view(Some(CgroupId(7)), &[CgroupId(7)]).opted_out, Some(false));
    }

    #[test]
    fn who_has_opted_out_is_told_by_the_cgroup() {
        let pod = pod(json!({"nodeName": "n1"}), json!({"podIP": "10.64.1.50"}));
        for (cgroup, opted_out, want) in [
            (Some(7), &[7, 8][..], Some(true)),
            (Some(9), &[7, 8], Some(false)),
            (None, &[7, 8], None),
            (None, &[], Some(false)),
        ] {
            let opted_out: Vec<_> = opted_out.iter().copied().map(CgroupId).collect();
            assert_eq!(
                pod.view(cgroup.map(CgroupId), &opted_out).opted_out,
                want,
                "{cgroup:?} in {opted_out:?}"
            );
        }
        let root = tempfile::tempdir().unwrap();
        assert_eq!(pod.cgroup(root.path()), None);
        std::fs::create_dir_all(root.path().join("kubepods/podu-1")).unwrap();
        assert!(pod.cgroup(root.path()).is_some());
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_used_is_named_if_the_pod_is_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a.yaml", "kind: [\n"),
            ("b.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: cart-1}\nstatus: {podIP: 10.64.1.50}\n"),
            ("ignored.txt", "kind: [\n"),
        ] {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let source = Source::Manifests(directory.path().to_owned());
        let found = ClientPod::look_up(&source, &ObjectKey::new("default", "cart-1")).await.unwrap();
        assert_eq!(told(&found, Family::V4), "10.64.1.50");
        let missing = ClientPod::look_up(&source, &ObjectKey::new("shop", "cart-1")).await.unwrap_err();
        let words = missing.to_string();
        assert!(
            words.contains("has no such Pod") && words.contains("where a.yaml cannot be used"),
            "{words}"
        );
        assert!(!words.contains("ignored"), "{words}");
        let nowhere = Source::Manifests(directory.path().join("nowhere"));
        let error = ClientPod::look_up(&nowhere, &ObjectKey::new("shop", "cart-1")).await.unwrap_err();
        assert!(matches!(error, PodError::Source { source: SourceError::Directory { .. }, .. }), "{error:?}");
    }
}
