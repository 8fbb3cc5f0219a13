//! The lab itself: routing, servers, clients, confinement, and the removal of everything in the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Attempt, Lab, LabSpec, Place, Proto, Summary};

/// Checks that one attempt from `client` to `target` is answered by `server`, which sees the address `seen`.
#[track_caller]
fn check(client: &Place, target: &str, proto: Proto, server: &str, seen: &str) -> Result<Attempt> {
    let attempt = client.connect(target).proto(proto).one()?;
    assert_eq!(attempt.server.as_deref(), Some(server), "{target} by {proto:?}: {attempt:?}");
    let peer = attempt.peer.context("no peer")?;
    assert_eq!(peer.ip().to_string(), seen, "{target} by {proto:?}");
    assert_eq!(Some(peer.port()), attempt.local.map(|local| local.port()), "{attempt:?}");
    assert_eq!(attempt.endpoint.map(|endpoint| endpoint.to_string()).as_deref(), Some(target));
    Ok(attempt)
}

#[test]
fn the_standard_world_is_up_at_once() -> Result<()> {
    // The fastest of some builds counts, because other tests run at the same time.
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let lab = Lab::cases()?;
        best = best.min(start.elapsed());
        drop(lab);
    }
    eprintln!("the standard world takes {best:?}");
    assert!(best < Duration::from_secs(1), "{best:?}");
    Ok(())
}

#[test]
fn pods_nodes_and_clients_reach_each_other() -> Result<()> {
    let lab = Lab::cases()?;
    for pod in ["L1", "R1", "R2", "V1", "P"] {
        lab.pod(pod).serve().tcp(8080).udp(8080).http(80).start()?;
    }
    for node in lab.nodes() {
        node.host().serve().tcp(9090).udp(9090).start()?;
    }
    let (p, q, h, x) = (lab.pod("P"), lab.pod("Q"), lab.node("n1").host(), lab.client("X"));

    for proto in [Proto::Tcp, Proto::Mptcp, Proto::Udp, Proto::UdpUnconnected] {
        // pod to pod: on the same node, on another, IPv6
        check(&p, "10.64.1.11:8080", proto, "L1", "10.64.1.50")?;
        check(&p, "10.64.3.31:8080", proto, "R2", "10.64.1.50")?;
        check(&p, "[fd00:64:0:1::11]:8080", proto, "V1", "fd00:64:0:1::50")?;
        check(&q, "10.64.1.11:8080", proto, "L1", "10.64.2.50")?;
        // pod to node, its own and another
        check(&p, "192.0.2.10:9090", proto, "n1", "10.64.1.50")?;
        check(&p, "192.0.2.20:9090", proto, "n2", "10.64.1.50")?;
        check(&p, "[2001:db8:1::30]:9090", proto, "n3", "fd00:64:0:1::50")?;
        // node to pod and to itself
        check(h, "10.64.1.11:8080", proto, "L1", "192.0.2.10")?;
        check(h, "10.64.2.21:8080", proto, "R1", "192.0.2.10")?;
        check(h, "[fd00:64:0:1::11]:8080", proto, "V1", "2001:db8:1::10")?;
        check(h, "198.51.100.10:9090", proto, "n1", "198.51.100.10")?;
        // outside to node, also its second device, and to pods
        check(&x, "192.0.2.10:9090", proto, "n1", "203.0.113.7")?;
        check(&x, "198.51.100.10:9090", proto, "n1", "203.0.113.7")?;
        check(&x, "[2001:db8:1::10]:9090", proto, "n1", "2001:db8:ff::7")?;
        check(&x, "[2001:db8:2::10]:9090", proto, "n1", "2001:db8:ff::7")?;
        check(&x, "10.64.3.31:8080", proto, "R2", "203.0.113.7")?;
        check(&x, "[fd00:64:0:1::11]:8080", proto, "V1", "2001:db8:ff::7")?;
    }
    check(&p, "10.64.1.11:80", Proto::Http, "L1", "10.64.1.50")?;
    check(&lab.client("Y"), "10.64.1.11:80", Proto::Http, "L1", "203.0.113.200")?;
    for target in ["10.64.2.21:0", "[fd00:64:0:1::11]:0"] {
        let attempt = p.connect(target).proto(Proto::Ping).one()?;
        assert!(attempt.ok, "{attempt:?}");
    }
    Ok(())
}

