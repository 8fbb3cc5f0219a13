//! The packet edge's flows, as the agent sees them: it frees the memory of expired flows, and counts flows.
//!
//! The datapath writes the records and their index entries, treats expired ones as absent, and recycles those that it
//! meets. So only memory depends on the agent: `FLOWS` and `FLOW_INDEX` never evict, and a flow that nobody uses again
//! would stay there for ever.

mod collect;

mod counts;

pub(crate) use self::collect::keep_collecting;
pub use self::collect::{Collected, Collection};
pub(crate) use self::counts::Counts;
