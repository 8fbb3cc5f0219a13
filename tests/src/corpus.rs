//! Replay of the inputs that the fuzzers have found (`fuzz/corpus`).

use std::fs;
use std::path::Path;

/// Smallest number of inputs in the corpus of a fuzzer.
const INPUTS: usize = 20;

/// Runs every input of a fuzzer, and prints the input's name first.
///
/// # Panics
/// If an input panics, or if most of the inputs are missing.
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
