//! Reports the results of the kernels: on the terminal, and in README.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::machine::{Kernel, Machine};
use super::verdict::{Console, End, SECTIONS, Verdict};
use crate::workspace;

/// Result of one kernel on one machine.
pub(super) struct Outcome {
    pub(super) kernel: Kernel,
    pub(super) machine: Machine,
    /// Debian's version of the kernel.
    pub(super) version: String,
    /// Seconds from the start of the first boot to the end of the last.
    pub(super) seconds: u64,
    pub(super) console: Console,
    pub(super) verdict: Verdict,
    /// Files with the complete output of the consoles.
    pub(super) logs: Vec<PathBuf>,
}

/// Prints the table of kernels and rows, verified instructions, and failures.
pub(super) fn print(outcomes: &[Outcome], dev: bool) {
    println!();
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in outcomes
        .iter()
        .flat_map(|outcome| outcome.console.sections.values())
        .flat_map(|section| &section.rows)
    {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    print!("{:<26}", "row (unified hybrid)");
    line(outcomes.iter().map(head));
    for name in names {
        print!("{name:<26}");
        line(outcomes.iter().map(|outcome| SECTIONS.map(|section| cell(outcome, section, name)).join(" ")));
    }
    print!("{:<26}", "seconds");
    line(outcomes.iter().map(|outcome| outcome.seconds.to_string()));
    println!();
    let mut programs: Vec<&String> =
        outcomes.iter().flat_map(|outcome| outcome.console.instructions.keys()).collect();
    programs.sort();
    programs.dedup();
    print!("{:<26}", "verified instructions");
    line(outcomes.iter().map(head));
    for program in programs {
        print!("{program:<26}");
        line(outcomes.iter().map(|outcome| {
            outcome.console.instructions.get(program).map_or_else(|| "-".to_owned(), u64::to_string)
        }));
    }
    println!();
    println!("{}", table(outcomes));
    println!("with {}", if dev { "development binaries" } else { "release binaries" });
    for outcome in outcomes.iter().filter(|outcome| !outcome.verdict.failures.is_empty()) {
        let logs: Vec<String> = outcome.logs.iter().map(|log| log.display().to_string()).collect();
        println!("\n{} failed; its consoles: {}", head(outcome), logs.join(", "));
        outcome.verdict.failures.iter().for_each(|failure| println!("  {failure}"));
    }
}

fn head(outcome: &Outcome) -> String {
    format!("{} {}", outcome.kernel, outcome.machine)
}

fn line(cells: impl Iterator<Item = String>) {
    println!("{}", cells.map(|cell| format!(" {cell:>15}")).collect::<String>());
}

fn cell(outcome: &Outcome, section: &str, name: &str) -> &'static str {
    let section = outcome.console.sections.get(section);
    match section.and_then(|section| section.rows.iter().find(|(row, _)| row == name)) {
        Some((_, End::Ok)) => "ok",
        Some((_, End::Lacks(_))) => "lacks",
        Some((_, End::Failed(_))) => "FAILED",
        None => "-",
    }
}

/// Line before the table in README.
const LEAD: &str =
    "What each of these kernels passes and lacks, as `cargo xtask test kernels all --arch all` found it:";

/// Returns the table for README.
fn table(outcomes: &[Outcome]) -> String {
    let mut table = "| kernel | machine | rows passed | what it lacks |\n|---|---|---|---|\n".to_owned();
    for outcome in outcomes {
        let verdict = &outcome.verdict;
        let lacks = if verdict.lacks.is_empty() { "-".to_owned() } else { verdict.lacks.join("; ") };
        let rows = match verdict.failures.len() {
            0 => verdict.passed.to_string(),
            failed => format!("{}, {failed} failed", verdict.passed),
        };
        table.push_str(&format!(
            "| {} (Debian {}) | {} | {rows} | {lacks} |\n",
            outcome.version,
            outcome.kernel.suite(),
            outcome.machine
        ));
    }
    table
}

/// Returns whether README has the table of these outcomes; with `write`, puts the table there.
///
/// # Errors
/// When README cannot be read or written, or has no place for the table.
pub(super) fn readme(outcomes: &[Outcome], write: bool) -> Result<bool> {
    let path = workspace::root().join("README.md");
    let text = fs::read_to_string(&path).context("cannot read README.md")?;
    let new = replace(&text, &format!("{LEAD}\n\n{}", table(outcomes)))
        .context("README.md has no place between <!-- kernels --> and <!-- /kernels -->")?;
    if write {
        fs::write(&path, &new).context("cannot write README.md")?;
    }
    Ok(write || new == text)
}

fn replace(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once("<!-- kernels -->\n")?;
    let (_, after) = rest.split_once("<!-- /kernels -->")?;
    Some(format!("{before}<!-- kernels -->\n{table}<!-- /kernels -->{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_goes_between_its_marks() {
        let text = "a\n<!-- kernels -->\nold\n<!-- /kernels -->\nb\n";
        let new = replace(text, "new\n").unwrap();
        assert_eq!(new, "a\n<!-- kernels -->\nnew\n<!-- /kernels -->\nb\n");
        assert_eq!(replace(&new, "new\n").as_ref(), Some(&new));
        assert_eq!(replace("no marks", "new\n"), None);
        assert!(replace(&fs::read_to_string(workspace::root().join("README.md")).unwrap(), "").is_some());
    }
}
