//! Networks inside pods: a cluster in a pod, and containers that a pod runs.

use proxy_agent::bpf::maps::KernelMaps;
use proxy_agent::bpf::pins::PinDir;
use proxy_tests::lab::{Netns, Pod, Proc, Role};

use super::*;

/// Cgroups of two pods.
const PODS: [&str; 2] = [
    "kubepods/burstable/pod3f2b7c1e-0001-4a5b-8c9d-000000000001",
    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3f2b7c1e_0002_4a5b_8c9d_000000000002.slice",
];

/// Starts the first process that a runtime starts in a pod: it keeps the namespaces, and does nothing.
fn pause(pod: &Pod, cgroup: &str, container: &str) -> Result<Proc> {
    run(&pod.in_cgroup(&format!("{cgroup}/{container}"))?)
}

/// Starts a process in a mount namespace of its own, like that of every container.
fn run(place: &Place) -> Result<Proc> {
    let mut command = place.command("unshare");
    command.args(["--mount", "sleep", "infinity"]);
    command.spawn()
}

/// Makes a network inside the pod, by the container `container`. Its packets leave by the pod's interface, from the
/// pod's address.
fn network_inside(pod: &Pod, cgroup: &str, container: &str) -> Result<Place> {
    let inner = Netns::new(Role::Leaf)?;
    pod.net().ip(&format!(
        "link add inner type veth peer name eth0 netns {}\naddress add 172.30.0.1/24 dev inner\nlink set inner up",
        inner.path()
    ))?;
    inner.ip("link set lo up\naddress add 172.30.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 172.30.0.1")?;
    pod.net().sysctl("net/ipv4/ip_forward", "1")?;
    pod.net().nft(
        "add table ip nat\nadd chain ip nat post { type nat hook postrouting priority srcnat; }\n\
                   add rule ip nat post ip saddr 172.30.0.0/24 oifname != inner masquerade\n",
    )?;
    let of = pod.in_cgroup(&format!("{cgroup}/{container}"))?;
    of.with_net("inside", &inner, &["172.30.0.2".parse()?])
}

/// Waits until the sandboxes of so many pods are known.
fn wait_known(setting: &Setting, pods: usize) -> Result<()> {
    let pins = PinDir::new(setting.lab.node(NODE).pin_dir());
    until("sandboxes", || {
        let contents = KernelMaps::open(&pins)?.contents()?;
        Ok((contents.sandboxes.len() == pods && (contents.opt_out.is_empty() == (pods == 0))).then_some(()))
    })
    .with_context(|| format!("of {pods} pods"))
}

#[test]
fn what_is_inside_a_pod_is_served_at_the_pods_interface() -> Result<()> {
    let mut setting = Setting::new(LabSpec::cases()?, &[])?;
    let p = setting.lab.pod("P");
    let own = p.in_cgroup(&format!("{}/app", PODS[0]))?;
    let inside = network_inside(&p, PODS[0], "app")?;
    // The container runs before anything is known of the pod.
    setting.served(&own, OPEN, false).context("a pod that nothing is known of")?;
    let first = pause(&p, PODS[0], "pause")?;
    setting.served(&own, OPEN, false).context("a pod that has just come")?;
    wait_known(&setting, 1)?;

    let left = setting.counter("left_to_packets")?;
    setting.served(&inside, OPEN, true)?;
    ensure!(setting.counter("left_to_packets")? >= left + 3);
    // Connections of the pod itself, of other pods, and of a container in a deeper cgroup are not left alone.
    let deeper = p.in_cgroup(&format!("{}/app/kubelet/kubepods/podaaaa-01/inner", PODS[0]))?;
    for place in [&own, &deeper, &*p, &*setting.lab.pod("L2"), setting.host()] {
        setting.served(place, OPEN, false)?;
    }

    // Neither the end of the agent nor its start makes a difference.
    setting.agent.kill9()?;
    setting.served(&inside, OPEN, true).context("no agent")?;
    setting.start(&[])?;
    for _ in 0..3 {
        setting.served(&inside, OPEN, true).context("another agent")?;
        setting.served(&own, OPEN, false).context("another agent")?;
    }

    // Without its sandbox, nothing is known of the pod. With a new sandbox, everything is known again.
    drop(first);
    wait_known(&setting, 0)?;
    for place in [&own, &inside] {
        setting.served(place, OPEN, false).context("the sandbox is gone")?;
    }
    let second = pause(&p, PODS[0], "another")?;
    wait_known(&setting, 1)?;
    setting.served(&inside, OPEN, true)?;
    setting.served(&own, OPEN, false)?;

    // The same holds for a sandbox made while no agent runs: its containers are new, and nothing is known of them.
    setting.agent.kill9()?;
    drop(second);
    let net = Netns::new(Role::Leaf)?;
    setting.lab.pod("L1").net().ip(&format!(
        "link add anew type veth peer name eth0 netns {}\naddress add 172.31.0.1/24 dev anew\nlink set anew up",
        net.path()
    ))?;
    net.ip("link set lo up\naddress add 172.31.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 172.31.0.1")?;
    let anew = p.in_cgroup(&format!("{}/anew", PODS[0]))?.with_net("anew", &net, &["172.31.0.2".parse()?])?;
    setting.served(&anew, OPEN, false).context("a sandbox that no agent has seen")?;
    setting.start(&[])?;

    setting.start(&[("pod-interfaces", "none")])?;
    setting.served(&inside, OPEN, false).context("nobody would judge its packets")
}

