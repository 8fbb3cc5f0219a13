//! Shared parts of the tests, benchmarks and the demo: the lab, the API server, the cases, and inputs for fuzzers.

pub mod apiserver;
pub mod cases;
pub mod corpus;
pub mod deployment;
pub mod floods;
pub mod inputs;
pub mod lab;
pub mod packets;
pub mod scenarios;
