//! Devices of every kind as edges: a client's packets come in through them, and pods are behind them.
//!
//! All lead to one machine, `far`, over two veth pairs. There, each device has the address of a pod, and the address of
//! a client whose packets leave by that device.

use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Lab, Place, Proto};

use super::checks::{Answer, served};
use super::kernel::{has_tcx, lacks};
use super::objects::{Backend, HERE, Service, THERE, balancer, cluster_ip, node_port};
use super::row::{Outcome, Row, right};
use super::tunnel;
use super::world::{ELSEWHERE, N1, NODE, ON_THIS_NODE, P, World};

pub(super) const ROWS: &[Row] = &[
    Row { id: KINDS[0].row, check: |world| edge(world, KINDS[0]) },
    Row { id: KINDS[1].row, check: |world| edge(world, KINDS[1]) },
    Row { id: KINDS[2].row, check: |world| edge(world, KINDS[2]) },
    Row { id: KINDS[3].row, check: |world| edge(world, KINDS[3]) },
    Row { id: KINDS[4].row, check: |world| edge(world, KINDS[4]) },
    Row { id: KINDS[5].row, check: |world| edge(world, KINDS[5]) },
];

/// Device that carries the others, with room for packets of more than a page. `MACS` are the addresses of its two ends.
pub(super) const UNDERLAY: &str = "u0";
const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
/// Routing table of the node that routes everything through `eth0`.
const ELSEWHERE_TABLE: u32 = 98;
/// Addresses of both ends of the underlay.
pub(super) const UNDER: [[&str; 2]; 2] = [["192.168.70.1", "fd70::1"], ["192.168.70.2", "fd70::2"]];

