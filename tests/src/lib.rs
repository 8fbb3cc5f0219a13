//! Shared parts of the tests, benchmarks and the demo: the lab, the API server and the cases.

pub mod apiserver;
pub mod cases;
pub mod corpus;
pub mod deployment;
pub mod floods;
pub mod lab;
pub mod packets;
pub mod scenarios;
