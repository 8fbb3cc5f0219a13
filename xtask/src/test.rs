//! `test`: the test rings by name.
//!
//! - `unit` needs no root, but for a few tests that make network namespaces: unit and property tests of every crate, doc tests, and every suite (an integration test of
//!   `tests/`, which is a directory of it) that is not named below.
//! - `equivalence` needs root: the suite `kernel`, which runs the real BPF programs and the same code on the host on the
//!   same packets.
//! - `lab` needs root: the suite `lab`, which loads the real BPF programs and builds nodes, pods and clients from network
//!   namespaces.
//! - `kernels` is [`crate::kernels`]: other kernels, booted in QEMU. It is not part of all.
//!
//! A new file of tests belongs to the suite whose directory it is in. All rings build the same packages with the same
//! features, so that going from one to another rebuilds no dependency; and in the dev profile, because building for
//! release takes longer than the tests themselves.

use std::env;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};

use crate::kernels;
use crate::process::{run as run_command, say};
use crate::rings::{LAB, Ring, Selection, build, option, select};
use crate::setup::{self, Part, mounted};
use crate::workspace::{self, find_program, is_root};

/// Arguments of `test`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// A ring (`unit`, `equivalence`, `lab` or `all`; default: all), then filters: only tests whose name contains one
    /// of them run.
    #[arg(value_name = "[RING] [FILTER]")]
    ring_and_filters: Vec<String>,
    /// Show the output of tests while they run, one test at a time.
    #[arg(long)]
    no_capture: bool,
}

/// Rings with arguments of their own.
#[derive(clap::Subcommand)]
enum Other {
    /// Boot Debian's kernels in QEMU and check every row on each.
    Kernels(kernels::Args),
}

/// Environment variables by which a Kubernetes client finds its API server by default. The tests have servers of their
/// own.
const OF_THE_USER: [&str; 5] =
    ["KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "HTTPS_PROXY", "https_proxy"];

/// Builds and runs a ring.
///
/// # Errors
/// When something is missing, a build or a test fails, or there was no test to run.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(Other::Kernels(args)) = &args.other {
        return kernels::run(args);
    }
    let (ring, filters) = split(&args.ring_and_filters);
    let selection = select(&workspace::packages()?, ring);
    if ring != Ring::Unit && !selection.tests.is_empty() {
        check_lab()?;
    }
    ensure!(selection.unit || !selection.tests.is_empty(), "the ring has no integration test");

    build(&selection)?;
    if selection.unit && filters.is_empty() {
        run_command(workspace::cargo().args(["test", "--doc"]).args(&selection.packages))?;
    }
    if find_program("cargo-nextest").is_some() {
        with_nextest(&selection, filters, args.no_capture)
    } else {
        with_cargo_test(&selection, filters, args.no_capture)
    }
}

/// Splits a leading ring name off the arguments.
fn split(args: &[String]) -> (Ring, &[String]) {
    let ring = match args.first().map(String::as_str) {
        Some("unit") => Ring::Unit,
        Some("equivalence") => Ring::Equivalence,
        Some("lab") => Ring::Lab,
        Some("all") => Ring::All,
        _ => return (Ring::All, args),
    };
    (ring, &args[1..])
}

/// Checks what the lab and the equivalence tests need, once for all of them, so that no test has to skip itself. They
/// change the machine's kernel.
fn check_lab() -> Result<()> {
    let only_unit = "`cargo xtask test unit` runs the tests that need no BPF programs and no lab";
    ensure!(
        is_root(),
        "these tests load BPF programs and create network namespaces: run as root; {only_unit}"
    );
    ensure!(
        !mounted("cgroup2")?.is_empty(),
        "these tests need a cgroup v2 hierarchy, and none is mounted; {only_unit}"
    );
    setup::parts(&[Part::Build, Part::Lab], setup::quiet)
}

fn test_command(runner: &[&str], selection: &Selection) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(runner).args(&selection.packages);
    if selection.unit {
        cargo.args(["--lib", "--bins"]);
    }
    cargo.args(&selection.tests).arg("--no-fail-fast");
    cargo.env("VIPR_AGENT", workspace::target_dir().join("debug").join("proxy-agent"));
    for variable in OF_THE_USER {
        cargo.env_remove(variable);
    }
    cargo
}

/// Sets the number of tests that nextest runs at a time, unless the user has set it. Most lab tests wait most of the
/// time. (`cargo test` cannot give a test the whole machine, so it runs as many as there are processors.)
fn side_by_side(cargo: &mut Command) {
    const VARIABLE: &str = "NEXTEST_TEST_THREADS";
    if env::var_os(VARIABLE).is_none() {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        cargo.env(VARIABLE, (2 * processors).to_string());
    }
}

/// Runs the tests with nextest, which fails when it finds no test to run.
fn with_nextest(selection: &Selection, filters: &[String], no_capture: bool) -> Result<()> {
    let mut cargo = test_command(&["nextest", "run"], selection);
    side_by_side(&mut cargo);
    if no_capture {
        cargo.arg("--no-capture");
    }
    run_command(cargo.args(filters))
}

