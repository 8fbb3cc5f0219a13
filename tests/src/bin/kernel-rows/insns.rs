//! Programs in the kernel: which use the node's maps, and how many instructions the verifier walked through where the kernel
//! does not tell.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use aya::maps::MapInfo;
use aya::programs::{CgroupSockAddr, Program, ProgramError, loaded_programs};
use aya::{EbpfLoader, VerifierLogLevel};
use proxy_agent::bpf::dataplane::OBJECT;
use proxy_agent::bpf::pins::{MAPS, PinDir};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::row::say;
use super::world::World;

/// Names of the programs that use the pinned maps.
pub(super) fn names(pins: &Path) -> Result<BTreeSet<String>> {
    Ok(using(trace(pins)?))
}

/// Number of the pinned map that every program uses.
pub(super) fn trace(pins: &Path) -> Result<u32> {
    Ok(MapInfo::from_pin(PinDir::new(pins).map("TRACE"))?.id())
}

/// Names of the programs that use a map.
pub(super) fn using(map: u32) -> BTreeSet<String> {
    // Programs come and go.
    let programs = loaded_programs().flatten();
    let users = programs.filter(|info| info.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&map)));
    users.filter_map(|info| info.name_as_str().map(str::to_owned)).collect()
}

/// Runs [`print`] in a process of its own, for what it does to that.
pub(super) fn by_log(world: &World) -> Result<BTreeMap<String, u32>> {
    let mut command = world.host().command(std::env::current_exe()?);
    command.arg("--insns").arg(world.node().pin_dir());
    let text = command.text()?;
    let count = |line: &str| -> Option<(String, u32)> {
        let (name, count) = line.strip_prefix("insns ")?.split_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    Ok(text.lines().filter_map(count).collect())
}

/// Has every program verified once more, for the verifier's last words. The log of a program that is loaded is thrown away by
/// the library; so none is: the process may have no further descriptor, which the kernel notices when all is verified.
pub(super) fn print(pins: &Path) -> Result<()> {
    let pins = PinDir::new(pins);
    let mut loader = EbpfLoader::new();
    // As the agent sets them on a kernel that does not tell: see `Dataplane::open` and `TcPrograms::open`.
    loader.btf(None).verifier_log_level(VerifierLogLevel::STATS);
    let paths = MAPS.map(|spec| (spec.name, pins.map(spec.name)));
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    let mut programs = loader.load(OBJECT)?;
    let enough = getrlimit(Resource::Nofile);
    for (name, program) in programs.programs_mut() {
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: enough.maximum })?;
        let result = match program {
            Program::CgroupSock(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            program => <&mut CgroupSockAddr>::try_from(program)?.load(),
        };
        setrlimit(Resource::Nofile, enough.clone())?;
        let Err(ProgramError::LoadError { verifier_log, .. }) = result else { bail!("{name} was loaded") };
        let log = verifier_log.to_string();
        let count = log.split_once("processed ").and_then(|(_, rest)| rest.split(' ').next());
        say(&format!("insns {name} {}", count.with_context(|| format!("{name}: {log}"))?));
    }
    Ok(())
}
