//! A file in a directory of manifests, and what is programmed for it. A thread that has read a file may still be ending when leaks are
//! looked for: `-detect_leaks=0`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::inputs::manifests(data));
