//! Inputs that a person or a cluster can write: runs those that the fuzzers have found worth keeping (`fuzz/corpus`).

use proxy_tests::corpus::replay;
use proxy_tests::inputs;

#[test]
fn kubeconfigs() {
    replay("kubeconfig", inputs::kubeconfig);
}

#[test]
fn configurations() {
    replay("configuration", inputs::configuration);
}

#[test]
fn manifests() {
    replay("manifests", inputs::manifests);
}

#[test]
fn objects() {
    replay("objects", inputs::objects);
}

#[test]
fn tables() {
    replay("tables", inputs::tables);
}
