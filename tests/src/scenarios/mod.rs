//! The manifests of `examples/` in a lab: nodes, pods and servers as in the manifests, and the real agent reading a
//! copy of the files, which can be changed while it serves.
//!
//! The servers of each address follow from the EndpointSlices and the Pods. An address of an EndpointSlice is a pod
//! that the slice refers to, a node, or otherwise a machine outside. Each of them answers on every port that it has
//! there. In addition, a pod [`CLIENT`] on [`NODE`] and a machine [`OUTSIDE`] of the cluster serve nothing.

mod checks;
mod loops;
mod manifests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::lab::{Agent, Exec, Lab, LabSpec, LeafSpec, NodeSpec, Place, Pod, Proto, binary};

pub use checks::{at_most, denial, evenly, kernel_version, refusal, served, syns_sent_again};
pub use loops::Loops;
pub use manifests::{Manifests, endpoint, examples};
pub use view::{FrontendView, PortView};

use manifests::Member;

/// The node of most clients.
pub const NODE: &str = "node-a";
/// A pod on [`NODE`].
pub const CLIENT: &str = "client";
/// Address of [`CLIENT`].
pub const CLIENT_ADDRESS: &str = "172.16.1.50";
/// A machine outside.
pub const OUTSIDE: &str = "laptop";
/// Address of [`OUTSIDE`].
pub const OUTSIDE_ADDRESS: &str = "203.0.113.7";
/// Prefix of the pods' addresses.
const CLUSTER_CIDR: &str = "172.16.0.0/16";
/// Time limit for things that happen at once on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A lab made from manifests, with its agents.
#[derive(Debug)]
pub struct World {
    // Dropped in this order: the agents before the manifests and the lab.
    agents: BTreeMap<String, Agent>,
    manifests: Manifests,
    dir: TempDir,
    lab: Lab,
}

impl World {
    /// Builds the lab of some files of `examples/` (by default all of them) and starts every server. No agent runs.
    ///
    /// # Errors
    /// If a file is missing, or the lab cannot be built.
    pub fn new(files: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vipr-").tempdir();
        let dir = dir.context("a temporary directory for manifests")?;
        let manifests = Manifests::copy(&dir.path().join("manifests"), files)?;
        let nodes = manifests.nodes()?;
        let members = manifests.members()?;
        let lab = Lab::build(lab_spec(&nodes, &members)?)?;
        let world = Self { agents: BTreeMap::new(), manifests, dir, lab };
        for member in &members {
            let place = match (&member.pod, nodes.iter().find(|node| node.eth0.contains(&member.address))) {
                (Some(pod), _) => Place::clone(&world.lab.pod(pod)),
                (None, Some(node)) => world.lab.node(&node.name).host().clone(),
                (None, None) => world.lab.client(&member.address.to_string()),
            };
            serve(&place, member.address, &member.ports)?;
        }
        Ok(world)
    }

    /// Does [`World::new`], and starts an agent on [`NODE`].
    ///
    /// # Errors
    /// As [`World::new`], or if the agent does not become ready.
    pub fn start(files: &[&str]) -> Result<Self> {
        let mut world = Self::new(files)?;
        world.start_agent(NODE)?;
        Ok(world)
    }

    /// Starts an agent on a node, which reads the manifests.
    ///
    /// # Errors
    /// If the agent does not become ready.
    pub fn start_agent(&mut self, node: &str) -> Result<&mut Agent> {
        let mut agent = self.new_agent(node)?.manifests(self.manifests.dir());
        agent.start()?;
        agent.wait_ready(PATIENCE)?;
        Ok(self.adopt(node, agent))
    }

    /// Returns an agent for a node, not started and without a source of objects.
    ///
    /// # Errors
    /// If the agent's program is missing.
    pub fn new_agent(&self, node: &str) -> Result<Agent> {
        self.lab.node(node).agent()
    }

    /// Makes `agent` the agent of its node; the one before is killed.
    pub fn adopt(&mut self, node: &str, agent: Agent) -> &mut Agent {
        self.agents.remove(node);
        self.agents.entry(node.to_owned()).or_insert(agent)
    }

