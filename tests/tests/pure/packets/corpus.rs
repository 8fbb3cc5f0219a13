//! Runs the packets that the fuzzers have found worth keeping (`fuzz/corpus`).

use proxy_tests::corpus::replay;
use proxy_tests::packets::fuzz;

#[test]
fn traffic() {
    replay("traffic", fuzz::traffic);
}

#[test]
fn packet() {
    replay("packet", fuzz::packet);
}
