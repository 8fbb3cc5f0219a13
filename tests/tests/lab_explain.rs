//! What `proxy-agent explain` says of a connection is what a real client then sees.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Agent, Attempt, Lab, Place, Summary};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Often enough that each of three backends is met.
const TIMES: usize = 40;
/// Silence is waited for so long.
const PATIENCE: Duration = Duration::from_millis(300);

/// A lab whose Services are each in another state, and an agent on `n1`.
struct World {
    agent: Agent,
    lab: Lab,
    _dir: TempDir,
}

impl World {
    fn new() -> Result<Self> {
        let (lab, dir) = (Lab::cases()?, tempfile::tempdir()?);
        for pod in ["L1", "L2", "R1"] {
            lab.pod(pod).serve().tcp(8080).udp(8080).start()?;
        }
        let mut objects = vec![
            lab.node("n1").object(),
            json!({ "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "default" },
                    "spec": { "cidrs": ["10.96.0.0/16"] }, "status": { "conditions": [{ "type": "Ready", "status": "True",
                    "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" }] } }),
        ];
        let (ready, unready) = (json!({ "ready": true }), json!({ "ready": false, "serving": false }));
        let leaving = json!({ "ready": false, "serving": true, "terminating": true });
        for (name, number, spec, endpoints) in [
            (
                "cart",
                10,
                json!({ "type": "NodePort", "externalTrafficPolicy": "Local" }),
                vec![("L1", &ready), ("L2", &ready), ("R1", &ready)],
            ),
            ("empty", 20, json!({}), vec![]),
            ("sticky", 30, json!({ "sessionAffinity": "ClientIP" }), vec![("L1", &ready), ("L2", &ready)]),
            ("near", 40, json!({ "internalTrafficPolicy": "Local" }), vec![("R1", &ready)]),
            (
                "public",
                50,
                json!({ "type": "LoadBalancer", "loadBalancerSourceRanges": ["203.0.113.0/25"] }),
                vec![("L1", &ready)],
            ),
            ("leaving", 60, json!({}), vec![("L2", &leaving)]),
            ("mixed", 70, json!({}), vec![("L1", &ready), ("L2", &leaving), ("R1", &unready)]),
        ] {
            let ip = format!("10.96.0.{number}");
            let mut spec = spec;
            for (field, value) in
                [("clusterIP", json!(ip)), ("clusterIPs", json!([ip])), ("ipFamilies", json!(["IPv4"]))]
            {
                spec[field] = value;
            }
            let port =
                |protocol: &str| json!({ "name": protocol.to_lowercase(), "port": 80, "protocol": protocol });
            spec["ports"] = json!([port("TCP"), port("UDP")]);
            if spec["type"] == "NodePort" {
                spec["ports"][0]["nodePort"] = 30080.into();
            }
            objects.push(json!({
                "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop", "name": name }, "spec": spec,
                "status": if name == "public" {
                    json!({ "loadBalancer": { "ingress": [{ "ip": "198.18.0.50" }] } })
                } else {
                    json!({})
                },
            }));
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|(pod, conditions)| {
                    json!({
                        "addresses": [address_of(pod)], "conditions": conditions,
                        "nodeName": if pod.starts_with('L') { "n1" } else { "n2" },
                    })
                })
                .collect();
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": { "namespace": "shop", "name": name, "labels": { "kubernetes.io/service-name": name } },
                "ports": [{ "name": "tcp", "port": 8080, "protocol": "TCP" }, { "name": "udp", "port": 8080, "protocol": "UDP" }],
                "endpoints": endpoints,
            }));
        }
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let manifests = dir.path().join("manifests");
        fs::create_dir(&manifests)?;
        fs::write(manifests.join("objects.json"), list.to_string())?;
        let mut agent = lab.node("n1").agent()?.manifests(&manifests);
        agent = agent.flag("run-dir", dir.path().join("run").display());
        agent.start_ready()?;
        Ok(Self { agent, lab, _dir: dir })
    }

    /// The client of that name and its address.
    fn client(&self, name: &str) -> (Place, String) {
        let place = match name {
            "n1" => self.lab.node(name).host().clone(),
            "P" => Place::clone(&self.lab.pod(name)),
            name => self.lab.client(name),
        };
        let address = place.addresses().first().map(ToString::to_string).unwrap_or_default();
        (place, address)
    }

    /// What is said that the client sees: a verdict, and the servers that it may meet.
    fn said(&self, from: &str, proto: &str, target: &str) -> Result<(String, BTreeSet<String>)> {
        let explanation = self.agent.tool("explain", &["--from", from, proto, target])?;
        let clients = explanation["clients"].as_array().context("clients")?;
        let says = |client: &&Value| client["verdict"] != "left-to-packets";
        let answer = clients.iter().find(says).with_context(|| format!("no verdict: {explanation}"))?;
        let verdict = answer["verdict"].as_str().unwrap_or_default().to_owned();
        let one = |endpoint: &Value| endpoint.as_str().and_then(server_of);
        let remembered = one(&answer["remembered"]);
        let backends = answer["backends"].as_array().into_iter().flatten();
        let servers = remembered.map_or_else(|| backends.filter_map(one).collect(), |one| [one].into());
        Ok((verdict, servers))
    }

    /// What it really sees, in the same words.
    fn seen(&self, place: &Place, proto: &str, target: &str) -> Result<(String, BTreeSet<String>)> {
        let connect = place.connect(target).timeout(PATIENCE);
        let connect = if proto == "udp" { connect.udp() } else { connect };
        let first = connect.clone().one()?;
        let verdict = match (first.ok, first.error.as_deref()) {
            (true, _) => "served",
            (false, Some("ECONNREFUSED")) => "refused",
            (false, Some("EPERM")) => "denied",
            (false, Some("ETIMEDOUT")) => "dropped",
            _ => anyhow::bail!("{first:?}"),
        };
        let attempts = if first.ok { connect.times(TIMES).run()? } else { vec![first] };
        ensure!(attempts.iter().all(|attempt: &Attempt| attempt.ok == (verdict == "served")), "{attempts:?}");
        let servers = Summary::of(&attempts).servers().into_iter().map(str::to_owned).collect();
        Ok((verdict.to_owned(), servers))
    }
}

