//! kube-proxy's rules (those that move packets) and Vipr on one node, one after the other: the fate of open
//! connections, as `deploy/from-kube-proxy.md` describes it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Agent, Held, Lab, Node, binary};
use serde_json::json;
use tempfile::TempDir;

const VIP: &str = "10.96.0.10:80";
const NODE_PORT: &str = "192.0.2.10:30080";
/// Rules like kube-proxy's: destinations are translated by the kernel's connection tracking, and the addresses of
/// clients outside are masqueraded.
const RULES: &str = "table ip rules {
  chain translate {
    ip daddr 10.96.0.10 tcp dport 80 dnat to 10.64.1.11:8080
    ip daddr 192.0.2.10 tcp dport 30080 dnat to 10.64.2.21:8080
  }
  chain pre { type nat hook prerouting priority dstnat; jump translate; }
  chain out { type nat hook output priority -100; jump translate; }
  chain post { type nat hook postrouting priority srcnat; ct status dnat oifname eth0 masquerade; }
}";
/// A table as iptables makes it, with a rule such as CNIs have, so that there is another translation.
const OTHERS: &str = "table ip nat {
  chain PREROUTING { type nat hook prerouting priority dstnat; }
  chain INPUT { type nat hook input priority 100; }
  chain OUTPUT { type nat hook output priority -100; }
  chain POSTROUTING { type nat hook postrouting priority srcnat; ip saddr 172.31.0.0/16 masquerade; }
}";

struct World {
    lab: Lab,
    dir: TempDir,
}

impl World {
    fn new() -> Result<Self> {
        let world = Self { lab: Lab::cases()?, dir: tempfile::tempdir()? };
        for pod in ["L1", "R1"] {
            world.lab.pod(pod).serve().tcp(8080).start()?;
        }
        let objects = json!({ "apiVersion": "v1", "kind": "List", "items": [world.node().object(), {
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop", "name": "cart" },
            "spec": { "type": "NodePort", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
                      "ports": [{ "name": "web", "port": 80, "nodePort": 30080, "protocol": "TCP" }] },
        }, {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "namespace": "shop", "name": "cart-1", "labels": { "kubernetes.io/service-name": "cart" } },
            "ports": [{ "name": "web", "port": 8080, "protocol": "TCP" }],
            "endpoints": [{ "addresses": ["10.64.1.11"], "nodeName": "n1" }, { "addresses": ["10.64.2.21"], "nodeName": "n2" }],
        }]});
        fs::create_dir(world.dir.path().join("manifests"))?;
        fs::write(world.dir.path().join("manifests/objects.json"), objects.to_string())?;
        Ok(world)
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    fn nft(&self, rules: &str) -> Result<()> {
        self.node().host().net().nft(rules)
    }

    fn agent(&self) -> Result<Agent> {
        let mut agent = self.node().agent()?.manifests(&self.dir.path().join("manifests"));
        agent.start_ready()?;
        Ok(agent)
    }

    /// Opens connections of a pod and of a client outside.
    fn open(&self) -> Result<[Held; 2]> {
        let held = [self.lab.pod("P").hold(VIP).open()?, self.lab.client("X").hold(NODE_PORT).open()?];
        for held in &held {
            ensure!(held.opened().ok, "{held:?}");
        }
        Ok(held)
    }

    fn cleanup(&self) -> Result<()> {
        let mut cleanup = self.node().host().command(binary::proxy_agent()?);
        cleanup.arg("cleanup").arg("--pin-dir").arg(self.node().pin_dir());
        cleanup.arg("--run-dir").arg(self.node().run_dir());
        cleanup.text().map(drop)
    }
}

/// Returns whether a connection still works.
fn lives(held: &mut Held) -> Result<bool> {
    let answer = held.say("still there?")?;
    Ok(answer.ok)
}

#[test]
fn connections_outlive_the_swap() -> Result<()> {
    let world = World::new()?;
    world.nft(OTHERS)?;
    world.nft(RULES)?;
    let [mut pod, mut outside] = world.open()?;
    let mut agent = world.agent()?;
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (true, true), "with both");
    // New connections are Vipr's: the pod is connected to its backend directly.
    let [mut new_pod, mut new_outside] = world.open()?;
    world.nft("delete table ip rules")?;
    assert_eq!((lives(&mut new_pod)?, lives(&mut new_outside)?), (true, true), "new ones");
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (true, true), "without the rules");
    agent.terminate()?;
    Ok(())
}

/// The kernel tracks and translates connections as long as there is any rule that needs it.
#[test]
fn where_nobody_else_translates_old_connections_end_with_the_rules() -> Result<()> {
    let world = World::new()?;
    world.nft(RULES)?;
    let [mut pod, mut outside] = world.open()?;
    let mut agent = world.agent()?;
    let [mut new_pod, mut new_outside] = world.open()?;
    world.nft("delete table ip rules")?;
    assert_eq!((lives(&mut new_pod)?, lives(&mut new_outside)?), (true, true), "new ones");
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (false, false), "old ones");
    agent.terminate()?;
    Ok(())
}

#[test]
fn on_the_way_back_pods_keep_their_connections_and_clients_outside_lose_theirs() -> Result<()> {
    let world = World::new()?;
    world.nft(OTHERS)?;
    let mut agent = world.agent()?;
    let [mut pod, mut outside] = world.open()?;
    world.nft(RULES)?;
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (true, true), "with both");
    agent.terminate().context("SIGTERM")?;
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (true, true), "without an agent");
    world.cleanup()?;
    // The kernel detaches the programs a little later.
    outside.say_until(Duration::from_secs(5), |answer| !answer.ok)?;
    assert!(lives(&mut pod)?, "after cleanup");
    let [mut pod, mut outside] = world.open()?;
    assert_eq!((lives(&mut pod)?, lives(&mut outside)?), (true, true), "by the rules");
    Ok(())
}
