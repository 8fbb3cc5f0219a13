//! The packet edge: translates packets of clients outside this node, and of pods whose sockets the socket
//! edge does not see.
//!
//! Each client has one edge: the device that its packets enter by. [`ingress()`] applies DNAT to a request when
//! it enters, and [`egress()`] applies reverse NAT to the reply when it leaves by that device. Between the two,
//! the kernel and its packet filters see the addresses of the real client and of the real backend. When a
//! request of an outside client leaves for a backend on another node, [`egress()`] applies SNAT to an address
//! of this node, so that the reply comes back here.
//!
//! The key of a flow includes its [`Origin`](crate::abi::Origin): the pod's interface, or all external devices together. A pod
//! that forges another client's source address therefore begins a flow of its own, and no reply to that
//! client belongs to this flow.
//!
//! | packet | hook | translated to |
//! |---|---|---|
//! | client → VIP | ingress of the client's device | client → backend |
//! | client → backend on another node | egress of an external device | our address → backend |
//! | backend → our address | ingress | backend → client |
//! | backend → client | egress of the client's device | VIP → client |
//! | host, from a frontend's own address and port | egress, and the reply on ingress | not translated |
//! | pod → itself (hairpin) | egress of its own device | our address → pod, and back on ingress |
//!
//! In reading order: [`packet`] and [`tables`] are what the pipeline works on, [`parse`] reads headers,
//! [`flows`] finds and creates flows, [`rewrite`] writes headers, [`icmp`] translates ICMP errors, [`refuse`]
//! turns a rejected packet into a reset or an ICMP error.

pub mod packet;

pub mod tables;

pub mod parsed;

pub mod role;

pub mod verdict;

pub mod work;

pub mod parse;

pub mod checksum;

pub mod sctp;

pub mod timeouts;

pub mod flows;

pub mod rewrite;

pub mod icmp;

pub mod refuse;

pub mod direct;
mod egress;
mod finish;
mod fragments;
mod ingress;
pub mod judge;
mod own_datagrams;
mod whence;

pub use self::egress::egress;
pub use self::ingress::ingress;
pub use self::role::Role;
pub use self::verdict::Verdict;
