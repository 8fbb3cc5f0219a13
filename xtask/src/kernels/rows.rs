//! The names of the rows, committed: a row that is gone from the program that runs them is missed here.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::report::Outcome;
use crate::workspace;

/// The rows that every kernel has to show, in the order in which they run.
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

    /// Those that a run with `filters` has.
    pub(super) fn matching(&self, filters: &[String]) -> Vec<String> {
        let wanted =
            |name: &&String| filters.is_empty() || filters.iter().any(|part| name.contains(part.as_str()));
        self.0.iter().filter(wanted).cloned().collect()
    }

    /// Takes all that any kernel showed.
    pub(super) fn bless(&mut self, outcomes: &[Outcome]) {
        let sections = outcomes.iter().flat_map(|outcome| outcome.console.sections.values());
        let mut seen = BTreeSet::new();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_choose_by_a_part_of_the_name() {
        let names = Names(vec!["load".into(), "sctp-here".into(), "sctp-there".into()]);
        assert_eq!(names.matching(&[]).len(), 3);
        assert_eq!(names.matching(&["sctp".into()]), ["sctp-here", "sctp-there"]);
        assert!(names.matching(&["none".into()]).is_empty());
    }
}
