//! Whatever names there are, in what the commands print.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::inputs::tables(data));
