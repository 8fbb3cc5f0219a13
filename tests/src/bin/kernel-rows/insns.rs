//! Programs in the kernel: those that use the node's maps, and the number of instructions that the verifier processed,
//! for kernels that do not report it.

use proxy_common::abi::maps;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result};
use aya::maps::{MapFd, MapInfo, loaded_maps};
use aya::programs::{ProgramInfo, loaded_programs};
use aya_obj::Object;
use aya_obj::generated::bpf_attach_type::{self, *};
use aya_obj::generated::bpf_prog_type::{self, *};
use proxy_agent::bpf::dataplane;
use proxy_agent::bpf::dataplane::OBJECT;
use proxy_agent::bpf::pins::PinDir;
use proxy_agent::bpf::tc;

use super::sys;

/// Returns the names of the programs that use the pinned maps.
pub(super) fn names(pins: &Path) -> Result<BTreeSet<String>> {
    Ok(using(trace(pins)?))
}

/// Returns the id of the pinned map that every program uses.
pub(super) fn trace(pins: &Path) -> Result<u32> {
    Ok(MapInfo::from_pin(PinDir::new(pins).map(maps::TRACE))?.id())
}

/// Returns the names of the programs that use a map.
pub(super) fn using(map: u32) -> BTreeSet<String> {
    users(map).filter_map(|info| info.name_as_str().map(str::to_owned)).collect()
}

fn users(map: u32) -> impl Iterator<Item = ProgramInfo> {
    // Programs may be unloaded meanwhile.
    let programs = loaded_programs().flatten();
    programs.filter(move |info| info.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&map)))
}

/// Has every program verified once more, with the maps of the running programs, and reads the statistics in the
/// verifier's log: the agent's library discards the log of an accepted program.
pub(super) fn by_log(pins: &Path) -> Result<BTreeMap<String, u32>> {
    let maps = maps(pins)?;
    let mut object = Object::parse(OBJECT)?;
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    let defined = object.maps.clone();
    let known =
        defined.iter().filter_map(|(name, map)| Some((name.as_str(), maps.get(in_kernel(name))?, map)));
    object.relocate_maps(known.map(|(name, fd, map)| (name, fd.as_fd().as_raw_fd(), map)), &text)?;
    object.relocate_calls(&text)?;
    let count = |name: &str| -> Result<u32> {
        let program = object.programs.get(name).context("no such program")?;
        let function = object.functions.get(&program.function_key()).context("a program without code")?;
        let (kind, hook) = kind(name);
        let log = sys::verify(kind, hook, &function.instructions, &program.license)?;
        let count = log.split_once("processed ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        count.with_context(|| log.clone())
    };
    let names = dataplane::PROGRAMS.into_iter().chain(tc::PROGRAMS);
    // One thread for each program.
    thread::scope(|scope| {
        let count = &count;
        let threads: Vec<_> = names.map(|name| (name, scope.spawn(move || count(name)))).collect();
        let joined = threads.into_iter().map(|(name, thread)| {
            let count = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok((name.to_owned(), count.with_context(|| name.to_owned())?))
        });
        joined.collect()
    })
}

/// Cuts a name to the length that the kernel keeps.
fn in_kernel(name: &str) -> &str {
    &name[..name.len().min(15)]
}

/// Returns the maps of the running programs by name. The loader's settings are also a map. If there are two such maps,
/// the one for socket programs is taken; on the kernels concerned it equals the one for devices with a MAC header.
fn maps(pins: &Path) -> Result<BTreeMap<String, MapFd>> {
    let (mut first, mut others) = (BTreeSet::new(), BTreeSet::new());
    for info in users(trace(pins)?) {
        let ids = info.map_ids()?.unwrap_or_default();
        if info.name_as_str() == Some("connect4") { &mut first } else { &mut others }.extend(ids);
    }
    let mut maps = BTreeMap::new();
    let loaded: Vec<MapInfo> = loaded_maps().flatten().collect();
    for ids in [first, others] {
        for info in loaded.iter().filter(|info| ids.contains(&info.id())) {
            let name = info.name_as_str().unwrap_or_default().to_owned();
            if let std::collections::btree_map::Entry::Vacant(place) = maps.entry(name) {
                place.insert(info.fd()?);
            }
        }
    }
    Ok(maps)
}

/// Returns the type and the attach type of a program.
fn kind(name: &str) -> (bpf_prog_type, bpf_attach_type) {
    let hook = match name {
        "connect4" => BPF_CGROUP_INET4_CONNECT,
        "connect6" => BPF_CGROUP_INET6_CONNECT,
        "sendmsg4" => BPF_CGROUP_UDP4_SENDMSG,
        "sendmsg6" => BPF_CGROUP_UDP6_SENDMSG,
        "recvmsg4" => BPF_CGROUP_UDP4_RECVMSG,
        "recvmsg6" => BPF_CGROUP_UDP6_RECVMSG,
        "getpeername4" => BPF_CGROUP_INET4_GETPEERNAME,
        "getpeername6" => BPF_CGROUP_INET6_GETPEERNAME,
        "sock_release" => return (BPF_PROG_TYPE_CGROUP_SOCK, BPF_CGROUP_INET_SOCK_RELEASE),
        // The attach type of a packet program is ignored.
        _ => return (BPF_PROG_TYPE_SCHED_CLS, BPF_CGROUP_INET_INGRESS),
    };
    (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook)
}
