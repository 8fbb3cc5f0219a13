//! tests

pub mod apiserver;
pub mod cases;
pub mod corpus;
pub mod deployment;
pub mod floods;
pub mod inputs;
pub mod lab;
pub mod packets;
pub mod scenarios;
