//! Fragments: only the first fragment of a packet has the ports, which are kept for the later ones.

use super::tables::EdgeTables;
use super::verdict::Verdict;
use crate::abi::{Counter, FilterBit, FragmentKey, FragmentPorts, Origin, local_address};
use crate::addr::Addr;
use crate::datapath::edge::parsed::{Parsed, Tuple};

/// Decides on a later fragment that has come before its first one. Its ports are not known, so it is dropped
/// if its destination may be a frontend. Fragments to the host's own addresses go on: the host reassembles
/// them itself. Fragments to pods go on, too: a pod is no frontend, though it may share a bit of the filter
/// with one.
#[inline(never)]
pub(super) fn stray_fragment(tables: &impl EdgeTables, destination: &Addr) -> Verdict {
    let bit = FilterBit::of_address(destination);
    if tables.local_address(destination) & local_address::HOST != 0
        || !tables.in_service_cidr(destination)
            && (tables.filter(bit.word) & bit.mask == 0 || tables.is_pod_source(destination))
    {
        return Verdict::Pass;
    }
    tables.count(Counter::DropFragment);
    Verdict::Drop
}

/// Keeps the ports of a first fragment for the later ones. Returns false on failure.
#[inline(never)]
pub(super) fn remember_ports(
    tables: &impl EdgeTables,
    parsed: &Parsed,
    origin: Origin,
    egress: bool,
) -> bool {
    let Tuple { source_port: source, destination_port: destination, .. } = parsed.tuple;
    tables.put_fragment(&fragment_key(parsed, origin, egress), &FragmentPorts { source, destination })
}

/// Fills in the ports of a later fragment from its first one. Returns false if they are not known.
#[inline(never)]
pub(super) fn restore_ports(
    tables: &impl EdgeTables,
    parsed: &mut Parsed,
    origin: Origin,
    egress: bool,
) -> bool {
    match tables.fragment(&fragment_key(parsed, origin, egress)) {
        Some(ports) => {
            parsed.tuple.source_port = ports.source;
            parsed.tuple.destination_port = ports.destination;
            true
        }
        None => false,
    }
}

#[inline(always)]
fn fragment_key(parsed: &Parsed, origin: Origin, egress: bool) -> FragmentKey {
    FragmentKey {
        source: parsed.tuple.source,
        destination: parsed.tuple.destination,
        origin,
        id: parsed.id,
        proto: parsed.proto,
        egress: u8::from(egress),
        pad: [0; 2],
    }
}
