//! Vipr's BPF programs: entry points that hand the kernel's context to `proxy_common::datapath` and turn its
//! verdict into a return value. No decision is made here.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
// On other targets the crate compiles (for lints and documentation) but nothing calls the entry points.
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "entry points are called by the kernel"))]

mod cell;
mod maps;
mod skb;
mod sock;
mod steps;
mod tables;
mod tc;

use aya_ebpf::Global;
use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, classifier};
use aya_ebpf::programs::{SockAddrContext, SockContext, TcContext};
use proxy_common::datapath::edge::{self, Role};
use proxy_common::datapath::socket::{self, Verdict};

use crate::maps::Maps;
use crate::skb::{Front, Skb};
use crate::sock::SockAddr;

/// Whether the kernel lets these programs choose the errno (`bpf_set_retval`). Set by the loader; the verifier removes
/// the branch if the value is 0.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u8> = Global::new(0);

const ALLOW: i32 = 1;
/// Return value that refuses a call. Without `bpf_set_retval` the kernel reports EPERM.
const DENY: i32 = 0;

// The kernel's NFS client takes these errors for failures of the network, and waits before it tries again. After an
// error that it does not know, it tries again at once and for ever: EPERM (until CVE-2024-42246), ENOMEM, ETIMEDOUT
// (`xs_tcp_setup_socket`).
const ENOBUFS: i32 = 105;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

#[inline(always)]
fn answer(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass | Verdict::Translated => ALLOW,
        Verdict::Drop => deny_with(EHOSTUNREACH),
        Verdict::Reject => deny_with(ECONNREFUSED),
        Verdict::Fail => deny_with(ENOBUFS),
    }
}

#[inline(always)]
fn deny_with(errno: i32) -> i32 {
    if HAS_SET_RETVAL.load() != 0 {
        // SAFETY: a helper without preconditions; the verifier refuses it in hooks that cannot have it.
        unsafe { bpf_set_retval(-errno) };
    }
    DENY
}

/// Runs one decision on the hook's socket.
#[inline(always)]
fn decide<const V6: bool>(
    hook: &'static str,
    ctx: SockAddrContext,
    decision: impl FnOnce(&mut SockAddr<V6>) -> Verdict,
) -> Verdict {
    let mut socket = SockAddr::new(ctx);
    if cfg!(feature = "debug-log") {
        log_address(hook, "asked", &socket);
    }
    let verdict = decision(&mut socket);
    if cfg!(feature = "debug-log") {
        log_address(hook, verdict_name(verdict), &socket);
    }
    verdict
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    answer(decide::<false>("connect4", ctx, |socket| socket::connect(socket, &Maps)))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    answer(decide::<true>("connect6", ctx, |socket| socket::connect(socket, &Maps)))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    answer(decide::<false>("sendmsg4", ctx, |socket| socket::sendmsg(socket, &Maps)))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    answer(decide::<true>("sendmsg6", ctx, |socket| socket::sendmsg(socket, &Maps)))
}

// The kernel accepts nothing but ALLOW from the hooks below.

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    decide::<false>("recvmsg4", ctx, |socket| socket::recvmsg(socket, &Maps));
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    decide::<true>("recvmsg6", ctx, |socket| socket::recvmsg(socket, &Maps));
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    decide::<false>("getpeername4", ctx, |socket| socket::peername(socket, &Maps));
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    decide::<true>("getpeername6", ctx, |socket| socket::peername(socket, &Maps));
    ALLOW
}

/// Whether the packets of the device begin with the IP header. Set by the loader, which loads the packet programs twice
/// if there are devices of both kinds.
#[unsafe(no_mangle)]
static L3_DEVICE: Global<u8> = Global::new(0);

/// Whether a packet that enters through a device without MAC headers may still have its outer headers before the IP
/// header: true of the IPv4 and IPv6 tunnels of kernels before 5.14. Set by the loader.
#[unsafe(no_mangle)]
static KEEPS_OUTER_HEADERS: Global<u8> = Global::new(0);

/// Runs the pipeline on a packet. A packet that goes on also goes on to the programs behind this one: `TC_ACT_OK` would
/// skip them.
#[inline(always)]
fn filter(ctx: &TcContext, role: Role, egress: bool) -> i32 {
    let Some(scratch) = maps::scratch() else { return TC_ACT_UNSPEC };
    let front = match (L3_DEVICE.load(), KEEPS_OUTER_HEADERS.load()) {
        (0, _) => Front::MacHeader,
        (_, 0) => Front::Nothing,
        _ if egress => Front::Nothing,
        _ => Front::OuterHeaders,
    };
    let mut packet = Skb::new(ctx, front);
    let verdict = if egress {
        edge::egress(&mut packet, &Maps, role, scratch)
    } else {
        edge::ingress(&mut packet, &Maps, role, scratch)
    };
    match verdict {
        edge::Verdict::Pass | edge::Verdict::Translated => TC_ACT_UNSPEC,
        edge::Verdict::Drop => TC_ACT_SHOT,
        edge::Verdict::Reply => packet.send_back(egress),
        edge::Verdict::Elsewhere => TC_ACT_REDIRECT,
    }
}

#[classifier]
fn edge_ingress(ctx: TcContext) -> i32 {
    filter(&ctx, Role::External, false)
}

#[classifier]
fn edge_egress(ctx: TcContext) -> i32 {
    filter(&ctx, Role::External, true)
}

#[classifier]
fn pod_ingress(ctx: TcContext) -> i32 {
    filter(&ctx, Role::Pod, false)
}

#[classifier]
fn pod_egress(ctx: TcContext) -> i32 {
    filter(&ctx, Role::Pod, true)
}

#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    let (protocol, cookie) = sock::closing(&ctx);
    socket::release(protocol, cookie, &Maps);
    ALLOW
}

#[cfg(feature = "debug-log")]
#[inline(always)]
fn log_address<const V6: bool>(hook: &'static str, what: &'static str, socket: &SockAddr<V6>) {
    use proxy_common::datapath::tables::Socket as _;
    let (addr, port) = (socket.addr().bytes, socket.port().get());
    aya_log_ebpf::info!(socket.ctx(), "{} {} [{:i}]:{}", hook, what, addr, port);
}

#[cfg(not(feature = "debug-log"))]
fn log_address<const V6: bool>(_: &'static str, _: &'static str, _: &SockAddr<V6>) {}

const fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Translated => "translated to",
        Verdict::Reject => "reject",
        Verdict::Drop => "drop",
        Verdict::Fail => "fail",
    }
}

/// Licence of the programs. The kernel offers some helpers only to programs under a GPL-compatible licence.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses programs that can reach this loop.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