/// Properties of a kind of device.
#[derive(Clone, Copy)]
struct Kind {
    row: &'static str,
    name: &'static str,
    /// Feature that a kernel without this kind of device lacks.
    what: &'static str,
    /// Whether the device's packets begin with the IP header.
    l3: bool,
    /// Service of the device, with the pod behind it.
    service: Service,
    /// The node's own addresses on the device.
    own: [&'static str; 2],
    /// Addresses of the client behind the device.
    client: [&'static str; 2],
}

/// Makes a `Kind`; the number is part of its addresses.
macro_rules! kind {
    ($row:literal, $name:literal, $what:literal, l3: $l3:literal, number: $number:literal, service: $service:literal, v6: $v6:literal) => {
        Kind {
            row: $row,
            name: $name,
            what: $what,
            l3: $l3,
            service: Service {
                name: $name,
                number: $service,
                backends: &[Backend {
                    name: "far",
                    node: "n2",
                    v4: concat!("10.64.100.", $number),
                    v6: if $v6 { concat!("fd00:64:0:100::", $number) } else { "" },
                }],
            },
            own: [concat!("192.168.", $number, ".1"), concat!("fd70:0:0:", $number, "::1")],
            client: [concat!("203.0.113.", $number), concat!("2001:db8:fe::", $number)],
        }
    };
}

const KINDS: [Kind; 6] = [
    kind!("k050_vlan", "vlan7", "VLAN devices", l3: false, number: "71", service: 21, v6: true),
    kind!("k051_bond", "bond7", "bonds", l3: false, number: "72", service: 22, v6: true),
    // Only IPv4 packets go through ipip.
    kind!("k052_ipip", "ipip7", "ipip", l3: true, number: "73", service: 23, v6: false),
    kind!("k053_wireguard", "wg7", "WireGuard", l3: true, number: "74", service: 24, v6: true),
    kind!("k054_vxlan", "vxlan7", "VXLAN", l3: false, number: "75", service: 25, v6: true),
    kind!("k055_tun", "tun7", "tun devices", l3: true, number: "76", service: 26, v6: true),
];

/// A device, or the reason why it could not be made.
pub(super) struct Device {
    kind: Kind,
    made: Result<(), String>,
}

impl Device {
    /// Returns the Service whose only pod is behind the device.
    pub(super) fn service(&self) -> Service {
        self.kind.service
    }
}

/// Makes `far` and the devices of these rows. A device that cannot be made is reported by its row.
pub(super) fn make(lab: &Lab, rows: &[&str]) -> Result<Vec<Device>> {
    let far = lab.add_client("far", &["203.0.113.70", "2001:db8:ff::70"])?;
    let near = lab.node(NODE).host();
    for (device, mtu) in [(UNDERLAY, 9000), ("b0", 1500)] {
        let line = format!(
            "link add {device} mtu {mtu} address {} type veth peer name {device} mtu {mtu} address {} netns {}\n",
            MACS[0],
            MACS[1],
            far.net().path(),
        );
        near.net().ip(&line)?;
    }
    for (place, [v4, v6]) in [(near, UNDER[0]), (&far, UNDER[1])] {
        let dev = UNDERLAY;
        place.net().ip(&format!(
            "address add {v4}/24 dev {dev}\naddress add {v6}/64 dev {dev} nodad\nlink set {dev} up\n"
        ))?;
    }
    let mut devices = Vec::new();
    let mut listening = far.serve();
    for kind in KINDS.into_iter().filter(|kind| rows.contains(&kind.row)) {
        let made = kind.make(near, &far).map_err(|error| format!("{error:#}"));
        if made.is_ok() {
            for address in kind.pod().filter(|address| !address.is_empty()) {
                let at = if address.contains(':') {
                    format!("[{address}]:8080")
                } else {
                    format!("{address}:8080")
                };
                listening = listening.at("tcp", &at).at("udp", &at);
            }
        }
        devices.push(Device { kind, made });
    }
    if devices.iter().any(|device| device.made.is_ok()) {
        listening.start()?;
    }
    Ok(devices)
}

impl Kind {
    fn pod(&self) -> impl Iterator<Item = &'static str> {
        self.service.backends.iter().flat_map(|pod| [pod.v4, pod.v6])
    }

    /// Makes both ends of the device, their addresses, and the pod and the client behind the far end.
    fn make(&self, near: &Place, far: &Place) -> Result<()> {
        self.link(near, far)?;
        let Self { name, own: [v4, v6], client, .. } = self;
        let table = v4.split('.').nth(2).unwrap_or_default();
        let [far_v4, far_v6] = [v4, v6].map(|address| address.trim_end_matches('1').to_owned() + "2");
        let mut here = format!("link set {name} up\naddress add {v4}/24 dev {name}\n");
        let mut there = format!("link set {name} up\naddress add {far_v4}/24 dev {name}\n");
        let mut behind: Vec<(&str, &str, &str, &str)> = vec![("", "32", v4, &far_v4)];
        if self.has_v6() {
            here += &format!("address add {v6}/64 dev {name} nodad\n");
            there += &format!("address add {far_v6}/64 dev {name} nodad\n");
            behind.push(("-6 ", "128", v6, &far_v6));
        }
        for (index, (option, length, gateway, far_gateway)) in behind.into_iter().enumerate() {
            let pod = self.pod().nth(index).unwrap_or_default();
            for address in [pod, client[index]] {
                let nodad = if option.is_empty() { "" } else { " nodad" };
                there += &format!("address add {address}/{length} dev lo{nodad}\n");
                there += &format!("{option}rule add from {address} lookup {table}\n");
                here += &format!("{option}route add {address}/{length} via {far_gateway} dev {name}\n");
            }
            there += &format!("{option}route add default via {gateway} dev {name} table {table}\n");
        }
        near.net().ip(&here)?;
        far.net().ip(&there)
    }

    fn has_v6(&self) -> bool {
        self.pod().nth(1).is_some_and(|address| !address.is_empty())
    }

    /// Makes the device in both namespaces.
    fn link(&self, near: &Place, far: &Place) -> Result<()> {
        let name = self.name;
        let [one, other] = [UNDER[0][0], UNDER[1][0]];
        if name == "tun7" {
            return tunnel::join(name, [near.net(), far.net()]);
        }
        for (place, local, remote) in [(near, one, other), (far, other, one)] {
            place.net().ip(&match name {
                "vlan7" => format!("link add link {UNDERLAY} name {name} type vlan id 7"),
                "bond7" => format!("link add {name} type bond mode active-backup\nlink set b0 master {name}\nlink set b0 up"),
                "ipip7" => format!("link add {name} type ipip local {local} remote {remote}"),
                "wg7" => format!("link add {name} type wireguard"),
                _ => format!("link add {name} type vxlan id 7 local {local} remote {remote} dstport 4789 dev {UNDERLAY}"),
            })?;
        }
        if name == "wg7" { wireguard(name, near, far) } else { Ok(()) }
    }
}

/// Makes two keys, and tells each end the public key of the other.
fn wireguard(name: &str, near: &Place, far: &Place) -> Result<()> {
    // Any 32 bytes are a key; these spell "not a secret".
    let private =
        ["bm90IGEgc2VjcmV0LCBub3QgYSBzZWNyZXQsIG9uZTE=", "bm90IGEgc2VjcmV0LCBub3QgYSBzZWNyZXQsIHR3bzI="];
    let public = [wg(near, &["pubkey"], private[0])?, wg(near, &["pubkey"], private[1])?];
    for (place, own, other, to) in [(near, 0, 1, UNDER[1][0]), (far, 1, 0, UNDER[0][0])] {
        let (port, endpoint) = ("51820", format!("{to}:51820"));
        let peer = ["peer", &public[other], "allowed-ips", "0.0.0.0/0,::/0", "endpoint", &endpoint];
        let mut key = tempfile::NamedTempFile::new()?;
        key.write_all(private[own].as_bytes())?;
        let path = key.path().display().to_string();
        let own_end = ["set", name, "listen-port", port, "private-key", &path];
        wg(place, &[&own_end[..], &peer].concat(), "")?;
    }
    Ok(())
}

fn wg(place: &Place, args: &[&str], input: &str) -> Result<String> {
    let mut command = place.command("wg");
    command.args(args);
    let output =
        command.output_with_input(input).context("the rows need `wg`, the package wireguard-tools")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "wg {}: {said}", args.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Removes the devices whose packets have no link-layer header, so that the programs for them need not be verified any
/// more.
pub(super) fn remove_l3(near: &Place) {
    for kind in KINDS.iter().filter(|kind| kind.l3) {
        // A device that could not be made does not exist.
        let _ = near.net().ip(&format!("link delete {}", kind.name));
    }
}

/// Checks that replies leave by the device through which the client's packets came, although a routing rule sends the
/// pod's packets to that client through `eth0`.
fn answered_by(world: &World, far: &Place, kind: Kind, v6: bool) -> Result<()> {
    let family = usize::from(v6);
    let (option, pod, hub) = [("", HERE.v4, "192.0.2.1"), ("-6 ", HERE.v6, "2001:db8:1::1")][family];
    let client = kind.client[family];
    let host = world.host().net();
    let rule = format!("from {pod} to {client} lookup {ELSEWHERE_TABLE}");
    host.ip(&format!(
        "{option}rule add {rule}\n{option}route replace default via {hub} dev eth0 table {ELSEWHERE_TABLE}"
    ))?;
    let target = node_port(ON_THIS_NODE.number, v6, 80);
    for way in [Proto::Tcp, Proto::Udp] {
        let attempt = far.connect(&target).proto(way).bind(client).one()?;
        super::checks::is_served(&target, &attempt, way, Answer::from(HERE, &kind.client))
            .with_context(|| format!("a client behind {}, whose answers are routed by eth0", kind.name))?;
    }
    host.ip(&format!("{option}rule del {rule}"))
}

/// Checks that the node's programs are on the device, and that clients and pods behind it are served.
fn edge(world: &World, kind: Kind) -> Result<Outcome> {
    let name = kind.name;
    let device =
        world.devices.iter().find(|device| device.kind.row == kind.row).context("it was not made")?;
    if let Err(error) = &device.made {
        return lacks(kind.what, anyhow::anyhow!("{error}"));
    }
    let state = world.device(name)?;
    let how = if has_tcx() { "tcx" } else { "clsact" };
    ensure!(state["role"] == "external" && state["l3"] == kind.l3 && state["attached"] == how, "{state}");

    let (outside, far) = (world.lab().client("X"), world.lab().client("far"));
    let number = kind.service.number;
    let pod = kind.service.backends[0];
    for v6 in [false, true].into_iter().filter(|&v6| !v6 || kind.has_v6()) {
        // A pod behind the device: the source is the node's address on that device, so that the reply comes back
        // through it.
        for way in [Proto::Tcp, Proto::Udp] {
            served(&outside, way, &balancer(number, v6, 80), Answer::from(pod, &kind.own))
                .context("from eth0")?;
        }
        served(&world.pod("P"), Proto::Tcp, &cluster_ip(number, v6, 80), Answer::from(pod, &P))
            .context("a socket")?;
        // A client behind the device.
        for (service, backend, seen) in [(ON_THIS_NODE, HERE, kind.client), (ELSEWHERE, THERE, N1)] {
            let target = node_port(service.number, v6, 80);
            let attempt = far.connect(&target).bind(kind.client[usize::from(v6)]).one()?;
            super::checks::is_served(&target, &attempt, Proto::Tcp, Answer::from(backend, &seen))
                .with_context(|| format!("a client behind {name} to {target}"))?;
        }
        answered_by(world, &far, kind, v6)?;
    }
    right(format!("{how}{}: clients and pods behind it", if kind.l3 { ", without a MAC header" } else { "" }))
}
