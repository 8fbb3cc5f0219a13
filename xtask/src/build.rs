//! `build`: the BPF object, then the agent that embeds it, and the test tools (demo, benchmarks).
//!
//! A release build makes each program one static binary, so that the agent runs on any distribution and in an empty
//! container image.

use std::ffi::OsString;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::build_ebpf;
use crate::process::{exec, run as run_command, say};
use crate::setup::{self, Part};
use crate::target::Target;
use crate::workspace;

/// Arguments of `build`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build optimised, static programs.
    #[arg(long)]
    release: bool,
    /// With --release: the machine to build for, `x86_64` or `aarch64`, or rustc's name of the target. Default: this
    /// machine.
    #[arg(long, requires = "release")]
    target: Option<String>,
    /// Build an agent and a BPF object that log every decision, for debugging.
    #[arg(long)]
    debug_log: bool,
    /// Build only the agent, which is all that an image needs, and not the test tools.
    #[arg(long)]
    agent_only: bool,
}

/// Programs that are built beside the BPF object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Programs<'a> {
    /// The agent alone.
    Agent,
    /// The agent, one program of crate `tests`, and the program of the lab's pods.
    Tool(&'a str),
    /// The agent and all of crate `tests`.
    All,
}

/// Builds everything and prints the path of the agent.
///
/// # Errors
/// When a build fails, or a program of a release build is not static.
pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = if args.agent_only { Programs::Agent } else { Programs::All };
    let target = if args.release { Some(Target::new(args.target.as_deref())?) } else { None };
    let dir = build(target.as_ref(), args.debug_log, programs)?;
    let agent = dir.join("proxy-agent");
    let kind = match target {
        Some(target) => format!("static release binary for {target}"),
        None => "development binary".to_owned(),
    };
    let mib = fs::metadata(&agent).context("the agent was built but is not there")?.len() >> 20;
    say(&format!("agent ({kind}, {mib} MiB): {}", agent.display()));
    Ok(())
}

/// Builds the BPF object, and `programs` for release; returns their directory.
///
/// # Errors
/// When something is missing and cannot be installed, a build fails, or a program is not static.
pub(crate) fn release(target: &Target, programs: Programs<'_>) -> Result<PathBuf> {
    build(Some(target), false, programs)
}

/// Builds the BPF object and `programs`. Without `target`, the build is one for development, on this machine.
fn build(target: Option<&Target>, debug_log: bool, programs: Programs<'_>) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "proxy-agent"]);
    match programs {
        Programs::Agent => cargo.arg("--bins"),
        // Only the tool that is going to be started: linking the others takes time.
        Programs::Tool(tool) => cargo.args([
            "--package",
            "proxy-tests",
            "--bin",
            "proxy-agent",
            "--bin",
            "lab-pod",
            "--bin",
            tool,
        ]),
        Programs::All => cargo.args(["--package", "proxy-tests", "--bins"]),
    };
    if debug_log {
        cargo.args(["--features", "proxy-agent/debug-log"]);
    }
    if let Some(target) = target {
        setup::target(target)?;
        cargo.arg("--release");
        target.apply(&mut cargo)?;
    }
    build_ebpf::run(&build_ebpf::Args { debug_log })?;
    if let Some(target) = target {
        say(&format!("building for {target}: some minutes the first time, then what has changed"));
    }
    run_command(&mut cargo)?;
    let Some(target) = target else { return Ok(workspace::target_dir().join("debug")) };
    let dir = workspace::target_dir().join(target.to_string()).join("release");
    for program in workspace::programs_in(&dir)? {
        ensure!(is_static(&program)?, "{} is not static: it names a dynamic linker", program.display());
    }
    Ok(dir)
}

/// Builds for release and replaces this process by `tool` of crate `tests`, run as root. The tool finds the agent by
/// the environment variable `VIPR_AGENT`, and other files by `variables`.
///
/// # Errors
/// When something is missing and cannot be installed, a build fails, or the tool cannot be started.
pub(crate) fn exec_tool(tool: &str, variables: &[(&str, PathBuf)], args: &[OsString]) -> Result<()> {
    setup::parts(&[Part::Build, Part::Lab], setup::quiet)?;
    let dir = release(&Target::new(None)?, Programs::Tool(tool))?;
    // The variables are set by `env`, because sudo does not pass the environment on.
    let mut env = setup::as_root("env")?;
    let agent = ("VIPR_AGENT", dir.join("proxy-agent"));
    for (name, value) in variables.iter().chain([&agent]) {
        let mut variable = OsString::from(format!("{name}="));
        variable.push(value);
        env.arg(variable);
    }
    exec(env.arg(dir.join(tool)).args(args))
}

/// Returns whether a 64-bit little-endian ELF program has no interpreter, that is, needs no dynamic linker.
///
/// # Errors
/// When the file cannot be read or is not such a program.
fn is_static(program: &Path) -> Result<bool> {
    let mut elf = Vec::new();
    // Program headers come right after the ELF header.
    let file = fs::File::open(program).with_context(|| format!("cannot open {}", program.display()))?;
    file.take(64 * 1024)
        .read_to_end(&mut elf)
        .with_context(|| format!("cannot read {}", program.display()))?;
    has_interpreter(&elf)
        .map(|interpreter| !interpreter)
        .with_context(|| format!("{} is not a 64-bit ELF program", program.display()))
}

/// Looks for a program header of type PT_INTERP (3); `None` if this is not a little-endian ELF64.
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (half(elf, 54)?, half(elf, 56)?);
    for index in 0..count {
        let header = elf.get(table + index * size..)?;
        if header.get(..4)? == 3u32.to_le_bytes() {
            return Some(true);
        }
    }
    Some(false)
}

fn half(elf: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_a_dynamic_program_and_text_is_none() {
        let dynamic = cfg!(not(target_feature = "crt-static"));
        assert_eq!(is_static(&std::env::current_exe().unwrap()).unwrap(), !dynamic);
        assert!(is_static(&workspace::root().join("Cargo.toml")).is_err());
    }

    #[test]
    fn an_elf_without_interpreter_is_static() {
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        assert_eq!(has_interpreter(&elf), Some(false));
        elf[64] = 3;
        assert_eq!(has_interpreter(&elf), Some(true));
        assert_eq!(has_interpreter(&elf[..70]), Some(true));
        assert_eq!(has_interpreter(&elf[..66]), None);
    }
}
