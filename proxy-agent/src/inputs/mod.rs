//! Inputs that a person or a cluster can write, with any content: run by the fuzzers (`fuzz/`), and by the replay of
//! their corpora in the unit tests. Each function panics when a property does not hold.
//!
//! Compiled for tests and fuzzers only.

mod configuration;
mod files;
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Smallest number of inputs in the corpus of a fuzzer.
    const INPUTS: usize = 20;

    /// Runs every input that a fuzzer has found worth keeping, and prints the input's name first.
    fn replay(target: &str, run: impl Fn(&[u8])) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
        let entries = fs::read_dir(&directory).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in &paths {
            println!("{}", path.display());
            run(&fs::read(path).unwrap());
        }
        assert!(paths.len() >= INPUTS, "only {} inputs in {}", paths.len(), directory.display());
    }

    #[test]
    fn kubeconfigs() {
        replay("kubeconfig", kubeconfig);
    }

    #[test]
    fn configurations() {
        replay("configuration", configuration);
    }

    #[test]
    fn manifests_of_any_content() {
        replay("manifests", manifests);
    }

    #[test]
    fn objects_of_any_content() {
        replay("objects", objects);
    }

    #[test]
    fn names_of_any_content() {
        replay("tables", tables);
    }
}
