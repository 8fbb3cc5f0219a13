//! Decisions on packets.

/// Decision on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on unchanged.
    Pass,
    /// Goes on, translated.
    Translated,
    /// Is dropped.
    Drop,
    /// Has been turned into a reset or an ICMP error: goes back where it came from.
    Reply,
    /// Goes on, translated, by another device than the one that routing chose.
    Elsewhere,
}
