//! Pods that opt out of the socket edge, by annotation and by runtime class.

use super::*;

const FLAGS: &[(&str, &str)] = &[("socket-opt-out", "annotation,runtime-class=sandbox")];
const UID: [&str; 2] = ["3f2b7c1e-0001-4a5b-8c9d-000000000001", "3f2b7c1e-0002-4a5b-8c9d-000000000002"];
/// Cgroups of containers of the two pods, as kubelet makes them with either cgroup driver.
const CGROUPS: [&str; 2] = [
    "kubepods/burstable/pod3f2b7c1e-0001-4a5b-8c9d-000000000001/0123abcd",
    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
     kubelet-kubepods-besteffort-pod3f2b7c1e_0002_4a5b_8c9d_000000000002.slice/cri-containerd-0123abcd.scope",
];

/// Returns a Pod of this node.
fn pod(name: &str, uid: &str, annotation: Option<&str>, mut spec: Value) -> Value {
    let annotations = annotation.map(|value| json!({ "vipr.dev/socket-edge": value }));
    spec["nodeName"] = json!(NODE);
    json!({
        "apiVersion": "v1", "kind": "Pod", "spec": spec, "status": { "phase": "Running" },
        "metadata": { "namespace": "a", "name": name, "uid": uid, "annotations": annotations },
    })
}

/// Returns the Pods: `p` opts out by its annotation, `sandboxed` by its runtime class.
fn pods(annotation: &str) -> [Value; 2] {
    [
        pod("p", UID[0], Some(annotation), json!({})),
        pod("sandboxed", UID[1], None, json!({ "runtimeClassName": "sandbox" })),
    ]
}

/// Waits until the sockets of exactly these pods are left alone.
fn wait_opted_out(setting: &Setting, pods: &[&str]) -> Result<()> {
    until("the pods that have opted out", || {
        Ok((setting.status()?["agent"]["opted_out"] == json!(pods)).then_some(()))
    })
    .with_context(|| format!("{pods:?}"))
}

/// Checks that the verdicts are those of every pod, and that the packet edge gives them.
fn in_packets(setting: &Setting, place: &Place) -> Result<()> {
    setting.served(place, OPEN, true)?;
    for target in [ABSENT, INACTIVE] {
        unheard(place, target)?;
    }
    for way in [Proto::Tcp, Proto::Udp] {
        let attempt = ask(place, "10.96.0.10:81", way, ANSWER)?;
        ensure!(attempt.error.as_deref() == Some("ECONNREFUSED"), "{attempt:?}");
        // The datagram was sent before the refusal: a socket would have been refused at connect().
        ensure!(way == Proto::Tcp || attempt.stage.as_deref() != Some("connect"), "{attempt:?}");
    }
    Ok(())
}

#[test]
fn pods_opt_out_and_in_while_they_run() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, FLAGS)?;
    let [p, l2] = [setting.lab.pod("P"), setting.lab.pod("L2")];
    setting.write("pods", &pods("off"))?;
    // The order is that of a node: first the object, then the cgroup, then a process in it.
    let inside = [p.in_cgroup(CGROUPS[0])?, l2.in_cgroup(CGROUPS[1])?];
    wait_opted_out(&setting, &["a/p", "a/sandboxed"])?;
    let before = setting.counter("left_to_packets")?;
    for place in &inside {
        in_packets(&setting, place)?;
    }
    ensure!(setting.counter("left_to_packets")? >= before + 16);
    // Processes outside these cgroups are served as before, from the same namespaces.
    for place in [&*p, &*l2, setting.host()] {
        setting.served(place, OPEN, false)?;
    }

    // Neither the end of the agent nor its start makes a difference.
    setting.agent.kill9()?;
    in_packets(&setting, &inside[0]).context("no agent")?;
    setting.start(FLAGS)?;
    wait_opted_out(&setting, &["a/p", "a/sandboxed"])?;
    in_packets(&setting, &inside[1]).context("another agent")?;

    setting.write("pods", &pods("on"))?;
    wait_opted_out(&setting, &["a/sandboxed"])?;
    setting.served(&inside[0], OPEN, false)?;
    in_packets(&setting, &inside[1])?;
    setting.write("pods", &[])?;
    wait_opted_out(&setting, &[])?;
    setting.served(&inside[1], OPEN, false)?;

    setting.write("pods", &pods("off"))?;
    wait_opted_out(&setting, &["a/p", "a/sandboxed"])?;
    setting.start(&[])?;
    wait_opted_out(&setting, &[])?;
    for place in &inside {
        setting.served(place, OPEN, false).context("the flag is gone")?;
    }
    Ok(())
}

