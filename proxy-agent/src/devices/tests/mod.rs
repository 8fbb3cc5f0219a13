//! Following and attaching, in network namespaces of the tests' own.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType};
use proxy_common::abi;
use proxy_common::abi::IfIndex;
use proxy_common::abi::maps;
use proxy_common::addr::Addr;

use super::*;
use crate::bpf::dataplane::{Dataplane, FLOW_ENTRIES, Sizes};
use crate::bpf::device::{Device, Direction};
use crate::bpf::tc::TcPrograms;
use crate::config::devices::{DetectLocal, Selection, Settings};
use crate::host::testing::{in_new_netns, ip};
use crate::reconcile::store::Capacity;

mod neighbours;

/// Time limit for a pass: loading takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node in a network namespace of its own, with pinned maps. Its pins go when it is dropped.
struct Node {
    config: Devices,
    _dataplane: Dataplane,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.config.pins.remove() {
            eprintln!("{error}");
        }
    }
}

impl Node {
    /// Runs `test` on a node: `eth0` with an address and the default route, `cali1` with a host route.
    fn run<F: Future<Output = ()>>(test: impl FnOnce(Self) -> F + Send) {
        static NODES: AtomicU32 = AtomicU32::new(0);
        in_new_netns(|| {
            let number = NODES.fetch_add(1, Ordering::Relaxed);
            let root = format!("/sys/fs/bpf/vipr-unit-edge-{}-{number}", std::process::id());
            let pins = PinDir::new(&PathBuf::from(root));
            pins.create().unwrap();
            let little = Capacity { frontends: 16, services: 16, slots: 16, backends: 16, source_ranges: 16 };
            let dataplane = Dataplane::open(
                pins.clone(),
                Sizes { least: little, want: little, flows: FLOW_ENTRIES },
                drop,
            );
            let config = Devices { settings: Settings::default(), no_tcx: false, pins: pins.clone() };
            let node = match dataplane {
                Ok(dataplane) => Self { config, _dataplane: dataplane },
                Err(error) => {
                    pins.remove().unwrap();
                    panic!("{error}");
                }
            };
            ip("link set lo up\n\
                link add eth0 type veth peer name far0\n\
                link set eth0 up\n\
                link set far0 up\n\
                address add 192.0.2.10/24 dev eth0\n\
                address add 2001:db8:1::10/64 dev eth0 nodad\n\
                route add default via 192.0.2.1\n");
            add_pod(1);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test(node));
        });
    }

    async fn start(&self) -> DeviceTask {
        DeviceTask::start(self.config.clone(), Facts::default()).await.unwrap()
    }

    /// Returns the entry of a device in `DEVICES`.
    fn device(&self, name: &str) -> Option<abi::Device> {
        let data = MapData::from_pin(self.config.pins.map(maps::DEVICES)).unwrap();
        let devices: HashMap<_, u32, abi::Device> = Map::HashMap(data).try_into().unwrap();
        devices.get(&index(name)?, 0).ok()
    }

    /// Returns the link and the program of a pin.
    fn link(&self, program: &str, device: &str) -> (u32, u32) {
        let pin = self.config.pins.link(&format!("{program}-{}", index(device).unwrap()));
        let info = FdLink::from(PinnedLink::from_pin(pin).unwrap()).info().unwrap();
        (info.id(), info.program_id())
    }

    fn links(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.config.pins.links()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn add_pod(number: u8) {
    ip(&format!(
        "link add cali{number} type veth peer name pod{number}\n\
         link set cali{number} up\n\
         route add 10.64.1.{number}/32 dev cali{number}\n"
    ));
}

fn index(device: &str) -> Option<u32> {
    let mut ip = std::process::Command::new("ip");
    let output = ip.args(["-o", "link", "show", "dev", device]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_once(':')?.0.parse().ok()
}

/// Returns the names of the programs on a device: ingress and egress.
fn programs(device: &str) -> [Vec<String>; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress].map(|attach_type| {
        let (_, programs) = SchedClassifier::query_tcx(device, attach_type).unwrap();
        programs.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
    })
}

/// Returns the clsact filters on a device, as tc(8) shows them.
fn filters(device: &str, direction: &str) -> String {
    let mut tc = std::process::Command::new("tc");
    let output = tc.args(["filter", "show", "dev", device, direction]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for a pass that `done` accepts.
async fn until(task: &mut DeviceTask, what: &str, done: impl Fn(&State) -> bool) -> State {
    let mut last = State::default();
    let wait = async {
        loop {
            last = task.changed().await;
            if done(&last) {
                return;
            }
        }
    };
    if tokio::time::timeout(PATIENCE, wait).await.is_err() {
        panic!("{what}: {last:#?}");
    }
    last
}

fn attached(state: &State) -> Vec<String> {
    let devices = state.devices.iter().filter(|device| !device.attached.is_empty());
    devices.map(|device| format!("{} {} {}", device.name, device.role, device.attached)).collect()
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

#[test]
fn devices_are_followed_as_they_come_and_go() {
    Node::run(async |node| {
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["eth0 external tcx", "cali1 pod tcx"]);
        assert_eq!(state.problems, BTreeMap::new());
        assert_eq!(programs("eth0"), [["edge_ingress"], ["edge_egress"]]);
        assert_eq!(programs("cali1"), [["pod_ingress"], ["pod_egress"]]);
        assert_eq!(programs("far0"), [[""; 0]; 2]);
        let eth0 = node.device("eth0").unwrap();
        assert_eq!((eth0.snat_v4, eth0.snat_v6, eth0.flags), (addr("192.0.2.10"), addr("2001:db8:1::10"), 0));

        add_pod(2);
        ip("link add br0 type bridge\nlink set br0 up\naddress add 172.17.0.1/16 dev br0\n\
            link add vm1 type veth peer name vm1-far\nlink set vm1 master br0 up\n");
        until(&mut task, "pods that come", |state| attached(state).len() == 4).await;
        assert_eq!(programs("cali2"), [["pod_ingress"], ["pod_egress"]]);
        assert_eq!(programs("vm1"), [["pod_ingress"], ["pod_egress"]]);
        assert_eq!(node.device("vm1").unwrap().snat_v4, addr("172.17.0.1"));

        let gone = index("cali1").unwrap();
        ip("link del cali1\n");
        // A pass that runs while the device goes still lists it.
        until(&mut task, "a pod that goes", |state| {
            state.devices.iter().all(|device| device.name != "cali1")
        })
        .await;
        let pins = node.links();
        assert!(pins.iter().all(|pin| !pin.ends_with(&format!("-{gone}"))), "{pins:?}");
        assert_eq!(pins.len(), 6, "{pins:?}");

        // A device that is down and without addresses keeps its programs.
        ip("link set eth0 down\naddress flush dev eth0\n");
        until(&mut task, "a device that goes down", |state| {
            state.devices.iter().any(|device| device.reason == "kept (down)")
        })
        .await;
        assert_eq!(programs("eth0"), [["edge_ingress"], ["edge_egress"]]);
    });
}

#[test]
fn a_restart_replaces_programs_in_place() {
    Node::run(async |node| {
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        let all = [("edge_ingress", "eth0"), ("edge_egress", "eth0"), ("pod_ingress", "cali1")];
        let before = all.map(|(program, device)| node.link(program, device));
        drop(task);
        assert_eq!(programs("eth0"), [["edge_ingress"], ["edge_egress"]], "attached without an agent");
        // Meanwhile a pod has gone and another has come.
        ip("link del cali1\n");
        add_pod(1);
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["eth0 external tcx", "cali1 pod tcx"]);
        for ((program, device), before) in all.into_iter().zip(before).take(2) {
            let after = node.link(program, device);
            assert_eq!(after.0, before.0, "{program}: the link");
            assert_ne!(after.1, before.1, "{program}: the program");
        }
        assert_eq!(node.links().len(), 4);
        assert_eq!(programs("eth0"), [["edge_ingress"], ["edge_egress"]]);
    });
}

#[test]
fn what_is_not_chosen_any_more_is_detached() {
    Node::run(async |mut node| {
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        drop(task);
        node.config.settings.devices = Selection::parse("--devices", &["none".to_owned()], false).unwrap();
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["cali1 pod tcx"]);
        assert_eq!(node.links().len(), 2);
        assert_eq!(node.device("eth0"), None);
        // The kernel detaches when the last reference is gone, which may take a moment.
        for _ in 0..100 {
            if programs("eth0") == [[""; 0]; 2] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(programs("eth0"), [[""; 0]; 2]);
    });
}

/// Attaches a program that the kernel takes for another project's.
fn intrude(programs: &mut TcPrograms, node: &Node, direction: Direction) -> PathBuf {
    let name = match direction {
        Direction::Ingress => "pod_ingress",
        Direction::Egress => "pod_egress",
    };
    let eth0 = index("eth0").unwrap();
    programs
        .overtake_tcx(&node.config.pins, &Device { index: IfIndex(eth0), name: "eth0" }, name, direction)
        .unwrap();
    let pin = node.config.pins.link(&format!("{name}-{eth0}"));
    let aside = node.config.pins.root().join(format!("intruder-{name}"));
    std::fs::rename(pin, &aside).unwrap();
    aside
}

#[test]
fn the_place_is_kept_against_later_arrivals() {
    Node::run(async |node| {
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        let mut intruder = TcPrograms::open(&node.config.pins, false).unwrap();
        intrude(&mut intruder, &node, Direction::Ingress);
        intrude(&mut intruder, &node, Direction::Egress);
        assert_eq!(programs("eth0"), [["pod_ingress", "edge_ingress"], ["edge_egress", "pod_egress"]]);
        add_pod(2);
        until(&mut task, "a pass", |state| attached(state).len() == 3).await;
        for _ in 0..100 {
            if programs("eth0").iter().all(|programs| programs.len() == 2) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(programs("eth0"), [["edge_ingress", "pod_ingress"], ["pod_egress", "edge_egress"]]);
        assert_eq!(node.links().len(), 6);
        // The next pass only makes all devices run the same programs.
        add_pod(3);
        let state = until(&mut task, "a pass", |state| attached(state).len() == 4).await;
        assert_eq!(state.problems, BTreeMap::new());
        assert_eq!(programs("eth0"), [["edge_ingress", "pod_ingress"], ["pod_egress", "edge_egress"]]);
        let [(_, other)] = &others(&state)[..] else { panic!("{state:#?}") };
        assert!(other.starts_with("TCX program ") && other.ends_with(" ahead on egress"), "{other}");
    });
}

#[test]
fn a_device_that_cannot_be_attached_costs_only_itself() {
    Node::run(async |node| {
        let obstacle = node.config.pins.link(&format!("edge_ingress-{}", index("eth0").unwrap()));
        std::fs::create_dir(&obstacle).unwrap();
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["cali1 pod tcx"]);
        let reason = &state.problems["device eth0"][0];
        assert!(reason.contains(obstacle.to_str().unwrap()), "{reason}");
        std::fs::remove_dir(&obstacle).unwrap();
        let state = until(&mut task, "another try", |state| state.problems.is_empty()).await;
        assert_eq!(attached(&state), ["eth0 external tcx", "cali1 pod tcx"]);
    });
}

#[test]
fn kernels_without_tcx_get_filters() {
    Node::run(async |mut node| {
        node.config.no_tcx = true;
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["eth0 external clsact", "cali1 pod clsact"]);
        assert_eq!(node.links(), [""; 0]);
        let shown = filters("eth0", "ingress");
        assert!(shown.contains("pref 1 bpf") && shown.contains("edge_ingress"), "{shown}");
        let shown = filters("eth0", "egress");
        assert!(shown.contains("pref 65535 bpf") && shown.contains("edge_egress"), "{shown}");
        drop(task);

        // After a restart the filters are the same, with other programs.
        let before = filters("eth0", "ingress");
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        let after = filters("eth0", "ingress");
        assert_eq!(after.matches("direct-action").count(), 1, "{after}");
        assert_ne!(before, after);
        drop(task);

        // With TCX the filters give way to links.
        node.config.no_tcx = false;
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(attached(&state), ["eth0 external tcx", "cali1 pod tcx"]);
        assert_eq!(filters("eth0", "ingress") + &filters("cali1", "egress"), "");
        drop(task);

        // Without TCX the links give way to filters; then all are removed.
        node.config.no_tcx = true;
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(node.links(), [""; 0]);
        drop(task);
        assert!(remove_filters(&node.config.pins).await.unwrap().is_empty());
        for device in ["eth0", "cali1"] {
            assert_eq!(filters(device, "ingress") + &filters(device, "egress"), "", "{device}");
        }
    });
}

/// Returns what others run, by device.
fn others(state: &State) -> Vec<(&str, String)> {
    let all = state.devices.iter().flat_map(|device| device.others.iter().map(move |other| (device, other)));
    all.map(|(device, other)| (device.name.as_str(), other.to_string())).collect()
}

#[test]
fn devices_without_mac_headers_get_programs_of_their_own() {
    Node::run(async |node| {
        ip("tuntap add dev tun0 mode tun\nlink set tun0 up\naddress add 10.64.9.1/32 dev tun0\n\
            route add 10.64.2.0/24 dev tun0\n");
        let mut task = node.start().await;
        let state = until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(state.problems, BTreeMap::new());
        let l3: Vec<_> = state.devices.iter().map(|device| (device.name.as_str(), device.l3)).collect();
        assert_eq!(l3, [("eth0", false), ("cali1", false), ("tun0", true)]);
        assert_eq!(programs("tun0"), [["edge_ingress"], ["edge_egress"]]);
        assert_ne!(node.link("edge_ingress", "tun0").1, node.link("edge_ingress", "eth0").1);
        assert_eq!(node.device("tun0").unwrap().snat_v4, addr("10.64.9.1"));
    });
}

#[test]
fn sources_are_what_the_kernel_would_take() {
    Node::run(async |node| {
        // Another source towards the pods of another node, and a second device whose first address is a frontend.
        ip("address add 192.0.2.11/24 dev eth0\nroute add 10.64.2.0/24 via 192.0.2.20 src 192.0.2.11\n\
            link add eth1 type veth peer name far1\nlink set eth1 up\naddress add 198.51.100.5/24 dev eth1\n\
            address add 198.51.100.10/24 dev eth1\n\
            link add wg0 type vxlan id 7 dev eth0 dstport 4789\nlink set wg0 up\nroute add 10.64.3.0/24 dev wg0\n");
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        let v4 = |device| node.device(device).unwrap().snat_v4;
        assert_eq!((v4("eth0"), v4("eth1")), (addr("192.0.2.11"), addr("198.51.100.5")));

        let facts = Facts {
            maps: 0,
            node_ips: [Some(addr("192.0.2.10")), None],
            remote: [Some(addr("10.64.2.21")), None],
        };
        task.tell(&facts, &DatagramPorts::default());
        until(&mut task, "a pass", |state| state.passes == 2).await;
        assert_eq!((v4("eth0"), v4("eth1")), (addr("192.0.2.11"), addr("198.51.100.5")));
        // `wg0` has no address of its own: it gets the one that the kernel takes.
        assert_eq!(v4("wg0"), addr("192.0.2.10"));
    });
}

#[test]
fn p127_near_is_in_devices() {
    Node::run(async |mut node| {
        node.config.settings.detect_local = DetectLocal::NamePrefix("cali".to_owned());
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        assert_eq!(node.device("cali1").unwrap().flags, abi::device::flags::NEAR | abi::device::flags::POD);
        assert_eq!(node.device("eth0").unwrap().flags, 0);
    });
}

/// Packets of pods behind a bridge enter the network stack through the bridge: they come from no client outside.
#[test]
fn bridges_of_pods_are_in_devices_while_they_have_pods() {
    Node::run(async |node| {
        ip("link add cni0 type bridge\nlink set cni0 up\naddress add 10.64.1.1/24 dev cni0\n\
            link add veth1 type veth peer name far1\nlink set veth1 master cni0 up\n");
        let mut task = node.start().await;
        until(&mut task, "the first pass", |state| state.passes == 1).await;
        let (pod, bridge) = (abi::device::flags::POD, abi::device::flags::POD_BRIDGE);
        let flags = |device| node.device(device).map(|device| device.flags);
        assert_eq!((flags("veth1"), flags("cni0"), flags("eth0")), (Some(pod), Some(bridge), Some(0)));
        assert_eq!(programs("cni0"), [[""; 0], []]);
        ip("link del veth1\n");
        until(&mut task, "a pass", |state| state.passes >= 2 && state.devices.len() == 2).await;
        assert_eq!(flags("cni0"), None);
    });
}
