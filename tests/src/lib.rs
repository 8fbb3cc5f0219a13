//! tests

pub mod apiserver;
pub mod cases;
pub mod deployment;
pub mod floods;
pub mod lab;
pub mod packets;
pub mod scenarios;
