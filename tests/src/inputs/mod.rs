//! Inputs that a person or a cluster can write, with any content: run by the fuzzers (`fuzz/`), and by the replay of
//! their corpora in the test suite. Each function panics when a property does not hold.

mod configuration;
mod kubeconfig;
mod manifests;
mod node;
mod objects;
mod printed;
mod tables;

pub use self::configuration::configuration;
pub use self::kubeconfig::kubeconfig;
pub use self::manifests::manifests;
pub use self::objects::objects;
pub use self::tables::tables;

use std::fs;
use std::path::Path;

use tempfile::TempDir;

/// Makes a directory for one input, in memory if possible.
fn directory() -> TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).expect("a directory can be made")
}

fn write(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("a file can be written");
}

/// Splits an input at lines that consist of `marker`.
fn parts<'a>(data: &'a [u8], marker: &[u8]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    let (mut begin, mut at) = (0, 0);
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        if line.strip_suffix(b"\n").unwrap_or(line) == marker {
            parts.push(&data[begin..at]);
            begin = at + line.len();
        }
        at += line.len();
    }
    parts.push(&data[begin..]);
    parts
}
