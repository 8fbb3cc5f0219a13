//! A question about a connection, and the packet that asks it.

use proxy_common::abi::CgroupId;
use proxy_common::abi::proto;
use proxy_common::addr::{Addr, Family};
use proxy_common::be::Be16;

/// A connection that somebody wants to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// IP protocol number: TCP, UDP or SCTP.
    pub(crate) proto: u8,
    /// Target address.
    pub(crate) addr: Addr,
    /// Target port.
    pub(crate) port: Be16,
    /// Address of the client, if it is given.
    pub(crate) from: Option<Addr>,
    /// Id of the cgroup of the client's pod, if it is given.
    pub(crate) cgroup: Option<CgroupId>,
}

const MAC_HEADER: usize = 14;
const TTL: u8 = 64;
const SYN: u8 = 0x02;

impl Question {
    /// Returns the first packet of the connection from `source`, with its MAC header. The checksums are not filled in.
    pub(crate) fn packet(&self, source: Addr, source_port: u16) -> Vec<u8> {
        let mut segment = [source_port.to_be_bytes(), self.port.bytes].concat();
        segment.extend_from_slice(match self.proto {
            // Sequence number 1, five words of header, a window.
            proto::TCP => &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0],
            // Verification tag and checksum, then a chunk INIT of 20 bytes.
            proto::SCTP => {
                &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1]
            }
            _ => &[0, 8, 0, 0],
        });
        let mut packet = vec![0; MAC_HEADER - 2];
        match self.addr.family() {
            Family::V4 => {
                let [high, low] = length(20 + segment.len());
                packet.extend_from_slice(&[8, 0, 0x45, 0, high, low, 0, 1, 0, 0, TTL, self.proto, 0, 0]);
                packet.extend_from_slice(&source.v4_octets());
                packet.extend_from_slice(&self.addr.v4_octets());
            }
            Family::V6 => {
                let [high, low] = length(segment.len());
                packet.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, high, low, self.proto, TTL]);
                packet.extend_from_slice(&source.bytes);
                packet.extend_from_slice(&self.addr.bytes);
            }
        }
        packet.extend(segment);
        packet
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}
