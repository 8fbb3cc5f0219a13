//! Addresses that come and go on the host: those that serve nodePorts, and those that are also a Service's.

use super::*;

/// Addresses that no machine has: a client that asks them gets an error at once.
const NOBODYS: &str = "route add unreachable 198.18.9.0/24\n-6 route add unreachable 2001:db8:9::/64\n";
const NODE_PORT: u16 = 31_053;
/// ClusterIPs of kube-dns, each with its endpoint.
const DNS: [(&str, &str); 2] = [("10.96.0.53:80", "L1"), ("[fd00:96::53]:80", "V1")];
/// Addresses with a port that no Service has.
const OTHER_PORT: [&str; 2] = ["10.96.0.53:9253", "[fd00:96::53]:9253"];
const HOST_ADDRESSES: &str = "addresses of this host";

/// Returns kube-dns, of both families and with a nodePort. With a label, it belongs to another proxy.
fn dns(label: Option<&str>) -> Vec<Value> {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.53", "clusterIPs": ["10.96.0.53", "fd00:96::53"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ports": [
                { "name": "tcp", "protocol": "TCP", "port": 80, "nodePort": NODE_PORT },
                { "name": "udp", "protocol": "UDP", "port": 80, "nodePort": NODE_PORT },
            ],
        },
    });
    if let Some(label) = label {
        service["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": label });
    }
    let cidr = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": "v6" }, "spec": { "cidrs": ["fd00:96::/112"] },
    });
    vec![cidr, service, slice("IPv4", "10.64.1.11"), slice("IPv6", "fd00:64:0:1::11")]
}

fn slice(family: &str, endpoint: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {
            "namespace": "kube-system", "name": format!("kube-dns-{}", family.to_lowercase()),
            "labels": { "kubernetes.io/service-name": "kube-dns" },
        },
        "ports": [port("TCP", 8080), port("UDP", 8080)],
        "endpoints": [{ "addresses": [endpoint], "nodeName": "n1" }],
    })
}

fn setting(flags: &[(&str, &str)]) -> Result<Setting> {
    let spec = LabSpec::cases()?.pod("n1", "U", &["10.64.1.60", "fd00:64:0:1::60"])?.unseen("U");
    let setting = Setting::new(spec, flags)?;
    setting.lab.pod("V1").serve().tcp(8080).udp(8080).start()?;
    setting.write("dns", &dns(None))?;
    Ok(setting)
}

/// Starts the host's own listener at the nodePort, on every address that the host has or will have.
fn listen(setting: &Setting) -> Result<()> {
    setting.host().serve().name("own").at("tcp", format!("[::]:{NODE_PORT}")).start()?;
    for loopback in ["127.0.0.1", "[::1]"] {
        let attempt = setting.host().connect(format!("{loopback}:{NODE_PORT}")).one()?;
        ensure!(attempt.server.as_deref() == Some("own"), "{attempt:?}");
    }
    Ok(())
}

/// Asks all the time while the host gets the address. Returns how long the address is not served, though the host's
/// own listener answers, and how many answers that were.
fn appears(setting: &Setting, target: &str, lines: &str, server: &str) -> Result<(Duration, usize)> {
    let mut asking = setting.host().connect(target).start()?;
    asking.wait_for(5)?;
    setting.host().net().ip(lines)?;
    until(target, || {
        Ok(asking.so_far()?.iter().any(|attempt| attempt.server.as_deref() == Some(server)).then_some(()))
    })?;
    let attempts = asking.stop()?;
    let answered = |by: &str| attempts.iter().position(|attempt| attempt.server.as_deref() == Some(by));
    let served = answered(server).context("it was served")?;
    let after = attempts[served..].iter().find(|attempt| attempt.server.as_deref() != Some(server));
    ensure!(after.is_none(), "once it is served it stays so: {after:?}");
    let own = answered("own").filter(|own| *own < served);
    let unserved = own.map_or(0, |own| attempts[served].at_us - attempts[own].at_us);
    Ok((Duration::from_micros(unserved), own.map_or(0, |own| served - own)))
}