fn address_of(pod: &str) -> &'static str {
    match pod {
        "L1" => "10.64.1.11",
        "L2" => "10.64.1.12",
        _ => "10.64.2.21",
    }
}

fn server_of(endpoint: &str) -> Option<String> {
    let endpoint: SocketAddr = endpoint.parse().ok()?;
    let pods = ["L1", "L2", "R1"].into_iter();
    pods.map(str::to_owned).find(|pod| address_of(pod) == endpoint.ip().to_string())
}

#[test]
fn a_client_sees_what_was_explained() -> Result<()> {
    let world = World::new()?;
    for (client, proto, target, verdict, servers) in [
        // Served, by every kind of client.
        ("P", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"][..]),
        ("n1", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        ("X", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        ("P", "udp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        // A nodePort with a Local policy: near clients need no local endpoint.
        ("X", "tcp", "192.0.2.10:30080", "served", &["L1", "L2"]),
        ("P", "tcp", "192.0.2.10:30080", "served", &["L1", "L2", "R1"]),
        // An address that is no nodePort address, a port that is nobody's, a port of the host.
        ("P", "tcp", "198.51.100.10:30080", "not-ours", &[]),
        ("X", "tcp", "192.0.2.10:9", "not-ours", &[]),
        ("P", "tcp", "10.96.0.10:81", "refused", &[]),
        ("X", "tcp", "10.96.0.10:81", "refused", &[]),
        // Nobody there.
        ("P", "tcp", "10.96.0.20:80", "refused", &[]),
        ("n1", "udp", "10.96.0.20:80", "refused", &[]),
        ("X", "udp", "10.96.0.20:80", "refused", &[]),
        // Nobody here.
        ("P", "tcp", "10.96.0.40:80", "dropped", &[]),
        ("n1", "tcp", "10.96.0.40:80", "denied", &[]),
        ("X", "tcp", "10.96.0.40:80", "dropped", &[]),
        // An address that no Service has.
        ("P", "tcp", "10.96.200.1:80", "dropped", &[]),
        ("n1", "tcp", "10.96.200.1:80", "denied", &[]),
        // Source ranges.
        ("X", "tcp", "198.18.0.50:80", "served", &["L1"]),
        ("Y", "tcp", "198.18.0.50:80", "dropped", &[]),
        ("P", "tcp", "198.18.0.50:80", "dropped", &[]),
        ("n1", "tcp", "198.18.0.50:80", "denied", &[]),
        // Terminating only, and terminating beside a ready one.
        ("P", "tcp", "10.96.0.60:80", "served", &["L2"]),
        ("P", "tcp", "10.96.0.70:80", "served", &["L1"]),
        // Nothing of ours.
        ("P", "tcp", "10.64.1.11:8080", "not-ours", &[]),
    ] {
        let (place, address) = world.client(client);
        let said =
            world.said(&address, proto, target).with_context(|| format!("{client} {proto} {target}"))?;
        let want: BTreeSet<String> = servers.iter().map(|server| (*server).to_owned()).collect();
        assert_eq!(said, (verdict.to_owned(), want.clone()), "said of {client} {proto} {target}");
        if verdict != "not-ours" {
            let seen = world.seen(&place, proto, target)?;
            assert_eq!(seen, said, "seen by {client} {proto} {target}");
        }
    }
    Ok(())
}

#[test]
fn who_is_remembered_is_told() -> Result<()> {
    let world = World::new()?;
    for client in ["n1", "X"] {
        let (place, address) = world.client(client);
        let target = "10.96.0.30:80";
        let before = world.said(&address, "tcp", target)?;
        assert_eq!(before.1.len(), 2, "{client}: {before:?}");
        let seen = world.seen(&place, "tcp", target)?;
        assert_eq!(seen.1.len(), 1, "{client}: {seen:?}");
        assert_eq!(world.said(&address, "tcp", target)?, seen, "{client}");
    }
    Ok(())
}

/// Its endpoints with the reasons, and whether an agent has told them.
fn reasons(world: &World) -> Result<(bool, Vec<(String, String)>)> {
    let explanation = world.agent.tool("explain", &["tcp", "10.96.0.70:80"])?;
    let service = &explanation["service"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let backends = service["backends"].as_array().context("backends")?;
    let reasons = backends.iter().map(|one| (text(&one["endpoint"]), text(&one["reason"]))).collect();
    Ok((service["agentAnswered"] == true, reasons))
}

#[test]
fn an_agent_tells_why_an_endpoint_is_out() -> Result<()> {
    let mut world = World::new()?;
    let (answered, told) = reasons(&world)?;
    let told: Vec<(&str, &str)> = told.iter().map(|(one, why)| (one.as_str(), why.as_str())).collect();
    assert!(answered);
    assert_eq!(
        told,
        [
            ("10.64.1.11:8080", ""),
            ("10.64.1.12:8080", "terminating while others are ready"),
            ("10.64.2.21:8080", "not ready; not on this node"),
        ]
    );
    world.agent.kill9()?;
    let (answered, told) = reasons(&world)?;
    assert!(!answered, "its socket is still there, but nobody answers");
    let endpoints: Vec<&str> = told.iter().map(|(one, _)| one.as_str()).collect();
    assert_eq!(endpoints, ["10.64.1.11:8080", "10.64.1.12:8080"], "the maps hold what serves");
    Ok(())
}

#[test]
fn it_works_without_an_agent_and_refuses_what_cannot_be() -> Result<()> {
    let mut world = World::new()?;
    world.agent.kill9()?;
    let explanation = world.agent.tool("explain", &["udp", "10.96.0.10:80"])?;
    assert_eq!(explanation["service"]["name"], "cart");
    assert_eq!(explanation["clients"].as_array().map(Vec::len), Some(4));
    for (args, words) in [
        (["--from", "shop/cart-1", "tcp", "10.96.0.10:80"], "kubectl get pod -n shop cart-1"),
        (["--from", "fd00::1", "tcp", "10.96.0.10:80"], "different families"),
    ] {
        let error = world.agent.tool("explain", &args).err().context("not refused")?;
        ensure!(format!("{error:#}").contains(words), "{error:#}");
    }
    Ok(())
}
