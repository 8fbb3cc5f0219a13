//! The catalogue of maps against the BPF object that the agent embeds.

use std::collections::BTreeSet;

use proxy_agent::bpf::dataplane::OBJECT;
use proxy_common::abi::maps::{self, MapKind};

/// Maps that no agent reads or pins: memory of the programs for one packet.
const PRIVATE: [&str; 1] = ["SCRATCH"];

#[test]
fn the_object_has_the_maps_of_the_catalogue() {
    let object = aya_obj::Object::parse(OBJECT).unwrap();
    for map in maps::ALL {
        let found = &object.maps[map.name];
        // A ring buffer has neither keys nor values. Storage in sockets has file descriptors as keys.
        let sizes = if map.kind == MapKind::RingBuffer { (0, 0) } else { (map.key, map.value) };
        assert_eq!((found.key_size() as usize, found.value_size() as usize), sizes, "{}", map.name);
    }
    let names = object.maps.keys().filter(|name| !name.starts_with('.')).map(String::as_str);
    let known = maps::ALL.iter().map(|map| map.name).chain(PRIVATE);
    assert_eq!(names.collect::<BTreeSet<_>>(), known.collect::<BTreeSet<_>>());
}
