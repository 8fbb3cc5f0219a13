//! The socket edge: connect, sendmsg, recvmsg and getpeername of pods and host processes.
//!
//! The application asks for a VIP and keeps seeing the VIP, while the kernel connects the socket to a
//! backend. After connect() there is no work per packet.
//!
//! Some decisions on sockets of pods are left to the packet edge, if it is attached to the interfaces of
//! pods: to drop a packet without an answer, which a socket call cannot do, and to compare the pod's address
//! with source ranges, because the socket has no address yet. All sockets of pods that have opted out are
//! left to the packet edge, too. The same holds for networks inside pods, which may have Services of their
//! own at the same addresses.

mod caller;
mod connect;
mod datagrams;
mod lead;
mod order;
mod record;
mod verdict;

pub use self::caller::is_of_opt_out;
pub use self::connect::{connect, peername, release};
pub use self::datagrams::{recvmsg, sendmsg};
pub use self::verdict::Verdict;
