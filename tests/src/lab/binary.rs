//! Finding the executables that the lab runs.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};

/// Returns the program that serves and connects inside pods: `$VIPR_LAB_POD`, else beside this executable.
///
/// # Errors
/// With the command that builds it, if it is missing.
pub fn lab_pod() -> Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    cached(&FOUND, "lab-pod", "VIPR_LAB_POD", "cargo build -p proxy-tests --bins")
}

/// Returns the agent: `$VIPR_AGENT`, else beside this executable or in another profile's directory of the same target
/// directory.
///
/// # Errors
/// With the command that builds it, if it is missing.
pub fn proxy_agent() -> Result<&'static Path> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    cached(&FOUND, "proxy-agent", "VIPR_AGENT", "cargo build -p proxy-agent")
}

fn cached(
    cell: &'static OnceLock<PathBuf>,
    name: &str,
    variable: &str,
    build: &str,
) -> Result<&'static Path> {
    if let Some(path) = cell.get() {
        return Ok(path);
    }
    let found =
        find(name, variable).with_context(|| format!("build it with `{build}`, or set {variable}"))?;
    Ok(cell.get_or_init(|| found))
}

fn find(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable).map(PathBuf::from) {
        if path.is_file() {
            return Ok(path);
        }
        bail!("{variable} names {}, which is not a file", path.display());
    }
    // Tests run from target/PROFILE/deps, programs from target/PROFILE.
    let own = env::current_exe().context("cannot tell the path of this executable")?;
    let above = own.ancestors().skip(1).take(3);
    let candidates =
        above.flat_map(|dir| [dir.join(name), dir.join("release").join(name), dir.join("debug").join(name)]);
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} near {}", own.display()))
}
