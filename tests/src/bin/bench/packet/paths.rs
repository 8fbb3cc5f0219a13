//! The paths of a packet through the packet edge: their flows, made by the programs themselves, and the packets that
//! are measured.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use super::frame::{ACK, Frame, PSH};
use super::rig::{Devices, GOES_ON, Program, Rig, Wrapper};
use crate::outside::{Backend, Ground};
use crate::traffic::Listener;

/// Bar for established flows, as a ratio to the reference.
const ESTABLISHED: f64 = 1.6;
/// Bar for packets that belong to no Service, as a ratio to the reference.
const NOT_OURS: f64 = 0.6;

/// A path through one program.
pub(super) struct Path {
    pub(super) name: String,
    pub(super) program: Program,
    pub(super) wrapper: Wrapper,
    pub(super) devices: Devices,
    pub(super) frame: Frame,
    /// Largest allowed ratio to the time of the reference.
    pub(super) bar: Option<f64>,
}

/// Interface indexes on the node.
#[derive(Clone, Copy, Debug)]
struct Interfaces {
    eth0: u32,
    /// Index of the server pod's interface.
    server: u32,
    /// Index of the client pod's interface.
    inside: u32,
}

/// Makes the flows of one family and names the paths.
pub(super) struct Paths<'a> {
    rig: &'a mut Rig,
    ground: &'a Ground,
    ipv6: bool,
    interfaces: Interfaces,
    paths: Vec<Path>,
}

impl<'a> Paths<'a> {
    /// Returns all paths of one family, after checking that each is what its name says.
    ///
    /// # Errors
    /// If a program handles a packet differently from its path.
    pub(super) fn of(rig: &'a mut Rig, ground: &'a Ground, ipv6: bool) -> Result<Vec<Path>> {
        let interfaces = interfaces(ground)?;
        let mut paths = Self { rig, ground, ipv6, interfaces, paths: Vec::new() };
        paths.not_ours()?;
        paths.local()?;
        paths.remote()?;
        paths.inside()?;
        Ok(paths.paths)
    }

