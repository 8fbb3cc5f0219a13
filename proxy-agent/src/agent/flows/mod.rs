//! The packet edge's flows, as the agent sees them: it frees the memory of those that have expired, and shows them.
//!
//! The datapath writes the records and their index entries, takes expired ones for absent, and recycles what it meets
//! of them. So nothing depends on the agent but memory: `FLOWS` and `FLOW_INDEX` never evict, and a flow that nobody
//! uses again would stay there for ever.

mod collect;

mod counts;

pub use self::collect::{CollectError, Collected, Collection, keep_collecting};
pub use self::counts::Counts;
