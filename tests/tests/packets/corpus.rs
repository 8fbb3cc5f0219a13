//! What the fuzzers have found worth keeping, once more (`fuzz/corpus`).

use std::fs;
use std::path::Path;

use proxy_tests::packets::fuzz;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&fs::read(&path).unwrap());
        inputs += 1;
    }
    assert!(inputs >= 20, "only {inputs} inputs in {}", directory.display());
}

#[test]
fn traffic() {
    replay("traffic", fuzz::traffic);
}

#[test]
fn packet() {
    replay("packet", fuzz::packet);
}
