//! What the fuzzers have found worth keeping (`fuzz/corpus`), once more.

use std::fs;
use std::path::Path;

/// The fewest inputs that a fuzzer begins with.
const INPUTS: usize = 20;

/// Runs every input of a fuzzer, and names it first.
///
/// # Panics
/// If one of them does, or if most of them are gone.
pub fn replay(target: &str, run: impl Fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries =
        fs::read_dir(&directory).unwrap_or_else(|error| unreachable!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a directory can be read").path()).collect();
    paths.sort();
    for path in &paths {
        println!("{}", path.display());
        run(&fs::read(path).expect("an input can be read"));
    }
    assert!(paths.len() >= INPUTS, "only {} inputs in {}", paths.len(), directory.display());
}
