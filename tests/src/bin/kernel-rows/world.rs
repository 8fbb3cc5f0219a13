//! The one world of all rows: two nodes, pods of either kind on the first node, pods on the second, clients outside,
//! and an agent on the first node. No other machine has an agent.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_agent::commands;
use proxy_tests::lab::{Agent, Exec, Lab, LabSpec, Node, NodeSpec, Place, binary};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::devices::{self, Device};
use super::objects::{Backend, HERE, NARROW, Service, THERE, service, service_cidr};

/// The node under test.
pub(super) const NODE: &str = "n1";
/// Time limit for the agent to become ready.
pub(super) const READY: Duration = Duration::from_secs(150);
/// Time limit for an answer, on a busy machine that emulates another.
pub(super) const ANSWER: Duration = Duration::from_secs(20);
/// Time for which no answer may come.
pub(super) const SILENCE: Duration = Duration::from_millis(300);

/// Addresses of the pod whose sockets the socket programs see, by family.
pub(super) const P: [&str; 2] = ["10.64.1.50", "fd00:64:0:1::50"];
/// Addresses of the pod that is in no cgroup of the node, so that its packets are served.
pub(super) const U: [&str; 2] = ["10.64.1.51", "fd00:64:0:1::51"];
/// Addresses of the first client outside.
pub(super) const X: [&str; 2] = ["203.0.113.7", "2001:db8:ff::7"];
/// Addresses of the second client outside.
pub(super) const Y: [&str; 2] = ["203.0.113.200", "2001:db8:ff::200"];
/// The node's own addresses.
pub(super) const N1: [&str; 2] = ["192.0.2.10", "2001:db8:1::10"];

/// The Services, each with what differs in its `spec`.
pub(super) const ON_THIS_NODE: Service = Service { name: "here", number: 1, backends: &[HERE] };
pub(super) const ELSEWHERE: Service = Service { name: "there", number: 2, backends: &[THERE] };
pub(super) const BOTH: Service = Service { name: "both", number: 3, backends: &[HERE, THERE] };
pub(super) const STICKY: Service = Service { name: "sticky", number: 4, backends: &[HERE, THERE] };
pub(super) const LOCAL: Service = Service { name: "local", number: 5, backends: &[HERE, THERE] };
pub(super) const ABSENT: Service = Service { name: "absent", number: 6, backends: &[THERE] };
pub(super) const EMPTY: Service = Service { name: "empty", number: 7, backends: &[] };
pub(super) const GUARDED: Service = Service { name: "guarded", number: 8, backends: &[HERE] };
pub(super) const BEHIND_NARROW: Service = Service { name: "narrow", number: 9, backends: &[NARROW] };
pub(super) const MOVING: Service = Service { name: "moving", number: 10, backends: &[HERE] };

/// State shared by the rows.
pub(super) struct World {
    // Dropped first: the agent runs in the lab.
    agent: Mutex<Agent>,

    lab: Lab,
    dir: TempDir,
    /// Devices that lead to the machine `far`.
    pub(super) devices: Vec<Device>,
    /// Whether the cgroup v2 hierarchy has to be beside those of version 1.
    pub(super) hybrid: bool,
}

impl World {
    /// Builds everything, with the devices of these rows; the agent is not started.
    pub(super) fn build(hybrid: bool, rows: &[&str]) -> Result<Self> {
        let lab = Lab::build(spec()?)?;
        for pod in ["L1", "R1", "M1"] {
            lab.pod(pod).serve().tcp(8080).udp(8080).tcp(8081).udp_echo(9082).echo(9083).start()?;
        }
        lab.client("owner").serve().tcp(80).udp(80).start()?;
        let devices = devices::make(&lab, rows)?;
        let dir = tempfile::Builder::new().prefix("kernel-rows-").tempdir()?;
        fs::create_dir(dir.path().join("manifests"))?;
        let agent = Mutex::new(lab.node(NODE).agent()?.quiet());
        let world = Self { agent, lab, dir, devices, hybrid };
        *world.agent() = world.new_agent()?;
        world.write("cluster", &world.objects())?;
        world.write("moving", &service(MOVING, json!({})))?;
        Ok(world)
    }

    fn objects(&self) -> Vec<Value> {
        let mut objects = vec![self.node().object(), service_cidr()];
        let sources = ["203.0.113.7/32", "2001:db8:ff::7/128"];
        for (of, patch) in [
            (ON_THIS_NODE, json!({})),
            (ELSEWHERE, json!({})),
            (BOTH, json!({})),
            (STICKY, json!({ "sessionAffinity": "ClientIP" })),
            (LOCAL, json!({ "externalTrafficPolicy": "Local" })),
            (ABSENT, json!({ "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local" })),
            (EMPTY, json!({})),
            (GUARDED, json!({ "loadBalancerSourceRanges": sources })),
            (BEHIND_NARROW, json!({})),
        ] {
            objects.extend(service(of, patch));
        }
        objects.extend(self.devices.iter().flat_map(|device| service(device.service(), json!({}))));
        objects
    }

    /// Returns an agent with the flags of this world, not yet started.
    pub(super) fn new_agent(&self) -> Result<Agent> {
        let agent = self.node().agent()?.quiet().manifests(&self.manifests());
        let agent = agent.flag("run-dir", self.run_dir().display()).flag("socket-opt-out", "annotation");
        // Failed work is retried soon.
        Ok(agent.flag("iptables-sync-period", "1s").flag("iptables-min-sync-period", "1s"))
    }

