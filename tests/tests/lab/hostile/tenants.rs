//! A namespace that has as much as possible of everything, beside one that has little. The source is an API server.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_common::abi::{FrontendKey, proto};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_tests::apiserver::{ApiServer, Streams};
use proxy_tests::lab::{Agent, Lab, Node};
use proxy_tests::scenarios::until;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::services::numbered;
use super::world::{HEALTH_PORT, NODE};

/// Time that a kubelet gives a probe.
const PROBE: Duration = Duration::from_secs(1);
/// Time during which the worst Service comes and goes.
const RUN: Duration = Duration::from_secs(10);
/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// A node whose agent follows an API server.
struct Stage {
    // Dropped first: it runs in the lab.
    agent: Agent,
    server: ApiServer,
    lab: Lab,
    _dir: TempDir,
}

impl Stage {
    fn start(flags: &[(&str, &str)]) -> Result<Self> {
        let lab = Lab::cases()?;
        let dir = tempfile::tempdir()?;
        let node = lab.node("n1");
        let listener = node.host().net().enter(|| TcpListener::bind("127.0.0.1:6443"))??;
        let server = ApiServer::start_on(listener)?;
        server.apply(node.object())?;
        let innocent = Shape { number: 1, ports: 1, external_ips: 0, endpoints: 1 };
        server.apply_all(innocent.objects("innocent", "s"))?;
        let kubeconfig = dir.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig)?;
        let agent = node.agent()?.quiet().kubeconfig(&kubeconfig);
        let agent = agent.flag("healthz-bind-address", format!("0.0.0.0:{HEALTH_PORT}"));
        let mut agent = flags.iter().fold(agent, |agent, (flag, value)| agent.flag(flag, value));
        agent.start_ready()?;
        Ok(Self { agent, server, lab, _dir: dir })
    }

    fn node(&self) -> &Node {
        self.lab.node("n1")
    }

    /// Returns the number of endpoints behind a port of the Service of this number; `None` while there is no such
    /// frontend.
    fn endpoints(&self, number: u16, port: u16) -> Result<Option<u32>> {
        // The maps may have grown.
        let maps = KernelMaps::open(&PinDir::new(self.node().pin_dir()))?;
        let key = FrontendKey::exact(Addr::from(cluster_ip(number)), Be16::new(port), proto::TCP);
        let frontend = maps.frontend(&key)?;
        Ok(frontend.map(|value| maps.service(value.service).map_or(0, |service| service.cluster.len)))
    }

    fn wait_endpoints(&self, number: u16, port: u16, want: Option<u32>) -> Result<()> {
        self.look_for(number, port, want, Duration::from_millis(20))
    }

    fn look_for(&self, number: u16, port: u16, want: Option<u32>, pause: Duration) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.endpoints(number, port)? != want {
            ensure!(
                Instant::now() < deadline,
                "Service {number}: {:?}, not {want:?}",
                self.endpoints(number, port)
            );
            thread::sleep(pause);
        }
        Ok(())
    }

    /// Returns the problems of `status`, by object.
    fn problems(&self) -> Result<serde_json::Map<String, Value>> {
        let status = self.agent.tool("status", &[])?;
        Ok(status["agent"]["problems"].as_object().context("status tells problems")?.clone())
    }

    /// Returns how often the loop has planned and written, and how often that took no more than 128 ms. The loop does
    /// nothing else.
    fn turns(&self) -> Result<[u64; 2]> {
        let metrics = self.agent.metrics()?;
        let count = |le: &str| -> Result<u64> {
            let name = format!(
                "kubeproxy_sync_proxy_rules_duration_seconds_bucket{{le=\"{le}\",ip_family=\"IPv4\"}} "
            );
            let sample = metrics.lines().find_map(|line| line.strip_prefix(&name)).context(name.clone())?;
            Ok(sample.parse()?)
        };
        Ok([count("+Inf")?, count("0.128")?])
    }

    fn come(&self, worst: &[Value; 2]) -> Result<()> {
        self.server.apply_all(worst.clone())?;
        self.wait_endpoints(WORST.number, WORST.ports, Some(WORST.endpoints.into()))
    }

    fn go(&self, [service, slice]: &[Value; 2]) -> Result<()> {
        ensure!(self.server.delete(service)? && self.server.delete(slice)?);
        self.wait_endpoints(WORST.number, WORST.ports, None)
    }

    /// Changes the endpoints of an innocent Service again and again; returns how long each change took.
    fn change_the_innocent(&self) -> Result<Vec<Duration>> {
        let (mut times, start) = (Vec::new(), Instant::now());
        while start.elapsed() < RUN {
            for endpoints in [2, 1] {
                let innocent = Shape { number: 1, ports: 1, external_ips: 0, endpoints };
                let [_, slice] = innocent.objects("innocent", "s");
                let changed = Instant::now();
                self.server.apply(slice)?;
                self.look_for(1, 1, Some(endpoints.into()), Duration::from_millis(1))?;
                times.push(changed.elapsed());
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(times)
    }

    /// Returns the peak of the agent's memory.
    fn peak(&self) -> Result<u64> {
        let pid = self.agent.id().context("the agent has ended")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }
}

fn cluster_ip(number: u16) -> std::net::IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 97, high, low).into()
}