/// Runs the tests with `cargo test`, which reports per test program and succeeds when no test ran: its output is
/// counted.
fn with_cargo_test(selection: &Selection, filters: &[String], no_capture: bool) -> Result<()> {
    say("running the tests with cargo test");
    let mut total = Total::default();
    let mut failed = None;
    for (selection, arguments) in goes(selection, filters) {
        let mut cargo = test_command(&["test"], &selection);
        cargo.arg("--").args(arguments);
        if no_capture {
            cargo.args(["--nocapture", "--test-threads=1"]);
        }
        let status = counted(&mut cargo, &mut total)?;
        if !status.success() {
            failed = Some(status);
        }
    }
    writeln!(std::io::stdout(), "tests: {} passed, {} failed", total.passed, total.failed)
        .context("cannot write the result")?;
    if let Some(status) = failed {
        bail!("cargo test failed: {status}");
    }
    ensure!(total.passed + total.failed > 0, "no test ran: none matches {filters:?}");
    Ok(())
}

/// Runs of `cargo test`, each with the arguments of its test programs. A whole lab has two of its own, the second one for
/// the floods alone: they want the machine for themselves.
fn goes(selection: &Selection, filters: &[String]) -> Vec<(Selection, Vec<String>)> {
    const FLOODS: &str = "floods::";
    if !filters.is_empty() || !selection.tests.iter().any(|test| test == LAB) {
        return vec![(selection.clone(), filters.to_vec())];
    }
    let others =
        selection.tests.chunks(2).filter(|pair| *pair != option("--test", LAB)).flatten().cloned().collect();
    let others = Selection { tests: others, ..selection.clone() };
    let lab = Selection { tests: option("--test", LAB).into(), unit: false, ..selection.clone() };
    let first = (others.unit || !others.tests.is_empty()).then_some((others, Vec::new()));
    let without = (lab.clone(), vec!["--skip".to_owned(), FLOODS.to_owned()]);
    first.into_iter().chain([without, (lab, vec![FLOODS.to_owned()])]).collect()
}

/// Runs `cargo test`, shows its output and adds up what it counts.
fn counted(cargo: &mut Command, total: &mut Total) -> Result<ExitStatus> {
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut shown = std::io::stdout().lock();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the output of cargo test")?;
        total.add(&line);
        writeln!(shown, "{line}").context("cannot write the output of cargo test")?;
    }
    child.wait().context("cannot wait for cargo test")
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Total {
    passed: u64,
    failed: u64,
}

impl Total {
    /// Adds the counts in the closing line of one test program; ignores other lines.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let counts = result.split_once(". ").map_or("", |(_, counts)| counts);
        for count in counts.split("; ") {
            match count.split_once(' ') {
                Some((number, "passed")) => self.passed += number.parse::<u64>().unwrap_or(0),
                Some((number, "failed")) => self.failed += number.parse::<u64>().unwrap_or(0),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Package;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn the_first_word_may_name_a_ring() {
        is_split(&[], Ring::All, &[]);
        is_split(&["lab"], Ring::Lab, &[]);
        is_split(&["equivalence"], Ring::Equivalence, &[]);
        is_split(&["unit", "addr", "be"], Ring::Unit, &["addr", "be"]);
        is_split(&["addr", "lab"], Ring::All, &["addr", "lab"]);
    }

    fn is_split(args: &[&str], ring: Ring, filters: &[&str]) {
        assert_eq!(split(&strings(args)), (ring, strings(filters).as_slice()));
    }

    #[test]
    fn tests_are_chosen_by_name_and_none_falls_through() {
        let packages = [
            package("proxy-ebpf", &[]),
            package("proxy-common", &[]),
            package("proxy-tests", &["api", "deploy", "kernel", "lab", "pure"]),
        ];
        let check = |ring, tests: &[&str]| {
            let selection = select(&packages, ring);
            assert_eq!(
                selection.packages,
                strings(&["--package", "proxy-common", "--package", "proxy-tests"])
            );
            assert_eq!(selection.tests, strings(tests));
        };
        check(Ring::Unit, &["--test", "api", "--test", "deploy", "--test", "pure"]);
        check(Ring::Equivalence, &["--test", "kernel"]);
        check(Ring::Lab, &["--test", "lab"]);
        let all =
            ["--test", "api", "--test", "deploy", "--test", "kernel", "--test", "lab", "--test", "pure"];
        check(Ring::All, &all);
    }

    fn package(name: &str, tests: &[&str]) -> Package {
        Package { name: name.into(), manifest: "Cargo.toml".into(), tests: strings(tests) }
    }

    #[test]
    fn floods_have_the_machine_for_themselves() {
        let selection =
            |tests: &[&str], unit| Selection { packages: Vec::new(), tests: strings(tests), unit };
        let all = selection(&["--test", "lab", "--test", "pure"], true);
        let pure = selection(&["--test", "pure"], true);
        let lab = selection(&["--test", "lab"], false);
        let (rest, floods) =
            ((lab.clone(), ["--skip", "floods::"].as_slice()), (lab.clone(), ["floods::"].as_slice()));
        go(&all, &[], &[(pure.clone(), &[]), rest.clone(), floods.clone()]);
        go(&lab, &[], &[rest, floods]);
        go(&all, &["p080"], &[(all.clone(), &["p080"])]);
        go(&pure, &[], &[(pure.clone(), &[])]);
    }

    fn go(selection: &Selection, filters: &[&str], want: &[(Selection, &[&str])]) {
        let want: Vec<_> = want.iter().map(|(part, words)| (part.clone(), strings(words))).collect();
        assert_eq!(goes(selection, &strings(filters)), want);
    }

    #[test]
    fn closing_lines_are_added_up() {
        let mut total = Total::default();
        total.add("running 3 tests");
        total.add(
            "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s",
        );
        total.add("test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!(total, Total { passed: 3, failed: 3 });
    }
}
