//! Nodes as they are found in the field, and the devices that are chosen on each.

use std::net::IpAddr;

use proxy_common::abi::IfIndex;
use proxy_common::addr::Prefix;

use super::super::snapshot::{Address, Route};
use super::*;

/// A node's network, written down device by device: each address and route belongs to the device before it.
#[derive(Clone, Default)]
struct Net(Snapshot);

impl Net {
    fn device(mut self, name: &str, kind: Kind, kind_name: &str) -> Self {
        let index = self.0.links.len() as u32 + 1;
        let (name, kind_name) = (name.to_owned(), kind_name.to_owned());
        self.0
            .links
            .insert(IfIndex(index), Link { name, kind, kind_name, layer: Layer::L2, up: true, master: None });
        self
    }

    fn plain(self, name: &str) -> Self {
        self.device(name, Kind::Plain, "")
    }

    fn veth(self, name: &str) -> Self {
        self.device(name, Kind::Pair, "veth")
    }

    fn bridge(self, name: &str) -> Self {
        self.device(name, Kind::Bridge, "bridge")
    }

    fn last(&self) -> IfIndex {
        IfIndex(self.0.links.len() as u32)
    }

    fn link(mut self, change: impl FnOnce(&mut Link)) -> Self {
        let last = self.last();
        change(self.0.links.get_mut(&last).unwrap());
        self
    }

    fn down(self) -> Self {
        self.link(|link| link.up = false)
    }

    fn port_of(self, master: &str) -> Self {
        let index = self.0.links.iter().find(|(_, link)| link.name == master).map(|(index, _)| *index);
        self.link(|link| link.master = Some(index.unwrap()))
    }

    fn addr(mut self, text: &str) -> Self {
        let (addr, len) = parse(text);
        let single = len == if addr.is_ipv4() { 32 } else { 128 };
        let address = Address { device: self.last(), addr: addr.into(), single, usable: true };
        self.0.addresses.push(address);
        self
    }

    fn leads(mut self, destination: &str, gateway: bool) -> Self {
        let (addr, len) = parse(destination);
        let destination = Prefix::new(addr.into(), len).unwrap();
        self.0.routes.push(Route { device: self.last(), table: 254, destination, gateway, source: None });
        self
    }

    /// A route through another host.
    fn via(self, destination: &str) -> Self {
        self.leads(destination, true)
    }

    /// A route to the link itself.
    fn to(self, destination: &str) -> Self {
        self.leads(destination, false)
    }

    /// Returns a network with `lo`, and `eth0` with the default route.
    fn host() -> Self {
        let lo = Self::default().device("lo", Kind::Loopback, "");
        lo.plain("eth0").addr("192.0.2.10/24").to("192.0.2.0/24").via("0.0.0.0/0")
    }
}

fn parse(text: &str) -> (IpAddr, u8) {
    let (addr, len) = text.split_once('/').unwrap();
    (addr.parse().unwrap(), len.parse().unwrap())
}

fn settings(devices: &str, pods: &str) -> Settings {
    let [devices, pods] = [devices, pods].map(|text| text.split(',').map(str::to_owned).collect::<Vec<_>>());
    Settings {
        devices: Selection::parse("--devices", &devices, false).unwrap(),
        pods: Selection::parse("--pod-interfaces", &pods, true).unwrap(),
        detect_local: DetectLocal::ClusterCidr,
    }
}

fn lines(choices: &Choices) -> Vec<String> {
    choices
        .values()
        .map(|choice| format!("{} {}: {}", choice.name, choice.role.name(), choice.reason))
        .collect()
}

fn check_with(net: &Net, settings: &Settings, want: &[&str]) {
    assert_eq!(lines(&choose(&net.0, settings, &Choices::new())), want);
}

/// Checks the choice with every flag left alone.
fn check(net: &Net, want: &[&str]) {
    check_with(net, &Settings::default(), want);
}

const ETH0: &str = "eth0 external: carries 192.0.2.10";

#[test]
fn a_host_without_pods() {
    check(&Net::host(), &[ETH0]);
    check(&Net::host().plain("eth1").down().addr("198.51.100.10/24").plain("eth2"), &[ETH0]);
    check(
        &Net::host().plain("eth1").addr("2001:db8:2::10/64"),
        &[ETH0, "eth1 external: carries 2001:db8:2::10"],
    );
}

#[test]
fn routed_pods() {
    let net = Net::host().veth("cali1").to("10.64.1.11/32").veth("cali2").to("fd00:64:0:1::11/128");
    let pods = ["cali1 pod: host route to 10.64.1.11", "cali2 pod: host route to fd00:64:0:1::11"];
    check(&net, &[ETH0, pods[0], pods[1]]);
    // A pod that is being set up or torn down, and one that is not up yet.
    check(&Net::host().veth("cali1").veth("cali2").down().to("10.64.1.12/32"), &[ETH0]);
}

