//! The packet edge's flows, as the agent sees them: it frees the memory of those that have expired, and shows them.
//!
//! The datapath writes the records and their index entries, takes expired ones for absent, and recycles what it meets
//! of them. So nothing depends on the agent but memory: `FLOWS` and `FLOW_INDEX` never evict, and a flow that nobody
//! uses again would stay there for ever.

mod collect;

mod counts;

mod view;

pub use self::collect::{CollectError, Collected, Collection, keep_collecting};
pub use self::counts::Counts;
pub use self::view::{FlowView, flow_views, print, print_flows};

/// The clock of [`proxy_common::abi::Flow::last_seen`]: monotonic, in nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}
