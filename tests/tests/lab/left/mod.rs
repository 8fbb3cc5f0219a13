//! Connections that the socket edge leaves to the packet edge: refusals that a pod's socket cannot be told, and pods
//! that opt out.
//!
//! These tests have a lab in common: the nodes, pods and clients of the cases, with an agent on `n1` that reads a
//! directory, and a machine outside that has the addresses of Services. A client that the machine outside answers was
//! not served.

mod addresses;
mod inside;
mod opt_out;
mod refusals;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::lab::{Agent, Attempt, Held, Lab, LabSpec, Netns, Place, Proto};
use proxy_tests::scenarios::{denial, syns_sent_again, until};
use serde_json::{Value, json};
use tempfile::TempDir;

const NODE: &str = "n1";
/// A Service that every client may use.
const OPEN: &str = "10.96.0.10:80";
/// A load-balancer address for P alone.
const GUARDED: &str = "198.18.5.5:80";
/// A Service without an endpoint on this node, with internal traffic policy Local.
const ABSENT: &str = "10.96.0.12:80";
/// An address for Services that no Service has.
const INACTIVE: &str = "10.96.77.77:80";
/// The machine outside.
const ELSEWHERE: &str = "elsewhere";
/// Time that silence has to last.
const SILENCE: Duration = Duration::from_millis(500);
/// Time that an answer may take on a busy machine.
const ANSWER: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);

struct Setting {
    // Dropped first: it runs in the lab.
    agent: Agent,
    lab: Lab,
    dir: TempDir,
}

impl Setting {
    /// Builds the lab and starts the agent with these flags.
    fn new(spec: LabSpec, flags: &[(&str, &str)]) -> Result<Self> {
        let outside = [OPEN, GUARDED, ABSENT, INACTIVE].map(|vip| vip.trim_end_matches(":80"));
        let lab = Lab::build(spec.client(ELSEWHERE, &outside)?)?;
        for (place, port) in [(Place::clone(&lab.pod("L1")), 8080), (lab.client(ELSEWHERE), 80)] {
            place.serve().tcp(port).udp(port).start()?;
        }
        let dir = tempfile::tempdir().context("a temporary directory")?;
        fs::create_dir(dir.path().join("manifests"))?;
        let agent = lab.node(NODE).agent()?;
        let mut setting = Self { agent, lab, dir };
        setting.write("services", &setting.services())?;
        setting.start(flags)?;
        Ok(setting)
    }

    fn services(&self) -> Vec<Value> {
        let mut objects = vec![
            self.lab.node(NODE).object(),
            json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
                "metadata": { "name": "kubernetes" }, "spec": { "cidrs": ["10.96.0.0/16"] },
            }),
        ];
        objects.extend(service("open", json!({ "clusterIP": "10.96.0.10", "type": "NodePort" }), "n1"));
        let guarded = json!({
            "clusterIP": "10.96.0.11", "type": "LoadBalancer", "loadBalancerSourceRanges": ["10.64.1.50/32"],
        });
        objects.extend(service("guarded", guarded, "n1"));
        let absent = json!({ "clusterIP": "10.96.0.12", "internalTrafficPolicy": "Local" });
        objects.extend(service("absent", absent, "n2"));
        objects
    }

    /// Writes a file of the directory that the agent reads.
    fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let next = self.dir.path().join("next");
        fs::write(&next, serde_json::to_vec_pretty(&list)?)?;
        Ok(fs::rename(&next, self.dir.path().join("manifests").join(name).with_extension("json"))?)
    }

    /// Starts an agent with these flags; one that still runs is ended first.
    fn start(&mut self, flags: &[(&str, &str)]) -> Result<()> {
        if self.agent.id().is_some() {
            self.agent.terminate()?;
        }
        let mut agent = self.lab.node(NODE).agent()?.manifests(&self.dir.path().join("manifests"));
        for (flag, value) in flags {
            agent = agent.flag(flag, value);
        }
        self.agent = agent;
        self.agent.start()?;
        self.agent.wait_ready(PATIENCE)
    }

    fn host(&self) -> &Place {
        self.lab.node(NODE).host()
    }

    fn status(&self) -> Result<Value> {
        self.agent.tool("status", &[])
    }

    /// Returns the problem of an object; `null` for none.
    fn problem(&self, object: &str) -> Result<Value> {
        Ok(self.status()?["agent"]["problems"][object].clone())
    }

    /// Waits until the problem of an object fulfils `done`.
    fn wait_problem(&self, object: &str, done: impl Fn(&Value) -> bool) -> Result<()> {
        until(object, || Ok(done(&self.problem(object)?).then_some(())))
            .with_context(|| format!("{:?}", self.status().map(|s| s["agent"].clone())))
    }

    fn counter(&self, name: &str) -> Result<u64> {
        self.status()?["counters"][name].as_u64().with_context(|| format!("no counter {name}"))
    }

    /// Returns whether the packet edge has translated this attempt.
    fn has_flow(&self, target: &str, (way, attempt): &(Proto, Attempt)) -> Result<bool> {
        let client = attempt.peer.context("no client")?.to_string();
        let protocol = if *way == Proto::Tcp { "TCP" } else { "UDP" };
        let flows = self.agent.tool("flows", &[])?;
        let flows = flows.as_array().context("no list of flows")?;
        Ok(flows
            .iter()
            .any(|flow| flow["client"] == client && flow["protocol"] == protocol && flow["vip"] == target))
    }

    /// Checks that L1 answers, after a translation by the packet edge (`in_packets`) or by the socket edge.
    fn served(&self, place: &Place, target: &str, in_packets: bool) -> Result<()> {
        for one in answered(place, target, "L1")? {
            ensure!(self.has_flow(target, &one)? == in_packets, "{} to {target}: {one:?}", place.name());
        }
        Ok(())
    }
}