fn endpoint(number: u16) -> Value {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 66, 0, 1)) + u32::from(number));
    json!({ "addresses": [address], "nodeName": "n2", "conditions": { "ready": true } })
}

/// Shape of a Service and its slice.
#[derive(Clone, Copy)]
struct Shape {
    /// Number that distinguishes its addresses from those of others.
    number: u16,
    ports: u16,
    external_ips: u8,
    endpoints: u16,
}

impl Shape {
    fn objects(self, namespace: &str, name: &str) -> [Value; 2] {
        let Self { number, ports, external_ips, endpoints } = self;
        let [high, low] = number.to_be_bytes();
        // The number gives the age.
        let created = format!("2026-01-01T{:02}:{:02}:{:02}Z", number / 3600, number / 60 % 60, number % 60);
        let metadata =
            |name: &str| json!({ "namespace": namespace, "name": name, "creationTimestamp": created });
        let external_ips: Vec<String> =
            (0..external_ips).map(|byte| Ipv4Addr::new(198, 18 + byte, high, low).to_string()).collect();
        let mut slice_metadata = metadata(name);
        slice_metadata["labels"] = json!({ "kubernetes.io/service-name": name });
        [
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": metadata(name),
                "spec": {
                    "type": "ClusterIP", "ipFamilies": ["IPv4"], "clusterIP": cluster_ip(number),
                    "clusterIPs": [cluster_ip(number)], "externalIPs": external_ips,
                    "ports": numbered(ports, None),
                },
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": slice_metadata,
                "ports": numbered(ports, Some(8080)),
                "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
            }),
        ]
    }
}

/// A Service with as many frontends and endpoints as allowed.
const WORST: Shape = Shape { number: 2, ports: 16_000, external_ips: 3, endpoints: 8 };

/// Returns the median, p90, p99 and maximum.
fn spread(times: &mut [Duration]) -> Result<String> {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let [p50, p90, p99, max] = [50, 90, 99, 100]
        .map(|percent| times.get((times.len() * percent / 100).min(last)).copied().unwrap_or_default());
    ensure!(!times.is_empty(), "nothing was measured");
    Ok(format!("{} times, p50 {p50:?}, p90 {p90:?}, p99 {p99:?}, max {max:?}", times.len()))
}

/// The worst Service is made and removed, over and over, while a small one changes and a kubelet probes. The test
/// prints the times of the changes and probes, by which agents can be compared; its limit of seconds is only a guard.
#[test]
fn h014_an_innocent_passes_while_the_worst_service_comes_and_goes() -> Result<()> {
    let stage = Stage::start(&[])?;
    let worst = WORST.objects("greedy", "worst");
    // The maps have grown before the measurement.
    stage.come(&worst)?;
    stage.go(&worst)?;

    let before = stage.turns()?;
    let to: SocketAddr = format!("{}:{HEALTH_PORT}", NODE[0]).parse()?;
    let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut changes, mut probes) = thread::scope(|scope| -> Result<(Vec<Duration>, Vec<Duration>)> {
        let greedy = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                stage.come(&worst)?;
                stage.go(&worst)?;
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let kubelet = scope.spawn(|| -> Result<Vec<Duration>> {
            let mut times = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                let (status, body) = stage.node().host().http_get(to, "/livez")?;
                times.push(start.elapsed());
                ensure!(status == 200, "/livez: {status} {body}");
                thread::sleep(Duration::from_millis(20));
            }
            Ok(times)
        });
        let changes = stage.change_the_innocent();
        over.store(true, Ordering::Relaxed);
        greedy.join().map_err(|panic| anyhow!("{panic:?}"))??;
        let probes = kubelet.join().map_err(|panic| anyhow!("{panic:?}"))??;
        Ok((changes?, probes))
    })?;
    let rounds = rounds.load(Ordering::Relaxed);
    let after = stage.turns()?;
    let [turns, short] = [after[0] - before[0], after[1] - before[1]];
    eprintln!(
        "the worst Service: {rounds} rounds, {turns} turns, {} of them longer than 128 ms",
        turns - short
    );
    eprintln!("changes of the innocent: {}", spread(&mut changes)?);
    eprintln!("/livez: {}", spread(&mut probes)?);
    ensure!(rounds > 0 && changes.len() > 10 && probes.len() > 50, "nothing has been tried");
    let [change, probe] = [changes, probes].map(|times| times.last().copied().unwrap_or_default());
    ensure!(change < 5 * PROBE, "a change of the innocent took {change:?}");
    ensure!(probe < PROBE, "a probe took {probe:?}");
    Ok(())
}

const MANY: u16 = 40;

fn greedy(number: u16) -> [Value; 2] {
    Shape { number, ports: 2_000, external_ips: 2, endpoints: 8 }.objects("greedy", &format!("s{number}"))
}