    /// Returns the agent of a node.
    ///
    /// # Panics
    /// If no agent was started: a mistake of the test.
    #[track_caller]
    #[expect(clippy::expect_used, reason = "a wrong name is a mistake in the test's text")]
    pub fn agent(&mut self, node: &str) -> &mut Agent {
        self.agents.get_mut(node).expect("no agent was started on this node")
    }

    /// Takes the agent of a node, so that the test can end it.
    ///
    /// # Errors
    /// If no agent was started.
    pub fn take_agent(&mut self, node: &str) -> Result<Agent> {
        self.agents.remove(node).with_context(|| format!("no agent on {node}"))
    }

    /// Returns the manifests that the agents read.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Returns the lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the pod [`CLIENT`].
    pub fn client(&self) -> Pod {
        self.lab.pod(CLIENT)
    }

    /// Returns the machine [`OUTSIDE`].
    pub fn outside(&self) -> Place {
        self.lab.client(OUTSIDE)
    }

    /// Returns the host side of [`NODE`].
    pub fn host(&self) -> &Place {
        self.lab.node(NODE).host()
    }

    /// Returns a client of each kind: the pod [`CLIENT`], and its node.
    pub fn clients(&self) -> [Place; 2] {
        [Place::clone(&self.client()), self.host().clone()]
    }

