//! `bpf_sock_addr` as the datapath's [`Socket`]: all `unsafe` of the kernel side for sockets.
//!
//! The hook's family is a const parameter. `V6` hooks carry sixteen bytes (IPv4 is mapped by the application), the
//! other hooks four.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use proxy_common::abi::{CgroupId, NetnsCookie, SocketRecord, socket::Order};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::tables::{Socket, Tables};

use crate::maps::{ORDERS, SOCKETS};
use crate::steps;

const AF_INET: u32 = 2;

/// The socket and address of one hook invocation.
pub(crate) struct SockAddr<const V6: bool> {
    ctx: SockAddrContext,
}

impl<const V6: bool> SockAddr<V6> {
    pub(crate) const fn new(ctx: SockAddrContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn sk(&self) -> *mut bpf_sock {
        // SAFETY: the kernel hands every program of this type a whole `bpf_sock_addr`.
        let sock_addr = unsafe { &*self.ctx.sock_addr };
        // SAFETY: the union has this one member; the verifier tracks the pointer.
        unsafe { sock_addr.__bindgen_anon_1.sk }
    }

    /// Removes the value that a map holds for this socket.
    #[inline(always)]
    fn forget<T>(&self, storage: &SkStorage<T>) {
        let sk = self.sk();
        if sk.is_null() {
            return;
        }
        // SAFETY: the pointer is the context's own.
        let _ = unsafe { storage.delete(sk) };
    }

    #[cfg(feature = "debug-log")]
    pub(crate) const fn ctx(&self) -> &SockAddrContext {
        &self.ctx
    }
}

/// Reads a context field exactly once, at its own width: the verifier rewrites each access by offset and width.
macro_rules! get {
    ($self:ident, $field:ident $([$i:literal])?) => {
        // SAFETY: the kernel hands every program of this type a whole `bpf_sock_addr`.
        unsafe { addr_of!((*$self.ctx.sock_addr).$field $([$i])?).read_volatile() }
    };
}

/// Reads a field of a socket exactly once, at its own width.
macro_rules! of_sock {
    ($sk:ident, $field:ident $([$i:literal])?) => {
        // SAFETY: the pointer is the context's and not null, and the verifier rewrites the access.
        unsafe { addr_of!((*$sk).$field $([$i])?).read_volatile() }
    };
}

macro_rules! set {
    ($self:ident, $field:ident $([$i:literal])?, $value:expr) => {
        // SAFETY: as for reading; the verifier allows writes to the fields that its attach type may change.
        unsafe { addr_of_mut!((*$self.ctx.sock_addr).$field $([$i])?).write_volatile($value) }
    };
}

impl<const V6: bool> Socket for SockAddr<V6> {
    #[inline(always)]
    fn addr(&self) -> Addr {
        if V6 {
            let words = [
                get!(self, user_ip6[0]),
                get!(self, user_ip6[1]),
                get!(self, user_ip6[2]),
                get!(self, user_ip6[3]),
            ];
            Addr::v6(bytemuck::cast(words))
        } else {
            Addr::v4_in_memory(get!(self, user_ip4))
        }
    }

    #[inline(always)]
    fn port(&self) -> Be16 {
        let [a, b, ..] = get!(self, user_port).to_ne_bytes();
        Be16 { bytes: [a, b] }
    }

    #[inline(always)]
    fn protocol(&self) -> u32 {
        get!(self, protocol)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is the one this program was called with.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn netns(&self) -> NetnsCookie {
        // SAFETY: the context is the one this program was called with.
        NetnsCookie(unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) })
    }

    #[inline(always)]
    fn cgroup(&self, level: i32) -> CgroupId {
        steps::ancestor(level)
    }

    #[inline(always)]
    fn is_of_opt_out(&self, _tables: &impl Tables, inside: bool) -> bool {
        steps::is_of_opt_out(inside)
    }

    #[inline(always)]
    fn rewrite(&mut self, addr: Addr, port: Be16) {
        if V6 {
            let [a, b, c, d] = bytemuck::cast::<[u8; 16], [u32; 4]>(addr.bytes);
            set!(self, user_ip6[0], a);
            set!(self, user_ip6[1], b);
            set!(self, user_ip6[2], c);
            set!(self, user_ip6[3], d);
        } else {
            set!(self, user_ip4, u32::from_ne_bytes(addr.v4_octets()));
        }
        let [a, b] = port.bytes;
        set!(self, user_port, u32::from_ne_bytes([a, b, 0, 0]));
    }

    #[inline(always)]
    fn record(&self) -> Option<SocketRecord> {
        // SAFETY: the helper checks the socket that the context carries.
        let record = unsafe { SOCKETS.get_ptr_mut(&self.ctx) };
        // SAFETY: null or a whole element, which lives as long as the socket that this hook holds.
        unsafe { record.as_ref() }.copied()
    }

    #[inline(always)]
    fn put_record(&mut self, mut record: SocketRecord) -> bool {
        // SAFETY: the helper checks the socket that the context carries.
        let stored = unsafe { SOCKETS.get_or_insert_ptr_mut(&self.ctx, Some(&mut record)) };
        // SAFETY: null or a whole element; the kernel holds the socket locked during connect().
        match unsafe { stored.as_mut() } {
            Some(stored) => {
                *stored = record;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn order(&self) -> Option<Order> {
        // SAFETY: the helper checks the socket that the context carries.
        let order = unsafe { ORDERS.get_ptr_mut(&self.ctx) };
        // SAFETY: null or a whole element, which lives as long as the socket that this hook holds.
        unsafe { order.as_ref() }.copied()
    }

    #[inline(always)]
    fn drop_order(&mut self) {
        self.forget(&ORDERS);
    }

    #[inline(always)]
    fn peer(&self) -> (Addr, Be16) {
        let sk = self.sk();
        if sk.is_null() {
            return (Addr::ZERO, Be16 { bytes: [0; 2] });
        }
        let port: u16 = of_sock!(sk, dst_port);
        let addr = if of_sock!(sk, family) == AF_INET {
            Addr::v4_in_memory(of_sock!(sk, dst_ip4))
        } else {
            let words = [
                of_sock!(sk, dst_ip6[0]),
                of_sock!(sk, dst_ip6[1]),
                of_sock!(sk, dst_ip6[2]),
                of_sock!(sk, dst_ip6[3]),
            ];
            Addr::v6(bytemuck::cast(words))
        };
        (addr, Be16 { bytes: port.to_ne_bytes() })
    }

    #[inline(always)]
    fn drop_record(&mut self) {
        self.forget(&SOCKETS);
    }
}

/// Returns protocol and cookie of a socket that is being closed.
#[inline(always)]
pub(crate) fn closing(ctx: &SockContext) -> (u32, u64) {
    // SAFETY: the kernel hands every program of this type a whole `bpf_sock`.
    let sock = unsafe { &*ctx.sock };
    // SAFETY: the context is the one this program was called with.
    (sock.protocol, unsafe { bpf_get_socket_cookie(ctx.as_ptr()) })
}
