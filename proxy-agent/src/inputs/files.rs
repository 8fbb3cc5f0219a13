//! Files that inputs are written to, and the parts of an input.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

/// Makes a directory for one input, in memory if possible.
pub(super) fn directory() -> TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).expect("a directory can be made")
}

/// Writes a file of the directory.
pub(super) fn write(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("a file can be written");
}

/// Splits an input at lines that consist of `marker`.
pub(super) fn parts<'a>(data: &'a [u8], marker: &[u8]) -> Vec<&'a [u8]> {
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
