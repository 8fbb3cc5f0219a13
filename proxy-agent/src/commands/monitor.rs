//! `proxy-agent monitor`: prints the decisions of the datapath as they are made.
//!
//! The command writes `TRACE` and reads `EVENTS`; the agent has no part in it, and need not run. Tracing ends by itself
//! when it is not prolonged, however the command ends.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use aya::maps::{Array, Map, MapData, RingBuf};
use k8s_openapi::jiff::Timestamp;
use proxy_common::abi::event::{PACKET, place};
use proxy_common::abi::maps;
use proxy_common::abi::proto;
use proxy_common::abi::{Counter, Event, Nanos, ServiceId, Trace};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};

use crate::bpf::maps::KernelMaps;
use crate::bpf::pins::OpenError;
use crate::bpf::pins::{PinDir, PinError};
use crate::commands::inspect::InspectError;
use crate::commands::table::line;
use crate::config::args::{MonitorArgs, Output};
use crate::host::clock::now;
use crate::host::device_name;
use crate::reconcile::model::Model;

/// Interval at which tracing is prolonged.
const RENEW: Duration = Duration::from_secs(1);
/// Time until tracing ends that is not prolonged, in nanoseconds.
const GRACE_NANOS: u64 = 3_000_000_000;

/// Interval at which the ring buffer is read; it holds some ten thousand events.
const LOOK: Duration = Duration::from_millis(20);

/// Reason why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MonitorError {
    /// The maps cannot be opened, read or written, or standard output is gone.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// Another monitor is running: an event is delivered once.
    #[error("another `proxy-agent monitor` is running; end it first")]
    Busy,
    /// The pin directory cannot be opened.
    #[error(transparent)]
    Pins(PinError),
    /// No such Service.
    #[error("--service {0}: no such Service is programmed; `proxy-agent services` shows those that are")]
    NoService(String),
}

macro_rules! through_inspect {
    ($($error:ty),*) => { $(
        impl From<$error> for MonitorError {
            fn from(error: $error) -> Self {
                Self::Inspect(error.into())
            }
        }
    )* };
}
through_inspect!(aya::maps::MapError, io::Error, OpenError);

/// A decision, as printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EventView {
    /// Time of the decision.
    pub(crate) time: Timestamp,
    /// `socket`, or the device's name, or its index if the device has gone.
    pub(crate) at: String,
    /// `in` to the host or `out` of it; none at sockets.
    pub(crate) direction: Option<&'static str>,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: &'static str,
    /// Source of the packet; none at sockets.
    pub(crate) source: Option<SocketAddr>,
    /// Destination of the packet, or the one that the application asked for.
    pub(crate) destination: SocketAddr,
    /// New source; none if the source stays.
    pub(crate) new_source: Option<SocketAddr>,
    /// New destination; none if the destination stays.
    pub(crate) new_destination: Option<SocketAddr>,
    /// Namespace, name and port of the Service; none if the event belongs to no Service, or to an unknown one.
    pub(crate) service: Option<String>,
    /// `packet`, or the name of the counter that the event counts for.
    pub(crate) what: &'static str,
}

/// Prints every decision until `stop` is ready.
///
/// # Errors
///
/// [`MonitorError`].
pub(crate) async fn run(
    args: &MonitorArgs,
    stop: impl Future<Output = ()>,
    out: &mut impl Write,
) -> Result<(), MonitorError> {
    let pins = PinDir::new(&args.inspect.pins.pin_dir);
    let mut names = Names::read(&pins)?;
    let _lock = match pins.lock_maps() {
        Ok(lock) => lock,
        Err(PinError::Locked(_)) => return Err(MonitorError::Busy),
        Err(error) => return Err(MonitorError::Pins(error)),
    };
    // A Service has an id for each port and family; the kernel can look for one id.
    let wanted = args.service.as_ref().map(|service| names.ids_of(service));
    let service = match wanted.as_deref() {
        None => ServiceId::NONE,
        Some([]) => return Err(MonitorError::NoService(args.service.clone().unwrap_or_default())),
        Some([id]) => *id,
        Some(_) => ServiceId::NONE,
    };
    let mut trace = Array::<_, Trace>::try_from(Map::Array(open(&pins, maps::TRACE)?))?;
    let mut ring = RingBuf::try_from(Map::RingBuf(open(&pins, maps::EVENTS)?))?;
    // Events that somebody else has left are old.
    while ring.next().is_some() {}

    let (mut renew, mut look) = (interval(RENEW), interval(LOOK));
    for ticks in [&mut renew, &mut look] {
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    tokio::pin!(stop);
    let result = loop {
        tokio::select! {
            () = &mut stop => break Ok(()),
            _ = renew.tick() => {
                let until = Nanos(now().0.saturating_add(GRACE_NANOS));
                trace.set(0, Trace { until, service, sample: args.sample }, 0)?;
            }
            _ = look.tick() => {
                if let Err(error) = print_all(&mut ring, &mut names, &pins, wanted.as_deref(), args, out) {
                    break Err(error);
                }
            }
        }
    };
    trace.set(0, Trace::default(), 0)?;
    result?;
    // Prints the events since the last look.
    print_all(&mut ring, &mut names, &pins, wanted.as_deref(), args, out)
}

fn print_all(
    ring: &mut RingBuf<MapData>,
    names: &mut Names,
    pins: &PinDir,
    wanted: Option<&[ServiceId]>,
    args: &MonitorArgs,
    out: &mut impl Write,
) -> Result<(), MonitorError> {
    let clock = Clock::now();
    while let Some(item) = ring.next() {
        let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&item) else { continue };
        if wanted.is_some_and(|ids| !ids.contains(&event.service)) {
            continue;
        }
        if event.service != ServiceId::NONE && !names.services.contains_key(&event.service) {
            *names = Names::read(pins)?;
        }
        let view = view(&event, names, clock);
        match args.inspect.output {
            Output::Json => {
                serde_json::to_writer(&mut *out, &view).map_err(io::Error::from)?;
                writeln!(out)?;
            }
            Output::Yaml => {
                writeln!(out, "---")?;
                write!(out, "{}", serde_saphyr::to_string(&view).map_err(io::Error::other)?)?;
            }
            Output::Table => line(out, format_args!("{view}"))?,
        }
    }
    Ok(out.flush()?)
}

