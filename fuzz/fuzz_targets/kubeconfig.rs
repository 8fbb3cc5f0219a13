//! A kubeconfig: a file that names an API server and its user.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_agent::inputs::kubeconfig(data));