#[test]
fn curl_understands_the_http_server() -> Result<()> {
    let lab = Lab::cases()?;
    lab.pod("L1").serve().name("kubia-gzwli").http(8080).start()?;
    let mut curl = lab.pod("P").command("curl");
    // Two requests on one connection.
    curl.args([
        "--silent",
        "--show-error",
        "--max-time",
        "5",
        "http://10.64.1.11:8080/",
        "http://10.64.1.11:8080/x",
    ]);
    let text = curl.text()?;
    assert_eq!(text.matches("You've hit kubia-gzwli\n").count(), 2, "{text}");
    assert_eq!(text.matches("peer 10.64.1.50:").count(), 2, "{text}");
    let (status, body) = lab.client("X").http_get("10.64.1.11:8080".parse()?, "/")?;
    assert_eq!(status, 200);
    assert!(body.starts_with("You've hit kubia-gzwli\npeer 203.0.113.7:"), "{body}");
    Ok(())
}

#[test]
fn failures_have_their_names() -> Result<()> {
    let lab = Lab::cases()?;
    let (p, x) = (lab.pod("P"), lab.client("X"));
    let patience = Duration::from_millis(300);
    let why =
        |attempt: Attempt| (attempt.ok, attempt.error.unwrap_or_default(), attempt.stage.unwrap_or_default());

    assert_eq!(why(p.connect("10.64.1.11:8080").one()?), refused("connect"));
    // Refusals by ICMP are not rate-limited.
    for target in ["10.64.1.11:8080", "[fd00:64:0:1::11]:8080"] {
        for attempt in p.connect(target).udp().times(30).run()? {
            assert_eq!(why(attempt), refused("recv"), "{target}");
        }
    }

    // Silence: the endpoint's namespace discards its replies.
    lab.pod("L1").net().ip("route add blackhole 10.64.1.50/32")?;
    for proto in [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected, Proto::Ping] {
        let attempt = p.connect("10.64.1.11:8080").proto(proto).timeout(patience).one()?;
        let elapsed = Duration::from_micros(attempt.elapsed_us);
        assert_eq!(why(attempt).1, "ETIMEDOUT", "{proto:?}");
        assert!(elapsed >= patience && elapsed < patience * 4, "{proto:?} took {elapsed:?}");
    }

    // An address that no node serves is answered by the hub, so that it differs from a dropped packet.
    for (client, target) in [(&*p, "198.18.5.5:80"), (&x, "198.18.5.5:80"), (&x, "[2001:db8:99::9]:80")] {
        let attempt = client.connect(target).one()?;
        assert_eq!(why(attempt), (false, "ENETUNREACH".to_owned(), "connect".to_owned()), "{target}");
    }

    let attempt = p.connect("10.64.1.11:8080").bind("10.64.1.99").one()?;
    assert_eq!(attempt.error.as_deref(), Some("EADDRNOTAVAIL"), "{attempt:?}");
    Ok(())
}

fn refused(stage: &str) -> (bool, String, String) {
    (false, "ECONNREFUSED".to_owned(), stage.to_owned())
}

#[test]
fn clients_of_every_kind() -> Result<()> {
    let lab = Lab::cases()?;
    lab.pod("L1").serve().tcp(8080).udp(8080).start()?;
    let p = lab.pod("P");

    // an AF_INET6 socket with a v4-mapped address
    for proto in [Proto::Tcp, Proto::Udp] {
        let attempt = p.connect("10.64.1.11:8080").proto(proto).v6_socket().one()?;
        assert_eq!(attempt.peername, Some("[::ffff:10.64.1.11]:8080".parse()?), "{attempt:?}");
        assert_eq!(attempt.peer.map(|peer| peer.ip().to_string()).as_deref(), Some("10.64.1.50"));
    }
    let attempt = p.connect("10.64.1.11:8080").udp_unconnected().v6_socket().one()?;
    assert_eq!(
        (attempt.from, attempt.peername),
        (Some("[::ffff:10.64.1.11]:8080".parse()?), None),
        "{attempt:?}"
    );

    // a source address and port
    let attempt = p.connect("10.64.1.11:8080").bind("10.64.1.50:5555").one()?;
    assert_eq!(attempt.peer, Some("10.64.1.50:5555".parse()?), "{attempt:?}");

    // one socket for several datagrams, or one each
    for proto in [Proto::Udp, Proto::UdpUnconnected] {
        let connect = p.connect("10.64.1.11:8080").proto(proto).times(6);
        assert_eq!(attempts_by_port(connect.clone().per_socket(3).run()?), [3, 3], "{proto:?}");
        assert!(
            attempts_by_port(connect.run()?).len() > 3,
            "{proto:?}: a port may come twice, but not all the time"
        );
    }

    // many attempts are in order and counted
    let attempts = p.connect("10.64.1.11:8080").times(200).run()?;
    assert_eq!(Summary::of(&attempts).by_server, BTreeMap::from([("L1".to_owned(), 200)]));
    assert!(attempts.is_sorted_by_key(|attempt| attempt.at_us));
    Ok(())
}