    fn client(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.ground.client_address(self.ipv6)?, 40_000))
    }

    /// Adds packets between the client and a pod that no Service has.
    fn not_ours(&mut self) -> Result<()> {
        let client = self.client()?;
        let pod = SocketAddr::new(self.ground.inside_address(self.ipv6)?, 80);
        let request = Frame::syn(client, pod).answer(0).answer(ACK | PSH);
        let reply = request.answer(ACK | PSH);
        let Interfaces { eth0, inside, .. } = self.interfaces;
        for (program, on, entered_by, frame) in [
            (Program::EdgeIngress, eth0, eth0, request),
            (Program::EdgeEgress, eth0, inside, reply),
            (Program::PodIngress, inside, inside, reply),
            (Program::PodEgress, inside, eth0, request),
        ] {
            let devices = Devices { on, entered_by };
            self.step(program, devices, &frame, (frame.source, frame.destination))?;
            self.add("not ours", program, devices, frame, Some(NOT_OURS));
        }
        Ok(())
    }

    /// Adds the path of the client outside, a nodePort, and a pod of this node.
    fn local(&mut self) -> Result<()> {
        let client = self.client()?;
        let port = self.ground.node_port(Backend::Local, self.ipv6, Listener::Echo)?;
        let pod = self.ground.server(Backend::Local, self.ipv6, Listener::Echo)?;
        let Interfaces { eth0, server, .. } = self.interfaces;
        let enters = Devices { on: eth0, entered_by: eth0 };
        let leaves = Devices { on: eth0, entered_by: server };

        let syn = Frame::syn(client, port);
        let at_pod = self.step(Program::EdgeIngress, enters, &syn, (client, pod))?;
        let synack = self.step(Program::EdgeEgress, leaves, &at_pod.answer(0), (port, client))?;
        self.step(Program::EdgeIngress, enters, &synack.answer(ACK), (client, pod))?;
        let request = synack.answer(ACK | PSH);
        let at_pod = self.step(Program::EdgeIngress, enters, &request, (client, pod))?;
        let reply = at_pod.answer(ACK | PSH);
        self.step(Program::EdgeEgress, leaves, &reply, (port, client))?;

        self.add("established", Program::EdgeIngress, enters, request, Some(ESTABLISHED));
        self.add("reply", Program::EdgeEgress, leaves, reply, None);
        self.add("new flow", Program::EdgeIngress, enters, Frame::syn(stranger(self.ipv6), port), None);
        if let Some(path) = self.paths.last_mut() {
            path.wrapper = Wrapper::Fresh;
        }
        Ok(())
    }

    /// Adds the path of the client outside, a nodePort, and a pod of another node.
    fn remote(&mut self) -> Result<()> {
        let client = self.client()?;
        let port = self.ground.node_port(Backend::Remote, self.ipv6, Listener::Echo)?;
        let pod = self.ground.server(Backend::Remote, self.ipv6, Listener::Echo)?;
        let node = self.ground.node_address(self.ipv6)?;
        let eth0 = Devices { on: self.interfaces.eth0, entered_by: self.interfaces.eth0 };

        let syn = Frame::syn(client, port);
        let inside = self.step(Program::EdgeIngress, eth0, &syn, (client, pod))?;
        let (verdict, at_pod) = self.rig.feed(Program::EdgeEgress, eth0, &inside)?;
        let own = at_pod.source;
        ensure!(
            verdict == GOES_ON && own.ip() == node && at_pod.destination == pod,
            "edge_egress: {inside:?} became {at_pod:?}, verdict {verdict}, instead of coming from {node}"
        );
        let mut sent = at_pod;
        for flags in [ACK, ACK | PSH] {
            let back = self.step(Program::EdgeIngress, eth0, &sent.answer(ACK), (pod, client))?;
            let answer = self.step(Program::EdgeEgress, eth0, &back, (port, client))?;
            let inside = self.step(Program::EdgeIngress, eth0, &answer.answer(flags), (client, pod))?;
            sent = self.step(Program::EdgeEgress, eth0, &inside, (own, pod))?;
        }
        let inside = Frame { source: client, ..sent };
        self.step(Program::EdgeEgress, eth0, &inside, (own, pod))?;
        let reply = sent.answer(ACK | PSH);
        self.step(Program::EdgeIngress, eth0, &reply, (pod, client))?;

        self.add("SNAT", Program::EdgeEgress, eth0, inside, None);
        self.add("reverse SNAT", Program::EdgeIngress, eth0, reply, None);
        Ok(())
    }

    /// Adds the path of a pod whose socket the socket programs have not seen, a clusterIP, and another pod of the node.
    fn inside(&mut self) -> Result<()> {
        let client = SocketAddr::new(self.ground.inside_address(self.ipv6)?, 40_000);
        let service = self.ground.service(Backend::Local, self.ipv6)?;
        let vip = SocketAddr::new(service.vip, Listener::Echo.port(service.base_port));
        let pod = self.ground.server(Backend::Local, self.ipv6, Listener::Echo)?;
        let Interfaces { server, inside, .. } = self.interfaces;
        let enters = Devices { on: inside, entered_by: inside };
        let leaves = Devices { on: inside, entered_by: server };

        let at_pod = self.step(Program::PodIngress, enters, &Frame::syn(client, vip), (client, pod))?;
        let synack = self.step(Program::PodEgress, leaves, &at_pod.answer(0), (vip, client))?;
        self.step(Program::PodIngress, enters, &synack.answer(ACK), (client, pod))?;
        let request = synack.answer(ACK | PSH);
        let at_pod = self.step(Program::PodIngress, enters, &request, (client, pod))?;
        let reply = at_pod.answer(ACK | PSH);
        self.step(Program::PodEgress, leaves, &reply, (vip, client))?;

        self.add("established", Program::PodIngress, enters, request, None);
        self.add("reply", Program::PodEgress, leaves, reply, None);
        Ok(())
    }

    /// Feeds a packet to a program and checks that it lets the packet go on with these addresses.
    fn step(
        &mut self,
        program: Program,
        devices: Devices,
        frame: &Frame,
        (source, destination): (SocketAddr, SocketAddr),
    ) -> Result<Frame> {
        let (verdict, out) = self.rig.feed(program, devices, frame)?;
        let want = Frame { source, destination, ..*frame };
        ensure!(
            verdict == GOES_ON && out == want,
            "{}: {frame:?} became {out:?}, verdict {verdict}, instead of {want:?}",
            program.name()
        );
        Ok(out)
    }

    fn add(&mut self, name: &str, program: Program, devices: Devices, frame: Frame, bar: Option<f64>) {
        let family = if self.ipv6 { "v6" } else { "v4" };
        let name = format!("{} {name} {family}", program.name());
        self.paths.push(Path { name, program, wrapper: Wrapper::Same, devices, frame, bar });
    }
}

/// Returns a network in which every address and port can be a client's.
fn stranger(ipv6: bool) -> SocketAddr {
    let address =
        if ipv6 { IpAddr::from([0x2001, 0xdb8, 0xaa, 0, 0, 0, 0, 0]) } else { IpAddr::from([198, 18, 0, 0]) };
    SocketAddr::new(address, 0)
}

fn interfaces(ground: &Ground) -> Result<Interfaces> {
    let (server, inside) = (ground.pod(Backend::Local), ground.inside());
    let names = ["eth0", server.host_device(), inside.host_device()];
    let [eth0, server, inside] = ground.node().host().net().enter(|| indexes(names))??;
    Ok(Interfaces { eth0, server, inside })
}

fn indexes(names: [&str; 3]) -> Result<[u32; 3]> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut indexes = [0; 3];
    for (index, name) in indexes.iter_mut().zip(names) {
        *index = name_to_index(&any, name).with_context(|| format!("no device {name}"))?;
    }
    Ok(indexes)
}
