//! Writes the tests of the table of cases, one for each case and suite, so that each has a name that a filter can
//! select.
//!
//! The table itself is part of this program. So a test has the name that [`cases::Case::test_name`] returns, and a
//! case that a suite cannot check has no test there.

use std::path::Path;
use std::{env, fs, io};

use cases::{Pods, lab_tests, pure_tests};

#[allow(dead_code, unreachable_pub, unused_imports, reason = "the table is written for the suites")]
#[path = "src/cases/mod.rs"]
mod cases;

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=src/cases");
    write("pure_cases.rs", &tests("", &pure_tests()))?;
    let seen = tests("SEEN Seen:\n", &lab_tests(Pods::Seen));
    let unseen = tests("UNSEEN Unseen:\n", &lab_tests(Pods::Unseen));
    write("lab_cases.rs", &[seen, unseen].concat())
}

/// Returns a call of the macro `tests`, which each suite with cases defines.
fn tests(head: &str, names: &[String]) -> String {
    format!("tests! {{\n{head}{}\n}}\n", names.join("\n"))
}

fn write(file: &str, text: &str) -> io::Result<()> {
    let directory = env::var_os("OUT_DIR").unwrap_or_default();
    fs::write(Path::new(&directory).join(file), text)
}
