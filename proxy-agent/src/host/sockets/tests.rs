//! Tests with real sockets in namespaces of their own. Records in socket storage need a BPF map, so a socket is chosen
//! here by its peer.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::host::testing::in_new_netns;

fn this_namespace() -> PathBuf {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    format!("/proc/{}/task/{thread}/ns/net", std::process::id()).into()
}

/// Makes `root/proc` a procfs in which only this process has descriptors.
fn places(root: &TempDir) -> Places {
    let process = root.path().join("proc").join(std::process::id().to_string());
    std::fs::create_dir_all(&process).unwrap();
    symlink("/proc/self/fd", process.join("fd")).unwrap();
    std::fs::create_dir(root.path().join("netns")).unwrap();
    Places { proc: root.path().join("proc"), named: vec![root.path().join("netns")] }
}

/// Shows the namespace of the calling thread as that of a process.
fn show_as_process(root: &Path, pid: u32) {
    let dir = root.join("proc").join(pid.to_string()).join("ns");
    std::fs::create_dir_all(&dir).unwrap();
    symlink(this_namespace(), dir.join("net")).unwrap();
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

/// Returns whether the socket reports ECONNABORTED, once: an application learns by it that its socket was destroyed.
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

/// Dooms sockets connected to `destination`, and checks that the copy is the right socket.
fn to(destination: &str) -> impl Fn(&Held<'_>) -> Result<Fate, SocketsError> + Sync {
    let destination: SocketAddr = destination.parse().unwrap();
    move |Held { id, copy, .. }| {
        let seen = SocketAddr::new(id.destination_address, id.destination_port);
        let copy = UdpSocket::from(copy.try_clone().unwrap());
        assert_eq!(canonical(copy.peer_addr().unwrap()), canonical(seen));
        Ok(if canonical(seen) == canonical(destination) { Fate::Doomed } else { Fate::Left })
    }
}

fn canonical(addr: SocketAddr) -> (Addr, u16) {
    (Addr::from(addr.ip()), addr.port())
}

#[test]
fn this_kernel_can_do_it() {
    SocketSweeper::new(Places::default()).unwrap();
}

#[test]
fn sockets_to_one_destination_are_destroyed_in_every_namespace() {
    let root = TempDir::new().unwrap();
    let places = places(&root);
    in_new_netns(|| {
        loopback_up();
        show_as_process(root.path(), 1);
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
            show_as_process(root.path(), 2);
            // The same namespace again: it is examined only once.
            show_as_process(root.path(), 3);
            let stale_there = connected("127.0.0.1:0", "127.0.0.7:1053");

            let report = sweep(&places, &to("127.0.0.7:1053")).unwrap();
            assert!(report.errors.is_empty(), "{report:?}");
            assert_eq!((report.namespaces, report.examined, report.destroyed), (2, 6, 3), "{report:?}");
            assert_eq!((report.ownerless, report.hidden), (0, 0), "{report:?}");
            assert!(is_destroyed(&stale_there));
        });
        assert!(stale.iter().all(is_destroyed));
        assert!(!kept.iter().chain([&unconnected]).any(is_destroyed));
    });
}

#[test]
fn the_caller_stays_in_its_namespace() {
    let root = TempDir::new().unwrap();
    let places = places(&root);
    in_new_netns(|| {
        show_as_process(root.path(), 1);
        in_new_netns(|| {
            let before = own_namespace();
            assert_eq!(sweep(&places, &|_| Ok(Fate::Left)).unwrap().namespaces, 1);
            assert_eq!(own_namespace(), before);
        });
    });
}

fn own_namespace() -> PathBuf {
    std::fs::read_link("/proc/thread-self/ns/net").unwrap()
}

#[test]
fn v6_sockets_and_named_namespaces() {
    let root = TempDir::new().unwrap();
    let places = places(&root);
    // iproute2 leaves such a file when a mount is gone. It is not a namespace, and not an error.
    std::fs::write(root.path().join("netns/leftover"), "").unwrap();
    in_new_netns(|| {
        loopback_up();
        symlink(this_namespace(), root.path().join("netns/mine")).unwrap();
        let stale = connected("[::1]:0", "[::1]:1053");
        let kept = connected("127.0.0.1:0", "127.0.0.7:1053");
        let report = sweep(&places, &to("[::1]:1053")).unwrap();
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!((report.namespaces, report.examined, report.destroyed), (1, 2, 1), "{report:?}");
        assert!(is_destroyed(&stale));
        assert!(!is_destroyed(&kept));
    });
}

#[test]
fn a_socket_without_a_visible_owner_is_left_alone() {
    let root = TempDir::new().unwrap();
    let mut places = places(&root);
    // The procfs shows only a process without descriptors, as for an agent that does not see the host's processes.
    places.proc = root.path().join("lonely");
    std::fs::create_dir_all(places.proc.join("1/fd")).unwrap();
    in_new_netns(|| {
        loopback_up();
        symlink(this_namespace(), root.path().join("netns/mine")).unwrap();
        let socket = connected("127.0.0.1:0", "127.0.0.7:1053");
        let report = sweep(&places, &to("127.0.0.7:1053")).unwrap();
        assert_eq!((report.examined, report.ownerless, report.destroyed), (1, 1, 0), "{report:?}");
        assert!(!is_destroyed(&socket));
    });
}

#[test]
fn a_socket_that_cannot_be_judged_is_left_alone() {
    let root = TempDir::new().unwrap();
    let places = places(&root);
    in_new_netns(|| {
        loopback_up();
        show_as_process(root.path(), 1);
        let socket = connected("127.0.0.1:0", "127.0.0.7:1053");
        let report = sweep(&places, &|_| Err(SocketsError::NoDestroy)).unwrap();
        assert_eq!((report.errors.len(), report.destroyed), (1, 0), "{report:?}");
        assert!(!is_destroyed(&socket));
    });
}

#[test]
fn a_descriptor_that_is_no_map_is_an_error() {
    let root = TempDir::new().unwrap();
    let sweeper = SocketSweeper::new(places(&root)).unwrap();
    let error = sweeper
        .follow(&SocketMaps { records: null(), orders: null(), streams: null() }, |_| None, &BTreeSet::new())
        .unwrap_err();
    assert!(matches!(error, SocketsError::Storage(_)), "{error}");
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

#[test]
fn no_processes_is_an_error_that_names_the_path() {
    let places = Places { proc: "/nonexistent/proc".into(), named: Vec::new() };
    let error = sweep(&places, &|_| Ok(Fate::Doomed)).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/proc"), "{error}");
}