fn attempts_by_port(attempts: Vec<Attempt>) -> Vec<usize> {
    let mut count = BTreeMap::<_, usize>::new();
    attempts.iter().for_each(|attempt| *count.entry(attempt.peer).or_default() += 1);
    count.into_values().collect::<Vec<_>>()
}

#[test]
fn a_flow_sees_a_server_go_and_come_back() -> Result<()> {
    let lab = Lab::cases()?;
    let l1 = lab.pod("L1");
    l1.serve().tcp(8080).start()?;
    let mut flow = lab.pod("P").connect("10.64.1.11:8080").pace(Duration::from_millis(1)).start()?;
    flow.wait_for(10)?;
    assert_eq!(Summary::of(flow.so_far()?).by_error, BTreeMap::new());
    l1.stop()?;
    flow.wait_for(10)?;
    l1.serve().name("again").tcp(8080).start()?;
    flow.wait_for(10)?;

    let summary = Summary::of(&flow.stop()?);
    assert_eq!(summary.servers(), ["L1", "again"]);
    assert!(summary.by_error.contains_key("ECONNREFUSED"), "{summary:?}");
    assert!(summary.total >= 30, "{summary:?}");
    Ok(())
}

#[test]
fn a_held_connection_lives_until_its_server_dies() -> Result<()> {
    let lab = Lab::cases()?;
    let (p, l1) = (lab.pod("P"), lab.pod("L1"));
    l1.serve().tcp(8080).udp(8080).start()?;

    let mut tcp = p.hold("10.64.1.11:8080").open()?;
    assert_eq!(tcp.opened().server.as_deref(), Some("L1"));
    assert_eq!(tcp.say("first")?.text.as_deref(), Some("first"));
    let mut udp = p.hold("10.64.1.11:8080").udp().open()?;
    assert_eq!(udp.opened().peername, Some("10.64.1.11:8080".parse()?));
    let answer = udp.say("second")?;
    assert_eq!((answer.server.as_deref(), answer.text.as_deref()), (Some("L1"), Some("second")));

    l1.stop()?;
    let broken = tcp.say("third")?;
    assert!(!broken.ok && matches!(broken.error.as_deref(), Some("EOF" | "ECONNRESET")), "{broken:?}");
    assert_eq!(udp.say("fourth")?.error.as_deref(), Some("ECONNREFUSED"));

    let refused = p.hold("10.64.1.11:8080").open()?;
    assert_eq!(refused.opened().error.as_deref(), Some("ECONNREFUSED"));
    Ok(())
}

#[test]
fn raw_servers_give_bytes_back() -> Result<()> {
    let lab = Lab::cases()?;
    lab.pod("L1").serve().echo(7).sink(9).udp_echo(7).start()?;
    lab.pod("P").net().enter(|| -> Result<()> {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect("10.64.1.11:7")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(&[7; 5000])?;
        let mut back = [0; 5000];
        stream.read_exact(&mut back)?;
        assert_eq!(back, [7; 5000]);

        let mut sink = std::net::TcpStream::connect("10.64.1.11:9")?;
        sink.write_all(&vec![1; 1 << 20])?;
        sink.shutdown(std::net::Shutdown::Write)?;
        sink.set_read_timeout(Some(Duration::from_secs(5)))?;
        assert_eq!(sink.read(&mut [0])?, 0);

        let udp = std::net::UdpSocket::bind("0.0.0.0:0")?;
        udp.set_read_timeout(Some(Duration::from_secs(5)))?;
        udp.send_to(b"raw", "10.64.1.11:7")?;
        let mut buffer = [0; 16];
        let (length, _) = udp.recv_from(&mut buffer)?;
        assert_eq!(&buffer[..length], b"raw");
        Ok(())
    })?
}

