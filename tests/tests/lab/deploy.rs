//! The pod of `deploy/base`, with the DaemonSet's own arguments, mounts and capabilities, against an API server that
//! enforces the ClusterRole. It works, and none of its rights can be left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::apiserver::{ApiServer, Resource, Streams, Verb, allows};
use proxy_tests::deployment::{Deployment, SERVICE_ACCOUNT, directory};
use proxy_tests::lab::{Container, Exec, Held, Lab, Node, Proc, binary};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

const VIP: &str = "10.96.0.10";
const TOKEN: &str = "a-token";
/// CA file that the kubeconfig names, although the server's URL needs none.
const CA: &str = include_str!("deploy-ca.crt");
const HEALTH: &str = "127.0.0.1:10256";

/// A lab, an API server in it with a Service of two pods, and the files that the DaemonSet mounts.
struct Setting {
    deployment: Deployment,
    server: ApiServer,
    dir: TempDir,
    lab: Lab,
}

/// The pod on `n1`.
struct Running {
    process: Proc,
    log: PathBuf,
}

impl Setting {
    fn new() -> Result<Self> {
        let (lab, dir) = (Lab::cases()?, tempfile::tempdir()?);
        let listener = lab.node("n1").host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
        let server = ApiServer::start_on(listener)?;
        // Does not stream lists, so the right to list is needed.
        server.offer_streams(Streams::Refused);
        server.apply(lab.node("n1").object())?;
        server.apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop", "name": "cart" },
            "spec": { "type": "NodePort", "clusterIP": VIP, "clusterIPs": [VIP], "ipFamilies": ["IPv4"], "ports": [
                { "name": "web", "port": 80, "protocol": "TCP", "nodePort": 30080 },
                { "name": "log", "port": 514, "protocol": "UDP" },
            ]},
        }))?;
        server.apply(slice(&["10.64.1.11", "10.64.1.12"]))?;
        for pod in ["L1", "L2"] {
            lab.pod(pod).serve().tcp(8080).udp(5140).start()?;
        }
        let setting = Self { deployment: Deployment::read()?, server, dir, lab };
        let rules = setting.deployment.cluster_role.rules.clone().unwrap_or_default();
        setting.server.restrict(TOKEN, &rules);
        setting.write_files()?;
        Ok(setting)
    }

    /// Writes the files that are mounted from elsewhere, with the addresses of the lab filled in.
    fn write_files(&self) -> Result<()> {
        let node = self.node();
        for dir in
            [&self.path("config"), &self.path("run"), &self.path("account"), &self.node().pin_dir().into()]
        {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        let cidrs = format!("clusterCIDR: {}", node.cluster_cidr());
        for (file, template, value) in [
            ("config.conf", "clusterCIDR: \"\"", cidrs.as_str()),
            ("kubeconfig.conf", "https://API-SERVER:6443", &self.server.url()),
        ] {
            let text = fs::read_to_string(directory().join("base").join(file))?;
            ensure!(text.matches(template).count() == 1, "{file} has no {template}");
            fs::write(self.path("config").join(file), text.replace(template, value))?;
        }
        fs::write(self.path("account").join("token"), TOKEN)?;
        Ok(fs::write(self.path("account").join("ca.crt"), CA)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    /// Starts the pod with these capabilities. It may be called again.
    fn start(&self, capabilities: &BTreeSet<String>) -> Result<Running> {
        let sources = BTreeMap::from([
            ("config", self.path("config")),
            ("bpf", self.node().pin_dir().to_owned()),
            ("cgroup", self.node().cgroup().to_owned()),
            ("run", self.path("run")),
            (SERVICE_ACCOUNT, self.path("account")),
        ]);
        let mut command = self.deployment.command(self.node(), &sources, capabilities)?;
        let log = self.path("log");
        let file = File::create(&log)?;
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Running { process: command.spawn()?, log })
    }

    fn get(&self, path: &str) -> Result<u16> {
        Ok(self.node().host().http_get(HEALTH.parse()?, path)?.0)
    }

    fn wait_ready(&self, pod: &mut Running) -> Result<()> {
        until("the agent", || {
            if let Some(status) = pod.process.ended()? {
                anyhow::bail!("the agent ended: {status}: {}", pod.log()?);
            }
            Ok(self.get("/readyz").is_ok_and(|status| status == 200).then_some(()))
        })
    }

    /// Checks that a client in a pod and a client outside are served.
    fn is_served(&self) -> Result<()> {
        let attempt = self.lab.pod("P").connect(format!("{VIP}:80")).one()?;
        ensure!(attempt.ok, "a pod: {attempt:?}");
        let attempt = self.lab.client("X").connect("192.0.2.10:30080").one()?;
        ensure!(attempt.ok, "a client outside: {attempt:?}");
        Ok(())
    }

    /// Opens a UDP socket to the Service, and removes the pod that answered from the Service. Returns the socket and
    /// the pod's name.
    fn backend_that_leaves(&self) -> Result<(Held, String)> {
        let mut held = self.lab.pod("P").hold(format!("{VIP}:514")).udp().open()?;
        let answer = held.say("hello")?;
        let server = answer.server.with_context(|| format!("no answer: {held:?}"))?;
        self.server.apply(slice(&[if server == "L1" { "10.64.1.12" } else { "10.64.1.11" }]))?;
        Ok((held, server))
    }

    fn metric(&self, name: &str) -> Result<Option<String>> {
        let (_, text) = self.node().host().http_get("127.0.0.1:10249".parse()?, "/metrics")?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        Ok(line)
    }
}

impl Running {
    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// Returns the warnings and errors in the log. Two are expected in the lab: its nodes are not at the root of the
    /// cgroups, and not every root may set `oomScoreAdj` as the kubelet does.
    fn complaints(&self) -> Result<Vec<String>> {
        let log = self.log()?;
        let expected = ["not the root of the cgroup", "oomScoreAdj cannot be set"];
        let complaints = log
            .lines()
            .filter(|line| line.contains("WARN") || line.contains("ERROR"))
            .filter(|line| !expected.iter().any(|text| line.contains(text)));
        Ok(complaints.map(str::to_owned).collect())
    }
}

fn slice(addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| json!({ "addresses": [address], "conditions": { "ready": true }, "nodeName": "n1" }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": { "namespace": "shop", "name": "cart-1", "labels": { "kubernetes.io/service-name": "cart" } },
        "ports": [{ "name": "web", "port": 8080, "protocol": "TCP" }, { "name": "log", "port": 5140, "protocol": "UDP" }],
    })
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn the_pod_of_the_daemon_set_works_and_asks_for_no_more_than_it_may() -> Result<()> {
    let mut setting = Setting::new()?;
    let pins = format!("--pin-dir={}", setting.node().pin_dir().join("vipr").display());
    let init = setting.deployment.pod()?.init_containers.as_ref().and_then(|all| all.first());
    let init = init.and_then(|init| init.args.clone()).context("an init container")?;
    let mut prepare = setting.node().host().command(binary::proxy_agent()?);
    prepare.args(init).arg(&pins);
    prepare.text()?;

    let mut pod = setting.start(&setting.deployment.capabilities()?)?;
    setting.wait_ready(&mut pod)?;
    // All of this runs under the seccomp filter that the DaemonSet asks for.
    let status = fs::read_to_string(format!("/proc/{}/status", pod.process.id()))?;
    assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
    setting.is_served()?;
    assert_eq!((setting.get("/livez")?, setting.get("/healthz")?), (200, 200));
    let (mut held, gone) = setting.backend_that_leaves()?;
    held.say_until(Duration::from_secs(10), |attempt| {
        attempt.server.as_ref().is_some_and(|server| *server != gone)
    })?;
    until("the metric", || {
        Ok(setting.metric("vipr_sockets_led_total")?.filter(|count| count == "1").map(drop))
    })?;

    // Every request is granted, and every right that is granted is used. Events are created only when there is
    // something to report.
    let rules = setting.deployment.cluster_role.rules.clone().unwrap_or_default();
    let requests: BTreeSet<(Verb, Resource)> =
        setting.server.requests().iter().map(|request| (request.verb, request.resource)).collect();
    for &(verb, resource) in &requests {
        assert!(rules.iter().any(|rule| allows(rule, verb, resource)), "{verb:?} {resource}");
    }
    for resource in Resource::ALL.into_iter().filter(|resource| *resource != Resource::Events) {
        for verb in Verb::ALL {
            let granted = rules.iter().any(|rule| allows(rule, verb, resource));
            assert_eq!(granted, requests.contains(&(verb, resource)), "{verb:?} {resource}");
        }
    }
    assert_eq!(pod.complaints()?, Vec::<String>::new());
    assert_eq!(pod.process.terminate(Duration::from_secs(10))?.code(), Some(0));
    setting.is_served()?;

    // The way back is the same pod with other arguments. Only its init container may write sysctls.
    let mut take_back = setting.node().host().command(binary::proxy_agent()?);
    take_back.arg("cleanup").arg(&pins);
    take_back.text()?;
    let containers =
        setting.deployment.daemon_set.spec.template.spec.as_mut().map(|spec| &mut spec.containers);
    containers.and_then(|all| all.first_mut()).context("a container")?.args =
        Some(vec!["cleanup".to_owned()]);
    let mut cleanup = setting.start(&setting.deployment.capabilities()?)?;
    let status = cleanup.process.wait(Duration::from_secs(10))?;
    ensure!(status.success(), "{status}: {}", cleanup.log()?);
    assert!(!setting.node().pin_dir().join("vipr").exists());
    Ok(())
}

/// Checks that the agent ends with an error that contains `why` if it has only these capabilities.
fn ends_without(capabilities: &[&str], why: &str) -> Result<()> {
    let setting = Setting::new()?;
    let mut pod = setting.start(&set(capabilities))?;
    let status = pod.process.wait(Duration::from_secs(60))?;
    let log = pod.log()?;
    ensure!(status.code() == Some(1), "{status}: {log}");
    ensure!(log.lines().any(|line| line.starts_with("error: ")) && log.contains(why), "{log}");
    Ok(())
}

#[test]
fn without_bpf() -> Result<()> {
    ends_without(&["NET_ADMIN", "PERFMON"], "CAP_BPF")
}

#[test]
fn without_net_admin() -> Result<()> {
    ends_without(&["BPF", "PERFMON"], "CAP_NET_ADMIN")
}

#[test]
fn without_perfmon() -> Result<()> {
    ends_without(&["BPF", "NET_ADMIN"], "prohibited for !root")
}

/// Checks that a missing capability costs only one thing: a socket stays connected to a pod that is gone.
fn serves_but_keeps_sockets(capabilities: &[&str]) -> Result<()> {
    let setting = Setting::new()?;
    let mut pod = setting.start(&set(capabilities))?;
    setting.wait_ready(&mut pod)?;
    setting.is_served().with_context(|| pod.log().unwrap_or_default())?;
    let (mut held, _) = setting.backend_that_leaves()?;
    // The sweep follows the change within milliseconds.
    thread::sleep(Duration::from_secs(2));
    let answer = held.say("still there?")?;
    ensure!(answer.ok, "{answer:?}");
    assert_eq!(setting.metric("vipr_sockets_led_total")?.as_deref(), Some("0"));
    Ok(())
}

#[test]
fn with_three_capabilities() -> Result<()> {
    serves_but_keeps_sockets(&["BPF", "NET_ADMIN", "PERFMON"])
}

#[test]
fn without_sys_admin() -> Result<()> {
    serves_but_keeps_sockets(&["BPF", "NET_ADMIN", "PERFMON", "SYS_PTRACE"])
}

#[test]
fn without_sys_ptrace() -> Result<()> {
    serves_but_keeps_sockets(&["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN"])
}

#[test]
fn the_capabilities_are_these() -> Result<()> {
    let given = Deployment::read()?.capabilities()?;
    assert_eq!(given, set(&["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"]));
    Ok(())
}

/// Returns a container of the image that starts the program under `name`, privileged as kube-proxy's is. The
/// container's changes to the host go to `dir`.
fn of_kube_proxy(lab: &Lab, dir: &TempDir, name: &str) -> Result<Exec> {
    let program = binary::proxy_agent()?;
    let mut container = Container::new(program)?;
    container.mount(program, name, true)?;
    container.mount(dir.path(), "/dir", false)?;
    container.mount(lab.node("n1").cgroup(), "/sys/fs/cgroup", true)?;
    container.privileged();
    let mut command = lab.node("n1").host().command(name);
    command.contained(container);
    Ok(command)
}

#[test]
fn without_the_hosts_bpf_file_system_it_says_what_to_add() -> Result<()> {
    let (lab, dir) = (Lab::cases()?, tempfile::tempdir()?);
    for what in ["run", "--init-only"] {
        let mut command = of_kube_proxy(&lab, &dir, "/usr/local/bin/kube-proxy")?;
        let log = dir.path().join("log");
        let file = File::create(&log)?;
        command.args(["--manifests=/dir", "--run-dir=/dir/run", "--healthz-bind-address="]);
        command.args((what != "run").then_some(what)).stdout(file.try_clone()?).stderr(file);
        let status = command.spawn()?.wait(Duration::from_secs(20))?;
        let log = fs::read_to_string(log)?;
        ensure!(status.code() == Some(1), "{what}: {status}: {log}");
        for words in ["ends with it", "hostPath /sys/fs/bpf", "mountPropagation: Bidirectional"] {
            ensure!(
                log.lines().any(|line| line.starts_with("error: ") && line.contains(words)),
                "{what}: {log}"
            );
        }
    }
    Ok(())
}

#[test]
fn the_program_answers_to_the_names_that_manifests_call() -> Result<()> {
    let (lab, dir) = (Lab::cases()?, tempfile::tempdir()?);
    let runner =
        ["--log-file=/dir/log", "--also-stdout", "--redirect-stderr", "--", "/usr/local/bin/kube-proxy"];
    for (name, before) in [("/usr/local/bin/kube-proxy", &[][..]), ("/go-runner", &runner[..])] {
        let mut command = of_kube_proxy(&lab, &dir, name)?;
        command.args(before).args([
            "--cluster-cidr=10.64.0.0/12",
            "--v=2",
            "--write-config-to=/dir/written.yaml",
        ]);
        command.text().with_context(|| name.to_owned())?;
        let written = dir.path().join("written.yaml");
        let text = fs::read_to_string(&written)?;
        ensure!(text.contains("clusterCIDR: 10.64.0.0/12"), "{name}: {text}");
        fs::remove_file(written)?;
    }
    let mut shell = of_kube_proxy(&lab, &dir, "/go-runner")?;
    shell.args(["--log-file=/dir/log", "/bin/sh", "-c", "kube-proxy"]);
    let error = format!("{:#}", shell.text().err().context("there is a shell")?);
    ensure!(error.contains("there is only /usr/local/bin/kube-proxy"), "{error}");
    Ok(())
}
