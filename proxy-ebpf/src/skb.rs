//! `__sk_buff`: fields, lengths, and memory of the packet.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS};
use aya_ebpf::helpers::generated::{
    bpf_l4_csum_replace, bpf_redirect, bpf_skb_load_bytes_relative, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
#[cfg(target_arch = "bpf")]
use core::arch::asm;
use core::ptr::addr_of;
use proxy_common::datapath::edge::packet::Packet as _;
use proxy_common::datapath::edge::parsed::Parsed;

pub(crate) const MAC_HEADER: u32 = 14;
/// Largest size of outer headers: Ethernet with a tag, IPv4 with all options or IPv6 with an extension, and a header of
/// GRE.
const MOST_OUTER_HEADERS: u32 = 128;

/// One packet on a TC hook.
pub(crate) struct Skb {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) ip_offset: u32,
}

/// Headers that a packet has before its IP header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    /// An Ethernet header.
    MacHeader,
    /// None: the packet begins with the IP header.
    Nothing,
    /// Perhaps the outer headers of a tunnel that has carried the packet.
    OuterHeaders,
}

/// Reads a context field exactly once.
macro_rules! get {
    ($self:ident, $field:ident) => {
        // SAFETY: the kernel hands every program of this type a whole `__sk_buff`.
        unsafe { addr_of!((*$self.skb).$field).read_volatile() }
    };
}
pub(crate) use get;

impl Skb {
    /// Returns the packet of a hook.
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext, front: Front) -> Self {
        let mut packet = Self { skb: ctx.skb.skb, ip_offset: 0 };
        packet.ip_offset = match front {
            Front::MacHeader => MAC_HEADER,
            Front::Nothing => 0,
            Front::OuterHeaders => packet.outer_headers(),
        };
        packet
    }

    /// Returns the caller's packet, in a global function.
    #[inline(always)]
    pub(crate) const fn lent(skb: *mut __sk_buff, parsed: &Parsed) -> Self {
        Self { skb, ip_offset: parsed.ip }
    }

    /// Returns the number of bytes before the IP header: the length of the packet less the length that the IP header
    /// states, or 0 if the packet begins with the IP header. The kernel knows where the IP header is, but tells
    /// programs no offset.
    #[inline(always)]
    pub(crate) fn outer_headers(&self) -> u32 {
        const HEAD: usize = 6;
        let mut head = [0_u8; HEAD];
        // SAFETY: the helper checks the offset; the buffer has the length that is passed. It stays zero, or the helper
        // zeroes it, if the read fails.
        let _ = unsafe {
            bpf_skb_load_bytes_relative(
                self.skb.cast(),
                0,
                head.as_mut_ptr().cast(),
                HEAD as u32,
                BPF_HDR_START_NET,
            )
        };
        let [first, _, t0, t1, p0, p1] = head;
        let own = match first >> 4 {
            4 => u32::from(u16::from_be_bytes([t0, t1])),
            6 => u32::from(u16::from_be_bytes([p0, p1])).wrapping_add(40),
            _ => return 0,
        };
        let before = get!(self, len).wrapping_sub(own);
        // In a packet that begins with its IP header, surplus bytes stand behind the IP packet, not before it.
        if before > MOST_OUTER_HEADERS || self.load_linear(0) == Some(head) { 0 } else { before }
    }

    /// Sends the packet back to where it came from: out of the device that it entered by, or into the device that it
    /// was about to leave by. Returns the action.
    #[inline(always)]
    pub(crate) fn send_back(&mut self, egress: bool) -> i32 {
        if self.ip_offset == MAC_HEADER
            && let Some([d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]) = self.load::<12>(0)
        {
            self.store(0, [s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5]);
        }
        let flags = if egress { u64::from(BPF_F_INGRESS) } else { 0 };
        // SAFETY: a helper without preconditions.
        (unsafe { bpf_redirect(self.ifindex().0, flags) }) as i32
    }

    #[inline(always)]
    pub(crate) fn store_with<const N: usize>(&mut self, offset: u32, bytes: &[u8; N], flags: u64) -> bool {
        // SAFETY: the helper checks the offset; the bytes are on the stack.
        let done = unsafe { bpf_skb_store_bytes(self.skb, offset, bytes.as_ptr().cast(), N as u32, flags) };
        done == 0
    }

    #[inline(always)]
    pub(crate) fn add_to_checksum(&mut self, offset: u32, difference: u32, flags: u64) -> bool {
        // Both 0 and 0xffffffff are zero in one's complement.
        if difference == 0 || difference == u32::MAX {
            return true;
        }
        // SAFETY: the helper checks the offset. With size 0 the helper adds the difference as it is.
        (unsafe { bpf_l4_csum_replace(self.skb, offset, 0, u64::from(difference), flags) }) == 0
    }
}

/// Returns the same value, but hides from the compiler how it was computed. The verifier only accepts an access to the
/// very value that was compared, not to the same sum computed again.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn opaque(value: u64) -> u64 {
    let same: u64;
    // SAFETY: the instruction copies a register. (Without an instruction, two lines would have the same place in the
    // line table, which the kernel refuses.)
    unsafe {
        asm!("{same} = {value}", same = out(reg) same, value = in(reg) value, options(pure, nomem, nostack));
    }
    same
}

#[cfg(not(target_arch = "bpf"))]
pub(crate) use core::hint::black_box as opaque;

/// Defines a function that reads a word of a packet by one instruction. The compiler itself would read single bytes,
/// since nothing in a packet is aligned; kernels for x86_64 and aarch64 allow unaligned words.
macro_rules! word_reader {
    ($name:ident, $type:ty, $instruction:literal) => {
        /// # Safety
        /// The word at `address` must be in the packet, by a comparison that the verifier has seen.
        #[inline(always)]
        unsafe fn $name(address: u64) -> $type {
            #[cfg(target_arch = "bpf")]
            {
                let word: u64;
                // SAFETY: the caller guarantees that the word is in the packet.
                unsafe {
                    asm!($instruction, word = out(reg) word, address = in(reg) address, options(pure, readonly, nostack));
                }
                word as $type
            }
            #[cfg(not(target_arch = "bpf"))]
            // SAFETY: the caller guarantees that the word is in the packet.
            unsafe {
                (address as *const $type).read_unaligned()
            }
        }
    };
}

word_reader!(read_u64, u64, "{word} = *(u64 *)({address} + 0)");
word_reader!(read_u32, u32, "{word} = *(u32 *)({address} + 0)");
word_reader!(read_u16, u16, "{word} = *(u16 *)({address} + 0)");
word_reader!(read_u8, u8, "{word} = *(u8 *)({address} + 0)");

/// Reads a packet's bytes in the largest words that fit.
///
/// # Safety
/// The bytes from `address` on must be in the packet, by a comparison that the verifier has seen.
#[inline(always)]
pub(crate) unsafe fn read_bytes<const N: usize>(address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    macro_rules! read {
        ($reader:ident, $size:literal) => {
            while N - at >= $size {
                // SAFETY: the caller guarantees that the bytes are in the packet.
                let word = unsafe { $reader(address + at as u64) };
                bytes[at..at + $size].copy_from_slice(&word.to_ne_bytes());
                at += $size;
            }
        };
    }
    read!(read_u64, 8);
    read!(read_u32, 4);
    read!(read_u16, 2);
    read!(read_u8, 1);
    bytes
}
