//! Addresses, ports and the other contents of the headers of a packet.

use crate::abi::proto::TCP;
use crate::addr::{Addr, Family};
use crate::be::Be16;

/// Bits of a TCP header's flag byte.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// Source and destination with their ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port; zero for protocols without ports.
    pub source_port: Be16,
    /// Destination port; zero for protocols without ports.
    pub destination_port: Be16,
}

/// Part of a fragmented packet that a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Not fragmented.
    Whole,
    /// First fragment, with the transport header.
    First,
    /// Later fragment, without the transport header.
    Later,
}

/// Contents of the headers of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Family of the IP header.
    pub family: Family,
    /// Offset of the IP header.
    pub ip: u32,
    /// Offset of the transport header.
    pub transport: u32,
    /// IP protocol number.
    pub proto: u8,
    /// Addresses and ports. The ports of a later fragment are zero until they are looked up.
    pub tuple: Tuple,
    /// Fragmentation.
    pub part: Part,
    /// Identification of the fragmented packet, as on the wire.
    pub id: [u8; 4],
    /// TCP: flags. ICMP: type.
    pub kind: u8,
    /// Bytes from the IP header on, according to that header.
    pub bytes: u32,
}

impl Parsed {
    /// Returns whether the packet begins a TCP connection.
    #[inline(always)]
    pub const fn begins(&self) -> bool {
        self.proto == TCP && self.kind & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN
    }
}

impl Default for Parsed {
    fn default() -> Self {
        Self {
            family: Family::V4,
            ip: 0,
            transport: 0,
            proto: 0,
            tuple: Tuple {
                source: Addr::ZERO,
                destination: Addr::ZERO,
                source_port: Be16 { bytes: [0; 2] },
                destination_port: Be16 { bytes: [0; 2] },
            },
            part: Part::Whole,
            id: [0; 4],
            kind: 0,
            bytes: 0,
        }
    }
}
