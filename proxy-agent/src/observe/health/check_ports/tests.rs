use std::net::Ipv4Addr;
use std::time::Duration;

use proxy_common::addr::Family;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::observe::http::testing::{Response, request};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("a", name)
}

/// Starts servers on loopback only.
fn start(health: &Health) -> CheckPorts {
    let ports = CheckPorts::start(health.clone(), &Handle::current());
    ports.listen_on([vec![LOOPBACK], Vec::new()]);
    ports
}

fn set(ports: &CheckPorts, service: &str, check: Option<(u16, usize)>) {
    let check = check.map(|(port, endpoints)| Check { port, endpoints });
    ports.services([(key(service), [check, None])].into_iter());
}

fn at(port: u16) -> SocketAddr {
    (LOOPBACK, port).into()
}

/// Returns a port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind(at(0)).unwrap().local_addr().unwrap().port()
}

/// Returns the first answer that `done` accepts.
async fn until(port: u16, path: &str, done: impl Fn(&io::Result<Response>) -> bool) -> io::Result<Response> {
    let asking = async {
        loop {
            let answer = request(at(port), "GET", path).await;
            if done(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), asking).await.expect("no such answer in 10 seconds")
}

fn refused(answer: &io::Result<Response>) -> bool {
    answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn p190_p191_headers_and_body_over_http() {
    block_on(async {
        let ports = start(&Health::new(Duration::from_secs(30)));
        let port = free_port();
        set(&ports, "s", Some((port, 1)));
        let got = until(port, "/", Result::is_ok).await.unwrap();
        assert_eq!(got.status, 200, "{got:?}");
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 1",
        ] {
            assert!(got.head.contains(&format!("\r\n{header}\r\n")), "{header}: {}", got.head);
        }
        assert_eq!(got.body, answer(&key("s"), 1, true).body);
        // Any path, any method.
        assert_eq!(request(at(port), "POST", "/healthz?verbose").await.unwrap().status, 200);

        set(&ports, "s", Some((port, 0)));
        let got = until(port, "/", |answer| answer.as_ref().is_ok_and(|answer| answer.status == 503))
            .await
            .unwrap();
        assert!(got.head.contains("\r\nx-load-balancing-endpoint-weight: 0\r\n"), "{}", got.head);
        assert_eq!(got.body, answer(&key("s"), 0, true).body);
    });
}

#[test]
fn p194_an_agent_that_is_stuck_serves_nobody() {
    block_on(async {
        let health = Health::new(Duration::ZERO);
        health.updated(Family::V4);
        let ports = start(&health);
        let port = free_port();
        set(&ports, "s", Some((port, 1)));
        assert_eq!(until(port, "/", Result::is_ok).await.unwrap().status, 200);
        health.queued(Family::V4);
        let got = request(at(port), "GET", "/").await.unwrap();
        assert_eq!((got.status, got.body), (503, answer(&key("s"), 1, false).body));
        health.updated(Family::V4);
        assert_eq!(request(at(port), "GET", "/").await.unwrap().status, 200);
    });
}

#[test]
fn p195_p197_ports_close_and_move() {
    block_on(async {
        let ports = start(&Health::new(Duration::from_secs(30)));
        let [first, second] = [free_port(), free_port()];
        set(&ports, "s", Some((first, 1)));
        until(first, "/", Result::is_ok).await.unwrap();
        // A prober that keeps its connection must not go on hearing yes.
        let mut kept = TcpStream::connect(at(first)).await.unwrap();
        kept.write_all(b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n").await.unwrap();
        let mut buffer = [0; 1024];
        assert!(kept.read(&mut buffer).await.unwrap() > 0);

        set(&ports, "s", Some((second, 1)));
        until(second, "/", Result::is_ok).await.unwrap();
        until(first, "/", refused).await.unwrap_err();
        let end = tokio::time::timeout(Duration::from_secs(10), kept.read(&mut buffer)).await.unwrap();
        assert_eq!(end.unwrap(), 0, "the connection ends with the port");

        assert_eq!(ports.known(), [key("s")]);
        set(&ports, "s", None);
        assert_eq!(ports.known(), []);
        until(second, "/", refused).await.unwrap_err();
    });
}

/// A port goes from one Service to another within one order, without a failure.
#[test]
fn p197_a_port_changes_hands() {
    block_on(async {
        let mut ports = start(&Health::new(Duration::from_secs(30)));
        let port = free_port();
        for name in ["t", "s", "t"] {
            let checks = ["s", "t"].map(|service| {
                let check = (service == name).then_some(Check { port, endpoints: 1 });
                (key(service), [check, None])
            });
            ports.services(checks.into_iter());
            let want = answer(&key(name), 1, true).body;
            until(port, "/", |got| got.as_ref().is_ok_and(|got| got.body == want)).await.unwrap();
        }
        let failed = tokio::time::timeout(Duration::from_millis(50), ports.failures()).await;
        assert!(failed.is_err(), "{failed:?}");
    });
}

#[test]
fn a_port_that_is_taken_is_told_and_tried_again() {
    block_on(async {
        let mut ports = start(&Health::new(Duration::from_secs(30)));
        let taken = std::net::TcpListener::bind(at(0)).unwrap();
        let [port, other] = [taken.local_addr().unwrap().port(), free_port()];
        set(&ports, "s", Some((port, 1)));
        let failures = ports.failures().await;
        let sentence = &failures[&key("s")][0];
        assert!(sentence.contains(&format!("127.0.0.1:{port}")) && sentence.contains("in use"), "{sentence}");
        // Other ports are served.
        set(&ports, "t", Some((other, 1)));
        until(other, "/", Result::is_ok).await.unwrap();
        drop(taken);
        // Any change makes the task try again at once.
        set(&ports, "t", Some((other, 2)));
        assert_eq!(ports.failures().await, Failures::new());
        assert_eq!(request(at(port), "GET", "/").await.unwrap().status, 200);
    });
}
