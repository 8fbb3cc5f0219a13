//! Who connects to the node's open ports and says nothing, or never ends.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::floods::allow_open_files;
use proxy_tests::lab::Place;

use super::world::{HEALTH_PORT, NODE, World};

/// More than any room of the agent has places.
const CONNECTIONS: usize = 1_400;
/// A kubelet gives a probe one second.
const PROBE: Duration = Duration::from_secs(1);

/// Connections from `place` that have sent `head` and do nothing more.
fn silent(place: &Place, to: SocketAddr, head: &[u8]) -> Result<Vec<TcpStream>> {
    place.net().enter(|| {
        let connect = |_| {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
            // Whoever has been thrown out in the meantime need not be told.
            let _ = stream.write_all(head);
            Ok(stream)
        };
        (0..CONNECTIONS).map(connect).collect()
    })?
}

/// One probe, as a kubelet sends it.
fn probe(place: &Place, to: SocketAddr, path: &str) -> Result<()> {
    let start = Instant::now();
    let answer = place.net().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, PROBE)?;
        stream.set_read_timeout(Some(PROBE))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: n1\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        // The server ends it: there is no second request.
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let took = start.elapsed();
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{path} of {to}: {answer}");
    ensure!(took < PROBE, "{path} of {to} took {took:?}");
    Ok(())
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
                // From where the crowd is, too.
                probe(&stranger, to, path)?;
            }
        }
        drop(crowd);
    }
    Ok(())
}