    /// Returns the agent, locked.
    pub(super) fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the end of the agent's log, unless a row that hangs holds the agent.
    pub(super) fn log(&self) -> String {
        let Ok(agent) = self.agent.try_lock() else { return "(a row that hangs has it)".to_owned() };
        let log = agent.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Returns the lab.
    pub(super) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the node under test.
    pub(super) fn node(&self) -> &Node {
        self.lab.node(NODE)
    }

    /// Returns the host of the node.
    pub(super) fn host(&self) -> &Place {
        self.node().host()
    }

    /// Returns the pod called `name`.
    pub(super) fn pod(&self, name: &str) -> Place {
        Place::clone(&self.lab.pod(name))
    }

    /// Returns the directory of manifests that the agent reads.
    pub(super) fn manifests(&self) -> PathBuf {
        self.dir.path().join("manifests")
    }

    /// Returns the agent's `--run-dir`.
    pub(super) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Replaces a file of manifests.
    pub(super) fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let next = self.dir.path().join("next");
        fs::write(&next, serde_json::to_vec(&list)?)?;
        Ok(fs::rename(&next, self.manifests().join(name).with_extension("json"))?)
    }

    /// Returns a command `proxy-agent SUBCOMMAND` on the node's state.
    pub(super) fn command(&self, subcommand: &str) -> Result<Exec> {
        let mut command = self.host().command(binary::proxy_agent()?);
        command
            .args([subcommand, "--pin-dir"])
            .arg(self.node().pin_dir())
            .arg("--run-dir")
            .arg(self.run_dir());
        Ok(command)
    }

    /// Returns the output of `proxy-agent status`, `services`, `backends` or `flows`. No process is started: under
    /// emulation its start takes a second.
    pub(super) fn tool(&self, subcommand: &str) -> Result<Value> {
        let mut line: Vec<OsString> =
            ["proxy-agent", subcommand, "--output=json", "--pin-dir"].map(Into::into).into();
        line.extend([self.node().pin_dir().into(), "--run-dir".into(), self.run_dir().into()]);
        let mut out = Vec::new();
        commands::show(line, &mut out)?;
        Ok(serde_json::from_slice(&out)?)
    }

    /// Returns a counter of the datapath.
    pub(super) fn counter(&self, name: &str) -> Result<u64> {
        self.tool("status")?["counters"][name].as_u64().with_context(|| format!("no counter {name}"))
    }

    /// Waits until the one endpoint of the first port of a Service is a backend.
    pub(super) fn wait_backend(&self, service: Service, backend: Backend) -> Result<()> {
        until(service.name, || {
            let services = self.tool("services")?;
            let ports = services.as_array().context("no list of Services")?;
            let own: Vec<&Value> = ports.iter().filter(|port| port["name"] == service.name).collect();
            let done = |port: &&Value| {
                let all = port["cluster"].as_array().map(Vec::as_slice).unwrap_or_default();
                all.len() == 1
                    && all[0].as_str().is_some_and(|at| at.contains(backend.v4) || at.contains(backend.v6))
            };
            Ok((!own.is_empty() && own.iter().all(done)).then_some(()))
        })
    }

    /// Returns whether the packet edge has a flow from this client to a Service's address.
    pub(super) fn has_flow(&self, client: &str, vip: &str) -> Result<bool> {
        let flows = self.tool("flows")?;
        let flows = flows.as_array().context("no list of flows")?;
        Ok(flows.iter().any(|flow| flow["client"] == client && flow["vip"] == vip))
    }

    /// Returns the node's programs on a device: the name of each, for ingress and egress.
    pub(super) fn device(&self, name: &str) -> Result<Value> {
        let status = self.tool("status")?;
        let devices = status["agent"]["devices"].as_array().context("status tells no devices")?;
        let device = devices.iter().find(|device| device["name"] == name);
        let device = device.with_context(|| format!("{name} is not in {devices:?}"))?.clone();
        ensure!(device["attached"].as_str().is_some_and(|how| !how.is_empty()), "not attached: {device}");
        Ok(device)
    }
}

/// Calls `look` until it returns a value, for at most the time that an agent may take to become ready.
pub(super) fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(start.elapsed() < READY, "{what}: not as expected after {READY:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn spec() -> Result<LabSpec> {
    let n1 = NodeSpec::new(NODE, &N1, &["10.64.1.0/24", "fd00:64:0:1::/64"])?;
    let n2 = NodeSpec::new("n2", &["192.0.2.20", "2001:db8:1::20"], &["10.64.2.0/24", "fd00:64:0:2::/64"])?;
    let spec = LabSpec { cluster_cidr: "10.64.0.0/12,fd00:64::/48".to_owned(), ..LabSpec::default() };
    // An answer from the real owner of a Service's address shows that Vipr neither served, refused nor dropped the
    // client.
    let owned = ["198.18.5.6", "2001:db8:5::6", "198.18.5.8", "2001:db8:5::8", "10.96.0.6", "fd00:96::6"];
    let inactive = ["10.96.77.77", "fd00:96::77"];
    spec.node(n1)
        .node(n2)
        .pod(NODE, "P", &P)?
        .pod(NODE, "U", &U)?
        .unseen("U")
        .pod(NODE, HERE.name, &[HERE.v4, HERE.v6])?
        .pod("n2", THERE.name, &[THERE.v4, THERE.v6])?
        .pod("n2", NARROW.name, &[NARROW.v4, NARROW.v6])?
        .client("X", &X)?
        .client("Y", &Y)?
        .client("owner", &[&owned[..], &inactive].concat())
}
