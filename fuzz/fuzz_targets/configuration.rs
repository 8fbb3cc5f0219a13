//! kube-proxy's configuration file, read and written.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_agent::inputs::configuration(data));