/// Some CNIs give every pod's veth the gateway's address.
#[test]
fn routed_pods_with_the_gateway_on_each_veth() {
    let net = Net::host();
    let net = net.veth("veth1").addr("10.244.0.1/32").to("10.244.0.5/32");
    let net = net.veth("veth2").addr("10.244.0.1/32").to("10.244.0.6/32");
    check(&net, &[ETH0, "veth1 pod: host route to 10.244.0.5", "veth2 pod: host route to 10.244.0.6"]);
    check_with(&net, &settings("auto", "none"), &[ETH0]);
}

/// A node that is a container itself: its uplink is a veth, in the worst case with an address of /32.
#[test]
fn a_veth_as_uplink() {
    let node = Net::default().veth("eth0").addr("172.18.0.2/16").to("172.18.0.0/16").via("0.0.0.0/0");
    check(&node, &["eth0 external: carries 172.18.0.2"]);
    let node = Net::default().veth("eth0").addr("192.0.2.10/32").to("169.254.1.1/32").via("0.0.0.0/0");
    check(&node, &["eth0 external: carries 192.0.2.10"]);
    let second = Net::default().veth("eth1").addr("198.51.100.10/24").to("198.51.100.0/24");
    check(&second, &["eth1 external: carries 198.51.100.10"]);
}

#[test]
fn pods_behind_a_bridge() {
    let net = Net::host().bridge("cni0").addr("10.64.1.1/24").to("10.64.1.0/24");
    check(&net, &[ETH0]);
    let with_pods =
        net.clone().veth("veth1").port_of("cni0").device("tap1", Kind::Pair, "tun").port_of("cni0");
    let pods = ["veth1 pod: port of cni0, which carries pods", "tap1 pod: port of cni0, which carries pods"];
    check(&with_pods, &[ETH0, pods[0], pods[1]]);
    check_with(&with_pods, &settings("auto", "none"), &[ETH0]);
    // A tunnel to the pods of other nodes may be among the ports.
    let stretched = net.veth("veth1").port_of("cni0").device("vx0", Kind::Overlay, "vxlan").port_of("cni0");
    check(&stretched, &[ETH0, pods[0]]);
}

#[test]
fn a_bridge_as_uplink() {
    let net = Net::default().bridge("br0").addr("192.0.2.10/24").to("192.0.2.0/24").via("0.0.0.0/0");
    let br0 = "br0 external: carries 192.0.2.10";
    check(&net, &[br0]);
    check(&net.clone().plain("eth0").port_of("br0"), &[br0]);
    // Virtual machines beside the host on its own network.
    let machines = net.plain("eth0").port_of("br0").device("tap1", Kind::Pair, "tun").port_of("br0");
    check(&machines, &[br0]);
    let network_of_machines = Net::host().bridge("br1").addr("198.51.100.10/24").plain("eth1").port_of("br1");
    check(&network_of_machines, &[ETH0, "br1 external: carries 198.51.100.10"]);
}

#[test]
fn the_topmost_device_counts() {
    let bond = Net::default().plain("bond0").link(|link| link.kind_name = "bond".to_owned());
    let bond = bond.addr("192.0.2.10/24").via("0.0.0.0/0");
    let bond = bond.plain("eth0").port_of("bond0").plain("eth1").port_of("bond0").addr("192.0.2.11/24");
    check(&bond, &["bond0 external: carries 192.0.2.10"]);
    let vlan = Net::default().plain("eth0").plain("eth0.7").addr("192.0.2.10/24").via("0.0.0.0/0");
    check(&vlan, &["eth0.7 external: carries 192.0.2.10"]);
    let vrf = Net::default().device("vrf1", Kind::Vrf, "vrf").addr("192.0.2.1/32");
    let vrf = vrf.plain("eth0").port_of("vrf1").addr("192.0.2.10/24");
    check(&vrf, &["eth0 external: carries 192.0.2.10"]);
}

#[test]
fn devices_without_addresses() {
    let net = Net::default().plain("ppp0").link(|link| link.layer = Layer::L3).to("0.0.0.0/0");
    check(&net, &["ppp0 external: carries the default route"]);
    let net = Net::default().plain("eth0").via("10.64.2.0/24").plain("eth1").to("198.51.100.0/24");
    check(&net, &["eth0 external: leads to 10.64.2.0/24"]);
}

#[test]
fn overlays() {
    let net = Net::host();
    let net = net.device("flannel.1", Kind::Overlay, "vxlan").addr("10.64.1.0/32").via("10.64.2.0/24");
    let net = net.device("tunl0", Kind::Overlay, "ipip").device("wg0", Kind::Overlay, "wireguard");
    let net = net.to("10.64.3.0/24").device("geneve0", Kind::Overlay, "geneve").down().addr("10.64.1.9/32");
    let want = [
        ETH0,
        "flannel.1 external: vxlan, carries 10.64.1.0",
        "wg0 external: wireguard, leads to 10.64.3.0/24",
    ];
    check(&net, &want);
}

#[test]
fn nothing_of_others_passes_dummies() {
    let net = Net::host().device("kube-ipvs0", Kind::Idle, "dummy").addr("10.96.0.1/32");
    check(&net, &[ETH0]);
}