/// Until the agent knows that an address serves nodePorts, the host's own listener answers there. That lasts until
/// the agent has received the kernel's event, without a delay for further events. It once always took 50 ms and more.
#[test]
fn node_ports_are_served_as_soon_as_the_kernel_tells_of_an_address() -> Result<()> {
    const ROUNDS: usize = 20;
    let setting = setting(&[("nodeport-addresses", "0.0.0.0/0,::/0"), ("pod-interfaces", "none")])?;
    let net = setting.host().net();
    net.ip(NOBODYS)?;
    listen(&setting)?;
    let (v4, v6) = ("198.18.9.10", "2001:db8:9::10");
    let device = "link add new0 type veth peer name new1\nlink set new0 up\n";
    let ways = [
        (
            "an IPv4 address",
            v4,
            format!("address add {v4}/32 dev eth0\n"),
            format!("address delete {v4}/32 dev eth0\n"),
        ),
        (
            "an IPv6 address",
            v6,
            format!("address add {v6}/128 dev eth0 nodad\n"),
            format!("address delete {v6}/128 dev eth0\n"),
        ),
        ("a device", v4, format!("{device}address add {v4}/32 dev new0\n"), "link delete new0\n".to_owned()),
    ];
    for (what, address, come, go) in &ways {
        let (target, server) = match address.contains(':') {
            false => (format!("{address}:{NODE_PORT}"), "L1"),
            true => (format!("[{address}]:{NODE_PORT}"), "V1"),
        };
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            took.push(appears(&setting, &target, come, server)?);
            net.ip(go)?;
            until("an address that is gone", || {
                Ok(setting.host().connect(&target).one()?.server.is_none().then_some(()))
            })?;
        }
        took.sort();
        let (fastest, median) = (took[0], took[ROUNDS / 2]);
        eprintln!(
            "{what}: the own listener answers for {median:?} (median of {ROUNDS}), at least {fastest:?}"
        );
        ensure!(fastest.0 < Duration::from_millis(40), "{what}: {took:?}");
    }
    Ok(())
}

/// An IPv6 address belongs to nobody until the kernel has looked for duplicates. An address of our own is served from
/// the first connection on. An address that another machine has stays with that machine.
#[test]
fn an_address_that_is_probed_for_duplicates_is_served_from_the_first_connection_on() -> Result<()> {
    let setting = setting(&[("nodeport-addresses", "0.0.0.0/0,::/0"), ("pod-interfaces", "none")])?;
    let net = setting.host().net();
    net.ip(NOBODYS)?;
    net.sysctl("net/ipv6/conf/eth0/accept_dad", "1")?;
    listen(&setting)?;
    let target = format!("[2001:db8:9::10]:{NODE_PORT}");
    let (_, own) = appears(&setting, &target, "address add 2001:db8:9::10/128 dev eth0\n", "V1")?;
    ensure!(own == 0, "the host's own listener has answered {own} times");

    setting.lab.hub().ip("address add 2001:db8:9::20/128 dev lan0 nodad\n")?;
    net.ip("address add 2001:db8:9::20/128 dev eth0\n")?;
    until("a duplicate", || {
        let mut show = setting.host().command("ip");
        show.args(["-6", "address", "show", "dadfailed"]);
        Ok(show.text()?.contains("2001:db8:9::20").then_some(()))
    })?;
    let target = format!("[2001:db8:9::20]:{NODE_PORT}");
    until("the other machine's address", || {
        Ok((setting.host().connect(&target).one()?.error.as_deref() == Some("EHOSTUNREACH")).then_some(()))
    })
}

/// Checks that these servers, of IPv4 and IPv6, answer every client.
fn everybody_hears(setting: &Setting, servers: [&str; 2]) -> Result<()> {
    let (pod, unseen) = (setting.lab.pod("P"), setting.lab.pod("U"));
    for place in [&*pod, &*unseen, setting.host()] {
        for ((target, _), server) in DNS.into_iter().zip(servers) {
            answered(place, target, server)?;
        }
    }
    Ok(())
}

