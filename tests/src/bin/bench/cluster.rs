//! Environment of a benchmark of connections beside its lab: an API server with the objects of a cluster, and the
//! agent.

use std::net::{IpAddr, TcpListener};
use std::time::Duration;

use anyhow::Result;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::lab::{Agent, Node};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::objects::World;
use crate::progress;
use crate::traffic::Listener;

/// Endpoints of each Service that only fills the cluster.
const FILLING_ENDPOINTS: usize = 10;
/// Time limit for the agent to program everything.
const READY: Duration = Duration::from_secs(120);

/// An API server on a node, and the folder for its agent's files.
pub(crate) struct Cluster {
    api: ApiServer,
    folder: TempDir,
    filled: usize,
}

impl Cluster {
    /// Starts an API server that knows the node and the ServiceCIDRs.
    ///
    /// # Errors
    /// If the API server cannot listen.
    pub(crate) fn start(node: &Node) -> Result<Self> {
        // The server listens in the node's network namespace, because the agent reaches only the node's own loopback.
        let listener = node.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))?;
        let api = ApiServer::start_on(listener?)?;
        let folder = tempfile::tempdir()?;
        api.write_kubeconfig(&folder.path().join("kubeconfig"))?;
        api.apply_all([node.object(), service_cidr()])?;
        Ok(Self { api, folder, filled: 0 })
    }

    /// Adds a Service to be measured. It counts as one of the Services of [`Cluster::fill`].
    ///
    /// # Errors
    /// If the API server has stopped.
    pub(crate) fn apply(&mut self, service: &Measured<'_>) -> Result<()> {
        self.filled += 1;
        self.api.apply_all(service.objects())
    }

    /// Fills the cluster up to `services` Services, then starts an agent, which sizes its maps at its start.
    ///
    /// # Errors
    /// If the agent does not become ready.
    pub(crate) fn fill(&mut self, services: usize, node: &Node) -> Result<(World, Agent)> {
        let world = World { services, endpoints: FILLING_ENDPOINTS };
        for service in self.filled..services {
            self.api.apply_all(world.service_and_slices(service))?;
        }
        self.filled = self.filled.max(services);
        let mut agent = node.agent()?.kubeconfig(&self.folder.path().join("kubeconfig")).quiet();
        agent.start()?;
        agent.wait_ready(READY)?;
        progress(format_args!("{world}: programmed"));
        Ok((world, agent))
    }
}

/// A Service with a port for each listener and one endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured<'a> {
    pub(crate) name: &'a str,
    pub(crate) vip: IpAddr,
    /// First port of the Service and of its endpoint.
    pub(crate) base_port: u16,
    /// First nodePort, if it has nodePorts.
    pub(crate) base_node_port: Option<u16>,
    pub(crate) endpoint: IpAddr,
    /// Name of the endpoint's node.
    pub(crate) node: &'a str,
}

impl Measured<'_> {
    fn objects(&self) -> [Value; 2] {
        let Self { name, vip, base_port, base_node_port, endpoint, node } = self;
        let metadata = json!({ "namespace": "bench", "name": name });
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        let port = |listener: Listener| {
            let port = listener.port(*base_port);
            json!({ "name": format!("p{port}"), "protocol": listener.protocol(), "port": port })
        };
        let ports: Vec<Value> = Listener::ALL.into_iter().map(port).collect();
        let mut service_ports = ports.clone();
        for (port, listener) in service_ports.iter_mut().zip(Listener::ALL) {
            if let Some(base) = base_node_port {
                port["nodePort"] = json!(listener.port(*base));
            }
        }
        let mut slice_metadata = metadata.clone();
        slice_metadata["labels"] = json!({ "kubernetes.io/service-name": name });
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {
                "type": if base_node_port.is_some() { "NodePort" } else { "ClusterIP" },
                "clusterIP": vip, "clusterIPs": [vip], "ipFamilies": [family],
                "ports": service_ports,
            },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": slice_metadata,
            "addressType": family, "ports": ports,
            "endpoints": [{ "addresses": [endpoint], "nodeName": node, "conditions": { "ready": true } }],
        });
        [service, slice]
    }
}

fn service_cidr() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/12", "fd00:96::/112"] },
    })
}
