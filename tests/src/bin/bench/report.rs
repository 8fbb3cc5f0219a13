//! The output of a benchmark: figures, some of them with a bar.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Serialize, Serializer};

use crate::machine::Machine;
use crate::stats::Estimate;

/// Version of the JSON document.
const VERSION: u32 = 1;

/// Report of one run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    version: u32,
    /// Name of the benchmark, as on the command line.
    pub(crate) bench: &'static str,
    pub(crate) machine: Machine,
    /// The options of the run, as text.
    pub(crate) options: String,
    pub(crate) figures: Vec<Figure>,
    /// Remarks that the figures need.
    pub(crate) notes: Vec<String>,
}

/// Bar that a figure has to meet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bar) => value >= bar,
            Self::AtMost(bar) => value <= bar,
        }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bar) => write!(f, ">= {bar}"),
            Self::AtMost(bar) => write!(f, "<= {bar}"),
        }
    }
}

impl Serialize for Bar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One measured figure.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    /// Measured quantity.
    pub(crate) name: String,
    /// World of the measurement: Services x endpoints of each.
    pub(crate) world: String,
    /// Unit of `value`, `low` and `high`.
    pub(crate) unit: &'static str,
    pub(crate) value: f64,
    /// Lower end of the 95 % confidence interval, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) high: Option<f64>,
    /// Number of measurements that the figure was made from.
    pub(crate) samples: usize,
    /// Further figures, each with its unit in its name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) details: BTreeMap<&'static str, f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bar: Option<Bar>,
    /// Whether `value` meets `bar`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ok: Option<bool>,
}

impl Figure {
    /// Returns a figure of a single value.
    pub(crate) fn new(name: impl Into<String>, world: &str, unit: &'static str, value: f64) -> Self {
        Self {
            name: name.into(),
            world: world.to_owned(),
            unit,
            value,
            low: None,
            high: None,
            samples: 1,
            details: BTreeMap::new(),
            bar: None,
            ok: None,
        }
    }

    /// Returns a figure that is the median of several measurements.
    pub(crate) fn estimated(
        name: impl Into<String>,
        world: &str,
        unit: &'static str,
        estimate: Estimate,
    ) -> Self {
        Self {
            low: Some(estimate.low),
            high: Some(estimate.high),
            samples: estimate.samples,
            ..Self::new(name, world, unit, estimate.median)
        }
    }

    /// Sets the number of measurements.
    pub(crate) fn samples(self, samples: usize) -> Self {
        Self { samples, ..self }
    }

    /// Adds a further figure.
    pub(crate) fn detail(mut self, name: &'static str, value: f64) -> Self {
        self.details.insert(name, value);
        self
    }

    /// Sets the bar, and whether the value meets it.
    pub(crate) fn bar(self, bar: Bar) -> Self {
        Self { bar: Some(bar), ok: Some(bar.is_met(self.value)), ..self }
    }
}

impl Report {
    /// Returns a report without figures.
    pub(crate) fn new(bench: &'static str, options: String) -> Self {
        let machine = Machine::now();
        Self { version: VERSION, bench, machine, options, figures: Vec::new(), notes: Vec::new() }
    }

    /// Adds a remark, unless the report already has it.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Returns whether every figure with a bar meets it.
    pub(crate) fn all_met(&self) -> bool {
        self.figures.iter().all(|figure| figure.ok != Some(false))
    }

    /// Returns the report as a table for people.
    pub(crate) fn table(&self) -> String {
        let Machine { kernel, cpu, cpus, load_before, load_after, .. } = &self.machine;
        let mut text = format!(
            "{}: {cpus} x {cpu}, kernel {kernel}, load {load_before} before and {load_after} after\n{}\n\n",
            self.bench, self.options
        );
        let mut rows = vec![["", "world", "value", "95 %", "bar", ""].map(str::to_owned)];
        rows.extend(self.figures.iter().map(row));
        let widths: Vec<usize> = (0..6)
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for [name, world, value, interval, bar, details] in &rows {
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "{name:0$}  {world:1$}  {value:>2$}  {interval:3$}  {bar:4$}  {details}",
                widths[0], widths[1], widths[2], widths[3], widths[4]
            );
        }
        for note in &self.notes {
            let _ = write!(text, "\n{note}\n");
        }
        text
    }
}

fn row(figure: &Figure) -> [String; 6] {
    let interval = match (figure.low, figure.high) {
        (Some(low), Some(high)) => format!("{} .. {}", number(low), number(high)),
        _ => String::new(),
    };
    let bar = match (figure.bar, figure.ok) {
        (Some(bar), Some(ok)) => format!("{} {bar}", if ok { "ok" } else { "MISS" }),
        _ => String::new(),
    };
    let details: Vec<String> =
        figure.details.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
    let value = format!("{} {}", number(figure.value), figure.unit);
    [figure.name.clone(), figure.world.clone(), value, interval, bar, details.join(", ")]
}

/// Formats a number with four significant digits, without an exponent.
fn number(value: f64) -> String {
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let decimals = usize::try_from(3 - magnitude).unwrap_or(0).min(6);
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.99412, "0.9941"),
            (1.0, "1.000"),
            (31_234.4, "31234"),
            (-12.345, "-12.35"),
            (0.0, "0.000"),
            (0.000_123_4, "0.000123"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_missed_bar_shows() {
        let mut report = Report::new("sync", String::new());
        report.figures.push(Figure::new("ready", "10x1", "s", 0.5).bar(Bar::AtMost(1.0)));
        assert!(report.all_met());
        report.figures.push(Figure::new("tcp-rr", "10x1", "ratio", 0.9).bar(Bar::AtLeast(0.99)));
        assert!(!report.all_met());
        assert!(report.table().contains("MISS >= 0.99"), "{}", report.table());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["figures"][0]["bar"], "<= 1");
        assert_eq!(json["figures"][1]["ok"], false);
    }
}