fn soon(what: &str, check: impl Fn() -> Result<()>) -> Result<()> {
    let mut last = None;
    until(what, || {
        last = check().err();
        Ok(last.is_none().then_some(()))
    })
    .with_context(|| format!("{last:?}"))
}

/// NodeLocal DNSCache takes the clusterIP of kube-dns. As long as we serve that Service, the cache gets no requests,
/// and `status` says so. With the label, the Service is left alone, and its address belongs to the host, whenever it
/// is added.
#[test]
fn who_takes_a_cluster_ip_is_reached_once_the_service_is_left_to_it() -> Result<()> {
    let mut setting = setting(&[])?;
    let endpoints = DNS.map(|(_, endpoint)| endpoint);
    soon("endpoints", || everybody_hears(&setting, endpoints))?;
    assert_eq!(setting.problem(HOST_ADDRESSES)?, Value::Null);

    let net = setting.host().net().clone();
    net.ip(
        "link add nodelocaldns type veth peer name unused\nlink set nodelocaldns up\nlink set unused up\n",
    )?;
    addresses(&net, "add", "nodelocaldns")?;
    let mut listening = setting.host().serve().name("local");
    for target in DNS.map(|(target, _)| target).into_iter().chain(OTHER_PORT) {
        listening = listening.at("tcp", target).at("udp", target);
    }
    // The listener keeps running.
    listening.start()?;
    setting.wait_problem(HOST_ADDRESSES, |problem| {
        let text = problem.to_string();
        ["10.96.0.53", "fd00:96::53"]
            .iter()
            .all(|addr| text.contains(&format!("{addr} is configured on nodelocaldns")))
            && text.contains("Service kube-system/kube-dns")
    })?;
    everybody_hears(&setting, endpoints)?;
    for place in [&*setting.lab.pod("P"), &*setting.lab.pod("U"), setting.host()] {
        for target in OTHER_PORT {
            let attempt = ask(place, target, Proto::Tcp, ANSWER)?;
            ensure!(
                attempt.error.as_deref() == Some("ECONNREFUSED"),
                "{} to {target}: {attempt:?}",
                place.name()
            );
        }
    }

    setting.write("dns", &dns(Some("node-local-dns")))?;
    soon("the listener", || everybody_hears(&setting, ["local"; 2]))?;
    setting.wait_problem(HOST_ADDRESSES, Value::is_null)?;
    answered(setting.host(), OTHER_PORT[0], "local")?;

    // The address is removed, and added to another device; then a new agent starts and finds it there.
    addresses(&net, "delete", "nodelocaldns")?;
    for place in [&*setting.lab.pod("P"), &*setting.lab.pod("U"), setting.host()] {
        soon("nobody", || nobody_hears(place))?;
    }
    addresses(&net, "add", "lo")?;
    soon("the listener, on lo", || everybody_hears(&setting, ["local"; 2]))?;
    setting.start(&[])?;
    everybody_hears(&setting, ["local"; 2])?;

    setting.write("dns", &dns(None))?;
    soon("endpoints again", || everybody_hears(&setting, endpoints))?;
    setting.wait_problem(HOST_ADDRESSES, |problem| {
        problem.to_string().contains("10.96.0.53 is configured on lo")
    })
}

fn nobody_hears(place: &Place) -> Result<()> {
    for (target, _) in DNS {
        let attempt = ask(place, target, Proto::Tcp, SILENCE)?;
        ensure!(!attempt.ok, "{} to {target}: {attempt:?}", place.name());
    }
    Ok(())
}

fn addresses(net: &Netns, verb: &str, device: &str) -> Result<()> {
    net.ip(&format!(
        "address {verb} 10.96.0.53/32 dev {device}\naddress {verb} fd00:96::53/128 dev {device} nodad\n"
    ))
}
