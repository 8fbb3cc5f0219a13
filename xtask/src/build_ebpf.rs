//! `build-ebpf`: builds package `proxy-ebpf` for the BPF target and puts the object where the agent's build script
//! looks for it.
//!
//! The package has a target directory of its own, so that building for the host and building for BPF do not invalidate
//! each other. The object is replaced only when its bytes have changed, so that the agent is not rebuilt for nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{run as run_command, say};
use crate::setup;
use crate::workspace;

/// BPF target: little-endian, like every architecture that Vipr runs on.
const TARGET: &str = "bpfel-unknown-none";

/// Architecture for aya's bindings, which define the registers that a program may read. Vipr's programs read none, so
/// one object serves every machine: built for another architecture it has the same code, and only other names in its
/// debug information.
const ARCH: &str = "bpf_target_arch=\"x86_64\"";

/// Name of the agent's programs.
pub(crate) const PROGRAMS: &str = "vipr";
/// Name of the programs for the benchmark of the packet edge, which need the feature [`BENCH_FEATURE`].
pub(crate) const BENCH_PROGRAMS: &str = "vipr-bench";
/// Feature that [`BENCH_PROGRAMS`] need.
pub(crate) const BENCH_FEATURE: &str = "bench";

/// Arguments of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Log every decision through a perf buffer. For debugging a datapath; never ship such an object.
    #[arg(long)]
    pub(crate) debug_log: bool,
}

/// Builds the BPF object.
///
/// # Errors
/// When the toolchain is missing and cannot be installed, or the build fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    let features = if args.debug_log { "debug-log" } else { "" };
    build(PROGRAMS, features, &workspace::ebpf_object())
}

/// Builds the programs that the benchmark of the packet edge measures with, and returns the path of their object.
/// Nothing that is shipped contains it.
///
/// # Errors
/// When the toolchain is missing and cannot be installed, or the build fails.
pub(crate) fn bench() -> Result<PathBuf> {
    let object = workspace::ebpf_object().with_file_name("vipr-bench.o");
    build(BENCH_PROGRAMS, BENCH_FEATURE, &object)?;
    Ok(object)
}

fn build(programs: &str, features: &str, object: &Path) -> Result<()> {
    run_command(cargo("build", programs)?.args(["--features", features]))?;
    let built = build_dir().join(TARGET).join("ebpf").join(programs);
    let how = if install(&built, object)? { "written" } else { "unchanged" };
    say(&format!("BPF object {how}: {}", object.display()));
    Ok(())
}

/// Returns `cargo <subcommand>` on `programs` for the BPF target, with the linker and flags that an object needs.
///
/// # Errors
/// When the toolchain or the linker is missing and cannot be installed.
pub(crate) fn cargo(subcommand: &str, programs: &str) -> Result<Command> {
    let (toolchain, linker) = setup::build(setup::quiet)?;
    say(&format!("BPF target with {toolchain} and {}", linker.display()));
    let flags = [
        "--cfg".to_owned(),
        ARCH.to_owned(),
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
    ];
    let mut cargo = toolchain.cargo(subcommand);
    cargo
        .args(["--package", "proxy-ebpf", "--bin", programs, "--profile", "ebpf"])
        .args(["--target", TARGET, "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(build_dir())
        // Flags are separated by 0x1f, so that paths may contain spaces.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(cargo)
}

fn build_dir() -> PathBuf {
    workspace::target_dir().join("ebpf-build")
}

/// Copies `built` to `object` if they differ, and returns whether they did.
fn install(built: &Path, object: &Path) -> Result<bool> {
    let bytes =
        fs::read(built).with_context(|| format!("cannot read the built object {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let dir = object.parent().context("the object has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    // Renamed into place: a build of the agent at the same time reads either the old object or the new one, never half
    // of one.
    let beside = object.with_extension("o.new");
    fs::write(&beside, &bytes).with_context(|| format!("cannot write {}", beside.display()))?;
    fs::rename(&beside, object).with_context(|| format!("cannot write {}", object.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("vipr-xtask-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (built, object) = (dir.join("vipr"), dir.join("ebpf/vipr.o"));
        fs::write(&built, b"one").unwrap();
        let first = install(&built, &object).unwrap();
        let second = install(&built, &object).unwrap();
        fs::write(&built, b"two").unwrap();
        let third = install(&built, &object).unwrap();
        let content = fs::read(&object).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!((first, second, third, content.as_slice()), (true, false, true, b"two".as_slice()));
    }
}
