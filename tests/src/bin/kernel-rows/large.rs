//! Large packets: fragments, ICMP errors about packets that are too big, and packets whose headers are not contiguous
//! in the kernel.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Netns, Place};
use proxy_tests::packets::Packet;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::devices::{UNDER, UNDERLAY};
use super::objects::{balancer, node_port};
use super::row::{Outcome, Row, right};
use super::sys;
use super::world::{ANSWER, BEHIND_NARROW, ELSEWHERE, ON_THIS_NODE, World};

pub(super) const ROWS: &[Row] = &[
    Row { id: "k045_fragments", check: fragments },
    Row { id: "k046_too_big", check: too_big },
    Row { id: "k047_headers_in_pieces", check: headers_in_pieces },
];

/// Service port whose pods send back the data that they get.
const ECHO: u16 = 82;
/// MTU of the link of the pod `M1`.
const NARROW_MTU: usize = 1300;

/// Returns bytes that depend on `seed` and on their position.
fn data(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 256 + seed * 7) as u8).collect()
}

/// Opens a connected socket in a namespace.
fn connected(net: &Netns, target: &str) -> Result<UdpSocket> {
    let target: SocketAddr = target.parse()?;
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    net.enter(|| -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        Ok(socket)
    })?
    .with_context(|| target.to_string())
}

/// Returns the data that arrives within `patience`.
fn answer(socket: &UdpSocket, patience: Duration) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(patience))?;
    let mut buffer = vec![0; 65_536];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Checks datagrams of three fragments each way, to a pod of this node and to one of another.
fn fragments(world: &World) -> Result<Outcome> {
    let client = world.lab().client("X");
    for v6 in [false, true] {
        for service in [ON_THIS_NODE, ELSEWHERE] {
            let target = node_port(service.number, v6, ECHO);
            let socket = connected(client.net(), &target)?;
            for seed in 0..3 {
                let sent = data(4000, seed);
                socket.send(&sent)?;
                let got = answer(&socket, ANSWER).with_context(|| format!("4000 bytes to {target}"))?;
                ensure!(got == sent, "{target}: {} bytes come back, or others", got.len());
            }
        }
    }
    right("datagrams of 4000 bytes there and back")
}

/// Checks a datagram that does not fit a link behind the node. The ICMP error quotes the packet that the node has
/// translated, and must reach the client as an error about the packet that the client has sent, with the MTU.
fn too_big(world: &World) -> Result<Outcome> {
    let (client, pod) = (world.lab().client("X"), world.lab().pod("M1"));
    let mtu = format!("link set {} mtu {NARROW_MTU}\n", pod.host_device());
    world.lab().node("n2").host().net().ip(&mtu)?;
    pod.net().ip(&format!("link set eth0 mtu {NARROW_MTU}\n"))?;
    let before = world.counter("icmp_error")?;
    for v6 in [false, true] {
        let target = balancer(BEHIND_NARROW.number, v6, ECHO);
        let socket = connected(client.net(), &target)?;
        let (small, large) = (data(100, 1), data(1400, 2));
        socket.send(&small)?;
        ensure!(answer(&socket, ANSWER)? == small, "{target}: another answer");
        // The kernel assumes a path MTU of 1500 bytes, and forbids fragments.
        socket.send(&large)?;
        ensure!(
            answer(&socket, Duration::from_millis(300)).is_err(),
            "{target}: the link was not too narrow"
        );
        let learnt = path_mtu(&client, &target)?;
        ensure!(learnt.contains(&format!("mtu {NARROW_MTU}")), "{target}: the client has learnt {learnt:?}");
        socket.send(&large)?;
        ensure!(answer(&socket, ANSWER).context("in fragments")? == large, "{target}: another answer");
    }
    let told = world.counter("icmp_error")? - before;
    ensure!(told >= 2, "{told} ICMP errors were translated");
    right(format!("the client learns {NARROW_MTU} bytes"))
}

fn path_mtu(client: &Place, target: &str) -> Result<String> {
    let target: SocketAddr = target.parse()?;
    let mut command = client.command("ip");
    command.args(["route", "get", &target.ip().to_string()]);
    command.text()
}

/// Checks a datagram of more than a page, of which only the Ethernet header lies in the linear part of the kernel's
/// packet, as from network cards that put everything into pages. [`sys::send_in_pieces`] explains it.
fn headers_in_pieces(world: &World) -> Result<Outcome> {
    let far = world.lab().client("far");
    // The whole path gets the large MTU, so that nothing is fragmented on it.
    let pod = world.lab().pod("L1");
    world.host().net().ip(&format!("link set {} mtu 9000\n", pod.host_device()))?;
    pod.net().ip("link set eth0 mtu 9000\n")?;
    for v6 in [false, true] {
        let target = balancer(ON_THIS_NODE.number, v6, ECHO);
        let source: IpAddr = UNDER[1][usize::from(v6)].parse()?;
        let sent = data(6000, 3);
        let (from, got) = far.net().enter(|| -> Result<(SocketAddr, Vec<u8>)> {
            let socket = UdpSocket::bind((source, 0))?;
            let frame = Packet::udp(socket.local_addr()?, target.parse()?, &sent).bytes();
            sys::send_in_pieces(index(UNDERLAY)?, &ethernet(frame)).context("AF_PACKET")?;
            socket.set_read_timeout(Some(ANSWER))?;
            let mut buffer = vec![0; 65_536];
            let (length, from) =
                socket.recv_from(&mut buffer).with_context(|| format!("6000 bytes to {target}"))?;
            buffer.truncate(length);
            Ok((from, buffer))
        })??;
        ensure!(from.to_string() == target, "the answer came from {from}, not {target}");
        ensure!(got == sent, "{target}: {} bytes come back, or others", got.len());
    }
    right("6000 bytes with nothing but the Ethernet header in the linear part")
}

/// Writes the MAC addresses for the way from the far end of the underlay to the near end: see `MACS` of the devices.
fn ethernet(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame
}

fn index(device: &str) -> Result<u32> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(netdevice::name_to_index(&socket, device)?)
}