/// Returns a Service `a/NAME` with port 80 by TCP and UDP, and its one endpoint L1. `node` is the node that its slice
/// names.
fn service(name: &str, mut spec: Value, node: &str) -> [Value; 2] {
    spec["clusterIPs"] = json!([spec["clusterIP"]]);
    spec["ipFamilies"] = json!(["IPv4"]);
    spec["ports"] = json!([port("TCP", 80), port("UDP", 80)]);
    if spec["type"] == "NodePort" {
        (spec["ports"][0]["nodePort"], spec["ports"][1]["nodePort"]) = (json!(31_080), json!(31_080));
    }
    let status = match spec["type"].as_str() {
        Some("LoadBalancer") => json!({ "loadBalancer": { "ingress": [{ "ip": "198.18.5.5" }] } }),
        _ => json!({}),
    };
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "a", "name": name },
        "spec": spec, "status": status,
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "a", "name": format!("{name}-1"), "labels": { "kubernetes.io/service-name": name },
        },
        "ports": [port("TCP", 8080), port("UDP", 8080)],
        "endpoints": [{ "addresses": ["10.64.1.11"], "nodeName": node }],
    });
    [service, slice]
}

fn port(protocol: &str, number: u16) -> Value {
    json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": number })
}

/// All kinds of sockets.
const WAYS: [Proto; 3] = [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected];

/// Makes one connection, or sends one datagram.
fn ask(place: &Place, target: &str, way: Proto, patience: Duration) -> Result<Attempt> {
    place.connect(target).proto(way).timeout(patience).one()
}

/// Checks that the call that names the destination fails. Without an endpoint on this node, connect() of the host's
/// UDP sockets succeeds, and their datagrams are refused.
fn denied(place: &Place, target: &str) -> Result<()> {
    for way in WAYS {
        let attempt = ask(place, target, way, ANSWER)?;
        let stage = if way == Proto::UdpUnconnected { "send" } else { "connect" };
        if way == Proto::Udp && target == ABSENT && place.name() == NODE {
            ensure!(
                attempt.error.as_deref() == Some("ECONNREFUSED"),
                "{} to {target}: {attempt:?}",
                place.name()
            );
            continue;
        }
        if (attempt.error.as_deref(), attempt.stage.as_deref()) != (Some(denial()), Some(stage)) {
            bail!("{} to {target}, {way:?}: {attempt:?}", place.name());
        }
    }
    Ok(())
}

/// Checks that nobody answers.
fn unheard(place: &Place, target: &str) -> Result<()> {
    for way in WAYS {
        let attempt = ask(place, target, way, SILENCE)?;
        let stage = if way == Proto::Tcp { "connect" } else { "recv" };
        if (attempt.error.as_deref(), attempt.stage.as_deref()) != (Some("ETIMEDOUT"), Some(stage)) {
            bail!("{} to {target}, {way:?}: {attempt:?}", place.name());
        }
    }
    Ok(())
}

/// Checks that `server` answers, and that the client sees the address that it asked for.
fn answered(place: &Place, target: &str, server: &str) -> Result<Vec<(Proto, Attempt)>> {
    let mut attempts = Vec::new();
    for way in WAYS {
        let attempt = ask(place, target, way, ANSWER)?;
        let seen = if way == Proto::UdpUnconnected { attempt.from } else { attempt.peername };
        if attempt.server.as_deref() != Some(server) || seen != target.parse().ok() {
            bail!("{} to {target}, {way:?}: {attempt:?}", place.name());
        }
        attempts.push((way, attempt));
    }
    Ok(attempts)
}
