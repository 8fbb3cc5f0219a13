//! Strangers that connect to the node's open ports and send nothing, or never end.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_common::datapath::edge::parsed::tcp::SYN;
use proxy_tests::floods::allow_open_files;
use proxy_tests::lab::Place;
use proxy_tests::packets::Packet;
use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size};

use super::world::{HEALTH_PORT, NODE, World};

/// Number of connections, more than any limit of the agent.
const CONNECTIONS: usize = 1_400;
/// Time that a kubelet gives a probe.
const PROBE: Duration = Duration::from_secs(1);

/// Opens connections from `place` that send `head` and do nothing more.
fn silent(place: &Place, to: SocketAddr, head: &[u8]) -> Result<Vec<TcpStream>> {
    place.net().enter(|| {
        (0..CONNECTIONS)
            .map(|_| {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
                // The connection may have been closed in the meantime.
                let _ = stream.write_all(head);
                Ok(stream)
            })
            .collect()
    })?
}

/// Sends one probe, as a kubelet does. Returns the time that it took.
fn probe(place: &Place, to: SocketAddr, path: &str) -> Result<Duration> {
    let start = Instant::now();
    let answer = place.net().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, PROBE)?;
        stream.set_read_timeout(Some(PROBE))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: n1\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        // The server closes the connection, because there is no second request.
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let took = start.elapsed();
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{path} of {to}: {answer}");
    ensure!(took < PROBE, "{path} of {to} took {took:?}");
    Ok(took)
}

#[test]
fn h010_probes_are_answered_beside_the_silent() -> Result<()> {
    allow_open_files()?;
    let world = World::start()?;
    let to: SocketAddr = format!("{}:{HEALTH_PORT}", NODE[0]).parse().context("an address")?;
    let (stranger, kubelet) = (world.client(), world.host().clone());
    for head in [&b""[..], b"GET /livez HT", b"GET /livez HTTP/1.1\r\nX: y\r\n"] {
        let crowd = silent(&stranger, to, head)?;
        for path in ["/livez", "/readyz", "/healthz"] {
            for _ in 0..10 {
                probe(&kubelet, to, path)?;
                // Probes from the crowd's own place are answered, too.
                probe(&stranger, to, path)?;
            }
        }
        drop(crowd);
    }
    Ok(())
}

/// Largest and smallest number of connections in the time of the test.
const CHURNED: usize = 100_000;
const CHURNED_LEAST: usize = 10_000;
/// Number of connections that are open at the same time.
const OPEN: usize = 12_000;
/// Time for 99 of 100 probes. On a machine where nothing else runs, not even the attackers, it is a tenth of a
/// second.
const RULE: Duration = Duration::from_millis(250);
/// Number of the attackers' threads: two CPUs keep two threads busy.
const THREADS: usize = 2;
/// Time limit, for however slow a machine.
const AT_MOST: Duration = Duration::from_secs(12);

/// Returns requests of strangers: nothing, half a request, a whole request whose answer is never read, nonsense, and
/// a request that never ends.
fn nonsense() -> Vec<Vec<u8>> {
    vec![
        Vec::new(),
        b"G".to_vec(),
        get(b""),
        get(b"\r\n"),
        // Many requests at once.
        get(b"\r\n").repeat(50),
        // Bodies that never come, or never end.
        get(b"Content-Length: 18446744073709551615\r\n\r\nx"),
        get(b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
        get(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
        get(b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"),
        get(b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n\r\n"),
        // Heads without an end.
        get(&b"X: y\r\n".repeat(20_000)),
        get(&b"X".repeat(9_000)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        vec![0; 4096],
        b"\r\n".repeat(10_000),
        b"GET  HTTP/9.9\r\n\r\n".to_vec(),
    ]
}

/// Returns a request for `/livez`; `rest` follows its first header.
fn get(rest: &[u8]) -> Vec<u8> {
    [b"GET /livez HTTP/1.1\r\nHost: n1\r\n", rest].concat()
}

/// Makes and closes connections as fast as possible, until so many have been made or `until`.
fn churn(to: SocketAddr, made: &AtomicUsize, until: Instant) -> Result<()> {
    let nonsense = nonsense();
    let mut open = VecDeque::new();
    while made.fetch_add(1, Ordering::Relaxed) < CHURNED && Instant::now() < until {
        let Ok(mut stream) = TcpStream::connect_timeout(&to, PROBE) else { continue };
        // A connection that is thrown out is gone at once: the number of ports is limited.
        set_socket_linger(&stream, Some(Duration::ZERO))?;
        set_socket_recv_buffer_size(&stream, 2_048)?;
        stream.set_nonblocking(true)?;
        let said = nonsense.get(made.load(Ordering::Relaxed) % nonsense.len()).context("something to say")?;
        // The request may not fit, or nobody may listen any more.
        let _ = stream.write(said);
        open.push_back(stream);
        if open.len() > OPEN / THREADS {
            open.pop_front();
        }
    }
    Ok(())
}

/// Probes are answered at once as a rule, and always within a second.
#[test]
fn h011_probes_are_answered_beside_those_who_come_and_go() -> Result<()> {
    allow_open_files()?;
    let world = World::start()?;
    let to: SocketAddr = format!("{}:{HEALTH_PORT}", NODE[0]).parse().context("an address")?;
    let (stranger, kubelet, other) = (world.client(), world.host().clone(), world.victim());
    let (made, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let until = Instant::now() + AT_MOST;
    let mut times = thread::scope(|scope| -> Result<Vec<Duration>> {
        let churning: Vec<_> =
            (0..THREADS).map(|_| scope.spawn(|| stranger.net().enter(|| churn(to, &made, until))?)).collect();
        // Half-open connections, from forged addresses.
        let half_open = scope.spawn(|| -> Result<()> {
            for round in 0..u16::MAX {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let from = Ipv4Addr::new(203, 0, 113, 100 + (round % 100) as u8);
                let ports = 10_000..10_200;
                stranger.send_raw(ports.map(|port| Packet::tcp((from, port).into(), to, SYN, 1, 0)))?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let probing = || {
            let mut times = Vec::new();
            while !churning.iter().all(thread::ScopedJoinHandle::is_finished) {
                for place in [&kubelet, &other] {
                    for path in ["/livez", "/readyz", "/healthz"] {
                        times.push(probe(place, to, path)?);
                    }
                }
                thread::sleep(Duration::from_millis(10));
            }
            Ok(times)
        };
        let times: Result<Vec<Duration>> = probing();
        over.store(true, Ordering::Relaxed);
        half_open.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
        for churning in churning {
            churning.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
        }
        times
    })?;
    times.sort();
    let count = times.len();
    let [median, p99, max] =
        [50, 99, 100].map(|percent| times.get((count * percent / 100).min(count - 1)).copied());
    let p99 = p99.context("somebody has probed")?;
    let said = format!("{count} probes, median {median:?}, p99 {p99:?}, max {max:?}, beside {made:?}");
    eprintln!("{said}");
    ensure!(count >= 100 && p99 <= RULE, "{said}");
    ensure!(made.load(Ordering::Relaxed) >= CHURNED_LEAST, "{said}");
    Ok(())
}
