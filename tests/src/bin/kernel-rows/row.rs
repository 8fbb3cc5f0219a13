//! A row, and how rows are run: one after the other on one world, each with its time, none stopped by another.

use std::any::Any;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::world::World;

/// How long one row may take: emulation on a busy machine makes a minute of what is a second elsewhere.
const ROW: Duration = Duration::from_secs(180);
/// How long all of them may take.
const ALL: Duration = Duration::from_secs(600);

/// One thing that has to be right on every kernel.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// Its name.
    pub(super) id: &'static str,
    /// Whether it is right.
    pub(super) check: fn(&World) -> Result<Outcome>,
}

/// How a row ended that did not fail.
pub(super) enum Outcome {
    /// As everywhere; with what was seen.
    Right(String),
    /// The kernel lacks something, and what is done instead is right.
    Lacks(String),
}

/// What was seen.
pub(super) fn right(what: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Right(what.into()))
}

/// Builds the world, which is a row as well, runs the rows, and says whether all were right.
pub(super) fn run_all(rows: &[Row], hybrid: bool) -> bool {
    let start = Instant::now();
    let ids: Vec<&str> = rows.iter().map(|row| row.id).collect();
    let built = within(ROW, move || World::build(hybrid, &ids)).map(Arc::new);
    let mut failed = usize::from(built.is_err());
    let there = Outcome::Right("namespaces, devices and servers".to_owned());
    tell("k000_world", start, built.as_ref().map(|_| &there));
    for row in rows {
        let began = Instant::now();
        let result = match &built {
            Err(_) => Err(anyhow!("there is no world to check it in")),
            Ok(_) if start.elapsed() > ALL => Err(anyhow!("no time is left of {ALL:?}")),
            Ok(world) => {
                let (world, check) = (Arc::clone(world), row.check);
                within(ROW, move || check(&world))
            }
        };
        failed += usize::from(result.is_err());
        tell(row.id, began, result.as_ref());
    }
    if let Ok(world) = built
        && failed > 0
    {
        say(&format!("--- the agent's log\n{}", world.log()));
    }
    say(&format!("rows: {} passed, {failed} failed", rows.len() + 1 - failed));
    failed == 0
}

fn tell(id: &str, began: Instant, result: Result<&Outcome, &anyhow::Error>) {
    let seconds = began.elapsed().as_secs_f64();
    say(&match result {
        Ok(Outcome::Right(what)) => format!("row {id} ok {seconds:.1} {what}"),
        Ok(Outcome::Lacks(what)) => format!("row {id} lacks {what}"),
        Err(error) => format!("row {id} FAILED {seconds:.1} {}", one_line(error)),
    });
}

/// The result of `work`, which is left to itself if it takes longer. A panic is an error like others.
fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        // Nobody waits any more for what comes too late.
        let _ = sender.send(result.unwrap_or_else(|panic| Err(anyhow!("panic: {}", words(&*panic)))));
    });
    receiver.recv_timeout(limit).unwrap_or_else(|_late| Err(anyhow!("it still runs after {limit:?}")))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words").to_owned()
}

/// An error with its causes.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " | ")
}

/// Prints a line. Who has closed the output does not want to know.
pub(super) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
