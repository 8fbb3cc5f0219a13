//! Programs for `cargo xtask bench packet`: they drive the packet edge, and serve as its baselines. A separate object
//! that only the benchmark loads.
//!
//! `BPF_PROG_TEST_RUN` gives a program its own output as the next input. So [`restore`] writes the frame's headers anew
//! each time and jumps to the measured program. The cost of that is measured with [`empty`] as the measured program.
//! [`reference()`] stands for the least that a translation can cost on this machine. [`rewrite_ingress`] and
//! [`rewrite_egress`] are the smallest programs that translate real packets.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// On other targets the crate compiles (for lints and documentation) but nothing calls the entry points.
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "entry points are called by the kernel"))]

use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, ProgramArray};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use proxy_common::abi::{
    Backend, Flow, FlowKey, FlowKind, FrontendKey, FrontendValue, Origin, Service, proto,
};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::checksum;

/// Words of the frame that are restored: Ethernet, IPv6 and TCP headers without options.
const WORDS: usize = 10;

/// Frame headers that [`restore`] writes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Template {
    /// The first bytes of the frame.
    words: [u64; WORDS],
    /// Number of frames written by [`restore_fresh`] so far.
    count: u64,
}

/// The template. One element, written by the benchmark.
#[btf_map]
static TEMPLATE: Array<Template, 1> = Array::new();

/// The program to measure. One element.
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();

/// Return value of [`restore`] if there is no program to jump to. No program of the packet edge returns it.
const NOT_RUN: i32 = 99;

/// EtherType as on the wire.
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// Returns the first bytes of the frame, if the frame is long enough.
#[inline(always)]
fn headers(ctx: &TcContext) -> Option<*mut u64> {
    let start = ctx.data();
    (start + WORDS * 8 <= ctx.data_end()).then_some(start as *mut u64)
}

/// Writes the headers and jumps to the measured program.
#[classifier]
fn restore(ctx: TcContext) -> i32 {
    let (Some(frame), Some(template)) = (headers(&ctx), TEMPLATE.get_ptr(0)) else { return NOT_RUN };
    // SAFETY: the map's element is a whole `Template`.
    write(frame, &unsafe { template.read() }.words);
    jump(&ctx)
}

/// Does the same as [`restore`], with another client each time: the low half of the source address and the source port
/// count up.
#[classifier]
fn restore_fresh(ctx: TcContext) -> i32 {
    let (Some(frame), Some(template)) = (headers(&ctx), TEMPLATE.get_ptr_mut(0)) else { return NOT_RUN };
    // SAFETY: the map's element is a whole `Template`, and the benchmark runs on one CPU.
    let template = unsafe { &mut *template };
    template.count += 1;
    let [a, b, c, d, ..] = template.count.to_ne_bytes();
    let mut bytes: [u8; WORDS * 8] = bytemuck::cast(template.words);
    if [bytes[12], bytes[13]] == ETHERTYPE_IPV4 {
        [bytes[28], bytes[29], bytes[34], bytes[35]] = [c, d, a, b];
    } else {
        [bytes[36], bytes[37], bytes[54], bytes[55]] = [c, d, a, b];
    }
    write(frame, &bytemuck::cast(bytes));
    jump(&ctx)
}

/// Writes to a frame that [`headers`] has returned.
#[inline(always)]
fn write(frame: *mut u64, words: &[u64; WORDS]) {
    // SAFETY: `headers` has checked that the frame is long enough; its words are aligned to two bytes.
    unsafe { frame.cast::<[u64; WORDS]>().write_unaligned(*words) };
}

#[inline(always)]
fn jump(ctx: &TcContext) -> i32 {
    // SAFETY: the target programs take the same context.
    unsafe { MEASURED.tail_call(ctx, 0) };
    NOT_RUN
}

/// Does nothing: the baseline for [`restore`].
#[classifier]
fn empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[btf_map]
static REFERENCE_FRONTENDS: HashMap<FrontendKey, FrontendValue, 1024> = HashMap::new();

#[btf_map]
static REFERENCE_SERVICES: Array<Service, 1024> = Array::new();

#[btf_map]
static REFERENCE_BACKENDS: Array<Backend, 1024> = Array::new();

#[btf_map]
static REFERENCE_FLOWS: LruHashMap<FlowKey, Flow, 1024> = LruHashMap::new();

const ETHERNET: usize = 14;
const IPV4_CHECKSUM: usize = ETHERNET + 10;
const SOURCE: usize = ETHERNET + 12;
const DESTINATION: usize = ETHERNET + 16;
const SOURCE_PORT: usize = ETHERNET + 20;
const DESTINATION_PORT: usize = SOURCE_PORT + 2;
const TCP_CHECKSUM: usize = SOURCE_PORT + 16;

/// Translates an IPv4 TCP packet with one hash lookup, two array lookups, one LRU hash lookup, and a new address and
/// port with their checksums. It does nothing else that a proxy must do: it parses no headers, and has no other
/// protocol, no state and no counters.
#[classifier]
fn reference(ctx: TcContext) -> i32 {
    translate(&ctx).unwrap_or(NOT_RUN)
}