#[test]
fn who_cannot_opt_out_is_named_and_served() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, FLAGS)?;
    let inside = setting.lab.pod("P").in_cgroup(CGROUPS[0])?;
    let mut objects = pods("off").to_vec();
    objects.push(pod("host", "3f2b7c1e-0003", Some("off"), json!({ "hostNetwork": true })));
    setting.write("pods", &objects)?;
    wait_opted_out(&setting, &["a/p"])?;
    let why =
        |object: &str, part: &str| setting.wait_problem(object, |problem| problem.to_string().contains(part));
    why("Pod a/host", "the host's network")?;
    why("Pod a/sandboxed", "its cgroup is not there")?;

    setting.start(&[FLAGS[0], ("pod-interfaces", "none")])?;
    setting.wait_problem("Pod a/p", |problem| problem.to_string().contains("no interface of a pod"))?;
    setting.served(&inside, OPEN, false)
}

/// Containers that are no Pods opt out by their cgroup, even one that is made after the agent's start.
#[test]
fn a_cgroup_opts_out_by_its_path() -> Result<()> {
    const DOCKER: &[(&str, &str)] =
        &[("socket-opt-out", "cgroup=/system.slice/docker,cgroup=system.slice/none")];
    let mut setting = Setting::new(LabSpec::cases()?, DOCKER)?;
    let p = setting.lab.pod("P");
    let beside = p.in_cgroup("system.slice/dockers/0123abcd")?;
    wait_opted_out(&setting, &[])?;
    setting.served(&beside, OPEN, false)?;
    let inside = p.in_cgroup("system.slice/docker/0123abcd")?;
    wait_opted_out(&setting, &["cgroup system.slice/docker"])?;
    in_packets(&setting, &inside)?;
    for place in [&beside, &*p, setting.host()] {
        setting.served(place, OPEN, false)?;
    }

    setting.start(&[DOCKER[0], ("pod-interfaces", "none")])?;
    setting.wait_problem("cgroup system.slice/docker", |problem| {
        problem.to_string().contains("no interface of a pod")
    })?;
    setting.served(&inside, OPEN, false)?;
    setting.start(DOCKER)?;
    wait_opted_out(&setting, &["cgroup system.slice/docker"])?;
    in_packets(&setting, &inside)?;
    setting.start(&[])?;
    wait_opted_out(&setting, &[])?;
    setting.served(&inside, OPEN, false)
}

/// A socket that was connected before its pod opted out keeps its backend. The socket of another pod follows the
/// Service.
#[test]
fn the_sockets_of_who_has_opted_out_are_not_led() -> Result<()> {
    let setting = Setting::new(LabSpec::cases()?, FLAGS)?;
    setting.lab.pod("R1").serve().udp(8080).start()?;
    let other = setting.lab.pod("P");
    let inside = other.in_cgroup(CGROUPS[0])?;
    let (mut left, mut led) = (open(&inside)?, open(&other)?);
    for socket in [&mut left, &mut led] {
        ensure!(socket.say("before")?.server.as_deref() == Some("L1"));
    }
    setting.write("pods", &pods("off"))?;
    wait_opted_out(&setting, &["a/p"])?;
    let mut objects = setting.services();
    for object in &mut objects {
        if object["metadata"]["name"] == "open-1" {
            object["endpoints"] = json!([{ "addresses": ["10.64.2.21"], "nodeName": "n2" }]);
        }
    }
    setting.write("services", &objects)?;
    led.say_until(PATIENCE, |answer| answer.server.as_deref() == Some("R1"))?;
    // The same sweep has seen both sockets.
    let answer = left.say("after")?;
    ensure!(answer.ok && answer.server.as_deref() == Some("L1"), "{answer:?}");
    Ok(())
}

fn open(place: &Place) -> Result<Held> {
    place.hold(OPEN).udp().timeout(ANSWER).open()
}
