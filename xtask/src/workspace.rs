//! Paths: the workspace, its target directory, and programs on `PATH`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process;

/// Returns the workspace's root directory.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Returns cargo's target directory, absolute: `CARGO_TARGET_DIR`, else `target` in the workspace.
///
/// `proxy-agent/build.rs` follows the same rule to find the BPF object.
pub(crate) fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Returns the directory in which `setup` installs the tools it builds. Programs are in its `bin`.
pub(crate) fn tools_dir() -> PathBuf {
    target_dir().join("tools")
}

/// Returns the path of the BPF object that the agent embeds.
pub(crate) fn ebpf_object() -> PathBuf {
    target_dir().join("ebpf").join("vipr.o")
}

/// Returns cargo of the workspace's own toolchain, started in the workspace's root.
///
/// `LD_LIBRARY_PATH` is removed: `cargo run` set it for xtask itself, and another compiler must not inherit it.
pub(crate) fn cargo() -> Command {
    static ELSEWHERE: OnceLock<bool> = OnceLock::new();
    let mut cargo = plain_cargo();
    // CARGO_TARGET_DIR is set only where the user's cargo configuration names another target directory. Build scripts
    // watch the variable and would run again if it were set elsewhere.
    let is_elsewhere =
        || metadata().is_ok_and(|all| all["target_directory"] != *target_dir().to_string_lossy());
    if env::var_os("CARGO_TARGET_DIR").is_some() || *ELSEWHERE.get_or_init(is_elsewhere) {
        cargo.env("CARGO_TARGET_DIR", target_dir());
    }
    cargo
}

fn plain_cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // CARGO_BUILD_TARGET would move the programs to another directory.
    cargo.current_dir(root()).env_remove("LD_LIBRARY_PATH").env_remove("CARGO_BUILD_TARGET");
    cargo
}

fn metadata() -> Result<Value> {
    let metadata = process::output(plain_cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    serde_json::from_str(&metadata).context("cargo metadata is not JSON")
}

/// A member of the workspace.
pub(crate) struct Package {
    /// Its name for `--package`.
    pub(crate) name: String,
    /// Its `Cargo.toml`.
    pub(crate) manifest: PathBuf,
    /// The names of its integration test targets, sorted.
    pub(crate) tests: Vec<String>,
}

/// Returns the members of the workspace, as cargo sees them.
///
/// # Errors
/// When cargo cannot read the workspace.
pub(crate) fn packages() -> Result<Vec<Package>> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    packages.iter().map(|package| read_package(package).context("cargo metadata is incomplete")).collect()
}

fn read_package(package: &Value) -> Option<Package> {
    let is_test =
        |target: &&Value| target["kind"].as_array().is_some_and(|kinds| kinds.contains(&"test".into()));
    let tests = package["targets"].as_array()?.iter().filter(is_test);
    let mut tests: Vec<_> = tests.filter_map(|target| Some(target["name"].as_str()?.to_owned())).collect();
    tests.sort();
    Some(Package {
        name: package["name"].as_str()?.to_owned(),
        manifest: package["manifest_path"].as_str()?.into(),
        tests,
    })
}

/// Finds the first executable called `name` in the tools directory or on `PATH`.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    find_in(tools_dir().join("bin"), &path, name)
}

fn find_in(first: PathBuf, path: &OsStr, name: &str) -> Option<PathBuf> {
    // Debian keeps bpftool and ip in sbin, which an ordinary user's PATH does not contain.
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::iter::once(first)
        .chain(env::split_paths(path))
        .chain(system)
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

/// Returns the executables in `dir` itself.
///
/// # Errors
/// When the directory cannot be read.
pub(crate) fn programs_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.with_context(|| format!("cannot read {}", dir.display()))?;
    Ok(entries.iter().map(fs::DirEntry::path).filter(|path| is_executable(path)).collect())
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns whether this process runs as root.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    // /proc/self belongs to the effective user.
    Path::new("/proc/self").metadata().is_ok_and(|meta| meta.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_the_workspace() {
        let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[workspace]"));
    }

    #[test]
    fn cargo_names_this_package() {
        let packages = packages().unwrap();
        let own = packages.iter().find(|package| package.name == "xtask").unwrap();
        assert_eq!(own.manifest, root().join("xtask/Cargo.toml"));
        assert_eq!(own.tests, Vec::<String>::new());
    }

    #[test]
    fn programs_are_found_in_order_and_only_if_executable() {
        let nowhere = PathBuf::from("/nonexistent");
        assert_eq!(find_in("/bin".into(), OsStr::new("/usr/bin"), "sh"), Some("/bin/sh".into()));
        assert_eq!(find_in(nowhere.clone(), OsStr::new("/nonexistent:/bin"), "sh"), Some("/bin/sh".into()));
        assert_eq!(find_in(nowhere.clone(), OsStr::new(""), "sh"), None);
        assert_eq!(find_in(nowhere, OsStr::new("/etc"), "passwd"), None);
    }
}
