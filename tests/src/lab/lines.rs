//! Reading the output of `lab-pod`, with a time limit.

use std::io::{BufRead as _, BufReader};
use std::process::ChildStdout;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::wire::{Attempt, Line, Summary};

/// The lines of one process, read by a thread of their own so that the process never blocks on a full pipe.
#[derive(Debug)]
pub(super) struct Lines(Receiver<Result<Line>>);

impl Lines {
    /// Starts reading.
    pub(super) fn of(stdout: ChildStdout) -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let parsed = line.map_err(Into::into).and_then(|text| {
                    serde_json::from_str(&text).with_context(|| format!("not a line of lab-pod: {text:?}"))
                });
                if sender.send(parsed).is_err() {
                    return;
                }
            }
        });
        Self(receiver)
    }

    /// Returns the next line.
    ///
    /// # Errors
    /// If no line comes within `patience`, or the process has closed its output.
    pub(super) fn next(&self, patience: Duration) -> Result<Line> {
        match self.0.recv_timeout(patience) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => bail!("lab-pod prints nothing for {patience:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("lab-pod ended early; see its standard error"),
        }
    }

    /// Returns the next line, which has to be an attempt.
    pub(super) fn attempt(&self, patience: Duration) -> Result<Attempt> {
        match self.next(patience)? {
            Line::Attempt(attempt) => Ok(attempt),
            line @ (Line::Ready | Line::Summary(_)) => bail!("unexpected line of lab-pod: {line:?}"),
        }
    }

    /// Appends the attempts that have already been read.
    pub(super) fn drain(&self, into: &mut Vec<Attempt>) -> Result<()> {
        while let Ok(line) = self.0.try_recv() {
            if let Line::Attempt(attempt) = line? {
                into.push(attempt);
            }
        }
        Ok(())
    }

    /// Appends attempts up to the summary, waiting at most `patience` for each, and checks that none was lost.
    pub(super) fn to_the_end(&self, patience: Duration, into: &mut Vec<Attempt>) -> Result<()> {
        loop {
            match self.next(patience)? {
                Line::Ready => {}
                Line::Attempt(attempt) => into.push(attempt),
                Line::Summary(summary) => {
                    let own = Summary::of(into.iter());
                    anyhow::ensure!(own == summary, "lab-pod counted {summary:?}, its lines say {own:?}");
                    return Ok(());
                }
            }
        }
    }
}
