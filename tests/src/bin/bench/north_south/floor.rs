//! The least possible cost of translating packets on this machine: two programs on the first node's device that know
//! the only backend. They look nothing up in a table, keep no state, and handle only IPv4 TCP.
//!
//! A packet that a program changes must not be shared. A sender that may have to send the packet again keeps it, so the
//! kernel copies its headers first. Every translation pays for that copy, and no network without translation does.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Result, bail};
use aya::Ebpf;
use aya::maps::Array;
use aya::programs::TcAttachType;

use crate::outside::{Backend, Ground};
use crate::programs::{classifier, map, own_programs};
use crate::traffic::Listener;

/// The node's device.
const DEVICE: &str = "eth0";

/// Source, destination, ports: three words, in network byte order.
type Words = [u32; 3];

/// One translation: the mask of the bits that are compared, their values, the mask of the bits that stay, and the
/// values of the other bits.
type Rule = [Words; 4];

const ALL: u32 = u32::MAX;

/// The programs, attached until this is dropped.
pub(super) struct Floor {
    programs: Ebpf,
}

impl Floor {
    /// Attaches the programs to the first node of `ground`.
    ///
    /// # Errors
    /// If the object is missing or the kernel refuses it.
    pub(super) fn new(ground: &Ground) -> Result<Self> {
        let mut programs = own_programs()?;
        let types = [("rewrite_ingress", TcAttachType::Ingress), ("rewrite_egress", TcAttachType::Egress)];
        for (name, attach_type) in types {
            let program = classifier(&mut programs, name)?;
            program.load()?;
            ground.node().host().net().enter(|| program.attach(DEVICE, attach_type))??;
        }
        Ok(Self { programs })
    }

    /// Translates between the client and one listener.
    ///
    /// # Errors
    /// If the rules cannot be written, or an address is of IPv6.
    pub(super) fn aim(&mut self, ground: &Ground, backend: Backend, listener: Listener) -> Result<()> {
        let (asked, asked_port) = v4(ground.node_port(backend, false, listener)?)?;
        let (server, server_port) = v4(ground.server(backend, false, listener)?)?;
        let (client, _) = v4(SocketAddr::new(ground.client_address(false)?, 0))?;
        let (from, to) = ([u16::MAX, 0], [0, u16::MAX]);
        let request = [
            [0, ALL, ports(to)],
            [0, asked, ports([0, asked_port])],
            [ALL, 0, ports(from)],
            [0, server, ports([0, server_port])],
        ];
        let answer = [
            [ALL, 0, ports(from)],
            [server, 0, ports([server_port, 0])],
            [0, ALL, ports(to)],
            [asked, 0, ports([asked_port, 0])],
        ];
        // For the backend on another node, the source becomes this node's address on the way out, and is restored on
        // the way back.
        let leaving =
            [[ALL, ALL, ports(to)], [client, server, ports([0, server_port])], [0, ALL, ALL], [asked, 0, 0]];
        let returning = [
            [ALL, ALL, ports(from)],
            [server, asked, ports([server_port, 0])],
            [ALL, 0, ALL],
            [0, client, 0],
        ];
        // A rule that never applies: no masked value can equal its values.
        let none = [[0; 3], [ALL; 3], [ALL; 3], [0; 3]];
        let rules: [Rule; 4] = match backend {
            Backend::Local => [none, request, none, answer],
            // The narrower rule first: a client may use the nodePort's number as its own port.
            Backend::Remote => [returning, request, leaving, answer],
        };
        let mut map: Array<_, Rule> = Array::try_from(map(&mut self.programs, "RULES")?)?;
        for (index, rule) in (0..).zip(rules) {
            map.set(index, rule, 0)?;
        }
        Ok(())
    }
}

/// Returns two ports in network byte order.
fn ports([source, destination]: [u16; 2]) -> u32 {
    let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Returns the address in network byte order, and the port.
fn v4(address: SocketAddr) -> Result<(u32, u16)> {
    let SocketAddr::V4(v4) = address else { bail!("{address} is not of IPv4") };
    Ok((u32::from_ne_bytes(Ipv4Addr::octets(v4.ip())), v4.port()))
}