    /// Returns the directory of this world's files; more files may be put there.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Adds a pod that serves `kind` (a word of `lab-pod serve --help`) on a port.
    ///
    /// # Errors
    /// If the name or the address is already used.
    pub fn add_pod(
        &self,
        node: &str,
        name: &str,
        address: &str,
        serving: (&'static str, u16),
    ) -> Result<Pod> {
        let pod = self.lab.add_pod(node, name, &[address])?;
        serve(&pod, address.parse()?, &BTreeSet::from([serving]))?;
        Ok(pod)
    }

    /// Returns a `proxy-agent` command on a node, with the flags for the paths of its state.
    ///
    /// # Errors
    /// If the agent's program is missing.
    pub fn command(&self, node: &str, subcommand: &str) -> Result<Exec> {
        let node = self.lab.node(node);
        let mut command = node.host().command(binary::proxy_agent()?);
        command.arg(subcommand).arg("--pin-dir").arg(node.pin_dir()).arg("--run-dir").arg(node.run_dir());
        Ok(command)
    }

    /// Returns the JSON output of a `proxy-agent` command.
    ///
    /// # Errors
    /// If the command fails.
    pub fn tool(&self, node: &str, subcommand: &str) -> Result<Value> {
        let mut command = self.command(node, subcommand)?;
        command.args(["-o", "json"]);
        Ok(serde_json::from_str(&command.text()?)?)
    }

    /// Returns the ports of a Service (`namespace/name`) as a node has them.
    ///
    /// # Errors
    /// If the node's maps cannot be read.
    pub fn ports(&self, node: &str, service: &str) -> Result<Vec<PortView>> {
        let all: Vec<PortView> = serde_json::from_value(self.tool(node, "services")?)?;
        Ok(all.into_iter().filter(|port| port.service() == service).collect())
    }

    /// Waits until `done` holds for the ports of a Service.
    ///
    /// # Errors
    /// With the ports, if that does not happen.
    pub fn wait_ports(
        &self,
        node: &str,
        service: &str,
        done: impl Fn(&[PortView]) -> bool,
    ) -> Result<Vec<PortView>> {
        let mut last = Vec::new();
        let result = until(&format!("{service} on {node}"), || {
            last = self.ports(node, service)?;
            Ok(done(&last).then(|| last.clone()))
        });
        result.with_context(|| format!("the ports are {last:#?}"))
    }

    /// Waits until a Service with one port has exactly these endpoints (`address:port`).
    ///
    /// # Errors
    /// With its endpoints, if that does not happen.
    pub fn wait_endpoints(&self, node: &str, service: &str, endpoints: &[&str]) -> Result<()> {
        let wanted: BTreeSet<_> = endpoints
            .iter()
            .map(|text| text.parse::<SocketAddr>().with_context(|| format!("{text:?}")))
            .collect::<Result<_>>()?;
        let same = |ports: &[PortView]| matches!(ports, [port] if BTreeSet::from_iter(port.cluster.clone()) == wanted);
        self.wait_ports(node, service, same).map(drop)
    }

    /// Returns the problems that an agent reports, by object.
    ///
    /// # Errors
    /// If the node's state cannot be read.
    pub fn problems(&self, node: &str) -> Result<BTreeMap<String, Vec<String>>> {
        let status = self.tool(node, "status")?;
        let problems = status["agent"]["problems"].clone();
        serde_json::from_value(problems).context("status shows no problems of the agent")
    }

    /// Waits until `done` holds for the problems.
    ///
    /// # Errors
    /// With the problems, if that does not happen.
    pub fn wait_problems(
        &self,
        node: &str,
        done: impl Fn(&BTreeMap<String, Vec<String>>) -> bool,
    ) -> Result<BTreeMap<String, Vec<String>>> {
        let mut last = BTreeMap::new();
        let result = until(&format!("problems on {node}"), || {
            last = self.problems(node)?;
            Ok(done(&last).then(|| last.clone()))
        });
        result.with_context(|| format!("the problems are {last:#?}"))
    }
}

/// Returns name, node and address of a pod of the scaled Service, by its number, beginning with 1. The first three are
/// in the example.
pub fn scaled_pod(number: usize) -> (String, &'static str, String) {
    let (node, subnet) = if number % 2 == 1 { ("node-a", 1) } else { ("node-b", 2) };
    (format!("kubia-scaled-{number:02}"), node, format!("172.16.{subnet}.{}", 100 + number))
}

/// Calls `look` until it returns a value.
///
/// # Errors
/// If `look` fails, or returns no value within a minute.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not as expected after {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn lab_spec(nodes: &[NodeSpec], members: &[Member]) -> Result<LabSpec> {
    let mut spec = LabSpec { cluster_cidr: CLUSTER_CIDR.to_owned(), ..LabSpec::default() };
    spec.nodes = nodes.to_vec();
    for member in members {
        let address = member.address.to_string();
        match (&member.pod, &member.node) {
            (Some(pod), Some(node)) => spec = spec.pod(node, pod, &[&address])?,
            (Some(pod), None) => bail!("the endpoint {address} of pod {pod} has no nodeName"),
            (None, _) if nodes.iter().any(|node| node.eth0.contains(&member.address)) => {}
            (None, _) => spec.clients.push(LeafSpec::new(&address, &[&address])?),
        }
    }
    spec.client(OUTSIDE, &[OUTSIDE_ADDRESS])?.pod(NODE, CLIENT, &[CLIENT_ADDRESS])
}

/// Starts the servers of one address.
fn serve(place: &Place, address: IpAddr, ports: &BTreeSet<(&'static str, u16)>) -> Result<()> {
    let mut own = ports.clone();
    for &port in ports.iter().filter(|(kind, _)| *kind == "redis") {
        if start_redis_server(place, address, port.1)? {
            own.remove(&port);
        }
    }
    if own.is_empty() {
        return Ok(());
    }
    own.iter()
        .fold(place.serve(), |serve, &(kind, port)| serve.at(kind, SocketAddr::new(address, port)))
        .start()
}

/// Starts the real Redis if it is installed; returns whether it is.
fn start_redis_server(place: &Place, address: IpAddr, port: u16) -> Result<bool> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(program) =
        std::env::split_paths(&path).map(|dir| dir.join("redis-server")).find(|program| program.is_file())
    else {
        return Ok(false);
    };
    let mut command = place.command(program);
    command.args(["--bind", &address.to_string(), "--port", &port.to_string()]);
    command.args(["--save", "", "--appendonly", "no", "--protected-mode", "no", "--daemonize", "no"]);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    place.keep(command.spawn()?);
    until("redis-server", || {
        Ok(place.connect(SocketAddr::new(address, port)).proto(Proto::Redis).one()?.ok.then_some(true))
    })
}
