//! Real sockets in namespaces of the test's own. Records in socket storage need a BPF map; here a socket is chosen
//! by where it is connected.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::Path;

use proxy_common::be::Be16;
use tempfile::TempDir;

use super::*;
use crate::node::testing::in_new_netns;

/// A directory in the shape of procfs, with the namespace of the calling thread as process `pid`.
fn show_this_namespace(root: &Path, pid: u32) {
    let dir = root.join("proc").join(pid.to_string()).join("ns");
    std::fs::create_dir_all(&dir).unwrap();
    let thread = rustix::thread::gettid().as_raw_nonzero();
    symlink(format!("/proc/{}/task/{thread}/ns/net", std::process::id()), dir.join("net")).unwrap();
}

fn places(root: &TempDir) -> Places {
    Places { proc: root.path().join("proc"), named: vec![root.path().join("netns")] }
}

fn loopback_up() {
    let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
}

fn connected(from: &str, to: &str) -> UdpSocket {
    let socket = UdpSocket::bind(from).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// ECONNABORTED, once, is how an application learns that its socket was destroyed.
fn is_destroyed(socket: &UdpSocket) -> bool {
    match socket.take_error().unwrap().map(|error| error.raw_os_error()) {
        Some(error) => {
            assert_eq!(error, Some(libc::ECONNABORTED));
            assert!(socket.peer_addr().is_err(), "a destroyed socket is not connected");
            true
        }
        None => false,
    }
}

fn destination(found: &Found) -> (Addr, u16) {
    (found.id.destination_address.into(), found.id.destination_port)
}

fn endpoint(s: &str) -> (Addr, u16) {
    let socket: SocketAddr = s.parse().unwrap();
    (socket.ip().into(), socket.port())
}

#[test]
fn this_kernel_can_do_it() {
    SocketSweeper::new(Places::default()).unwrap();
}

#[test]
fn sockets_to_one_destination_are_destroyed_in_every_namespace() {
    let root = TempDir::new().unwrap();
    in_new_netns(|| {
        loopback_up();
        show_this_namespace(root.path(), 1);
        let stale = [
            connected("127.0.0.1:0", "127.0.0.7:1053"),
            // An AF_INET6 socket that talks IPv4 is found by its canonical address.
            connected("[::]:0", "[::ffff:127.0.0.7]:1053"),
        ];
        let kept = [
            connected("127.0.0.1:0", "127.0.0.7:1054"),
            connected("127.0.0.1:0", "127.0.0.8:1053"),
            connected("[::1]:0", "[::1]:1053"),
        ];
        let unconnected = UdpSocket::bind("127.0.0.1:0").unwrap();
        in_new_netns(|| {
            loopback_up();
            show_this_namespace(root.path(), 2);
            // The same namespace once more: it is looked into once.
            show_this_namespace(root.path(), 3);
            let stale_there = connected("127.0.0.1:0", "127.0.0.7:1053");

            let report =
                sweep(&places(&root), None, &|found| destination(found) == endpoint("127.0.0.7:1053"))
                    .unwrap();
            assert!(report.errors.is_empty(), "{:?}", report.errors);
            assert_eq!((report.namespaces, report.examined, report.destroyed), (2, 6, 3));
            assert!(is_destroyed(&stale_there));
        });
        assert!(stale.iter().all(is_destroyed));
        assert!(!kept.iter().chain([&unconnected]).any(is_destroyed));
    });
}

#[test]
fn the_caller_stays_in_its_namespace() {
    let root = TempDir::new().unwrap();
    in_new_netns(|| {
        show_this_namespace(root.path(), 1);
        in_new_netns(|| {
            let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
            let before = here();
            assert_eq!(sweep(&places(&root), None, &|_| false).unwrap().namespaces, 1);
            assert_eq!(here(), before);
        });
    });
}

#[test]
fn v6_sockets_and_named_namespaces() {
    let root = TempDir::new().unwrap();
    std::fs::create_dir(root.path().join("proc")).unwrap();
    std::fs::create_dir(root.path().join("netns")).unwrap();
    // What iproute2 leaves when a mount is gone: not a namespace, and no reason to complain.
    std::fs::write(root.path().join("netns/leftover"), "").unwrap();
    in_new_netns(|| {
        loopback_up();
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let path = format!("/proc/{}/task/{thread}/ns/net", std::process::id());
        symlink(path, root.path().join("netns/mine")).unwrap();
        let stale = connected("[::1]:0", "[::1]:1053");
        let kept = connected("127.0.0.1:0", "127.0.0.7:1053");
        let report =
            sweep(&places(&root), None, &|found| destination(found) == endpoint("[::1]:1053")).unwrap();
        assert!(report.errors.is_empty(), "{:?}", report.errors);
        assert_eq!((report.namespaces, report.examined, report.destroyed), (1, 2, 1));
        assert!(is_destroyed(&stale));
        assert!(!is_destroyed(&kept));
    });
}

#[test]
fn a_descriptor_that_is_no_socket_storage_is_told_by_namespace() {
    let root = TempDir::new().unwrap();
    in_new_netns(|| {
        show_this_namespace(root.path(), 1);
        let not_a_map = std::fs::File::open("/dev/null").unwrap();
        let sweeper = SocketSweeper::new(places(&root)).unwrap();
        let report = sweeper.destroy_stale(not_a_map.as_fd(), |_| true).unwrap();
        let errors: Vec<String> = report.errors.iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("/proc/1/ns/net: sock_diag, listing"), "{errors:?}");
    });
}

#[test]
fn no_processes_is_an_error_that_names_the_path() {
    let places = Places { proc: "/nonexistent/proc".into(), named: Vec::new() };
    let error = sweep(&places, None, &|_| true).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/proc"), "{error}");
}

#[test]
fn a_socket_counts_only_while_it_is_connected_where_its_record_says() {
    let found = |destination: &str, port| {
        let mut id = netlink_packet_sock_diag::inet::SocketId::new_v6();
        id.destination_address = destination.parse::<IpAddr>().unwrap();
        id.destination_port = port;
        Found { family: libc::AF_INET6 as u8, id, record: None }
    };
    let record = SocketRecord {
        backend_addr: Addr::v4([10, 64, 1, 11]),
        backend_port: Be16::new(1053),
        ..SocketRecord::default()
    };
    assert!(connected_by(&found("10.64.1.11", 1053), &record));
    assert!(connected_by(&found("::ffff:10.64.1.11", 1053), &record));
    assert!(!connected_by(&found("10.64.1.11", 1054), &record));
    assert!(!connected_by(&found("10.64.1.12", 1053), &record));
}
