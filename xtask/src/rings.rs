//! The rings of tests: which packages and integration tests each selects, and how they are built.

use std::path::PathBuf;

use anyhow::Result;

use crate::build_ebpf;
use crate::process::run as run_command;
use crate::workspace::{self, Package};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    Unit,
    Equivalence,
    Lab,
    All,
}

/// The suite of the ring of the same name.
pub(crate) const LAB: &str = "lab";

/// The tests to run, as options of cargo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Options that name the packages; the same for every ring.
    pub(crate) packages: Vec<String>,
    /// Options that name every integration test of the ring.
    pub(crate) tests: Vec<String>,
    /// Whether unit tests and doc tests are selected.
    pub(crate) unit: bool,
}

/// Builds the packages of the rings, and returns the directory of the agent and of the programs of crate `tests`.
///
/// # Errors
/// When a build fails.
pub(crate) fn development_programs() -> Result<PathBuf> {
    build(&select(&workspace::packages()?, Ring::All))?;
    Ok(workspace::target_dir().join("debug"))
}

/// Builds the agent and the tests that are selected.
///
/// # Errors
/// When a build fails.
pub(crate) fn build(selection: &Selection) -> Result<()> {
    build_ebpf::run(&build_ebpf::Args { debug_log: false })?;
    let mut agent = workspace::cargo();
    // The test programs are built by the same command: a build of the agent alone would select other features.
    agent.arg("build").args(&selection.packages).args(["--bin", "proxy-agent"]).args(&selection.tests);
    run_command(&mut agent)
}

/// Returns what a ring selects of these packages.
pub(crate) fn select(packages: &[Package], ring: Ring) -> Selection {
    // The programs themselves run only in the kernel.
    let packages = packages.iter().filter(|package| package.name != "proxy-ebpf");
    Selection {
        packages: packages.clone().flat_map(|package| option("--package", &package.name)).collect(),
        tests: packages
            .flat_map(|package| {
                package.tests.iter().filter(|name| ring == Ring::All || ring == ring_of(name))
            })
            .flat_map(|test| option("--test", test))
            .collect(),
        unit: matches!(ring, Ring::Unit | Ring::All),
    }
}

pub(crate) fn option(option: &str, value: &str) -> [String; 2] {
    [option.to_owned(), value.to_owned()]
}

/// Returns the ring of an integration test.
fn ring_of(test: &str) -> Ring {
    match test {
        LAB => Ring::Lab,
        "kernel" => Ring::Equivalence,
        _ => Ring::Unit,
    }
}
