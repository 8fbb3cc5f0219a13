//! The kernels and machines of the ring, and the names that Debian, Rust and QEMU give them.

use std::env;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::workspace;

/// A kernel of the ring, named by its first two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kernel {
    V5_10,
    V6_1,
    V6_12,
    Newest,
}

impl Kernel {
    pub(super) const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// Returns the suite of Debian that has the kernel.
    pub(super) fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Newest => "sid",
        }
    }

    /// Returns the kernels that `word` names.
    pub(super) fn named(word: &str) -> Option<Vec<Self>> {
        if word == "all" {
            return Some(Self::ALL.to_vec());
        }
        Self::ALL.into_iter().find(|kernel| kernel.name() == word).map(|kernel| vec![kernel])
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An architecture, as Rust calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Machine {
    X86_64,
    Aarch64,
}

/// Values of `--arch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
    All,
}

impl Arch {
    pub(super) fn machines(self) -> Vec<Machine> {
        match self {
            Self::X86_64 => vec![Machine::X86_64],
            Self::Aarch64 => vec![Machine::Aarch64],
            Self::All => vec![Machine::X86_64, Machine::Aarch64],
        }
    }
}

impl Machine {
    /// Returns the machine that this program runs on.
    ///
    /// # Errors
    /// When the ring does not know this machine's architecture.
    pub(crate) fn host() -> Result<Self> {
        match env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
        .context("say by --arch which machine the kernels are for: x86_64 or aarch64")
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Returns Debian's name of the architecture.
    pub(super) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Returns the program that emulates the machine, and the package that contains it.
    pub(crate) fn qemu(self) -> (&'static str, &'static str) {
        match self {
            Self::X86_64 => ("qemu-system-x86_64", "qemu-system-x86"),
            Self::Aarch64 => ("qemu-system-aarch64", "qemu-system-arm"),
        }
    }

    /// Returns QEMU's options for the board. On an emulated aarch64, pointer authentication takes most of the kernel's
    /// time unless QEMU's own algorithm is used. An emulated x86_64 is slow at copies by `rep movs` (see
    /// [`Machine::kernel_options`]): its processor does not announce that they are fast.
    pub(super) fn board(self, kvm: bool) -> [&'static str; 4] {
        match (self, kvm) {
            (Self::X86_64, true) => ["-M", "q35", "-cpu", "max"],
            (Self::X86_64, false) => ["-M", "q35", "-cpu", "max,-erms,-fsrm"],
            (Self::Aarch64, true) => ["-M", "virt", "-cpu", "max"],
            (Self::Aarch64, false) => ["-M", "virt", "-cpu", "max,pauth-impdef=on"],
        }
    }

    /// Returns options of the kernel's command line that this machine needs. An emulated x86_64 runs `rep movs` one
    /// element at a time, and Linux takes it for every copy where the processor has `rep_good` (feature 112, word 3 bit
    /// 16, of arch/x86/include/asm/cpufeatures.h; named by number, since 5.10 knows no names here). Without it the
    /// verifier, which copies much, takes a quarter less time.
    pub(super) fn kernel_options(self, kvm: bool) -> &'static str {
        match (self, kvm) {
            (Self::X86_64, false) => " clearcpuid=112",
            _ => "",
        }
    }

    /// Returns the device of the first serial line.
    pub(super) fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 => "ttyAMA0",
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Returns the directory of packages, initramfs and logs.
pub(super) fn dir() -> PathBuf {
    workspace::target_dir().join("kernels")
}
