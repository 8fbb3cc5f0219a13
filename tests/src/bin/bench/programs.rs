//! The benchmarks' own BPF object.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use aya::maps::Map;
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};

/// Environment variable in which xtask passes the path of the object.
const VARIABLE: &str = "VIPR_BENCH_OBJECT";

/// Returns the object's programs, none of them loaded, with maps of their own.
///
/// # Errors
/// If the object is missing or cannot be parsed.
pub(crate) fn own_programs() -> Result<Ebpf> {
    let path = std::env::var_os(VARIABLE)
        .with_context(|| format!("{VARIABLE} is not set; run this as `cargo xtask bench ...`"))?;
    let path = PathBuf::from(path);
    ensure!(path.is_file(), "{VARIABLE} names {}, which is not a file", path.display());
    let mut loader = EbpfLoader::new();
    loader.btf(None).load_file(&path).with_context(|| format!("cannot load {}", path.display()))
}

/// Returns a program of the object.
///
/// # Errors
/// If no program has this name.
pub(crate) fn classifier<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = programs.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// Returns a map of the object.
///
/// # Errors
/// If no map has this name.
pub(crate) fn map<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    programs.map_mut(name).with_context(|| format!("the object has no map {name}"))
}
