//! Flows: looked up by any of their tuples, created once, kept while they live.
//!
//! A flow begins in the maps that evict ([`Tier::New`](super::tables::Tier::New)). It moves to the maps that never evict
//! ([`Tier::Assured`](super::tables::Tier::Assured)) when its client goes on after a reply. A reply alone proves nothing, because a live
//! backend replies to spoofed requests, too. For TCP the client has to acknowledge what the backend sent.
//! Until then only a packet that answers the client's own SYN counts as a reply: somebody else may have a
//! direct connection to the backend between the same addresses and ports.
//!
//! A SYN never ends an open flow. It begins a second flow beside the open one if the backend has gone or has
//! been silent for too long, or if the flow was closed a moment ago (perhaps by somebody else). The second
//! flow takes the place of the first when the client proves it.

mod begin;
mod index;
mod keys;
mod place;
mod segments;
mod source;

pub use self::begin::{create, try_tuple};
pub use self::index::{give_way, keep_vip, remove};
pub use self::keys::{key, reversed, snat_index, snat_target, vip_index, vip_target};
pub use self::place::{
    Place, by_snat, by_vip, find_by_vip, has_snat, is_succeeded, is_succeeded_at_backend, is_taken, of_vip,
    record,
};
pub use self::segments::{has_sent, is_answer, meet, on_reply, on_request};
pub use self::source::{keeps_source, translate_source, try_source};
