//! Parses checks, in the short form that cases use.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use proxy_common::addr::Family;

use super::{
    Check, Connect, Dest, ENDPOINTS, Endpoint, Expect, Frontend, Pace, Proto, Sender, Source, Target,
};

/// Parses checks, separated by line breaks or semicolons:
///
/// - `P>CIP = L1, R1:8443 masq`: new connections of a sender go to these endpoints. Instead of endpoints there may
///   be `REJECT`, `DROP` or `PASS`; `sticky L1, R1` means one of these for all connections; ` @ 20x15s` gives the
///   number of connections and the pause between them.
/// - `open f P>CIP/udp = L1`: a socket that is kept under the name `f`, on one of these endpoints; `say f = R1`: the
///   endpoint that answers the next data of that socket.
/// - `frontends4 = 10.96.0.10:80, node:31080`: all the frontends of IPv4; `none` for none. `frontends6` likewise.
/// - `set CIP = 1`: number of endpoints in the cluster set.
/// - `affinity CIP = 10800`: affinity timeout in seconds.
///
/// Destinations are `CIP`, `CIP6`, `VIP`, `EXT`, `NP`, or `address:port`, with `/udp`, `/sctp` or `/ping` if the
/// protocol is not TCP. The default port of an endpoint is 8080.
pub(super) fn parse(text: &str) -> Result<Vec<Check>> {
    text.split(['\n', ';'])
        .map(str::trim)
        .filter(|row| !row.is_empty())
        .map(|row| check(row).with_context(|| format!("check {row:?}")))
        .collect()
}

fn check(row: &str) -> Result<Check> {
    if let Some(row) = row.strip_prefix("open ") {
        let (name, row) = row.split_once(' ').context("no name")?;
        let Check::Connect(connect) = check(row)? else { bail!("not a connection") };
        return Ok(Check::Open(name.to_owned(), connect));
    }
    let (subject, want) = row.split_once(" = ").context("no ` = `")?;
    if let Some((sender, to)) = subject.split_once('>') {
        let (want, pace) = match want.split_once(" @ ") {
            Some((want, pace)) => (want, Some(self::pace(pace)?)),
            None => (want, None),
        };
        return Ok(Check::Connect(Connect {
            sender: self::sender(sender)?,
            dest: dest(to)?,
            expect: expect(want)?,
            pace,
        }));
    }
    match subject.split_once(' ') {
        Some(("say", name)) => Ok(Check::Say(name.to_owned(), expect(want)?)),
        Some(("set", to)) => Ok(Check::ClusterSet(dest(to)?, want.parse()?)),
        Some(("affinity", to)) => Ok(Check::AffinitySeconds(dest(to)?, want.parse()?)),
        _ if subject == "frontends4" => Ok(Check::Frontends(Family::V4, frontends(want)?)),
        _ if subject == "frontends6" => Ok(Check::Frontends(Family::V6, frontends(want)?)),
        _ => bail!("no such subject"),
    }
}

fn sender(text: &str) -> Result<Sender> {
    Ok(match text {
        "P" => Sender::P,
        "P6" => Sender::P6,
        "Pods" => Sender::Pods,
        "L1" => Sender::L1,
        "Q" => Sender::Q,
        "H" => Sender::H,
        "X" => Sender::X,
        "Y" => Sender::Y,
        "X6" => Sender::X6,
        other => bail!("no such sender: {other}"),
    })
}

fn dest(text: &str) -> Result<Dest> {
    let (proto, text) = protocol(text)?;
    let text = match text {
        "CIP" => "10.96.0.10:80",
        "CIP6" => "[fd00:96::10]:80",
        "VIP" => "198.18.5.5:80",
        "EXT" => "198.18.9.9:80",
        "NP" => "192.0.2.10:31080",
        other => other,
    };
    let addr = match proto {
        Proto::Ping => SocketAddr::new(text.parse::<IpAddr>().context("address")?, 0),
        Proto::Tcp | Proto::Udp | Proto::Sctp => text.parse().context("address:port")?,
    };
    Ok(Dest { proto, addr })
}

/// Splits the protocol off the end.
fn protocol(text: &str) -> Result<(Proto, &str)> {
    Ok(match text.split_once('/') {
        None => (Proto::Tcp, text),
        Some((rest, "udp")) => (Proto::Udp, rest),
        Some((rest, "sctp")) => (Proto::Sctp, rest),
        Some((rest, "ping")) => (Proto::Ping, rest),
        Some((_, other)) => bail!("no such protocol: {other}"),
    })
}

fn expect(text: &str) -> Result<Expect> {
    let (text, source) = match text.rsplit_once(' ') {
        Some((rest, "masq")) => (rest, Source::Masqueraded),
        Some((rest, "keep")) => (rest, Source::Kept),
        _ => (text, Source::Unsaid),
    };
    Ok(match text {
        "REJECT" => Expect::Reject,
        "DROP" => Expect::Drop,
        "PASS" => Expect::Pass,
        _ => match text.strip_prefix("sticky ") {
            Some(text) => Expect::Sticky(targets(text)?, source),
            None => Expect::Spread(targets(text)?, source),
        },
    })
}

fn targets(text: &str) -> Result<BTreeSet<Target>> {
    text.split(',')
        .map(|text| {
            let (name, port) = text.trim().split_once(':').unwrap_or((text.trim(), "8080"));
            Ok(Target { endpoint: endpoint(name)?, port: port.parse().context("port")? })
        })
        .collect()
}

/// Returns the endpoint of that name.
pub(super) fn endpoint(name: &str) -> Result<Endpoint> {
    let known = ENDPOINTS.into_iter().find(|endpoint| endpoint.name == name);
    known.with_context(|| format!("no such endpoint: {name}"))
}

fn pace(text: &str) -> Result<Pace> {
    let (connections, pause) =
        text.strip_suffix('s').and_then(|t| t.split_once('x')).context("pace is like 20x15s")?;
    Ok(Pace { connections: connections.parse()?, pause: Duration::from_secs(pause.parse()?) })
}

fn frontends(text: &str) -> Result<BTreeSet<Frontend>> {
    if text == "none" {
        return Ok(BTreeSet::new());
    }
    text.split(',')
        .map(|text| {
            let (proto, text) = protocol(text.trim())?;
            Ok(match text.strip_prefix("node:") {
                Some(port) => Frontend::NodePort(proto, port.parse().context("nodePort")?),
                None => Frontend::Address(proto, text.parse().context("address:port")?),
            })
        })
        .collect()
}
