//! `setup`: finds what the other commands need and installs what is missing. It says what it found and what it
//! installs, and it changes the machine only through the system's package manager, rustup, mounting the BPF
//! filesystem, and the tools directory in the target directory.
//!
//! The other commands call the same functions for the parts they need, and those speak only when something is
//! missing: nobody has to know about `setup` to run the demo.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::kernels::{KEYRING, Machine};
use crate::process::{output, run as run_command, say};
use crate::target::Target;
use crate::toolchain::{self, BPF_LINKER, CARGO_DENY, CHOICE, LLVM, Toolchain};
use crate::workspace::{find_program, is_root, tools_dir};

/// Arguments of `setup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to set up.
    #[arg(value_enum, default_values_t = [Part::Build, Part::Lab])]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The compiler and linker for the BPF object.
    Build,
    /// What the demo, the lab tests and the benchmarks use: ip, bpftool, a mounted BPF filesystem.
    Lab,
    /// What `lint` uses: clippy for the BPF target, and cargo-deny (built from source: a minute or two, once).
    Lint,
    /// What `test kernels` uses: QEMU for this machine, and tools to unpack kernels and pack an initramfs.
    Kernels,
}

/// Sets up the parts asked for.
///
/// # Errors
/// When something is missing and cannot be installed.
pub(crate) fn run(args: &Args) -> Result<()> {
    for part in &args.parts {
        match part {
            Part::Build => build(say).map(drop)?,
            Part::Lab => lab(say)?,
            Part::Lint => lint(say)?,
            Part::Kernels => kernels(&[Machine::host()?], say)?,
        }
    }
    say("setup is complete");
    Ok(())
}

/// Called with a line about each thing that is there already: [`say`], or [`quiet`].
type Found = fn(&str);

/// For commands that only want to get on with it.
pub(crate) fn quiet(_: &str) {}

/// The compiler and the linker for the BPF object.
///
/// # Errors
/// When one is missing and cannot be installed.
pub(crate) fn build(found: Found) -> Result<(Toolchain, PathBuf)> {
    Ok((ebpf_toolchain(found)?, bpf_linker(found)?))
}

/// What release programs of another machine are built with: Rust's library for it, and a C compiler, which also links.
///
/// # Errors
/// When one is missing and cannot be installed.
pub(crate) fn target(target: &Target) -> Result<()> {
    if target.is_own() {
        return Ok(());
    }
    let triple = target.to_string();
    let library = output(Command::new("rustc").args(["--print", "target-libdir", "--target", &triple]))?;
    if !Path::new(library.trim()).is_dir() {
        if find_program("rustup").is_none() {
            bail!(
                "rustc has no library for {triple} ({}): install it the way this rustc was installed; with rustup \
                 that is `rustup target add {triple}`",
                library.trim()
            );
        }
        say(&format!("installing Rust's library for {triple} into the toolchain that builds Vipr"));
        run_command(Command::new("timeout").args(["300", "rustup", "target", "add", &triple]))?;
    }
    // A compiler may be there without the header files.
    let compiles = |program: String| {
        output(Command::new(program).args(["-E", "-include", "stdint.h", "-x", "c", "/dev/null"]))
    };
    if compiles(target.compiler()).is_err() {
        let packages = target.compiler_packages();
        apt_install(&packages.each_ref().map(String::as_str), &format!("a C compiler for {triple}"))?;
    }
    Ok(())
}

/// What the demo, the lab tests and the benchmarks use.
///
/// # Errors
/// When a tool is missing and cannot be installed, or the BPF filesystem cannot be mounted.
pub(crate) fn lab(found: Found) -> Result<()> {
    let tools = [("ip", "iproute2"), ("nft", "nftables"), ("bpftool", "bpftool")];
    let missing: Vec<_> = tools.iter().filter(|(program, _)| find_program(program).is_none()).collect();
    if missing.is_empty() {
        found("ip, nft and bpftool: found");
    } else {
        let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
        apt_install(&packages, "network and BPF tools")?;
    }
    mount_bpffs(found)?;
    match find_program("cargo-nextest") {
        Some(nextest) => found(&format!("cargo-nextest: found {}", nextest.display())),
        None => found("cargo-nextest: not found, tests will run with cargo test"),
    }
    Ok(())
}

