//! Answers of an API server, and the operations that they lead to.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_agent::inputs::objects(data));
