//! Floods and crowds: packets from invented senders as fast as this machine makes them, many real connections that
//! carry data at the same time, and the lab for both.

mod crowd;

mod flood;

mod ground;

mod sys;

pub use self::crowd::{Crowd, Outcome, Way};
pub use self::flood::{Flood, Senders, Sent};
pub use self::ground::{Backend, CROWD_ADDRESS, Ground, NODE_ADDRESS, allow_open_files};