/// What `lint` uses beyond rustfmt and clippy of the workspace's own toolchain.
///
/// # Errors
/// When something is missing and cannot be installed; clippy for the BPF target may stay missing.
pub(crate) fn lint(found: Found) -> Result<()> {
    let toolchain = ebpf_toolchain(found)?;
    ebpf_clippy(&toolchain, found);
    cargo_deny(found)
}

/// What the ring of kernels uses for these machines.
///
/// # Errors
/// When a tool is missing and cannot be installed.
pub(crate) fn kernels(machines: &[Machine], found: Found) -> Result<()> {
    ensure!(
        find_program("apt-get").is_some() && find_program("dpkg-deb").is_some(),
        "the kernels are Debian's packages: they are fetched by apt, on Debian or a system made from it"
    );
    let tools =
        [("cpio", "cpio"), ("depmod", "kmod"), ("xz", "xz-utils"), ("zstd", "zstd"), ("strip", "binutils")];
    let tools = machines.iter().copied().map(Machine::qemu).chain(tools);
    let mut missing: Vec<_> =
        tools.filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| package).collect();
    if !Path::new(KEYRING).exists() {
        missing.push("debian-archive-keyring");
    }
    if missing.is_empty() {
        found("QEMU, and tools for kernels and initramfs: found");
        return Ok(());
    }
    apt_install(&missing, "what boots other kernels (nothing of them is installed)")
}

/// A compiler for the BPF target: the one that is there, else rustup's nightly, else Debian's packages.
fn ebpf_toolchain(found: Found) -> Result<Toolchain> {
    let missing = match Toolchain::find() {
        Ok(toolchain) => {
            found(&format!("compiler for the BPF target: found {toolchain}"));
            return Ok(toolchain);
        }
        Err(missing) => missing,
    };
    say(&format!("{missing:#}"));
    let chosen = Toolchain::chosen();
    if chosen != Some(Toolchain::Debian) && find_program("rustup").is_some() {
        let name = match &chosen {
            Some(Toolchain::Rustup(name)) => name.as_str(),
            _ => "nightly",
        };
        match rustup_install(name) {
            Ok(()) => {
                let toolchain = Toolchain::Rustup(name.to_owned());
                match toolchain.check() {
                    Ok(()) => return Ok(toolchain),
                    Err(reason) => say(&format!("{toolchain} cannot be used: {reason:#}")),
                }
            }
            Err(reason) => say(&format!("rustup could not install {name}: {reason:#}")),
        }
    }
    if let Some(Toolchain::Rustup(name)) = &chosen {
        bail!("{CHOICE} asks for {name}, which cannot be used");
    }
    apt_install(&["rustc-web", "cargo-web", "rust-web-src"], "a compiler for the BPF target")?;
    let toolchain = Toolchain::Debian;
    toolchain.check().with_context(|| format!("{toolchain} was installed, but cannot be used"))?;
    Ok(toolchain)
}

/// Bounded in time: behind a firewall that swallows packets rustup would wait for very long.
fn rustup_install(name: &str) -> Result<()> {
    say(&format!("installing rustup's {name} with rust-src (at most 10 minutes)"));
    let mut rustup = Command::new("timeout");
    rustup.args(["600", "rustup", "toolchain", "install", name, "--no-self-update"]);
    run_command(rustup.args(["--profile", "minimal", "--component", "rust-src"]))
}

/// bpf-linker, built from source against the system's LLVM if it is not there.
fn bpf_linker(found: Found) -> Result<PathBuf> {
    match toolchain::bpf_linker() {
        Ok(linker) => {
            found(&format!("bpf-linker {BPF_LINKER}: found {}", linker.display()));
            return Ok(linker);
        }
        Err(missing) => say(&format!("{missing:#}")),
    }
    let prefix = format!("/usr/lib/llvm-{LLVM}");
    // The libraries that this LLVM itself was linked with come along: the linker asks for all of them by name.
    let libraries = ["/include/llvm-c/Core.h", "/lib/libPolly.a"].map(|file| format!("{prefix}{file}"));
    let system = ["/usr/include/zlib.h", "/usr/include/zstd.h"].map(str::to_owned);
    if !libraries.iter().chain(&system).all(|file| Path::new(file).exists()) {
        let llvm = format!("llvm-{LLVM}-dev");
        let polly = format!("libpolly-{LLVM}-dev");
        apt_install(&[&llvm, &polly, "zlib1g-dev", "libzstd-dev", "g++"], "LLVM, to build bpf-linker")?;
    }
    let llvm = format!("llvm-{LLVM}");
    let mut install = cargo_install("bpf-linker", BPF_LINKER);
    install.args(["--no-default-features", "--features", &llvm]).env("LLVM_PREFIX", &prefix);
    build_tool(&mut install, "bpf-linker", "about a minute")?;
    toolchain::bpf_linker().context("bpf-linker was built, but cannot be used")
}

