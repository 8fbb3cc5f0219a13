//! tests

pub mod apiserver;
pub mod cases;
pub mod lab;
