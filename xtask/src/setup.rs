//! `setup`: finds the tools that the other commands need, prints which are missing and how they will be installed, and
//! then installs them. `setup` changes the machine only through the system's package manager, by mounting the BPF
//! filesystem, and in the tools directory in the target directory. For a build for another machine, rustup also adds
//! that target's library.
//!
//! The other commands call the same functions for the parts they need. These calls print something only when a part is
//! missing: nobody has to know about `setup` to run the demo.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::kernels::apt::KEYRING;
use crate::kernels::machine::Machine;
use crate::plan::{Compiler, DEBIAN_RUST, Plan};
use crate::process::{output, run as run_command, say};
use crate::target::Target;
use crate::toolchain::{self, BPF_LINKER, CARGO_DENY, LLVM, LLVM_PREFIX, PINNED, Toolchain, pinned_home};
use crate::workspace::{find_program, is_root, tools_dir};

/// Arguments of `setup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Parts to set up.
    #[arg(value_enum, default_values_t = [Part::Build, Part::Lab])]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// The compiler and linker for the BPF object.
    Build,
    /// The tools of the demo, the lab tests and the benchmarks: ip, bpftool, a mounted BPF filesystem.
    Lab,
    /// The tools of `lint`: clippy for the BPF target, and cargo-deny (built from source: a minute or two, once).
    Lint,
    /// The tools of `test kernels`: QEMU for this machine, and tools to unpack kernels and pack an initramfs.
    Kernels,
}

/// Sets up the parts asked for.
///
/// # Errors
/// When something is missing and cannot be installed.
pub(crate) fn run(args: &Args) -> Result<()> {
    parts(&args.parts, say)?;
    say("setup is complete");
    Ok(())
}

/// Function called with a line about each tool that is already present: [`say`] or [`quiet`].
type Found = fn(&str);

/// Prints nothing: for commands that set up parts only on the way.
pub(crate) fn quiet(_: &str) {}

/// Finds the tools that `parts` need, prints which are missing and how they will be installed, and installs them.
///
/// # Errors
/// When something is missing and cannot be installed.
pub(crate) fn parts(parts: &[Part], found: Found) -> Result<()> {
    let mut plan = Plan::default();
    for part in parts {
        match part {
            Part::Build => plan_build(&mut plan, found)?,
            Part::Lab => plan_lab(&mut plan, found)?,
            Part::Lint => plan_lint(&mut plan, found)?,
            Part::Kernels => plan_kernels(&mut plan, &[Machine::host()?], found)?,
        }
    }
    install(&plan)
}

/// Does the same as [`parts`] for the tools that the ring of kernels needs for `machines`.
///
/// # Errors
/// When a tool is missing and cannot be installed.
pub(crate) fn kernels(machines: &[Machine], found: Found) -> Result<()> {
    let mut plan = Plan::default();
    plan_kernels(&mut plan, machines, found)?;
    install(&plan)
}