/// A moment on both clocks.
#[derive(Clone, Copy)]
struct Clock {
    monotonic: Nanos,
    wall: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self { monotonic: now(), wall: SystemTime::now() }
    }

    fn wall(self, monotonic: Nanos) -> Timestamp {
        let ago = Duration::from_nanos(self.monotonic.0.saturating_sub(monotonic.0));
        self.wall.checked_sub(ago).and_then(|time| Timestamp::try_from(time).ok()).unwrap_or_default()
    }
}

/// Names of Services by id, as they were when last read.
struct Names {
    services: BTreeMap<ServiceId, String>,
}

impl Names {
    fn read(pins: &PinDir) -> Result<Self, MonitorError> {
        let maps = KernelMaps::open(pins)?;
        let model = Model::restore(maps.capacity(), &maps.contents()?);
        let services = model.ports.iter().map(|(key, port)| {
            let colon = if key.port_name.is_empty() { "" } else { ":" };
            (port.id, format!("{}{colon}{}", key.service, key.port_name))
        });
        Ok(Self { services: services.collect() })
    }

    /// Returns the ids of every port of a Service.
    fn ids_of(&self, service: &str) -> Vec<ServiceId> {
        let ports = self.services.iter().filter(|(_, name)| {
            name.strip_prefix(service).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        });
        ports.map(|(id, _)| *id).collect()
    }
}

fn open(pins: &PinDir, map: &str) -> Result<MapData, OpenError> {
    let path = pins.map(map);
    MapData::from_pin(&path).map_err(|source| OpenError::Pin { path, source })
}

fn view(event: &Event, names: &Names, clock: Clock) -> EventView {
    let at_socket = event.place == place::SOCKET;
    let source = address(event.source, event.source_port);
    let destination = address(event.destination, event.destination_port);
    let new_source = address(event.new_source, event.new_source_port);
    let new_destination = address(event.new_destination, event.new_destination_port);
    let nowhere = event.new_destination == Addr::ZERO;
    EventView {
        time: clock.wall(event.time),
        at: if at_socket {
            "socket".to_owned()
        } else {
            device_name(event.ifindex).unwrap_or_else(|| event.ifindex.to_string())
        },
        direction: match event.place {
            place::INGRESS => Some("in"),
            place::EGRESS => Some("out"),
            _ => None,
        },
        protocol: proto::name(event.proto),
        source: (!at_socket).then_some(source),
        destination,
        new_source: (!at_socket && new_source != source).then_some(new_source),
        new_destination: (!nowhere && new_destination != destination).then_some(new_destination),
        service: names.services.get(&event.service).cloned(),
        what: match event.what {
            PACKET => "packet",
            what => Counter::ALL.get(usize::from(what)).map_or("?", |counter| counter.name()),
        },
    }
}

fn address(addr: Addr, port: Be16) -> SocketAddr {
    SocketAddr::new(addr.to_ip(), port.get())
}

fn write_way(
    f: &mut std::fmt::Formatter<'_>,
    source: Option<SocketAddr>,
    to: SocketAddr,
) -> std::fmt::Result {
    match source {
        Some(source) => write!(f, "{source} -> {to}"),
        None => write!(f, "-> {to}"),
    }
}

impl std::fmt::Display for EventView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { time, at, protocol, destination, what, .. } = self;
        write!(f, "{time:.6} {what:<22} {at} {} {protocol} ", self.direction.unwrap_or("-"))?;
        write_way(f, self.source, *destination)?;
        if self.new_source.is_some() || self.new_destination.is_some() {
            f.write_str(" becomes ")?;
            write_way(f, self.new_source.or(self.source), self.new_destination.unwrap_or(*destination))?;
        }
        write!(f, "  {}", self.service.as_deref().unwrap_or("-"))
    }
}