/// The original fault: a Service of a cluster inside the pod has the address of a Service outside.
#[test]
fn a_cluster_inside_a_pod_answers_at_its_own_addresses() -> Result<()> {
    let setting = Setting::new(LabSpec::cases()?, &[])?;
    let p = setting.lab.pod("P");
    let inside = network_inside(&p, PODS[0], "app")?;
    p.net().ip("link set lo up\naddress add 10.96.0.10/32 dev lo")?;
    p.serve().name("inner").at("tcp", OPEN).at("udp", OPEN).start()?;
    answered(&inside, OPEN, "L1").context("while nothing is known of the pod")?;
    let _pause = pause(&p, PODS[0], "pause")?;
    wait_known(&setting, 1)?;
    answered(&inside, OPEN, "inner")?;
    answered(&p.in_cgroup(&format!("{}/app", PODS[0]))?, OPEN, "L1").map(drop)
}

/// A pod whose interface has no end on this host, as with macvlan, ipvlan or SR-IOV, beside other pods. Its packets
/// cannot be served by the packet edge.
#[test]
fn a_pod_whose_interface_is_not_on_the_host_is_served() -> Result<()> {
    let setting = Setting::new(LabSpec::cases()?, &[])?;
    let _other = pause(&setting.lab.pod("P"), PODS[0], "pause")?;
    wait_known(&setting, 1)?;
    let (net, l1) = (Netns::new(Role::Leaf)?, setting.lab.pod("L1"));
    // A macvlan on a device that is not on this host either.
    l1.net().ip(&format!(
        "link add near type veth peer name base\naddress add 172.31.0.1/24 dev near\nlink set near up\nlink set base up\n\
         link add link base name mv0 type macvlan mode private\nlink set mv0 netns {} name eth0",
        net.path()
    ))?;
    net.ip("link set lo up\naddress add 172.31.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 172.31.0.1")?;
    let pod = setting.lab.pod("L2").in_cgroup(&format!("{}/app", PODS[1]))?;
    let pod = pod.with_net("moved", &net, &["172.31.0.2".parse()?])?;
    setting.served(&pod, OPEN, false).context("before anything is known of it")?;
    let sandbox = setting.lab.pod("L2").in_cgroup(&format!("{}/pause", PODS[1]))?;
    let _pause = run(&sandbox.with_net("pause", &net, &[])?)?;
    // The pod is served as soon as its first process runs, and from then on.
    setting.served(&pod, OPEN, false)?;
    wait_known(&setting, 2)?;
    setting.served(&pod, OPEN, false)
}

/// A cluster in a container that is no pod of this cluster (kind, k3d): its pods have cgroups like ours, and networks
/// that lead into the container's network.
#[test]
fn a_pod_of_a_cluster_inside_a_container_is_left_to_packets() -> Result<()> {
    const POD: &str = "docker/4fa6/kubelet/kubepods/burstable/pod3f2b7c1e-0003-4a5b-8c9d-000000000003";
    let mut setting = Setting::new(LabSpec::cases()?, &[])?;
    let container = setting.lab.pod("P");
    let inside = network_inside(&container, POD, "app")?;
    setting.served(&inside, OPEN, false).context("before anything is known of it")?;
    let pause = container.in_cgroup(&format!("{POD}/pause"))?;
    let _pause = run(&pause.with_net("pause", inside.net(), &[])?)?;
    until("the way out is known", || Ok(setting.served(&inside, OPEN, true).is_ok().then_some(())))?;
    // Their packets come from the container. Clients without a network inside are served as before.
    for place in [&*container, &*setting.lab.pod("L2"), setting.host()] {
        setting.served(place, OPEN, false)?;
    }
    setting.agent.kill9()?;
    setting.served(&inside, OPEN, true).context("no agent")?;
    setting.start(&[])?;
    for _ in 0..3 {
        setting.served(&inside, OPEN, true).context("another agent")?;
    }
    Ok(())
}

/// A pod with many networks takes one entry, and no entry of another pod.
#[test]
fn a_pod_with_many_networks_hurts_nobody() -> Result<()> {
    let setting = Setting::new(LabSpec::cases()?, &[])?;
    let (p, l2) = (setting.lab.pod("P"), setting.lab.pod("L2"));
    let _pauses = [pause(&p, PODS[0], "pause")?, pause(&l2, PODS[1], "pause")?];
    wait_known(&setting, 2)?;
    let mut crowd = Vec::new();
    for number in 0..40 {
        let net = Netns::new(Role::Leaf)?;
        net.ip("link add d0 type veth peer name d1")?;
        let place = p.in_cgroup(&format!("{}/app/kubepods/pod{number}/x", PODS[0]))?;
        crowd.push(run(&place.with_net("crowd", &net, &[])?)?);
    }
    for (pod, cgroup) in [(&p, PODS[0]), (&l2, PODS[1])] {
        let own = pod.in_cgroup(&format!("{cgroup}/app"))?;
        setting.served(&own, OPEN, false)?;
    }
    wait_known(&setting, 2)
}