#[test]
fn processes_are_where_they_belong() -> Result<()> {
    let lab = Lab::cases()?;
    let pod = cgroup_of(&lab.pod("L1"))?;
    assert!(pod.ends_with("/n1/pods/L1"), "{pod}");
    let host = cgroup_of(lab.node("n1").host())?;
    assert!(host.ends_with("/n1/host"), "{host}");
    let outside = cgroup_of(&lab.client("X"))?;
    assert!(outside.ends_with("/outside/X"), "{outside}");
    assert!(lab.pod("L1").cgroup().starts_with(lab.node("n1").cgroup()));
    assert!(!lab.client("X").cgroup().starts_with(lab.node("n1").cgroup()));

    let mut ip = lab.pod("L1").command("ip");
    ip.args(["-o", "address"]);
    let addresses = ip.text()?;
    assert!(addresses.contains("10.64.1.11/32"), "{addresses}");
    assert!(!addresses.contains("tentative"), "{addresses}");
    Ok(())
}

fn cgroup_of(place: &Place) -> Result<String> {
    let mut cat = place.command("cat");
    cat.arg("/proc/self/cgroup");
    let text = cat.text()?;
    Ok(text.lines().find_map(|line| line.strip_prefix("0::")).context("no cgroup v2 line")?.to_owned())
}

#[test]
fn pods_come_and_go() -> Result<()> {
    let lab = Lab::build(LabSpec::three_nodes()?.pod("n1", "P", &["10.64.1.50"])?)?;
    // Once inside the node's prefix, once outside all prefixes.
    for (name, address) in [("kubia-7nog1", "10.64.2.7"), ("db", "172.16.2.44")] {
        let pod = lab.add_pod("n2", name, &[address])?;
        pod.serve().tcp(8080).start()?;
        let target = format!("{address}:8080");
        check(&lab.pod("P"), &target, Proto::Tcp, name, "10.64.1.50")?;
        lab.remove_pod(name)?;
        assert!(!pod.cgroup().exists());
        let attempt = lab.pod("P").connect(&target).timeout(Duration::from_millis(300)).one()?;
        assert!(!attempt.ok, "{attempt:?}");
        assert!(lab.all_pods().iter().all(|left| left.name() != name));
        // The address is free again.
        lab.add_pod("n3", &format!("{name}-2"), &[address])?;
    }
    let external = lab.add_client("external", &["11.11.11.11"])?;
    external.serve().http(80).start()?;
    check(&lab.pod("P"), "11.11.11.11:80", Proto::Http, "external", "10.64.1.50")?;
    Ok(())
}

#[test]
fn outside_traffic_for_services_follows_the_chosen_node() -> Result<()> {
    let lab = Lab::cases()?;
    for node in lab.nodes() {
        node.host().net().ip("address add 198.18.5.5/32 dev lo")?;
        node.host().serve().at("tcp", "198.18.5.5:80").start()?;
    }
    assert_eq!(server(&lab)?.as_deref(), Some("n1"));
    lab.outside_via("n3")?;
    assert_eq!(server(&lab)?.as_deref(), Some("n3"));
    Ok(())
}

fn server(lab: &Lab) -> Result<Option<String>> {
    Ok(lab.client("X").connect("198.18.5.5:80").one()?.server)
}

/// Returns every directory that the lab `lab` has in the kernel.
fn traces(lab: &Lab) -> Result<Vec<PathBuf>> {
    let node = lab.node("n1");
    let cgroup = node.cgroup().parent().context("no parent")?.to_path_buf();
    let [pins, run] = [node.pin_dir(), node.run_dir()].map(Path::parent);
    Ok(vec![cgroup, pins.context("no parent")?.to_path_buf(), run.context("no parent")?.to_path_buf()])
}