/// Maps and links are pinned in a BPF filesystem; systemd mounts it at boot, a plain container does not.
fn mount_bpffs(found: Found) -> Result<()> {
    if mounted("bpf")?.iter().any(|point| point == "/sys/fs/bpf") {
        found("BPF filesystem: mounted at /sys/fs/bpf");
        return Ok(());
    }
    say("mounting the BPF filesystem at /sys/fs/bpf");
    run_command(as_root("mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
}

/// Where filesystems of type `kind` are mounted.
///
/// # Errors
/// When /proc/mounts cannot be read.
pub(crate) fn mounted(kind: &str) -> Result<Vec<String>> {
    let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    Ok(mounted_in(&mounts, kind))
}

fn mounted_in(mounts: &str, kind: &str) -> Vec<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, found) = (fields.next()?, fields.next()?);
            (found == kind).then(|| point.to_owned())
        })
        .collect()
}

/// Linting the BPF target is worth having, not worth failing for: the host build of the crate is linted anyway.
fn ebpf_clippy(toolchain: &Toolchain, found: Found) {
    if toolchain.has_clippy() {
        found(&format!("clippy for the BPF target: found, of {toolchain}"));
        return;
    }
    let result = match toolchain {
        Toolchain::Debian => apt_install(&["rust-web-clippy"], "clippy for the BPF target"),
        Toolchain::Rustup(name) => {
            let mut rustup = Command::new("timeout");
            run_command(rustup.args(["300", "rustup", "component", "add", "clippy", "--toolchain", name]))
        }
    };
    if let Err(reason) = result {
        say(&format!("lint will skip clippy for the BPF target: {reason:#}"));
    }
}

fn cargo_deny(found: Found) -> Result<()> {
    if let Some(deny) = find_program("cargo-deny") {
        found(&format!("cargo-deny: found {}", deny.display()));
        return Ok(());
    }
    let mut install = cargo_install("cargo-deny", CARGO_DENY);
    install.arg("--no-default-features");
    build_tool(&mut install, "cargo-deny", "a minute or two")
}

/// `cargo install` of one exact version into the tools directory.
fn cargo_install(name: &str, version: &str) -> Command {
    let mut cargo = crate::workspace::cargo();
    cargo
        .args(["install", name, "--version", version, "--locked", "--root"])
        .arg(tools_dir())
        .env("CARGO_TARGET_DIR", tools_dir().join("build"))
        // These run for moments: the time to build them is what counts.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    cargo
}

fn build_tool(install: &mut Command, name: &str, time: &str) -> Result<()> {
    say(&format!("building {name} into {} ({time})", tools_dir().display()));
    run_command(install)?;
    let build = tools_dir().join("build");
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))
}

/// Installs Debian packages; `what` says what they are for.
fn apt_install(packages: &[&str], what: &str) -> Result<()> {
    if find_program("apt-get").is_none() {
        bail!("{what} is missing; install what Debian calls: {}", packages.join(" "));
    }
    say(&format!("installing {what}: {}", packages.join(" ")));
    run_command(as_root("apt-get")?.args(["update", "--quiet"]))?;
    run_command(
        as_root("env")?
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--quiet"])
            .arg("--no-install-recommends")
            .args(packages),
    )
}

/// `program`, through sudo unless this is root.
///
/// # Errors
/// When this is not root and there is no sudo.
pub(crate) fn as_root(program: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if find_program("sudo").is_none() {
        bail!("`{program}` has to be run as root, and there is no sudo");
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(program);
    Ok(sudo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_type() {
        let mounts = "bpf /sys/fs/bpf bpf rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mounted_in(mounts, "bpf"), ["/sys/fs/bpf"]);
        assert_eq!(mounted_in(mounts, "cgroup2"), ["/sys/fs/cgroup/unified"]);
        assert!(mounted_in(mounts, "tracefs").is_empty());
    }
}
