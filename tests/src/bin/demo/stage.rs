//! The output of the demo, and the record of unexpected results.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use proxy_tests::lab::{Attempt, Summary};
use proxy_tests::scenarios::served;

/// Width of text, in columns.
const WIDTH: usize = 100;
/// Width of the output of other programs, in columns.
const WIDE: usize = 140;
/// Length of the longest bar, in columns.
const BAR: usize = 50;

/// Prints, counts and judges the results.
pub(crate) struct Stage {
    colour: bool,
    start: Instant,
    acts: usize,
    connections: usize,
    unexpected: Vec<String>,
}

impl Stage {
    /// Returns a stage with colours or without.
    pub(crate) fn new(colour: bool) -> Self {
        Self { colour, start: Instant::now(), acts: 0, connections: 0, unexpected: Vec::new() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints the headline of the next act.
    pub(crate) fn act(&mut self, title: &str) {
        self.acts += 1;
        let title = format!("{}. {title}", self.acts);
        println!("\n{}\n{}", self.paint("1;36", &title), self.paint("36", &"-".repeat(title.len())));
    }

    /// Prints a headline without a number.
    pub(crate) fn title(&self, title: &str) {
        println!("{}\n{}", self.paint("1", title), self.paint("1", &"=".repeat(title.len())));
    }

    /// Prints a paragraph.
    pub(crate) fn say(&self, text: &str) {
        let mut line = String::new();
        for word in text.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH {
                println!("{line}");
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        println!("{line}");
    }

    /// Prints a line unchanged.
    pub(crate) fn line(&self, text: &str) {
        println!("{text}");
    }

    /// Prints lines of a program's output, indented and cut at the width [`WIDE`].
    pub(crate) fn output(&self, text: &str) {
        for line in text.trim_end().lines() {
            let shown: String = line.chars().take(WIDE).collect();
            let more = if shown.len() < line.len() { "…" } else { "" };
            println!("  {}{more}", self.paint("2", &shown));
        }
    }

    /// Prints a command that the audience could type.
    pub(crate) fn command(&self, place: &str, command: &str) {
        println!("{} {}", self.paint("32", &format!("{place}$")), self.paint("1", command));
    }

    /// Counts connections, which all have to be answered, and draws the number of answers of each server.
    pub(crate) fn answered(&mut self, target: &str, attempts: &[Attempt]) -> Summary {
        let summary = self.count(target, attempts);
        self.bars(&summary);
        summary
    }

    /// Counts connections, which all have to be answered.
    pub(crate) fn count(&mut self, target: &str, attempts: &[Attempt]) -> Summary {
        self.connections += attempts.len();
        match served(target, attempts) {
            Ok(summary) => summary,
            Err(error) => {
                self.unexpected(&format!("{error:#}"));
                Summary::of(attempts)
            }
        }
    }

    /// Counts connections whose outcome the caller judges.
    pub(crate) fn add(&mut self, attempts: usize) {
        self.connections += attempts;
    }

    /// Draws a bar for every server.
    pub(crate) fn bars(&self, summary: &Summary) {
        let most = summary.by_server.values().copied().max().unwrap_or(1).max(1);
        let names = summary.by_server.keys().map(String::len).max().unwrap_or_default();
        for (server, count) in &summary.by_server {
            let bar = "#".repeat((count * BAR / most).max(1));
            println!("  {server:<names$}  {} {count}", self.paint("34", &bar));
        }
    }

    /// Records an error; prints nothing on success.
    pub(crate) fn expect(&mut self, judgement: Result<()>) {
        if let Err(error) = judgement {
            self.unexpected(&format!("{error:#}"));
        }
    }

    /// Prints a check and its result.
    pub(crate) fn check(&mut self, good: bool, what: &str) {
        if good {
            println!("  {} {what}", self.paint("32", "ok"));
        } else {
            self.unexpected(what);
        }
    }

    /// Prints and records a failed check; prints nothing for a good one.
    pub(crate) fn check_quietly(&mut self, good: bool, otherwise: &str) {
        if !good {
            self.unexpected(otherwise);
        }
    }

    /// Prints and records an unexpected result.
    pub(crate) fn unexpected(&mut self, what: &str) {
        println!("  {} {what}", self.paint("1;31", "UNEXPECTED:"));
        self.unexpected.push(what.to_owned());
    }

    /// Prints the end of the demo and returns its exit code.
    pub(crate) fn finish(self) -> ExitCode {
        let Self { connections, unexpected, start, .. } = &self;
        if !unexpected.is_empty() {
            println!("\n{}", self.paint("1;31", "not as expected:"));
            unexpected.iter().for_each(|what| println!("- {what}"));
        }
        println!(
            "\n{}",
            self.paint("2", &format!("{:.1} seconds; nothing is left behind", start.elapsed().as_secs_f32()))
        );
        let last =
            format!("demo finished: {connections} connections, {} unexpected results", unexpected.len());
        println!("{}", self.paint(if unexpected.is_empty() { "1;32" } else { "1;31" }, &last));
        if unexpected.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
