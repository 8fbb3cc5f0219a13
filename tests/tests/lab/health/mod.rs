//! The running agent, as probes, load balancers, scrapes and readers of Events see it.
//!
//! These tests have in common the world of the behaviour cases with an agent on `n1`, which reads either a file of
//! manifests or an API server.

mod cgroups;
mod check_ports;
mod events;
mod probes;
mod scrape;
mod sync;

use proxy_common::abi::maps;
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::lab::{Agent, Lab, Node, Place};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Endpoints of the behaviour cases: name, address and node.
const ENDPOINTS: [(&str, &str, &str); 4] = [
    ("L1", "10.64.1.11", "n1"),
    ("L2", "10.64.1.12", "n1"),
    ("R1", "10.64.2.21", "n2"),
    ("V1", "fd00:64:0:1::11", "n1"),
];

/// The lab and a directory for files.
struct Stage {
    lab: Lab,
    dir: TempDir,
}

impl Stage {
    fn new() -> Result<Self> {
        let stage = Self { lab: Lab::cases()?, dir: tempfile::tempdir()? };
        fs::create_dir(stage.dir.path().join("manifests"))?;
        Ok(stage)
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    fn host(&self) -> &Place {
        self.node().host()
    }

    fn agent(&self) -> Result<Agent> {
        self.node().agent()
    }

    /// Returns an agent that reads the objects written by [`Stage::write`].
    fn with_manifests(&self) -> Result<Agent> {
        Ok(self.agent()?.manifests(&self.dir.path().join("manifests")))
    }

    /// Replaces all objects, except the Node, by these.
    fn write(&self, objects: &[Value]) -> Result<()> {
        self.write_with_node(self.node().object(), objects)
    }

    fn write_with_node(&self, node: Value, objects: &[Value]) -> Result<()> {
        let items: Vec<&Value> = [&node].into_iter().chain(objects).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        let new = self.dir.path().join("objects.new");
        fs::write(&new, list.to_string())?;
        Ok(fs::rename(new, self.dir.path().join("manifests/objects.json"))?)
    }

    /// Starts an API server that the node reaches, with its Node, and returns it with an agent for it.
    fn with_api(&self) -> Result<(ApiServer, Agent)> {
        let listener = self.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
        let server = ApiServer::start_on(listener)?;
        server.apply(self.node().object())?;
        let kubeconfig = self.dir.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig)?;
        let agent = self.agent()?.kubeconfig(&kubeconfig);
        Ok((server, agent))
    }

    /// Makes `FRONTENDS` read-only: every programming fails.
    fn freeze_frontends(&self) -> Result<()> {
        let pins = proxy_agent::bpf::pins::PinDir::new(self.node().pin_dir());
        let mut command = self.host().command("bpftool");
        command.args(["map", "freeze", "pinned"]).arg(pins.map(maps::FRONTENDS));
        command.text().map(drop)
    }
}

fn start(agent: &mut Agent) -> Result<()> {
    agent.start()?;
    agent.wait_ready(PATIENCE)
}

/// Returns a ClusterIP Service in namespace `a` with port `web` 80, and these fields of its spec besides.
fn service(name: &str, cluster_ip: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "a", "name": name},
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ipFamilies": ["IPv4"],
            "ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
        },
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        object["spec"][field] = value.clone();
    }
    object
}

/// Returns the slice of a Service with endpoints of [`ENDPOINTS`], each with an optional state: `L1`, `L2/nr`,
/// `R1/st`.
fn slice(service: &str, family: &str, endpoints: &[&str]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "a", "name": format!("{service}-{}", family.to_lowercase()),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.iter().map(|text| endpoint(text)).collect::<Vec<_>>(),
    })
}

fn endpoint(text: &str) -> Value {
    let (name, state) = text.split_once('/').unwrap_or((text, "ready"));
    let (_, address, node) =
        ENDPOINTS.iter().find(|(known, ..)| *known == name).unwrap_or_else(|| unreachable!("{name}"));
    let (ready, serving, terminating) = match state {
        "ready" => (true, true, false),
        "nr" => (false, false, false),
        "st" => (false, true, true),
        other => unreachable!("{other}"),
    };
    let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
    json!({"addresses": [address], "nodeName": node, "conditions": conditions})
}

/// Returns the samples of the agent's metrics whose names start with `name`, by name and labels.
fn samples(agent: &Agent, name: &str) -> Result<BTreeMap<String, f64>> {
    let text = agent.metrics()?;
    let lines = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit_once(' '));
    lines.map(|(name, value)| Ok((name.to_owned(), value.parse().context(value.to_owned())?))).collect()
}

/// Returns a sample by its name and labels; 0 while there is none.
fn sample(agent: &Agent, name: &str) -> Result<f64> {
    Ok(samples(agent, name)?.remove(name).unwrap_or_default())
}

/// Waits until a sample fulfils `done`, and returns it.
fn wait_sample(agent: &Agent, name: &str, done: impl Fn(f64) -> bool) -> Result<f64> {
    let mut last = f64::NAN;
    let found = until(name, || {
        last = sample(agent, name)?;
        Ok(done(last).then_some(last))
    });
    found.with_context(|| format!("{name} is {last}"))
}

/// Returns the problems of an object as `status` shows them.
fn problems(agent: &Agent, object: &str) -> Result<Vec<String>> {
    let status = agent.tool("status", &[])?;
    let problems = &status["agent"]["problems"][object];
    Ok(if problems.is_null() { Vec::new() } else { serde_json::from_value(problems.clone())? })
}