fn wait_until_gone(paths: &[PathBuf]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Some(left) = paths.iter().find(|path| path.exists()) {
        ensure!(Instant::now() < deadline, "{} stays", left.display());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn two_labs_beside_each_other_leave_nothing() -> Result<()> {
    let (first, second) = (Lab::cases()?, Lab::cases()?);
    for (lab, name) in [(&first, "one"), (&second, "two")] {
        lab.pod("L1").serve().name(name).tcp(8080).start()?;
    }
    // The same addresses belong to other pods.
    for (lab, name) in [(&first, "one"), (&second, "two")] {
        check(&lab.pod("P"), "10.64.1.11:8080", Proto::Tcp, name, "10.64.1.50")?;
    }
    let paths = [traces(&first)?, traces(&second)?].concat();
    assert!(paths.iter().all(|path| path.is_dir()), "{paths:?}");

    // A program that outlives its parent, and directories of an agent.
    let mut shell = first.pod("L2").command("sh");
    shell.args(["-c", "sleep 1000 & echo $!"]).stdout(Stdio::piped());
    let orphan = {
        use std::io::Read as _;
        let mut text = String::new();
        let mut process = shell.spawn()?;
        let mut stdout = process.take_stdout()?;
        process.wait(Duration::from_secs(5))?;
        let mut byte = [0];
        while stdout.read(&mut byte)? == 1 && byte != *b"\n" {
            text.push(char::from(byte[0]));
        }
        text.parse::<u32>()?
    };
    assert!(is_alive(orphan));
    fs::create_dir_all(first.node("n1").pin_dir().join("v1/links"))?;
    fs::create_dir_all(first.node("n1").run_dir())?;

    drop(first);
    assert!(paths[..3].iter().all(|path| !path.exists()), "{paths:?}");
    assert!(paths[3..].iter().all(|path| path.is_dir()), "{paths:?}");
    assert!(
        !fs::read_to_string(format!("/proc/{orphan}/status")).is_ok_and(|status| status.contains("sleeping"))
    );
    check(&second.pod("P"), "10.64.1.11:8080", Proto::Tcp, "two", "10.64.1.50")?;
    drop(second);
    assert!(paths.iter().all(|path| !path.exists()), "{paths:?}");
    Ok(())
}

#[test]
fn a_panic_cleans_up() -> Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let result = thread::spawn(move || {
        let lab = Lab::cases().unwrap();
        lab.pod("L1").serve().tcp(8080).start().unwrap();
        sender.send(traces(&lab).unwrap()).unwrap();
        panic!("as a failing test does");
    })
    .join();
    assert!(result.is_err());
    let paths = receiver.recv()?;
    assert!(paths.iter().all(|path| !path.exists()), "{paths:?}");
    Ok(())
}

/// The process that [`a_killed_process_is_swept_up`] kills; not a test of its own.
#[test]
#[ignore = "run by a_killed_process_is_swept_up"]
fn victim() -> Result<()> {
    let lab = Lab::cases()?;
    lab.pod("L1").serve().tcp(8080).start()?;
    fs::create_dir_all(lab.node("n1").pin_dir().join("v1"))?;
    let server = fs::read_to_string(lab.pod("L1").cgroup().join("cgroup.procs"))?;
    fs::create_dir_all(lab.node("n1").run_dir())?;
    let traces: Vec<_> = traces(&lab)?.iter().map(|path| path.display().to_string()).collect();
    eprintln!("victim: {} {}", server.trim(), traces.join(" "));
    thread::sleep(Duration::from_secs(20));
    Ok(())
}

#[test]
fn a_killed_process_is_swept_up() -> Result<()> {
    use std::io::{BufRead as _, BufReader};
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["--exact", "itself::victim", "--ignored", "--nocapture"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = BufReader::new(victim.stderr.take().context("no stderr")?);
    let line =
        stderr.lines().map_while(Result::ok).find_map(|line| Some(line.strip_prefix("victim: ")?.to_owned()));
    victim.kill()?;
    victim.wait()?;
    let line = line.context("the victim made no lab")?;
    let (server, paths) = line.split_once(' ').context("the victim names nothing")?;
    let paths: Vec<_> = paths.split(' ').map(PathBuf::from).collect();

    // The children die at once and by themselves; the next lab removes the rest from the kernel.
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_alive(server.parse()?) {
        ensure!(Instant::now() < deadline, "the server {server} outlives its lab");
        thread::sleep(Duration::from_millis(5));
    }
    let _next = Lab::build(LabSpec::default())?;
    wait_until_gone(&paths)
}

#[test]
fn node_objects_say_what_the_node_is() -> Result<()> {
    let lab = Lab::cases()?;
    let object = lab.node("n1").object();
    assert_eq!(object["metadata"]["labels"]["topology.kubernetes.io/zone"], "za");
    assert_eq!(object["status"]["addresses"][0]["address"], "192.0.2.10");
    assert_eq!(object["spec"]["podCIDRs"][1], "fd00:64:0:1::/64");
    assert_eq!(lab.node("n1").cluster_cidr(), "10.64.0.0/12,fd00:64::/48");
    Ok(())
}