/// Prints what is missing and how it will be installed, and installs it.
fn install(plan: &Plan) -> Result<()> {
    if plan.is_empty() {
        return Ok(());
    }
    say(&plan.to_string());
    let packages: Vec<_> = plan.packages.iter().map(|(package, _)| *package).collect();
    if !packages.is_empty() {
        apt_install(&packages, "Debian's packages")?;
    }
    if !plan.compiler.is_empty() {
        install_compiler(&plan.compiler)?;
    }
    if plan.bpffs {
        run_command(as_root("mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
    }
    if plan.bpf_linker {
        build_bpf_linker()?;
    }
    if plan.cargo_deny {
        let mut install = cargo_install("cargo-deny", CARGO_DENY);
        build_tool(install.arg("--no-default-features"))?;
    }
    Ok(())
}

/// Returns the compiler and the linker for the BPF object, installing missing ones.
///
/// # Errors
/// When one is missing and cannot be installed.
pub(crate) fn build(found: Found) -> Result<(Toolchain, PathBuf)> {
    parts(&[Part::Build], found)?;
    let Compiler::Found(toolchain) = compiler()? else { bail!("no compiler for the BPF target") };
    Ok((toolchain, toolchain::bpf_linker()?))
}

/// Installs the parts that release programs of another machine are built with: Rust's library for the target, and a C
/// compiler, which also links.
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
    // The compiler may be installed without the C header files.
    let mut compiler = Command::new(target.compiler());
    if output(compiler.args(["-E", "-include", "stdint.h", "-x", "c", "/dev/null"])).is_err() {
        let packages = target.compiler_packages();
        apt_install(&packages.each_ref().map(String::as_str), &format!("a C compiler for {triple}"))?;
    }
    Ok(())
}

fn compiler() -> Result<Compiler> {
    Compiler::choose(
        Toolchain::chosen(),
        Toolchain::check,
        find_program("rustup").is_some(),
        find_program("apt-get").is_some(),
    )
}

fn plan_build(plan: &mut Plan, found: Found) -> Result<()> {
    match compiler()? {
        Compiler::Found(toolchain) => found(&format!("compiler for the BPF target: found {toolchain}")),
        Compiler::Install(ways) => plan.compiler = ways,
    }
    match toolchain::bpf_linker() {
        Ok(linker) => found(&format!("bpf-linker {BPF_LINKER}: found {}", linker.display())),
        Err(missing) => {
            found(&format!("{missing:#}"));
            plan.bpf_linker = true;
            // The libraries that LLVM itself was linked with are installed too: the linker asks for all of them by
            // name.
            let libraries = [
                (format!("{LLVM_PREFIX}/include/llvm-c/Core.h"), "llvm-22-dev"),
                (format!("{LLVM_PREFIX}/lib/libPolly.a"), "libpolly-22-dev"),
                ("/usr/include/zlib.h".to_owned(), "zlib1g-dev"),
                ("/usr/include/zstd.h".to_owned(), "libzstd-dev"),
                ("/usr/bin/c++".to_owned(), "g++"),
            ];
            let missing = libraries.iter().filter(|(file, _)| !Path::new(file).exists());
            plan.packages.extend(missing.map(|(_, package)| (*package, "to build bpf-linker")));
        }
    }
    Ok(())
}

/// Plans ip, bpftool and the BPF filesystem, in which maps and links are pinned. systemd mounts it at boot; a plain
/// container does not.
fn plan_lab(plan: &mut Plan, found: Found) -> Result<()> {
    let tools = [
        ("ip", "iproute2", "makes networks"),
        ("nft", "nftables", "stands for a cluster's other rules"),
        ("bpftool", "bpftool", "prints maps and programs"),
    ];
    for (program, package, purpose) in tools {
        match find_program(program) {
            Some(path) => found(&format!("{program}: found {}", path.display())),
            None => plan.packages.push((package, purpose)),
        }
    }
    plan.bpffs = !mounted("bpf")?.iter().any(|point| point == "/sys/fs/bpf");
    if !plan.bpffs {
        found("BPF filesystem: mounted at /sys/fs/bpf");
    }
    match find_program("cargo-nextest") {
        Some(nextest) => found(&format!("cargo-nextest: found {}", nextest.display())),
        None => found("cargo-nextest: not found, tests will run with cargo test"),
    }
    Ok(())
}

/// Plans the tools of `lint`, beyond rustfmt and clippy of the workspace's own toolchain.
fn plan_lint(plan: &mut Plan, found: Found) -> Result<()> {
    let debian = match compiler()? {
        // A toolchain of the user's stays as it is, with clippy or without.
        Compiler::Found(toolchain) => toolchain == Toolchain::Debian && !toolchain.has_clippy(),
        Compiler::Install(ways) => ways.first() == Some(&Toolchain::Debian),
    };
    if debian {
        plan.packages.push(("rust-web-clippy", "lints the BPF programs"));
    }
    match find_program("cargo-deny") {
        Some(deny) => found(&format!("cargo-deny: found {}", deny.display())),
        None => plan.cargo_deny = true,
    }
    Ok(())
}

/// Plans the tools that boot other kernels. The kernels are fetched, and nothing of them is installed.
fn plan_kernels(plan: &mut Plan, machines: &[Machine], found: Found) -> Result<()> {
    ensure!(
        find_program("apt-get").is_some() && find_program("dpkg-deb").is_some(),
        "the kernels are Debian's packages: they are fetched by apt, on Debian or a system made from it"
    );
    let emulators = machines.iter().map(|machine| (machine.qemu(), "boots other kernels"));
    let tools =
        [("cpio", "cpio"), ("depmod", "kmod"), ("xz", "xz-utils"), ("zstd", "zstd"), ("strip", "binutils")];
    let tools = tools.map(|tool| (tool, "unpacks kernels, packs what they start with"));
    for ((program, package), purpose) in emulators.chain(tools) {
        match find_program(program) {
            Some(path) => found(&format!("{program}: found {}", path.display())),
            None => plan.packages.push((package, purpose)),
        }
    }
    if !Path::new(KEYRING).exists() {
        plan.packages.push(("debian-archive-keyring", "tells whether a package is Debian's"));
    }
    Ok(())
}

/// Installs the first of `ways` that can be installed.
fn install_compiler(ways: &[Toolchain]) -> Result<()> {
    let mut reasons = Vec::new();
    for way in ways {
        let installed = match way {
            Toolchain::Pinned => install_pinned(),
            Toolchain::Debian => apt_install(&DEBIAN_RUST, "a compiler for the BPF target"),
            Toolchain::Rustup(_) => Ok(()),
        };
        match installed.and_then(|()| way.check()) {
            Ok(()) => return Ok(()),
            Err(reason) => {
                say(&format!("{way} cannot be had: {reason:#}"));
                reasons.push(format!("{way}: {reason:#}"));
            }
        }
    }
    bail!("no compiler for the BPF target ({})", reasons.join("; "))
}

/// Installs the pinned toolchain, within a time limit: behind a firewall that drops packets, rustup would wait for very
/// long.
fn install_pinned() -> Result<()> {
    say(
        "rustup gets a home of its own, in Vipr's target directory: what it says about a default toolchain is not about yours",
    );
    let mut install = Command::new("timeout");
    install.args(["600", "rustup", "toolchain", "install", PINNED, "--no-self-update"]);
    install.args(["--profile", "minimal", "--component", "rust-src", "--component", "clippy"]);
    run_command(install.env("RUSTUP_HOME", pinned_home()))
}

/// Builds bpf-linker from source against the system's LLVM.
fn build_bpf_linker() -> Result<()> {
    let mut install = cargo_install("bpf-linker", BPF_LINKER);
    let feature = format!("llvm-{LLVM}");
    install.args(["--no-default-features", "--features", &feature]).env("LLVM_PREFIX", LLVM_PREFIX);
    build_tool(&mut install)?;
    toolchain::bpf_linker().map(drop).context("bpf-linker was built, but cannot be used")
}

/// Returns the mount points of filesystems of type `kind`.
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

/// Returns `cargo install` of one exact version into the tools directory.
fn cargo_install(name: &str, version: &str) -> Command {
    let mut cargo = crate::workspace::cargo();
    cargo
        .args(["install", name, "--version", version, "--locked", "--root"])
        .arg(tools_dir())
        .env("CARGO_TARGET_DIR", tools_dir().join("build"))
        // The tools run for moments only: the time to build them matters more than their speed.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    cargo
}

fn build_tool(install: &mut Command) -> Result<()> {
    run_command(install)?;
    let build = tools_dir().join("build");
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))
}

/// Installs Debian packages; `what` names their purpose.
fn apt_install(packages: &[&str], what: &str) -> Result<()> {
    if find_program("apt-get").is_none() {
        bail!("{what} is missing; install what Debian calls: {}", packages.join(" "));
    }
    say(&format!("installing {what}: {}", packages.join(" ")));
    run_command(as_root("apt-get")?.args(["update", "--quiet"]))?;
    run_command(
        as_root("env")?
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--quiet"])
            // Refuses a package that would replace an installed one, such as a compiler of the user's.
            .args(["--no-install-recommends", "--no-remove"])
            .args(packages),
    )
}

/// Returns a command for `program`, through sudo unless this process is root.
///
/// # Errors
/// When this process is not root and there is no sudo.
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
