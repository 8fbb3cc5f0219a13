//! The names of the rows, committed, so that a row that disappears from the program is noticed.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::report::Outcome;
use crate::workspace;

/// Rows that are run once more with the hybrid layout of cgroups, by parts of their names: those that load programs,
/// attach them to cgroups, or look for pods there.
const HYBRID: [&str; 4] = ["k002_", "k004_", "k01", "k062_"];

/// Rows that are run with the hybrid layout only, by parts of their names: those that load the programs once more.
/// Verifying the programs takes most of the time of an emulated kernel.
pub(super) const LIFETIME: [&str; 2] = ["k07", "k08"];

/// Number of rows that always run, because the others need what they make: the world, and in it the agent.
const ALWAYS: usize = 2;

/// Names of the rows that every kernel has to show, in the order in which they run.
pub(super) struct Names(Vec<String>);

fn path() -> PathBuf {
    workspace::root().join("xtask/src/kernels/rows.txt")
}

impl Names {
    /// Reads the committed names.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn load() -> Result<Self> {
        let text = fs::read_to_string(path()).context("cannot read the names of the rows")?;
        Ok(Self(text.lines().map(str::to_owned).collect()))
    }

    /// Returns the rows that `section` has in a run with `filters`.
    pub(super) fn of(&self, section: &str, filters: &[String]) -> Vec<String> {
        let wanted = self.0.iter().skip(ALWAYS).filter(|name| {
            is_in(section, name) && (filters.is_empty() || filters.iter().any(|part| name.contains(part)))
        });
        let mut rows: Vec<_> = wanted.cloned().collect();
        if !rows.is_empty() {
            rows.splice(..0, self.0.iter().take(ALWAYS).cloned());
        }
        rows
    }

    /// Replaces the names by those that any kernel showed.
    pub(super) fn bless(&mut self, outcomes: &[Outcome]) {
        let mut seen = BTreeSet::new();
        let sections = ["unified", "hybrid"].into_iter().flat_map(|section| {
            outcomes.iter().filter_map(move |outcome| outcome.console.sections.get(section))
        });
        let rows = sections.flat_map(|section| &section.rows);
        self.0 = rows.map(|(name, _)| name.clone()).filter(|name| seen.insert(name.clone())).collect();
    }

    /// Writes the committed names.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn store(&self) -> Result<()> {
        let text: String = self.0.iter().map(|name| format!("{name}\n")).collect();
        fs::write(path(), text).context("cannot write the names of the rows")
    }
}

fn is_in(section: &str, name: &str) -> bool {
    match section {
        "hybrid" => is_one_of(name, &HYBRID) || is_one_of(name, &LIFETIME),
        _ => !is_one_of(name, &LIFETIME),
    }
}

fn is_one_of(name: &str, parts: &[&str]) -> bool {
    parts.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_choose_by_a_part_of_the_name_and_the_first_are_always_there() {
        let names = Names(
            ["k000_world", "k001_takeover", "k002_load", "k010_tcp", "k040_sctp", "k070_growth"]
                .map(str::to_owned)
                .to_vec(),
        );
        assert_eq!(of(&names, "unified", &[]), "k000 k001 k002 k010 k040");
        assert_eq!(of(&names, "hybrid", &[]), "k000 k001 k002 k010 k070");
        assert_eq!(of(&names, "unified", &["tcp", "sctp"]), "k000 k001 k010 k040");
        assert_eq!(of(&names, "hybrid", &["tcp", "sctp"]), "k000 k001 k010");
        assert_eq!(of(&names, "hybrid", &["sctp"]), "");
        assert_eq!(of(&names, "hybrid", &["growth"]), "k000 k001 k070");
        assert_eq!(of(&names, "unified", &["growth"]), "");
    }

    fn of(names: &Names, section: &str, filters: &[&str]) -> String {
        let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
        names.of(section, &filters).iter().map(|name| name[..4].to_owned()).collect::<Vec<_>>().join(" ")
    }
}
