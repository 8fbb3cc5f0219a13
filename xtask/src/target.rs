//! The target of a release build: this machine, or another machine of an architecture that Vipr runs on.

use std::env;
use std::fmt;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// Names of each architecture: Rust's, and the one that Debian, Go and Kubernetes use.
const ARCHITECTURES: [(&str, &str); 2] = [("x86_64", "amd64"), ("aarch64", "arm64")];

/// A target of release builds. Programs are linked statically; everything that they need, except a C compiler, comes
/// with Rust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    arch: &'static str,
    /// `gnu` or `musl`.
    libc: &'static str,
    /// Whether the target's programs run on this machine's CPU.
    native: bool,
}

impl fmt::Display for Target {
    /// Writes the target's name in rustc and cargo.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-unknown-linux-{}", self.arch, self.libc)
    }
}

impl Target {
    /// Returns the target called `wanted`, an architecture or one of rustc's names; without `wanted`, this machine's
    /// target.
    ///
    /// # Errors
    /// When Vipr does not run on that target, or this machine cannot build for it.
    pub(crate) fn new(wanted: Option<&str>) -> Result<Self> {
        ensure!(
            cfg!(target_os = "linux") && cfg!(target_env = "gnu"),
            "release builds are made on a GNU/Linux machine"
        );
        Self::named(wanted.unwrap_or(env::consts::ARCH), env::consts::ARCH)
    }

    fn named(wanted: &str, host: &str) -> Result<Self> {
        let (name, libc) = match wanted.split_once("-unknown-linux-") {
            Some((name, libc)) => (name, Some(libc)),
            None => (wanted, None),
        };
        let Some((arch, _)) =
            ARCHITECTURES.into_iter().find(|(rust, debian)| [rust, debian].contains(&&name))
        else {
            bail!(
                "Vipr runs on x86_64 and aarch64, not on {name}; what is in its maps and packets is read as \
                 little-endian, so no big-endian machine can run it"
            );
        };
        let native = arch == host;
        let libc = match libc {
            // On this machine glibc, which also links statically, needs no installation; for another machine musl needs
            // less.
            Some("gnu") | None if native => "gnu",
            Some("musl") | None => "musl",
            Some(_) => {
                bail!("release builds for another machine are made with musl: {arch}-unknown-linux-musl")
            }
        };
        Ok(Self { arch, libc, native })
    }

    /// Returns whether programs are built for this machine with only the tools that every build needs.
    pub(crate) fn is_own(&self) -> bool {
        self.native && self.libc == "gnu"
    }

    /// Returns the C compiler that builds and links programs of this target.
    pub(crate) fn compiler(&self) -> String {
        if self.native { "cc".to_owned() } else { format!("{}-linux-gnu-gcc", self.arch) }
    }

    /// Returns Debian's packages of that compiler and of C's header files for it.
    pub(crate) fn compiler_packages(&self) -> [String; 2] {
        if self.native {
            return ["gcc", "libc6-dev"].map(str::to_owned);
        }
        let debian =
            ARCHITECTURES.iter().find(|(rust, _)| *rust == self.arch).map_or(self.arch, |names| names.1);
        [format!("gcc-{}-linux-gnu", self.arch.replace('_', "-")), format!("libc6-dev-{debian}-cross")]
    }

    /// Makes `cargo` build for this target.
    ///
    /// # Errors
    /// When an environment variable to which flags are added is not UTF-8.
    pub(crate) fn apply(&self, cargo: &mut Command) -> Result<()> {
        let triple = self.to_string();
        // With --target, the flag reaches only the programs of the target, not procedural macros, which cannot be
        // static.
        let flags = match env::var("RUSTFLAGS") {
            Ok(flags) => flags,
            Err(env::VarError::NotPresent) => String::new(),
            Err(error) => return Err(error).context("RUSTFLAGS"),
        };
        cargo
            .args(["--target", &triple])
            .env("RUSTFLAGS", format!("{flags} -C target-feature=+crt-static").trim_start());
        if !self.is_own() {
            let variable = triple.replace('-', "_");
            let compiler = self.compiler();
            cargo
                .env(format!("CC_{variable}"), &compiler)
                .env(format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), &compiler);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_many_names() {
        check("x86_64", "x86_64", "x86_64-unknown-linux-gnu", "cc");
        check("amd64", "x86_64", "x86_64-unknown-linux-gnu", "cc");
        check("aarch64", "x86_64", "aarch64-unknown-linux-musl", "aarch64-linux-gnu-gcc");
        check("arm64", "aarch64", "aarch64-unknown-linux-gnu", "cc");
        check("amd64", "aarch64", "x86_64-unknown-linux-musl", "x86_64-linux-gnu-gcc");
        check("x86_64-unknown-linux-musl", "x86_64", "x86_64-unknown-linux-musl", "cc");
    }

    fn check(wanted: &str, host: &str, triple: &str, compiler: &str) {
        let target = Target::named(wanted, host).unwrap();
        assert_eq!((target.to_string(), target.compiler()), (triple.to_owned(), compiler.to_owned()));
        assert_eq!(Target::named(triple, host).unwrap(), target);
    }

    #[test]
    fn cross_compilers_have_debian_s_names() {
        assert_eq!(packages("aarch64", "x86_64"), ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"]);
        assert_eq!(packages("x86_64", "aarch64"), ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"]);
    }

    fn packages(wanted: &str, host: &str) -> [String; 2] {
        Target::named(wanted, host).unwrap().compiler_packages()
    }

    #[test]
    fn other_targets_are_refused_with_what_is_possible() {
        for wanted in ["s390x", "powerpc64-unknown-linux-gnu", "aarch64_be-unknown-linux-gnu", "riscv64gc"] {
            assert!(error(wanted).contains("no big-endian machine"), "{wanted}");
        }
        assert!(error("aarch64-unknown-linux-gnu").contains("aarch64-unknown-linux-musl"));
    }

    fn error(wanted: &str) -> String {
        Target::named(wanted, "x86_64").unwrap_err().to_string()
    }
}