#[inline(always)]
fn translate(ctx: &TcContext) -> Option<i32> {
    let (source, vip) = (load::<4>(ctx, SOURCE)?, load::<4>(ctx, DESTINATION)?);
    let (source_port, port) = (load::<2>(ctx, SOURCE_PORT)?, load::<2>(ctx, DESTINATION_PORT)?);
    let key = FrontendKey::exact(Addr::v4(vip), Be16 { bytes: port }, proto::TCP);
    // SAFETY: copied at once, and nobody writes this map while the benchmark runs.
    let frontend = unsafe { REFERENCE_FRONTENDS.get(key) }.copied()?;
    let service = REFERENCE_SERVICES.get_ptr(frontend.service.0)?;
    // SAFETY: the kernel's lookup returned a pointer to a whole element.
    let base = unsafe { read_volatile(service) }.cluster.base;
    let backend = REFERENCE_BACKENDS.get_ptr(base)?;
    // SAFETY: the kernel's lookup returned a pointer to a whole element.
    let backend = unsafe { read_volatile(backend) };
    let flow = FlowKey {
        source: Addr::v4(source),
        destination: Addr::v4(vip),
        source_port: Be16 { bytes: source_port },
        destination_port: Be16 { bytes: port },
        origin: Origin::OUTSIDE,
        proto: proto::TCP,
        kind: FlowKind::Vip as u8,
        pad: 0,
        pad_end: 0,
    };
    // SAFETY: one field is copied at once.
    let known = unsafe { REFERENCE_FLOWS.get(flow) }?.backend;
    if known.0 != base {
        return None;
    }
    let (to, to_port) = (backend.addr.v4_octets(), backend.port.bytes);
    let [old, new] = [vip, to].map(|address| u64::from(u32::from_ne_bytes(address)));
    ctx.l3_csum_replace(IPV4_CHECKSUM, old, new, 4).ok()?;
    ctx.l4_csum_replace(TCP_CHECKSUM, old, new, u64::from(BPF_F_PSEUDO_HDR) | 4).ok()?;
    let [old, new] = [port, to_port].map(|port| u64::from(u16::from_ne_bytes(port)));
    ctx.l4_csum_replace(TCP_CHECKSUM, old, new, 2).ok()?;
    ctx.store(DESTINATION, &to, 0).ok()?;
    ctx.store(DESTINATION_PORT, &to_port, 0).ok()?;
    Some(TC_ACT_UNSPEC)
}

/// Translation that the rewriting programs apply to source, destination and ports of an IPv4 TCP segment: three words
/// as they lie in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    /// Bits that are compared.
    mask: [u32; 3],
    /// Values that the compared bits must have.
    old: [u32; 3],
    /// Bits that stay.
    keep: [u32; 3],
    /// Values of the other bits.
    new: [u32; 3],
}

/// Number of rules of each of the two programs.
const RULES_EACH: u32 = 2;

/// Rules, written by the benchmark: those of [`rewrite_ingress`], then those of [`rewrite_egress`].
#[btf_map]
static RULES: Array<Rule, { 2 * RULES_EACH as usize }> = Array::new();

/// Rewrites packets that enter through a device. It knows the only backend, and nothing else.
#[classifier]
fn rewrite_ingress(ctx: TcContext) -> i32 {
    rewrite(&ctx, 0)
}

/// Rewrites packets that leave through a device.
#[classifier]
fn rewrite_egress(ctx: TcContext) -> i32 {
    rewrite(&ctx, RULES_EACH)
}

/// Offset at which the three words of a [`Rule`] begin.
const WORDS_AT: usize = SOURCE;

#[inline(always)]
fn rewrite(ctx: &TcContext, first: u32) -> i32 {
    const LENGTH: usize = WORDS_AT + 12;
    if ctx.data() + LENGTH > ctx.data_end() {
        return TC_ACT_UNSPEC;
    }
    let frame = ctx.data() as *const u8;
    // SAFETY: the comparison above shows that the packet has so many bytes.
    let header = unsafe { frame.cast::<[u8; LENGTH]>().read_unaligned() };
    if [header[12], header[13]] != ETHERTYPE_IPV4 || header[ETHERNET + 9] != proto::TCP {
        return TC_ACT_UNSPEC;
    }
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let old = [word(WORDS_AT), word(WORDS_AT + 4), word(WORDS_AT + 8)];
    for index in first..first + RULES_EACH {
        let Some(rule) = RULES.get_ptr(index) else { return TC_ACT_UNSPEC };
        // SAFETY: the kernel's lookup returned a pointer to a whole element.
        let rule = unsafe { &*rule };
        if (0..3).all(|i| old[i] & rule.mask[i] == rule.old[i]) {
            let new = [0, 1, 2].map(|i| old[i] & rule.keep[i] | rule.new[i]);
            let sum = [header[IPV4_CHECKSUM], header[IPV4_CHECKSUM + 1]];
            return if put(ctx, sum, old, new).is_some() { TC_ACT_UNSPEC } else { TC_ACT_SHOT };
        }
    }
    TC_ACT_UNSPEC
}

/// Writes the words and both checksums. Returns `None` if a helper fails.
#[inline(always)]
fn put(ctx: &TcContext, ip_checksum: [u8; 2], old: [u32; 3], new: [u32; 3]) -> Option<()> {
    let addresses = checksum::difference(&[old[0], old[1]], &[new[0], new[1]]);
    let ports = checksum::difference(&[old[2]], &[new[2]]);
    let [c0, c1] = checksum::updated(ip_checksum, addresses);
    let mut bytes = [0; 14];
    bytes[..2].copy_from_slice(&[c0, c1]);
    for (to, word) in bytes[2..].chunks_exact_mut(4).zip(new) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    ctx.store(IPV4_CHECKSUM, &bytes, 0).ok()?;
    ctx.l4_csum_replace(TCP_CHECKSUM, 0, u64::from(addresses), u64::from(BPF_F_PSEUDO_HDR)).ok()?;
    ctx.l4_csum_replace(TCP_CHECKSUM, 0, u64::from(ports), 0).ok()
}

#[inline(always)]
fn load<const N: usize>(ctx: &TcContext, at: usize) -> Option<[u8; N]> {
    ctx.load::<[u8; N]>(at).ok()
}

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
