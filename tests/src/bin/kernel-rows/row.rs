//! The rows and their runner: rows run one after another in one world, each with its time, and a failed row does not
//! stop the others.

use std::any::Any;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::world::World;

/// Time limit of one row: emulation on a busy machine turns a second into a minute.
const ROW: Duration = Duration::from_secs(180);
/// Time limit of all rows together.
const ALL: Duration = Duration::from_secs(600);

/// A property that every kernel must have.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// The row's name.
    pub(super) id: &'static str,
    /// Function that checks the property.
    pub(super) check: fn(&World) -> Result<Outcome>,
}

/// Outcome of a row that did not fail.
pub(super) enum Outcome {
    /// The row passed; with a description of the result.
    Right(String),
    /// The kernel lacks this, and the substitute is right.
    Lacks(String),
}

/// Returns an outcome with a description of the result.
pub(super) fn right(what: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Right(what.into()))
}

/// Builds the world, which is a row as well, runs the rows, and returns whether all of them passed.
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

/// Returns the result of `work`, or an error if it takes longer than `limit`; it then goes on unobserved. A panic
/// becomes an error.
fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        // The receiver may have stopped waiting.
        let _ = sender.send(result.unwrap_or_else(|panic| Err(anyhow!("panic: {}", words(&*panic)))));
    });
    receiver.recv_timeout(limit).unwrap_or_else(|_late| Err(anyhow!("it still runs after {limit:?}")))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words").to_owned()
}

/// Formats an error with its causes on one line.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " | ")
}

/// Prints a line; ignores that the output may be closed.
pub(super) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
