//! A file in a directory of manifests, and the operations that it leads to. Run with `-detect_leaks=0`: a thread that
//! has read a file may still be ending when leaks are searched for.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_agent::inputs::manifests(data));
