//! `proxy-agent explain`: its statement about a connection is compared with the experience of a real client.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::{ApiServer, Resource, Verb};
use proxy_tests::lab::{Agent, Attempt, Lab, Place, Summary};
use proxy_tests::scenarios::{denial, until};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Number of connections, enough to reach each of three backends.
const TIMES: usize = 40;
/// Time after which silence counts.
const PATIENCE: Duration = Duration::from_secs(1);

/// A lab with Services that are each in another state, and an agent on `n1`.
struct World {
    agent: Agent,
    lab: Lab,
    dir: TempDir,
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
        agent = agent.flag("socket-opt-out", "annotation");
        agent.start_ready()?;
        Ok(Self { agent, lab, dir })
    }

    /// Returns the path of a file or directory of this world.
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Returns the explanation of a connection from `from` to the Service `cart`.
    fn cart(&self, from: &str, more: &[&str]) -> Result<Value> {
        self.agent.tool("explain", &[&["--from", from, "tcp", "10.96.0.10:80"], more].concat())
    }

    /// Checks that the explanation is refused, with these words.
    fn refuses(&self, from: &str, place: &[&str], words: &[&str]) -> Result<()> {
        let error = format!("{:#}", self.cart(from, place).err().context("not refused")?);
        ensure!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error}");
        Ok(())
    }

    /// Returns the client of that name and its address.
    fn client(&self, name: &str) -> (Place, String) {
        let place = match name {
            "n1" => self.lab.node(name).host().clone(),
            "P" => Place::clone(&self.lab.pod(name)),
            name => self.lab.client(name),
        };
        let address = place.addresses().first().map(ToString::to_string).unwrap_or_default();
        (place, address)
    }

    /// Returns the outcome that `explain` foretells the client: a verdict, and the servers that it may reach.
    fn said(&self, from: &str, proto: &str, target: &str) -> Result<(String, BTreeSet<String>)> {
        self.said_of(from, &[], proto, target)
    }

    /// Returns the same for a Pod that is looked up in `place`.
    fn said_of(
        &self,
        from: &str,
        place: &[&str],
        proto: &str,
        target: &str,
    ) -> Result<(String, BTreeSet<String>)> {
        let args = [&["--from", from, proto, target], place].concat();
        let explanation = self.agent.tool("explain", &args)?;
        let clients = explanation["clients"].as_array().context("clients")?;
        let answer = clients
            .iter()
            .find(|client| client["verdict"] != "left-to-packets")
            .with_context(|| format!("no verdict: {explanation}"))?;
        let verdict = answer["verdict"].as_str().unwrap_or_default().to_owned();
        let remembered = server_of(&answer["remembered"]);
        let backends = answer["backends"].as_array().into_iter().flatten();
        let servers = remembered.map_or_else(|| backends.filter_map(server_of).collect(), |one| [one].into());
        Ok((verdict, servers))
    }

    /// Returns the outcome that the client really sees, in the same words.
    fn seen(&self, place: &Place, proto: &str, target: &str) -> Result<(String, BTreeSet<String>)> {
        let connect = place.connect(target).timeout(PATIENCE);
        let connect = if proto == "udp" { connect.udp() } else { connect };
        let first = connect.clone().one()?;
        let verdict = match (first.ok, first.error.as_deref()) {
            (true, _) => "served",
            (false, Some("ECONNREFUSED")) => "refused",
            (false, Some(error)) if error == denial() => "denied",
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

fn server_of(endpoint: &Value) -> Option<String> {
    let endpoint: SocketAddr = endpoint.as_str()?.parse().ok()?;
    let pods = ["L1", "L2", "R1"].into_iter();
    pods.map(str::to_owned).find(|pod| address_of(pod) == endpoint.ip().to_string())
}

#[test]
fn a_client_sees_what_was_explained() -> Result<()> {
    let world = World::new()?;
    for (client, proto, target, verdict, servers) in [
        // Served, from every kind of client.
        ("P", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"][..]),
        ("n1", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        ("X", "tcp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        ("P", "udp", "10.96.0.10:80", "served", &["L1", "L2", "R1"]),
        // A nodePort with a Local policy: near clients need no local endpoint.
        ("X", "tcp", "192.0.2.10:30080", "served", &["L1", "L2"]),
        ("P", "tcp", "192.0.2.10:30080", "served", &["L1", "L2", "R1"]),
        // An address that is no nodePort address, a port that nobody has, a port of the host.
        ("P", "tcp", "198.51.100.10:30080", "not-ours", &[]),
        ("X", "tcp", "192.0.2.10:9", "not-ours", &[]),
        ("P", "tcp", "10.96.0.10:81", "refused", &[]),
        ("X", "tcp", "10.96.0.10:81", "refused", &[]),
        // No endpoint at all.
        ("P", "tcp", "10.96.0.20:80", "refused", &[]),
        ("n1", "udp", "10.96.0.20:80", "refused", &[]),
        ("X", "udp", "10.96.0.20:80", "refused", &[]),
        // No endpoint on this node.
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
        // Only a terminating endpoint, and a terminating one beside a ready one.
        ("P", "tcp", "10.96.0.60:80", "served", &["L2"]),
        ("P", "tcp", "10.96.0.70:80", "served", &["L1"]),
        // An address that is not of a Service.
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

/// Returns the endpoints of the Service with their reasons, and whether an agent has given them.
fn reasons(world: &World) -> Result<(bool, Vec<(String, String)>)> {
    let explanation = world.agent.tool("explain", &["tcp", "10.96.0.70:80"])?;
    let service = &explanation["service"];
    let backends = service["backends"].as_array().context("backends")?;
    let reasons = backends.iter().map(|one| (text(&one["endpoint"]), text(&one["reason"]))).collect();
    Ok((service["agentAnswered"] == true, reasons))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
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
        (["--from", "10.64.0.0/12", "tcp", "10.96.0.10:80"], "must be an address, or NAMESPACE/POD"),
        (["--from", "fd00::1", "tcp", "10.96.0.10:80"], "different families"),
    ] {
        let error = world.agent.tool("explain", &args).err().context("not refused")?;
        ensure!(format!("{error:#}").contains(words), "{error:#}");
    }
    Ok(())
}

/// Returns a Pod in namespace `shop`.
fn pod(name: &str, node: &str, host_network: bool, addresses: &[&str]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "shop", "name": name, "uid": format!("0f2b7c1e-{name}") },
        "spec": { "nodeName": node, "hostNetwork": host_network },
        "status": { "phase": "Running", "podIP": addresses.first(), "podIPs": ips },
    })
}

#[test]
fn a_client_may_be_the_name_of_a_pod() -> Result<()> {
    let world = World::new()?;
    let pods = [
        pod("client", "n1", false, &["10.64.1.50", "fd00:64:0:1::50"]),
        pod("of-host", "n1", true, &["192.0.2.10"]),
        pod("elsewhere", "n2", false, &["10.64.2.50"]),
        pod("pending", "n1", false, &[]),
    ];
    let host = world.lab.node("n1").host();
    let listener = host.net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
    let server = ApiServer::start_on(listener)?;
    server.apply_all(pods.clone())?;
    let (kubeconfig, config) = (world.path("kubeconfig"), world.path("config.conf"));
    server.write_kubeconfig(kubeconfig.as_ref())?;
    fs::write(
        &config,
        format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclientConnection: {{kubeconfig: \
             {kubeconfig}}}\n"
        ),
    )?;
    let saved = world.path("saved");
    fs::create_dir(&saved)?;
    fs::write(Path::new(&saved).join("pods.json"), json!({ "kind": "List", "items": pods }).to_string())?;

    let url = server.url();
    let places: [[&str; 2]; 4] =
        [["--kubeconfig", &kubeconfig], ["--config", &config], ["--master", &url], ["--manifests", &saved]];
    for place in places {
        for (pod, address) in
            [("client", "10.64.1.50"), ("of-host", "192.0.2.10"), ("elsewhere", "10.64.2.50")]
        {
            let (by_name, by_address) =
                (world.cart(&format!("shop/{pod}"), &place)?, world.cart(address, &[])?);
            assert_eq!((&by_name["clients"], &by_name["from"]), (&by_address["clients"], &json!(address)));
            assert_eq!((&by_name["pod"]["name"], &by_address["pod"]), (&json!(pod), &Value::Null));
            let note = by_name["clientNote"].as_str().unwrap_or_default();
            assert_eq!(note.starts_with("it runs on node n2"), pod == "elsewhere", "{note}");
        }
        let of_host = world.cart("shop/of-host", &place)?;
        let kinds: Vec<&Value> = of_host["clients"]
            .as_array()
            .context("clients")?
            .iter()
            .map(|answer| &answer["client"])
            .collect();
        assert_eq!(kinds, [&json!("host")]);
    }
    // The explanation of a client given by name is true.
    let (place, _) = world.client("P");
    let said = world.said_of("shop/client", &["--kubeconfig", &kubeconfig], "tcp", "10.96.0.10:80")?;
    assert_eq!(world.seen(&place, "tcp", "10.96.0.10:80")?, said);

    for place in places {
        world.refuses("shop/nobody", &place, &["--from shop/nobody", "no such Pod"])?;
        world.refuses("shop/pending", &place, &["--from shop/pending", "status.podIPs is empty"])?;
    }
    server.fail(Some(Verb::Get), Some(Resource::Pods), 403, 1);
    let who = "give --kubeconfig of a user who may read pods";
    world.refuses(
        "shop/client",
        &places[0],
        &["--from shop/client", &url, "(403)", who, "the Pod's address"],
    )?;
    server.go_away();
    world.refuses(
        "shop/client",
        &places[0],
        &["--from shop/client", &url, "the Pod's address does as well"],
    )?;
    world.refuses("shop/client", &[], &["--from shop/client", "--kubeconfig"])
}

#[test]
fn a_pod_that_has_opted_out_is_told_of_its_packets() -> Result<()> {
    let world = World::new()?;
    let mut object = pod("client", "n1", false, &["10.64.1.50"]);
    object["metadata"]["annotations"] = json!({ "vipr.dev/socket-edge": "off" });
    fs::write(world.path("manifests/pod.json"), object.to_string())?;
    let inside =
        world.lab.pod("P").in_cgroup("kubepods/burstable/pod0f2b7c1e-client/0123abcd").context("a cgroup")?;
    until("it has opted out", || {
        let status = world.agent.tool("status", &[])?;
        Ok((status["agent"]["opted_out"] == json!(["shop/client"])).then_some(()))
    })?;
    let manifests = world.path("manifests");
    let place = ["--manifests", &manifests];
    let explanation = world.cart("shop/client", &place)?;
    assert_eq!(explanation["pod"]["optedOut"], true);
    let [socket, packets] = &explanation["clients"].as_array().context("clients")?[..] else {
        anyhow::bail!("{explanation}")
    };
    assert_eq!((&socket["client"], &socket["verdict"]), (&json!("pod"), &json!("left-to-packets")));
    assert!(socket["reason"].as_str().is_some_and(|why| why.contains("opted out")), "{socket}");
    assert_eq!((&packets["client"], &packets["verdict"]), (&json!("pod-packets"), &json!("served")));
    let said = world.said_of("shop/client", &place, "tcp", "10.96.0.10:80")?;
    assert_eq!(world.seen(&inside, "tcp", "10.96.0.10:80")?, said);
    // The address alone does not show whether its pod has opted out.
    let note = world.cart("10.64.1.50", &[])?["clientNote"].clone();
    assert!(note.as_str().is_some_and(|note| note.contains("opted out of the socket edge (1)")), "{note}");
    Ok(())
}
