//! One packet of arbitrary bits.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::packets::fuzz::packet(data));