#[test]
fn flags_beat_what_the_network_looks_like() {
    let net = Net::host().plain("eth1").addr("198.51.100.10/24").veth("veth1").to("10.64.1.11/32");
    let net = net.plain("eth2").down().bridge("br0").veth("lxc1").port_of("br0");
    check_with(
        &net,
        &settings("eth1,eth2", "auto"),
        &[
            "eth1 external: named by --devices",
            "veth1 pod: host route to 10.64.1.11",
            "eth2 external: named by --devices",
        ],
    );
    check_with(
        &net,
        &settings("auto", "lxc,eth1"),
        &[ETH0, "eth1 pod: named by --pod-interfaces", "lxc1 pod: named by --pod-interfaces"],
    );
    check_with(&net, &settings("veth+", "none"), &["veth1 external: named by --devices"]);
    check_with(&net, &settings("none", "none"), &[]);
    check_with(&net, &settings("lo", "lo"), &[]);
}

#[test]
fn names_without_a_device_are_told() {
    for (devices, want) in [
        ("eth0,eth7,wg+", &["there is no device `eth7`"][..]),
        ("lo", &["`lo` is the loopback device: no client's packets pass it"]),
        ("auto", &[]),
    ] {
        assert_eq!(problems(&Net::host().0, &settings(devices, "auto")), want);
    }
}

#[test]
fn p127_p128_near_is_what_the_stack_sees_entering_through_the_named_interface() {
    let net = Net::host().bridge("cni0").addr("10.64.1.1/24").veth("veth1").port_of("cni0");
    let net = net.veth("veth2").to("10.64.1.11/32").veth("veth3");
    let near = |detect_local| {
        let choices = choose(&net.0, &Settings { detect_local, ..Settings::default() }, &Choices::new());
        let named = choices.values().map(|choice| (choice.name.clone(), choice.near));
        named.collect::<Vec<_>>()
    };
    let named = |all: &[(&str, bool)]| -> Vec<(String, bool)> {
        all.iter().map(|(name, near)| ((*name).to_owned(), *near)).collect()
    };
    assert_eq!(near(DetectLocal::ClusterCidr), named(&[("eth0", false), ("veth1", false), ("veth2", false)]));
    assert_eq!(
        near(DetectLocal::Bridge("cni0".to_owned())),
        named(&[("eth0", false), ("veth1", true), ("veth2", false)])
    );
    // Packets through veth1 enter the stack through cni0. veth3 is a pod's because of its name.
    assert_eq!(
        near(DetectLocal::NamePrefix("veth".to_owned())),
        named(&[("eth0", false), ("veth1", false), ("veth2", true), ("veth3", true)])
    );
}

#[test]
fn a_device_keeps_its_role_while_it_is_down() {
    let before = choose(&Net::host().0, &Settings::default(), &Choices::new());
    let check = |net: &Net, want: &[&str]| {
        assert_eq!(lines(&choose(&net.0, &Settings::default(), &before)), want);
    };
    check(&Net::host().down(), &["eth0 external: kept (down)"]);
    let bare = Net::default().device("lo", Kind::Loopback, "").plain("eth0");
    check(&bare, &["eth0 external: kept (nothing leads there any more)"]);
    // The device has become the port of a bridge; another device has its index.
    let lo_and_bridge = Net::default().bridge("br0").addr("192.0.2.10/24").via("0.0.0.0/0");
    check(&lo_and_bridge.plain("eth0").port_of("br0"), &["br0 external: carries 192.0.2.10"]);
    check(&Net::default().device("lo", Kind::Loopback, "").plain("other"), &[]);
    check(&Net::default().device("lo", Kind::Loopback, ""), &[]);
}

/// The role of the bridge follows from the snapshot, as it would after a restart.
#[test]
fn a_bridge_of_pods_is_external_only_while_it_leads_to_hosts() {
    let pods =
        Net::host().bridge("cni0").addr("10.64.1.1/24").to("10.64.1.0/24").veth("veth1").port_of("cni0");
    let empty = Net::host().bridge("virbr0").addr("10.64.9.1/24").to("10.64.9.0/24");
    for (name, net, want) in [
        ("cni0", pods, &[ETH0, "veth1 pod: port of cni0, which carries pods"][..]),
        ("virbr0", empty, &[ETH0]),
    ] {
        let mut with_gateway = net.clone();
        let bridge = with_gateway.0.links.iter().find(|(_, link)| link.name == name).map(|(index, _)| *index);
        let destination = Prefix::new(parse("10.65.0.0/16").0.into(), 16).unwrap();
        let route = Route { device: bridge.unwrap(), table: 254, destination, gateway: true, source: None };
        with_gateway.0.routes.push(route);
        let before = choose(&with_gateway.0, &Settings::default(), &Choices::new());
        assert_eq!(before[&bridge.unwrap()].role, Role::External, "{name}");
        assert_eq!(lines(&choose(&net.0, &Settings::default(), &before)), want, "{name}");
        // While the bridge is down its role cannot be told: its routes have gone with that.
        let mut down = net;
        down.0.links.get_mut(&bridge.unwrap()).unwrap().up = false;
        assert_eq!(
            choose(&down.0, &Settings::default(), &before)[&bridge.unwrap()].role,
            Role::External,
            "{name}"
        );
    }
}
