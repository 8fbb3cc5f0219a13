//! Finds the compiler for the BPF target and the linker that goes with it. This module only looks: [`crate::setup`]
//! installs.
//!
//! Building for BPF needs `core` from source, hence a compiler that accepts `-Z` flags and the library source of
//! exactly that compiler. `RUSTC_BOOTSTRAP` makes a stable compiler accept `-Z` flags, so there are two ways to the
//! same release of it:
//!
//! - rustup's [`PINNED`] with the component `rust-src`, in a directory of Vipr's own;
//! - Debian's packages `rustc-web cargo-web rust-web-src`.
//!
//! The user's own toolchains are neither used nor changed, unless [`CHOICE`] names one: another compiler generates
//! other code, and only this compiler's code has been tried on every kernel.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process;
use crate::workspace;

/// Version of bpf-linker that `setup` builds, and the only one that is accepted from `PATH`.
pub(crate) const BPF_LINKER: &str = "0.13.0";

/// Major version of the LLVM that bpf-linker is built with. It cannot read the bitcode of a compiler with a newer LLVM.
pub(crate) const LLVM: u32 = 22;

/// Directory of that LLVM in Debian.
pub(crate) const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Release of Rust that builds the BPF object where rustup provides it. Debian's packages have the same release.
pub(crate) const PINNED: &str = "1.96.0";

/// Version of cargo-deny that `setup` builds. Any version on `PATH` is accepted.
pub(crate) const CARGO_DENY: &str = "0.20.2";

/// Oldest compiler that the workspace builds with: `rust-version` of the workspace.
const OLDEST_RUSTC: (u32, u32) = (1, 95);

/// Environment variable that chooses the compiler: `pinned`, `debian`, or the name of one of the user's rustup
/// toolchains.
pub(crate) const CHOICE: &str = "VIPR_EBPF_TOOLCHAIN";

/// A compiler that can build for BPF, with its library source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// [`PINNED`], installed by rustup beside the user's toolchains.
    Pinned,
    /// A toolchain of the user's, by its name in rustup.
    Rustup(String),
    /// Debian's packages.
    Debian,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned => write!(f, "Rust {PINNED}"),
            Self::Rustup(name) => write!(f, "rustup's {name}"),
            Self::Debian => f.write_str("Debian's rustc-web"),
        }
    }
}

impl Toolchain {
    /// Returns the toolchain that [`CHOICE`] asks for, if any.
    pub(crate) fn chosen() -> Option<Self> {
        let choice = env::var(CHOICE).ok().filter(|choice| !choice.is_empty())?;
        Some(match choice.as_str() {
            "pinned" => Self::Pinned,
            "debian" => Self::Debian,
            _ => Self::Rustup(choice),
        })
    }

    /// Checks that this toolchain can build the BPF object.
    ///
    /// # Errors
    /// With the reason why it cannot.
    pub(crate) fn check(&self) -> Result<()> {
        let version = process::output(self.program("rustc").arg("-vV"))?;
        check_version(&version)?;
        let sysroot = process::output(self.program("rustc").args(["--print", "sysroot"]))?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        if !core.is_file() {
            bail!("library source is missing ({})", core.display());
        }
        process::output(self.program("cargo").arg("--version"))?;
        Ok(())
    }

    /// Returns `cargo <subcommand>` of this toolchain, started in the workspace's root, with `-Z` flags allowed.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        // clippy is started as cargo-clippy: cargo would look for it on PATH, where another toolchain's may come first.
        let mut cargo = self.program(if subcommand == "clippy" { "cargo-clippy" } else { "cargo" });
        cargo.arg(subcommand).current_dir(workspace::root()).env("RUSTC_BOOTSTRAP", "1");
        if *self == Self::Debian {
            cargo.env("CARGO", "/usr/bin/cargo").env("RUSTC", "/usr/bin/rustc");
        }
        cargo
    }

    /// Returns whether this toolchain has clippy.
    pub(crate) fn has_clippy(&self) -> bool {
        process::output(self.program("cargo-clippy").arg("--version")).is_ok()
    }

    /// Returns a program of this toolchain, without the variables that `cargo run` and rustup set for xtask's own
    /// toolchain.
    fn program(&self, name: &str) -> Command {
        let mut command = match self {
            Self::Pinned => {
                let mut command = Command::new("rustup");
                command.env("RUSTUP_HOME", pinned_home()).args(["run", PINNED, name]);
                command
            }
            Self::Rustup(toolchain) => {
                let mut command = Command::new("rustup");
                command.args(["run", toolchain, name]);
                command
            }
            Self::Debian => Command::new(Path::new("/usr/bin").join(name)),
        };
        for variable in ["LD_LIBRARY_PATH", "RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC", "CARGO", "RUST_BACKTRACE"]
        {
            command.env_remove(variable);
        }
        // Looking for a toolchain must not install one.
        command.env("RUSTUP_AUTO_INSTALL", "0");
        command
    }
}

/// Returns the directory of a rustup home for Vipr alone, so that the user's toolchains and settings do not change.
/// `cargo clean` removes it.
pub(crate) fn pinned_home() -> PathBuf {
    workspace::tools_dir().join("rustup")
}

/// Checks the version that `rustc -vV` printed.
fn check_version(verbose: &str) -> Result<()> {
    let release = process::field(verbose, "release: ").context("rustc does not say its version")?;
    let mut numbers = release.split(['.', '-']).map(str::parse);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => bail!("rustc's version {release:?} is not understood"),
    };
    if version < OLDEST_RUSTC {
        bail!("rustc {release} is older than {}.{}", OLDEST_RUSTC.0, OLDEST_RUSTC.1);
    }
    let llvm: u32 = process::field(verbose, "LLVM version: ")
        .and_then(|llvm| llvm.split('.').next()?.parse().ok())
        .context("rustc does not say which LLVM it has")?;
    if llvm > LLVM {
        bail!("its LLVM {llvm} is newer than bpf-linker's {LLVM}; name an older toolchain in {CHOICE}");
    }
    Ok(())
}

/// Returns bpf-linker of version [`BPF_LINKER`], from the tools directory or `PATH`.
///
/// # Errors
/// When that version is not found.
pub(crate) fn bpf_linker() -> Result<PathBuf> {
    let found = workspace::find_program("bpf-linker");
    let Some(linker) = found else {
        bail!("bpf-linker {BPF_LINKER} is not installed");
    };
    // bpf-linker also fails to start when the LLVM that it was linked with has been removed.
    let version = process::output(Command::new(&linker).arg("--version"))?;
    if version.split_whitespace().nth(1) != Some(BPF_LINKER) {
        bail!("{} is {}, not {BPF_LINKER}", linker.display(), version.trim());
    }
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(release: &str, llvm: &str) -> Result<(), String> {
        let verbose =
            format!("rustc {release} (abc)\nbinary: rustc\nrelease: {release}\nLLVM version: {llvm}\n");
        check_version(&verbose).map_err(|error| error.to_string())
    }

    #[test]
    fn versions_are_judged_by_release_and_llvm() {
        assert_eq!(check("1.95.0", "22.1.2"), Ok(()));
        assert_eq!(check("1.97.0-nightly", "22.1.4"), Ok(()));
        assert_eq!(check("1.96.0", "21.0.0"), Ok(()));
        assert!(check("1.85.0", "19.1.0").unwrap_err().contains("older than 1.95"));
        assert!(check("1.99.0-nightly", "23.0.0").unwrap_err().contains("LLVM 23 is newer"));
        assert!(check("odd", "22").unwrap_err().contains("not understood"));
        assert!(check_version("rustc").is_err());
    }
}
