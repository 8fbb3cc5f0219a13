//! Last step: writes the new tuple into the packet.

use super::packet::Packet;
use super::parsed::Parsed;
use super::rewrite;
use super::tables::EdgeTables;
use super::verdict::Verdict;
use super::work::Work;
use crate::abi::Counter;

/// Writes the new tuple in `work` into the packet.
#[inline(never)]
pub(super) fn finish(
    packet: &mut impl Packet,
    tables: &impl EdgeTables,
    parsed: &Parsed,
    work: &Work,
) -> Verdict {
    if rewrite::rewrite(packet, parsed, &work.new) {
        Verdict::Translated
    } else {
        tables.count(Counter::DropUnwritable);
        Verdict::Drop
    }
}
