//! Programs that the kernel refuses, in a kernel. It takes root.

use std::fs;
use std::path::{Path, PathBuf};

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::{Pins, SMALL};
use crate::bpf::dataplane::{Dataplane, DataplaneError, FLOW_ENTRIES, OBJECT, Sizes};
use crate::bpf::pins::PinDir;
use crate::bpf::tc::{PROGRAMS, Pair, TcPrograms};
use crate::node::Host;

const SIZES: Sizes = Sizes { least: SMALL, want: SMALL, flows: FLOW_ENTRIES };

/// The object, with programs that begin with a call of a helper that no kernel has. (The buffer is as aligned as a vector
/// of words.)
fn broken(programs: &[&str]) -> Vec<u64> {
    const CALL: [u8; 8] = [0x85, 0, 0, 0, 0xff, 0xff, 0, 0];
    let file = object::File::parse(OBJECT).unwrap();
    let mut bytes = OBJECT.to_vec();
    for program in programs {
        let symbol = file.symbol_by_name(program).unwrap();
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        let (start, _) = section.file_range().unwrap();
        let at = usize::try_from(start + symbol.address()).unwrap();
        // The first two instructions copy the context, or set a register: nothing that a relocation changes.
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
    let there = |program: &str| pins.0.link(program).exists();
    assert!(there("sendmsg6") && there("connect6"));
    let object = broken(&["sendmsg6"]);
    let mut broken =
        Dataplane::open_object(bytemuck::cast_slice(&object), pins.0.clone(), SIZES, drop).unwrap();
    broken.attach(&served.0).unwrap();
    assert!(!there("sendmsg6") && !there("recvmsg6") && there("connect6") && there("sendmsg4"));
}

/// A cgroup that goes when it is dropped.
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
fn a_pair_is_attached_whole_or_not_at_all() {
    let pins = pins("pair");
    let _maps = Dataplane::open(pins.0.clone(), SIZES, drop).unwrap();
    let object = broken(&["edge_ingress"]);
    let mut programs = TcPrograms::open_object(bytemuck::cast_slice(&object), &pins.0, false).unwrap();
    programs.load(&PROGRAMS);
    assert_eq!(programs.refused().into_keys().collect::<Vec<_>>(), ["edge_ingress"]);
    let error = programs.check(Pair::Edge).unwrap_err().to_string();
    assert!(error.contains("clients outside of this node are not served"), "{error}");
    programs.check(Pair::Pod).unwrap();
}
