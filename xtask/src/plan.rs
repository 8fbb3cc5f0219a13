//! Plan of `setup`: the packages and tools to install, decided from those that are present, and printed before anything
//! is fetched.

use std::fmt;

use anyhow::{Result, bail};

use crate::toolchain::{BPF_LINKER, CARGO_DENY, CHOICE, LLVM, PINNED, Toolchain};

/// Debian's packages of a compiler for the BPF target.
pub(crate) const DEBIAN_RUST: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// Way to a compiler for the BPF target.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// A compiler that is present.
    Found(Toolchain),
    /// Candidates: the first one that can be installed is.
    Install(Vec<Toolchain>),
}

impl Compiler {
    /// Decides from the user's choice, the result of `check` for a toolchain, and the installers that are present.
    ///
    /// # Errors
    /// When there is no way to a compiler; the error says what the user can do.
    pub(crate) fn choose(
        chosen: Option<Toolchain>,
        check: impl Fn(&Toolchain) -> Result<()>,
        rustup: bool,
        apt: bool,
    ) -> Result<Self> {
        let candidates = match chosen {
            Some(chosen) => vec![chosen],
            None => vec![Toolchain::Pinned, Toolchain::Debian],
        };
        let mut reasons = Vec::new();
        for candidate in &candidates {
            match check(candidate) {
                Ok(()) => return Ok(Self::Found(candidate.clone())),
                Err(reason) => reasons.push(format!("{candidate}: {reason:#}")),
            }
        }
        if let [Toolchain::Rustup(name)] = candidates.as_slice() {
            bail!(
                "{CHOICE} names a compiler that cannot be used ({}); toolchains of yours are not changed: \
                 `rustup toolchain install {name} --component rust-src` may mend it, or leave {CHOICE} unset",
                reasons.join("; ")
            );
        }
        let ways: Vec<_> = candidates
            .into_iter()
            .filter(|toolchain| match toolchain {
                Toolchain::Pinned => rustup,
                Toolchain::Debian => apt,
                Toolchain::Rustup(_) => false,
            })
            .collect();
        if ways.is_empty() {
            bail!(
                "no compiler for the BPF target ({}), and neither rustup nor apt to install one: install rustup \
                 (https://rustup.rs), or name a toolchain with rust-src in {CHOICE}",
                reasons.join("; ")
            );
        }
        Ok(Self::Install(ways))
    }
}

/// Everything that is missing, and how each part is installed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Ways to a compiler for the BPF target; none if there is one.
    pub(crate) compiler: Vec<Toolchain>,
    /// Debian's packages, each with its purpose.
    pub(crate) packages: Vec<(&'static str, &'static str)>,
    /// Whether bpf-linker is built.
    pub(crate) bpf_linker: bool,
    /// Whether cargo-deny is built.
    pub(crate) cargo_deny: bool,
    /// Whether the BPF filesystem is mounted.
    pub(crate) bpffs: bool,
}

impl Plan {
    /// Returns whether nothing is missing.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("missing, and installed now:")?;
        for (index, toolchain) in self.compiler.iter().enumerate() {
            let how = match toolchain {
                Toolchain::Pinned => {
                    format!(
                        "by rustup into target/tools, beside your toolchains (Rust {PINNED}, 130 MB to fetch)"
                    )
                }
                Toolchain::Debian => {
                    format!("by apt, for the whole machine ({}, 145 MB to fetch)", DEBIAN_RUST.join(" "))
                }
                Toolchain::Rustup(_) => continue,
            };
            let what = if index == 0 { "a compiler for the BPF target," } else { "  or, if that fails," };
            write!(f, "\n  - {what} {how}")?;
        }
        if !self.packages.is_empty() {
            f.write_str("\n  - by apt, for the whole machine:")?;
            for (package, purpose) in &self.packages {
                write!(f, "\n      {package} ({purpose})")?;
            }
        }
        if self.bpf_linker {
            write!(
                f,
                "\n  - bpf-linker {BPF_LINKER}, built with LLVM {LLVM} into target/tools (a CPU minute)"
            )?;
        }
        if self.cargo_deny {
            write!(f, "\n  - cargo-deny {CARGO_DENY}, built into target/tools (two CPU minutes)")?;
        }
        if self.bpffs {
            f.write_str("\n  - the BPF filesystem, mounted at /sys/fs/bpf until the next boot")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `Compiler::choose` where only the toolchains in `there` are usable.
    fn choose(chosen: Option<&str>, there: &[&str], rustup: bool, apt: bool) -> Result<Compiler, String> {
        let usable: Vec<_> = there.iter().map(|name| toolchain(name)).collect();
        let check = |candidate: &Toolchain| {
            if usable.contains(candidate) {
                return Ok(());
            }
            bail!("not there")
        };
        Compiler::choose(chosen.map(toolchain), check, rustup, apt).map_err(|error| error.to_string())
    }

    fn toolchain(name: &str) -> Toolchain {
        match name {
            "pinned" => Toolchain::Pinned,
            "debian" => Toolchain::Debian,
            name => Toolchain::Rustup(name.to_owned()),
        }
    }

    #[test]
    fn what_is_there_is_used_and_nothing_of_the_user_s() {
        assert_eq!(choose(None, &["pinned", "debian"], true, true), found(Toolchain::Pinned));
        assert_eq!(choose(None, &["debian"], true, true), found(Toolchain::Debian));
        // The user's nightly may be of any day, so it is not used unless chosen.
        let install = Compiler::Install(vec![Toolchain::Pinned, Toolchain::Debian]);
        assert_eq!(choose(None, &["nightly"], true, true), Ok(install));
        let nightly = Toolchain::Rustup("nightly".to_owned());
        assert_eq!(choose(Some("nightly"), &["nightly", "pinned"], true, true), found(nightly));
    }

    fn found(toolchain: Toolchain) -> Result<Compiler, String> {
        Ok(Compiler::Found(toolchain))
    }

    #[test]
    fn what_is_missing_comes_beside_the_user_s_or_from_debian() {
        assert_eq!(choose(None, &[], true, false), install(&[Toolchain::Pinned]));
        assert_eq!(choose(None, &[], false, true), install(&[Toolchain::Debian]));
        assert_eq!(choose(Some("debian"), &["pinned"], true, true), install(&[Toolchain::Debian]));
        assert!(choose(None, &[], false, false).unwrap_err().contains("https://rustup.rs"));
        assert!(choose(Some("debian"), &["pinned"], true, false).is_err());
    }

    fn install(ways: &[Toolchain]) -> Result<Compiler, String> {
        Ok(Compiler::Install(ways.to_vec()))
    }

    #[test]
    fn a_toolchain_of_the_user_s_is_never_installed() {
        let error = choose(Some("nightly"), &["pinned", "debian"], true, true).unwrap_err();
        assert!(error.contains("rustup toolchain install nightly --component rust-src"), "{error}");
    }

    #[test]
    fn everything_is_told_at_once() {
        let plan = Plan {
            compiler: vec![Toolchain::Pinned, Toolchain::Debian],
            packages: vec![("bpftool", "prints maps")],
            bpf_linker: true,
            cargo_deny: true,
            bpffs: true,
        };
        let told = plan.to_string();
        for word in ["Rust 1.96.0", "rustc-web", "bpftool", "bpf-linker 0.13.0", "cargo-deny", "/sys/fs/bpf"]
        {
            assert!(told.contains(word), "{word} in {told}");
        }
        assert!(!plan.is_empty() && Plan::default().is_empty());
    }
}
