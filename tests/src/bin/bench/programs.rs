//! The benchmarks' own BPF object.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use aya::maps::Map;
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};

/// Where xtask says that it has built the object.
const VARIABLE: &str = "VIPR_BENCH_OBJECT";

/// Its programs, none of them loaded, with maps of their own.
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

/// A program of it.
///
/// # Errors
/// If there is none of this name.
pub(crate) fn classifier<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = programs.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// A map of it.
///
/// # Errors
/// If there is none of this name.
pub(crate) fn map<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    programs.map_mut(name).with_context(|| format!("the object has no map {name}"))
}
