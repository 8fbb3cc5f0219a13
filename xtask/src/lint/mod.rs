//! `lint`: every check that needs no test run. All checks run, also after one failed, and the failed ones are named
//! at the end.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::build_ebpf;
use crate::process::{run as run_command, say};
use crate::setup::{self, Part};
use crate::workspace::{self, find_program};

mod house;

mod manifests;

mod source;

mod stack;

mod unsafe_code;

mod words;

/// Arguments of `lint`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only the checks whose name contains one of these.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// Also look for known vulnerabilities; fetches the RustSec database from GitHub.
    #[arg(long)]
    advisories: bool,
}

/// Runs all checks.
///
/// # Errors
/// When something is missing and cannot be installed, or a check failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::parts(&[Part::Build, Part::Lint], setup::quiet)?;
    let mut checks = Checks { filters: args.filters.clone(), ..Checks::default() };
    checks.run("formatting", || run_command(workspace::cargo().args(["fmt", "--all", "--check"])));
    checks.run("manifests", manifests::check);
    checks.run("unsafe code", unsafe_code::check);
    checks.run("house", house::check);
    checks.run("words", words::check);
    checks.run("licences, bans and sources of dependencies", || cargo_deny(&["licenses", "bans", "sources"]));
    if args.advisories {
        checks.run("known vulnerabilities", || cargo_deny(&["advisories"]));
    } else {
        say("known vulnerabilities: skipped, `--advisories` fetches the database they are looked up in");
    }
    // The agent embeds the object, so nothing that uses the agent compiles without it.
    checks.run("BPF object", || build_ebpf::run(&build_ebpf::Args { debug_log: false }));
    checks.run("stack of the BPF programs", || stack::check(&workspace::ebpf_object()));
    checks.run("clippy on the host", || {
        let mut clippy = workspace::cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--all-features", "--locked", "--keep-going"]);
        run_command(clippy.args(["--", "-D", "warnings"]))
    });
    checks.run("clippy on the BPF target", ebpf_clippy);
    checks.run("documentation", || {
        let mut doc = workspace::cargo();
        doc.args(["doc", "--workspace", "--all-features", "--no-deps", "--document-private-items"]);
        // The documentation is for contributors and always built with private items: links to them do resolve.
        run_command(doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"))
    });
    checks.finish()
}

/// Checks that have run, and those that failed.
#[derive(Default)]
struct Checks {
    filters: Vec<String>,
    count: usize,
    failed: Vec<String>,
}

impl Checks {
    fn run(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        if !self.filters.is_empty() && !self.filters.iter().any(|filter| name.contains(filter.as_str())) {
            return;
        }
        say(name);
        self.count += 1;
        if let Err(error) = check() {
            eprintln!("error: {error:#}");
            self.failed.push(name.to_owned());
        }
    }

    fn finish(self) -> Result<()> {
        ensure!(self.count > 0, "no check has {:?} in its name", self.filters);
        if !self.failed.is_empty() {
            bail!("{} of {} checks failed: {}", self.failed.len(), self.count, self.failed.join("; "));
        }
        say(&format!("lint: {} checks, none failed", self.count));
        Ok(())
    }
}

fn cargo_deny(checks: &[&str]) -> Result<()> {
    let deny = find_program("cargo-deny").context("cargo-deny is missing")?;
    let mut command = Command::new(deny);
    run_command(
        command.current_dir(workspace::root()).args(["--workspace", "--locked", "check"]).args(checks),
    )
}

/// Runs clippy for the BPF target: the code behind `cfg(target_arch = "bpf")` is compiled only there.
fn ebpf_clippy() -> Result<()> {
    let (toolchain, _) = setup::build(setup::quiet)?;
    if !toolchain.has_clippy() {
        say(&format!("skipped: {toolchain} has no clippy"));
        return Ok(());
    }
    let (own, bench) = (build_ebpf::PROGRAMS, build_ebpf::BENCH_PROGRAMS);
    for (programs, features) in [(own, ""), (own, "debug-log"), (bench, build_ebpf::BENCH_FEATURE)] {
        let mut clippy = build_ebpf::cargo("clippy", programs)?;
        run_command(clippy.args(["--features", features, "--", "-D", "warnings"]))?;
    }
    Ok(())
}
