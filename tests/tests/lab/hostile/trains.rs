//! BIG TCP: the kernel passes on trains of segments that are longer than the length fields of their headers can tell.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::lab::{Netns, Place};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};
use serde_json::Value;

use super::world::World;

/// Bytes that every device takes in one piece.
const TRAIN: u32 = 192 << 10;
/// Bytes that are sent in each direction.
const BYTES: usize = 16 << 20;
/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the devices of a namespace take trains of [`TRAIN`].
fn take_trains(net: &Netns) -> Result<()> {
    net.enter(set_trains)?
}

fn set_trains() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        for entry in fs::read_dir("/proc/thread-self/net/dev_snmp6")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // The second network's bridge has no ports, and takes no limit from them.
            if ["lo", "lan1"].contains(&name.as_str()) {
                continue;
            }
            let limits = [
                LinkAttribute::GsoMaxSize(TRAIN),
                LinkAttribute::GroMaxSize(TRAIN),
                LinkAttribute::GsoIpv4MaxSize(TRAIN),
                LinkAttribute::GroIpv4MaxSize(TRAIN),
            ];
            let message = LinkMessageBuilder::<LinkUnspec>::new().name(name.clone());
            let message = limits.into_iter().fold(message, LinkMessageBuilder::append_extra_attribute);
            handle.link().change(message.build()).execute().await.context(name)?;
        }
        Ok(())
    })
}

/// Sends a long line to a server, and receives it back.
fn transfer(place: &Place, target: SocketAddr) -> Result<()> {
    let line: Vec<u8> = (0..BYTES).map(|n| b'a' + (n * n % 251 % 26) as u8).chain(*b"\n").collect();
    place.net().enter(|| -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&line).context("the upload")?;
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut String::new()).context("the upload's end")?;
        let mut back = vec![0; line.len()];
        reader.read_exact(&mut back).context("the download")?;
        ensure!(back == line, "other bytes came back");
        Ok(())
    })?
}

/// Returns the mean length of the packets that a place has sent.
fn mean_length(place: &Place) -> Result<u64> {
    let mut ip = place.command("ip");
    ip.args(["-json", "-statistics", "link", "show", "eth0"]);
    let shown: Value = serde_json::from_str(&ip.text()?)?;
    let sent = &shown[0]["stats64"]["tx"];
    let [bytes, packets] = ["bytes", "packets"].map(|what| sent[what].as_u64().context("no counter"));
    Ok(bytes? / packets?)
}

#[test]
fn h030_trains_longer_than_a_length_field() -> Result<()> {
    let world = World::start()?;
    for net in world.nets() {
        take_trains(&net)?;
    }
    for place in [world.client(), world.victim()] {
        // When the kernel itself forwards a train of IPv6, it counts eight bytes more for each segment.
        place.net().ip("link set eth0 mtu 1480")?;
        for (service, target) in world.targets(&place)? {
            transfer(&place, target)
                .with_context(|| format!("{} to {target}, {}", place.name(), service.name))?;
        }
        // The mean includes the acknowledgements of the downloads.
        let length = mean_length(&place)?;
        ensure!(length > 65_535, "{} has sent packets of {length} bytes: no trains", place.name());
    }
    Ok(())
}
