//! One packet, of which every bit may be anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::packets::fuzz::packet(data));
