//! The budget of verified instructions: the limit for each program in each kernel's verifier. The file is a table, so
//! that a change of it is read in a diff.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use super::machine::Kernel;
use crate::workspace;

/// Highest possible bound: a quarter of the instructions that a verifier accepts.
const CEILING: u64 = 250_000;

/// Bounds by program, in the order of [`Kernel::ALL`]; 0 for a program that has no bound yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Budget(BTreeMap<String, [u64; 4]>);

fn path() -> PathBuf {
    workspace::root().join("xtask/src/kernels/budget.txt")
}

impl Budget {
    /// Reads the committed budget.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub(super) fn load() -> Result<Self> {
        Self::parse(&fs::read_to_string(path()).context("cannot read the budget of verified instructions")?)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut bounds = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let mut words = line.split_whitespace();
            let program = words.next().with_context(|| format!("budget: {line:?} has no program"))?;
            let numbers: Vec<u64> = words
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| format!("budget: {line:?}"))?;
            let numbers = numbers
                .try_into()
                .ok()
                .with_context(|| format!("budget: {line:?} has not one bound a kernel"))?;
            bounds.insert(program.to_owned(), numbers);
        }
        Ok(Self(bounds))
    }

    /// Returns a failure for each program that exceeds its bound, has no bound, or has a bound and was not measured.
    pub(super) fn check(&self, kernel: Kernel, measured: &BTreeMap<String, u64>) -> Vec<String> {
        let mut failures = Vec::new();
        for (program, count) in measured {
            match self.0.get(program).map(|bounds| bounds[kernel as usize]) {
                None | Some(0) => failures.push(format!(
                    "{program}: {count} verified instructions, and the budget has no bound: --bless makes one"
                )),
                Some(bound) if *count > bound => {
                    failures.push(format!("{program}: {count} verified instructions, the budget is {bound}"))
                }
                Some(_) => {}
            }
        }
        for (program, bounds) in &self.0 {
            if bounds[kernel as usize] > 0 && !measured.contains_key(program) {
                failures.push(format!("{program}: its verified instructions were not told"));
            }
        }
        failures
    }

    /// Replaces the bounds of one kernel by the measured number and a tenth more, for the kernel's point releases.
    ///
    /// # Errors
    /// When a program is above the ceiling: then the program has to change.
    pub(super) fn bless(&mut self, kernel: Kernel, measured: &BTreeMap<String, u64>) -> Result<()> {
        for (program, bounds) in &mut self.0 {
            if !measured.contains_key(program) {
                bounds[kernel as usize] = 0;
            }
        }
        for (program, count) in measured {
            ensure!(
                *count <= CEILING,
                "{program} costs {kernel} {count} verified instructions: a quarter of the most that a kernel accepts is {CEILING}"
            );
            self.0.entry(program.clone()).or_default()[kernel as usize] =
                (count + count / 10).div_ceil(100) * 100;
        }
        for bounds in self.0.values_mut() {
            bounds.iter_mut().for_each(|bound| *bound = CEILING.min(*bound));
        }
        self.0.retain(|_, bounds| bounds.iter().any(|bound| *bound > 0));
        Ok(())
    }

    /// Writes the committed budget.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn store(&self) -> Result<()> {
        fs::write(path(), self.print()).context("cannot write the budget of verified instructions")
    }

    fn print(&self) -> String {
        let mut text = "# Verified instructions that each program may cost each kernel; `cargo xtask test kernels all --bless` writes this file.\n".to_owned();
        text.push_str(&row("# program", Kernel::ALL.map(|kernel| kernel.name().to_owned())));
        for (program, bounds) in &self.0 {
            text.push_str(&row(program, bounds.map(|bound| bound.to_string())));
        }
        text
    }
}

fn row(name: &str, columns: [String; 4]) -> String {
    let columns = columns.map(|column| format!("{column:>9}")).concat();
    format!("{name:<18}{columns}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(counts: &[(&str, u64)]) -> BTreeMap<String, u64> {
        counts.iter().map(|&(program, count)| (program.to_owned(), count)).collect()
    }

    #[test]
    fn the_committed_budget_is_within_the_ceiling_and_as_it_would_be_written() {
        let budget = Budget::load().unwrap();
        assert!(budget.0.values().flatten().all(|bound| *bound <= CEILING));
        assert_eq!(budget.print(), fs::read_to_string(path()).unwrap());
    }

    #[test]
    fn more_than_the_bound_no_bound_and_no_measurement_are_failures() {
        let budget = Budget::parse("# program\nedge 100 90 0 80\nsock 10 10 10 10\n").unwrap();
        assert!(budget.check(Kernel::V5_10, &measured(&[("edge", 100), ("sock", 1)])).is_empty());
        let failures = budget.check(Kernel::V6_1, &measured(&[("edge", 91), ("new", 5)]));
        assert_eq!(failures.len(), 3, "{failures:?}");
        assert_eq!(failures[0], "edge: 91 verified instructions, the budget is 90");
        assert!(failures[1].contains("has no bound") && failures[2].starts_with("sock: "), "{failures:?}");
        assert_eq!(budget.check(Kernel::V6_12, &measured(&[("edge", 1), ("sock", 1)])).len(), 1);
        assert!(Budget::parse("edge 1 2 3\n").is_err());
        assert!(Budget::parse("edge 1 2 3 x\n").is_err());
    }

    #[test]
    fn blessing_adds_a_margin_below_the_ceiling() {
        let mut budget = Budget::parse("gone 5 0 0 0\nkept 5 0 0 7\n").unwrap();
        budget.bless(Kernel::V5_10, &measured(&[("edge", 1000), ("large", 240_000)])).unwrap();
        let expected = Budget::parse("edge 1100 0 0 0\nlarge 250000 0 0 0\nkept 0 0 0 7\n").unwrap();
        assert_eq!(budget, expected);
        assert!(budget.bless(Kernel::V5_10, &measured(&[("edge", 250_001)])).is_err());
    }
}
