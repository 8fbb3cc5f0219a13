//! What an API server sends, and what is programmed for it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::inputs::objects(data));
