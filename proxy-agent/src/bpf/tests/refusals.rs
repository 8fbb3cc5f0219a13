//! Tests of programs that the kernel refuses, in a real kernel. They need root.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use proxy_common::abi::IfIndex;
use proxy_common::datapath::edge::Role;

use super::{Pins, SMALL};
use crate::bpf::dataplane::{
    Dataplane, DataplaneError, FLOW_ENTRIES, OBJECT, PROGRAMS as PROGRAMS_AT_SOCKETS, Sizes,
};
use crate::bpf::pins::PinDir;
use crate::bpf::tc::{Mechanism, PROGRAMS, TcPrograms};
use crate::devices::attach::Attacher;
use crate::devices::choice::Choice;
use crate::devices::snapshot::Layer;
use crate::host::Host;
use crate::host::testing::{in_new_netns, ip};

const SIZES: Sizes = Sizes { least: SMALL, want: SMALL, flows: FLOW_ENTRIES };

/// Returns the object with programs that begin with a call of a helper that no kernel has. (The buffer is aligned like
/// a vector of words.)
fn broken(programs: &[&str]) -> Vec<u64> {
    const CALL: [u8; 8] = [0x85, 0, 0, 0, 0xff, 0xff, 0, 0];
    let file = object::File::parse(OBJECT).unwrap();
    let mut bytes = OBJECT.to_vec();
    for program in programs {
        let symbol = file.symbol_by_name(program).unwrap();
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        let (start, _) = section.file_range().unwrap();
        let at = usize::try_from(start + symbol.address()).unwrap();
        // The first two instructions copy the context, or set a register; no relocation changes them.
        bytes[at..at + CALL.len()].copy_from_slice(&CALL);
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

fn pins(name: &str) -> Pins {
    let root = format!("/sys/fs/bpf/vipr-unit-refusals-{name}-{}", std::process::id());
    let pins = PinDir::new(Path::new(&root));
    pins.create().unwrap();
    Pins(pins)
}

fn refused_sockets(name: &str, programs: &[&str]) -> Result<Dataplane, DataplaneError> {
    let pins = pins(name);
    Dataplane::open_object(bytemuck::cast_slice(&broken(programs)), pins.0.clone(), SIZES, drop)
}

#[test]
fn a_program_that_is_refused_costs_itself_and_its_other_half() {
    let dataplane = refused_sockets("half", &["sendmsg6", "getpeername4"]).unwrap();
    let names: Vec<_> = dataplane.refused.keys().copied().collect();
    assert_eq!(names, ["getpeername4", "recvmsg6", "sendmsg6"]);
    let reason = &dataplane.refused["sendmsg6"];
    for part in ["the kernel does not load it", "invalid func unknown", "unconnected UDP sockets of IPv6"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert_eq!(dataplane.refused["recvmsg6"], "is not attached without sendmsg6");
}

#[test]
fn without_connect4_nothing_is_served() {
    let error = refused_sockets("connect4", &["connect4"]).unwrap_err().to_string();
    assert!(error.starts_with("BPF program connect4: the kernel does not load it"), "{error}");
    assert!(error.contains("invalid func unknown"), "{error}");
}

#[test]
fn what_is_refused_is_detached() {
    let pins = pins("detached");
    let served = cgroup();
    let mut whole = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
    whole.attach(&served.0).unwrap();
    assert!(is_pinned(&pins, "sendmsg6") && is_pinned(&pins, "connect6"));
    let object = broken(&["sendmsg6"]);
    let mut broken =
        Dataplane::open_object(bytemuck::cast_slice(&object), pins.0.clone(), SIZES, drop).unwrap();
    broken.attach(&served.0).unwrap();
    assert!(
        !is_pinned(&pins, "sendmsg6")
            && !is_pinned(&pins, "recvmsg6")
            && is_pinned(&pins, "connect6")
            && is_pinned(&pins, "sendmsg4")
    );
}

fn is_pinned(pins: &Pins, program: &str) -> bool {
    pins.0.link(program).exists()
}

#[test]
fn what_has_been_detached_is_told_and_attached_again() {
    let pins = pins("audit");
    let served = cgroup();
    let mut dataplane = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
    assert_eq!(dataplane.detached(&served.0).len(), PROGRAMS_AT_SOCKETS.len(), "nothing is attached yet");
    dataplane.attach(&served.0).unwrap();
    assert_eq!(dataplane.detached(&served.0), [""; 0]);
    // The programs are detached with the cgroup, and their pins stay.
    fs::remove_dir(&served.0).unwrap();
    assert_eq!(dataplane.detached(&served.0).len(), PROGRAMS_AT_SOCKETS.len());
    fs::create_dir(&served.0).unwrap();
    assert_eq!(dataplane.detached(&served.0).len(), PROGRAMS_AT_SOCKETS.len());
    dataplane.attach(&served.0).unwrap();
    assert_eq!(dataplane.detached(&served.0), [""; 0]);
    fs::remove_file(pins.0.link("connect6")).unwrap();
    assert_eq!(dataplane.detached(&served.0), ["connect6"]);
    // Another agent on the same pin directory takes the links over.
    let mut other = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
    other.attach(&served.0).unwrap();
    assert_eq!(dataplane.detached(&served.0).len(), PROGRAMS_AT_SOCKETS.len());
}

/// A cgroup that is removed when it is dropped.
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn cgroup() -> Cgroup {
    let path = Host::look(None).unwrap().cgroup.join(format!("vipr-unit-refusals-{}", std::process::id()));
    fs::create_dir(&path).unwrap();
    Cgroup(path)
}

#[test]
fn both_programs_of_a_role_are_attached_or_none() {
    let pins = pins("pair");
    let _maps = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
    let object = broken(&["edge_ingress"]);
    let mut programs = TcPrograms::open_object(bytemuck::cast_slice(&object), &pins.0, false).unwrap();
    programs.load(&PROGRAMS);
    assert_eq!(programs.refused().into_keys().collect::<Vec<_>>(), ["edge_ingress"]);
    let error = programs.check(Role::External).unwrap_err().to_string();
    assert!(error.contains("clients outside of this node are not served"), "{error}");
    programs.check(Role::Pod).unwrap();
}

/// A restarted agent finds devices that run the programs of the earlier agent. A program that the kernel refuses this
/// time must not go on there with maps that nobody writes. Other devices are not affected.
#[test]
fn a_device_whose_programs_are_refused_runs_none() {
    in_new_netns(|| {
        ip("link add eth0 type veth peer name far0\n\
            link add cali1 type veth peer name pod1\n\
            link set eth0 up\n\
            link set cali1 up\n");
        let (edge, pod) = (index("eth0"), index("cali1"));
        let choices =
            BTreeMap::from([(edge, choice("eth0", Role::External)), (pod, choice("cali1", Role::Pod))]);
        let object = broken(&["edge_ingress"]);
        for (mechanism, name) in [(Mechanism::Tcx, "device-tcx"), (Mechanism::Clsact, "device-clsact")] {
            let pins = pins(name);
            let _maps = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
            let run = |attacher: &mut Attacher| {
                let outcomes = attacher.apply(&choices, &BTreeMap::new());
                let held: Vec<_> =
                    outcomes.iter().filter(|(_, it)| it.holds).map(|(index, _)| *index).collect();
                ([edge, pod].map(|index| outcomes[&index].attached.clone().map(drop)), held)
            };
            let mut whole = Attacher::new(pins.0.clone(), mechanism, BTreeMap::new()).unwrap();
            assert_eq!(run(&mut whole), ([Ok(()), Ok(())], vec![]));
            assert_eq!(["eth0", "cali1"].map(ours), [2, 2], "{mechanism:?}");
            drop(whole);

            let programs = TcPrograms::open_object(bytemuck::cast_slice(&object), &pins.0, false).unwrap();
            let present = BTreeMap::from([(edge, "eth0".to_owned()), (pod, "cali1".to_owned())]);
            let mut next = Attacher::with(programs, pins.0.clone(), mechanism, present).unwrap();
            let ([refused, attached], held) = run(&mut next);
            assert_eq!(held, [edge], "the node is not ready without it");
            assert!(refused.unwrap_err().contains("clients outside of this node are not served"));
            assert_eq!(attached, Ok(()));
            // The kernel detaches a program when its last reference is gone, which may take a moment.
            for _ in 0..100 {
                if ours("eth0") == 0 {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(["eth0", "cali1"].map(ours), [0, 2], "{mechanism:?}");
        }
    });
}

fn choice(name: &str, role: Role) -> Choice {
    Choice { name: name.to_owned(), role, layer: Layer::L2, near: false, owner: None, reason: String::new() }
}

fn index(name: &str) -> IfIndex {
    let mut ip = std::process::Command::new("ip");
    let output = ip.args(["-o", "link", "show", "dev", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    IfIndex(text.split_once(':').unwrap().0.parse().unwrap())
}

/// Returns the number of our programs that a device runs, by links and by filters.
fn ours(device: &str) -> usize {
    let links = [TcAttachType::Ingress, TcAttachType::Egress].map(|attach_type| {
        SchedClassifier::query_tcx(device, attach_type).map_or(0, |(_, programs)| programs.len())
    });
    let filters = ["ingress", "egress"].map(|direction| {
        let mut tc = std::process::Command::new("tc");
        let output = tc.args(["filter", "show", "dev", device, direction]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().matches("direct-action").count()
    });
    links.into_iter().chain(filters).sum()
}
