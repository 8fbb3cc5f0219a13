//! Arbitrary names in the output of the commands.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_agent::inputs::tables(data));
