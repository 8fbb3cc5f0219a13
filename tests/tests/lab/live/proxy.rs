//! The agent of a case: its input, and the sign that it has done everything.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use proxy_tests::cases::{Config, DetectLocal};
use proxy_tests::lab::Agent;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::world::World;

/// Namespace of [`marker`], which no case uses.
const MARKER: &str = "marker";
/// Time that the agent may take to be ready, or a step to be programmed, while other tests keep the machine busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent that reads a directory, which holds the objects of the current step.
pub(super) struct Proxy {
    agent: Agent,
    dir: TempDir,
}

impl Proxy {
    pub(super) fn new(world: &World, config: &Config) -> Result<Self> {
        let dir = tempfile::tempdir().context("a temporary directory for manifests")?;
        let manifests = dir.path().join("manifests");
        fs::create_dir(&manifests)?;
        let agent = world.node().agent()?;
        let agent = agent.manifests(&manifests);
        let agent = if config.cluster_cidr.is_empty() {
            agent.without("cluster-cidr")
        } else {
            agent.flag("cluster-cidr", config.cluster_cidr.join(","))
        };
        let agent = agent.flag("nodeport-addresses", config.node_port_addresses.join(","));
        let agent =
            agent.flag("feature-gates", format!("AllowServiceExternalIPs={}", config.allow_external_ips));
        let agent = agent.flag("masquerade-all", config.masquerade_all);
        let agent = match config.detect_local {
            DetectLocal::ClusterCidr => agent,
            DetectLocal::Bridge(name) => {
                agent.flag("detect-local-mode", "BridgeInterface").flag("pod-bridge-interface", name)
            }
            DetectLocal::Prefix(prefix) => agent
                .flag("detect-local-mode", "InterfaceNamePrefix")
                .flag("pod-interface-name-prefix", prefix),
        };
        Ok(Self { agent, dir })
    }

    /// Makes `objects` the whole state of the cluster and waits until the agent has programmed it.
    pub(super) fn program(&mut self, step: usize, objects: &[Value]) -> Result<()> {
        let mut items = objects.to_vec();
        items.push(marker(step));
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        let next = self.dir.path().join("next.json");
        fs::write(&next, serde_json::to_vec_pretty(&list)?)?;
        fs::rename(&next, self.dir.path().join("manifests").join("objects.json"))?;

        if self.agent.id().is_none() {
            self.agent.start()?;
            self.agent.wait_ready(PATIENCE)?;
        }
        self.wait_for(step)
    }

    /// Waits until the agent reports the problem of the marker of this step. The report comes when everything that
    /// arrived with the marker is in the maps. (The marker's own frontend would prove less: it appears in the middle
    /// of a plan.)
    fn wait_for(&self, step: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.agent.tool("status", &[])?;
            let problems = &status["agent"]["problems"];
            let of_marker = &problems[format!("Service {MARKER}/{MARKER}")];
            if of_marker.to_string().contains(&name(step)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the agent does not report the marker of step {step}; its problems are {problems}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the Services that `proxy-agent services` shows, without the marker.
    pub(super) fn services(&self) -> Result<Vec<Value>> {
        let Value::Array(services) = self.agent.tool("services", &[])? else { bail!("not a list") };
        Ok(services.into_iter().filter(|service| service["namespace"] != MARKER).collect())
    }
}

impl Proxy {
    /// Returns the datapath's counters, for messages.
    pub(super) fn counters(&self) -> String {
        match self.agent.tool("status", &[]) {
            Ok(status) => format!("the datapath's counters: {}", status["counters"]),
            Err(error) => format!("no counters: {error:#}"),
        }
    }
}

/// Returns a Service with one invalid field, whose problem contains the number of the step.
fn marker(step: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": MARKER, "name": MARKER },
        "spec": {
            "clusterIP": "10.96.255.254",
            "clusterIPs": ["10.96.255.254"],
            "ipFamilies": ["IPv4"],
            "ports": [{ "port": 1 }],
            "externalIPs": [name(step)],
        },
    })
}

fn name(step: usize) -> String {
    format!("step-{step};")
}
