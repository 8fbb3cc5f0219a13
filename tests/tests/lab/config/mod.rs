//! kube-proxy's configuration, by file and by flags, and the Node, as the running agent applies them.
//!
//! These tests have in common a lab of nodes, files, and an agent on `n1`.

mod files;
mod node;

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::lab::{Agent, Lab, LabSpec, Node};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab without Services, and a directory for files. Agents run on `n1`.
struct Setting {
    lab: Lab,
    dir: TempDir,
}

impl Setting {
    fn new() -> Result<Self> {
        Self::within(LabSpec::three_nodes()?)
    }

    fn within(spec: LabSpec) -> Result<Self> {
        let setting = Self { lab: Lab::build(spec)?, dir: tempfile::tempdir()? };
        fs::create_dir(setting.dir.path().join("manifests"))?;
        Ok(setting)
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    fn agent(&self) -> Result<Agent> {
        self.node().agent()
    }

    /// Returns an agent that reads manifests.
    fn with_manifests(&self) -> Result<Agent> {
        Ok(self.agent()?.manifests(&self.dir.path().join("manifests")))
    }

    /// Puts an object into the manifests.
    fn write(&self, object: &Value) -> Result<()> {
        let new = self.dir.path().join("object.new");
        fs::write(&new, object.to_string())?;
        Ok(fs::rename(new, self.dir.path().join("manifests/object.json"))?)
    }

    /// Writes a configuration file with these fields.
    fn config(&self, fields: &str) -> Result<PathBuf> {
        let path = self.dir.path().join("config.conf");
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        fs::write(&path, format!("{head}{fields}"))?;
        Ok(path)
    }

    /// Starts an API server that the node reaches, and writes its kubeconfig.
    fn api_server(&self) -> Result<(ApiServer, PathBuf)> {
        let listener = self.node().host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
        let server = ApiServer::start_on(listener)?;
        let kubeconfig = self.dir.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig)?;
        Ok((server, kubeconfig))
    }

    /// Returns the answer of a server on the node.
    fn get(&self, address: &str, path: &str) -> Result<(u16, String)> {
        self.node().host().http_get(address.parse()?, path)
    }

    /// Returns the configuration that `/configz` shows.
    fn configz(&self, address: &str) -> Result<Value> {
        let (status, body) = self.get(address, "/configz")?;
        ensure!(status == 200, "{status}: {body}");
        Ok(serde_json::from_str::<Value>(&body)?["kubeproxy.config.k8s.io"].clone())
    }
}

fn start(agent: &mut Agent) -> Result<()> {
    agent.start()?;
    agent.wait_ready(PATIENCE)
}

/// Waits until `status` shows these IPs of the node, the primary one first.
fn wait_ips(agent: &Agent, want: &[&str]) -> Result<()> {
    until("the node's IPs", || {
        let status = agent.tool("status", &[])?;
        Ok((status["agent"]["node_ips"] == json!(want)).then_some(()))
    })
}

/// Waits for an answer of `/readyz` that contains `text`.
fn wait_not_ready(agent: &Agent, text: &str) -> Result<()> {
    until(text, || {
        let answer = agent.get("/readyz").ok();
        Ok(answer.is_some_and(|(status, body)| status == 503 && body.contains(text)).then_some(()))
    })
}

/// Waits for the end of `agent`, and checks that it is an error with these words.
fn ends_with(mut agent: Agent, words: &[&str]) -> Result<()> {
    let status = agent.wait_end(PATIENCE)?;
    let log = agent.quiet().log();
    let error = log.lines().rfind(|line| line.starts_with("error: ")).context("no error in the log")?;
    ensure!(status.code() == Some(1), "{status}: {log}");
    ensure!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error}");
    Ok(())
}