/// Forty Services of one namespace that are each within their budget. The budget of the namespace has room for ten of
/// them, and for the slices of eight. With `VIPR_TENANT=1000`, the test instead makes a thousand Services and slices,
/// each as large as an object may be, with the default budgets, and prints their cost.
#[test]
fn h015_a_namespace_has_its_share() -> Result<()> {
    let count = std::env::var("VIPR_TENANT").ok().map(|text| text.parse::<u16>()).transpose()?;
    if let Some(count) = count {
        return as_large_as_may_be(count);
    }
    let flags = [("max-namespace-frontends", "65536"), ("max-namespace-endpoints", "131072")];
    let stage = Stage::start(&flags)?;
    let before = stage.peak()?;
    // The youngest come first: the order of arrival does not decide which ones stay.
    for number in (100..100 + MANY).rev() {
        stage.server.apply_all(greedy(number))?;
    }
    settled(&stage, 0)?;
    let problems = stage.problems()?;
    let named = problems.keys().filter(|object| object.starts_with("Service greedy/s")).count();
    ensure!(named == 20, "{problems:?}");
    let reason = &problems["Service greedy/s110"][0];
    ensure!(reason.as_str().is_some_and(|text| text.contains("--max-namespace-frontends")), "{reason}");
    let reason = &problems["EndpointSlice greedy/s108"][0];
    ensure!(reason.as_str().is_some_and(|text| text.contains("--max-namespace-endpoints")), "{reason}");
    let rest = problems["Namespace greedy"].to_string();
    ensure!(rest.contains("10 more Services") && rest.contains("12 more EndpointSlices"), "{rest}");
    let took = stage.peak()? - before;
    eprintln!("{} MiB more", took / MIB);
    ensure!(took < 96 * MIB, "{} MiB", took / MIB);
    // Another namespace gets everything that it asks for.
    let [_, slice] = Shape { number: 1, ports: 1, external_ips: 0, endpoints: 3 }.objects("innocent", "s");
    stage.server.apply(slice)?;
    stage.wait_endpoints(1, 1, Some(3))?;

    // A new agent keeps the same ones, and removed ones make room for the next.
    let mut stage = stage;
    stage.agent.kill9()?;
    stage.agent.start_ready()?;
    settled(&stage, 0)?;
    for number in 100..105 {
        for object in greedy(number) {
            ensure!(stage.server.delete(&object)?);
        }
    }
    settled(&stage, 5)?;
    for number in 105..130 {
        for object in greedy(number) {
            ensure!(stage.server.delete(&object)?);
        }
    }
    for number in 130..138 {
        stage.wait_endpoints(number, 2_000, Some(8))?;
    }
    until("nobody else is refused", || {
        let problems = stage.problems()?;
        Ok((problems.len() == 2 && problems.contains_key("EndpointSlice greedy/s138")).then_some(()))
    })
}

fn settled(stage: &Stage, gone: u16) -> Result<()> {
    for number in 100 + gone..110 + gone {
        stage.wait_endpoints(number, 2_000, Some(if number - gone < 108 { 8 } else { 0 }))?;
    }
    for number in 110 + gone..100 + MANY {
        stage.wait_endpoints(number, 2_000, None)?;
    }
    Ok(())
}

/// Most memory that the agent may use, whatever one namespace holds.
const MOST: u64 = 512 * MIB;

fn as_large_as_may_be(count: u16) -> Result<()> {
    let stage = Stage::start(&[])?;
    let before = stage.peak()?;
    for number in 100..100 + count {
        // As many endpoints as a slice may have, with a hundred ports; and as many ports as fit into an object.
        let shape = match number % 2 {
            0 => Shape { number, ports: 100, external_ips: 200, endpoints: 1_000 },
            _ => Shape { number, ports: 16_000, external_ips: 3, endpoints: 8 },
        };
        stage.server.apply_all(shape.objects("greedy", &format!("s{number}")))?;
    }
    let innocent = Shape { number: 1, ports: 1, external_ips: 0, endpoints: 3 };
    let [_, slice] = innocent.objects("innocent", "s");
    let start = Instant::now();
    stage.server.apply(slice)?;
    stage.wait_endpoints(1, 1, Some(3))?;
    eprintln!("the innocent waited {:?}", start.elapsed());
    let mut peak = 0;
    while stage.peak()? > peak {
        peak = stage.peak()?;
        thread::sleep(Duration::from_secs(20));
    }
    eprintln!("{count} of each: {} MiB before, {} MiB at most", before / MIB, peak / MIB);
    ensure!(peak < MOST, "{} MiB", peak / MIB);
    let mut stage = stage;
    for streams in [Streams::Offered, Streams::Refused] {
        stage.server.offer_streams(streams);
        stage.agent.kill9()?;
        stage.agent.start_ready()?;
        let peak = stage.peak()?;
        eprintln!("and {} MiB at most after a start, lists as streams: {streams:?}", peak / MIB);
        ensure!(peak < MOST, "{} MiB", peak / MIB);
    }
    Ok(())
}
