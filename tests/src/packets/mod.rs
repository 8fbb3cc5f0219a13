//! The packet edge's packets: a small world of Services with its maps, packets as tests write and read them, random
//! packets, and the programs in the kernel on single packets.

mod world;

mod wire;

pub mod random;

pub mod fuzz;

pub mod kernel;

mod sys;

pub use self::wire::{Body, ETHERNET, Packet, Seen, Trouble, fragments, internet_checksum, read};
pub use self::world::{BARE, NEAR, NIC, Net, OVERLAY, POD, World, role_of};
