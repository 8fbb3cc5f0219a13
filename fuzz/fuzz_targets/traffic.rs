//! Clients, pods and routers, and the packets that they send to each other through a node.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| proxy_tests::packets::fuzz::traffic(data));
