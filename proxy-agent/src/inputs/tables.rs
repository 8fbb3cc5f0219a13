//! Output of the commands for people and for programs, with names of any content.

use proxy_common::abi::maps;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::commands::explain::explanation;
use crate::commands::explain::explanation::{Explanation, Owner};
use crate::commands::explain::pod::PodView;
use crate::commands::explain::print::words;
use crate::commands::flows::{FlowView, print_flows};
use crate::commands::inspect::{
    BackendView, FrontendView, ServiceView, StatusView, TrafficView, print_backends, print_services,
    print_status,
};
use crate::commands::table::{CELL_MAX, write_table};
use crate::commands::verify::Findings;
use crate::config::args::Output;
use crate::observe::report::State;
use crate::reconcile::drift::Difference;

use super::printed::{lines, printed};

/// Rows of one table.
const ROWS: usize = 8;

/// Uses `data` as the names and sentences that the commands print, each after a byte of 255, and as numbers among them.
///
/// # Panics
/// If a cell contains a line break or is too long for a terminal, or if printed data is read as other data.
pub fn tables(data: &[u8]) {
    table(&mut Words::new(data));
    let words = &mut Words::new(data);
    let services: Vec<ServiceView> = words.some(service);
    printed(|output, out| print_services(&services, output, out));
    let backends: Vec<BackendView> = words.some(backend);
    printed(|output, out| print_backends(&backends, output, out));
    let flows: Vec<FlowView> = words.some(flow);
    printed(|output, out| print_flows(&flows, output, out));
    let status = status(words);
    printed(|output, out| print_status(&status, output, out));
    let findings = findings(words);
    printed(|output, out| findings.print(output, out));
    explained(&explanation(words));
}

/// Checks that every row is one line, and that for a terminal every cell but the last has its width.
fn table(text: &mut Words<'_>) {
    let rows: Vec<[String; 4]> = (0..ROWS)
        .map(|_| [text.text(), text.text(), text.text(), text.text()])
        .take_while(|row| row.iter().any(|cell| !cell.is_empty()))
        .collect();
    for cut in [false, true] {
        let mut out = Vec::new();
        write_table(["ONE", "TWO", "THREE", "FOUR"], rows.iter().cloned(), cut, &mut out)
            .expect("memory takes everything");
        let out = String::from_utf8(out).expect("it is text");
        let shown = lines(&out);
        assert_eq!(shown.len(), rows.len() + 1, "{out:?}");
        // The last column, unless it is empty, begins at the same position in every row.
        let widths = 3 * (CELL_MAX + 2);
        for (line, row) in shown.iter().skip(1).zip(&rows).filter(|_| cut) {
            let last = row.last().map_or(0, |cell| cell.chars().map(|c| c.escape_debug().len()).sum());
            assert!(line.chars().count() <= widths + last, "{line:?}");
        }
    }
}

/// Does the same as [`printed`] for an explanation, which is not a list.
fn explained(explanation: &Explanation) {
    printed(|output, out| match output {
        Output::Table => words(explanation, out),
        Output::Json => serde_json::to_writer(out, explanation).map_err(io::Error::from),
        Output::Yaml => serde_saphyr::to_io_writer(out, explanation).map_err(io::Error::other),
    });
}

fn service(words: &mut Words<'_>) -> ServiceView {
    ServiceView {
        namespace: words.text(),
        name: words.text(),
        port: words.text(),
        protocol: "TCP",
        family: words.text(),
        id: words.number(),
        frontends: words.some(frontend),
        cluster: words.some(Words::address),
        local: words.some(Words::address),
        affinity_seconds: words.number(),
        source_ranges: words.some(Words::text),
        traffic: TrafficView {
            connections: words.large(),
            request_packets: u64::from(words.number()),
            request_bytes: u64::from(words.number()),
            ..TrafficView::default()
        },
    }
}

fn frontend(words: &mut Words<'_>) -> FrontendView {
    FrontendView { name: words.text(), flags: words.some(|_| "external") }
}

fn backend(words: &mut Words<'_>) -> BackendView {
    BackendView {
        id: words.number(),
        service: words.text(),
        port: words.text(),
        protocol: "UDP",
        endpoint: words.address(),
        flags: words.some(|_| "serving"),
        generation: words.number(),
    }
}

fn flow(words: &mut Words<'_>) -> FlowView {
    FlowView {
        service: words.maybe(Words::text),
        port: words.text(),
        protocol: "SCTP",
        client: words.address(),
        vip: words.address(),
        backend: words.address(),
        source: words.maybe(Words::address),
        outside: words.flag(),
        state: "new",
        assured: words.flag(),
        idle_seconds: f64::from(words.number()) / 1e9,
    }
}

/// Makes a status file of an agent, after a conversion to JSON and back.
fn status(words: &mut Words<'_>) -> StatusView {
    let state = State {
        version: words.text(),
        node: words.text(),
        node_ips: words.some(Words::text),
        source: words.text(),
        cgroup: words.text(),
        cgroup_below_root: words.maybe(Words::large),
        verified_instructions: words.map(Words::number),
        opted_out: words.some(Words::text),
        problems: words.map(|words| words.some(Words::text)),
        ..State::default()
    };
    let text = serde_json::to_string(&state).expect("it can be written");
    StatusView {
        abi_version: words.number(),
        agent_running: words.flag(),
        programs: BTreeMap::from([("connect4", words.flag()), ("edge_ingress", words.flag())]),
        maps: BTreeMap::from([(maps::SERVICES, (words.large(), words.large()))]),
        counters: BTreeMap::from([("drop_full", words.large())]),
        host_netns: words.large(),
        pods_in_packets: words.flag(),
        host_in_packets: words.flag(),
        refusals: words.maybe(|_| "EPERM"),
        agent: words.maybe(|_| serde_json::from_str(&text).expect("it has been written so")),
    }
}

fn findings(words: &mut Words<'_>) -> Findings {
    let difference =
        |words: &mut Words<'_>| Difference { map: maps::NAMES, object: words.text(), what: words.text() };
    Findings {
        services: 7,
        differences: words.some(difference),
        refused: words.map(|words| words.some(Words::text)),
    }
}

fn explanation(words: &mut Words<'_>) -> Explanation {
    Explanation {
        target: words.address(),
        protocol: "TCP",
        from: words.maybe(|words| words.address().ip()),
        pod: words.maybe(pod),
        client_note: words.maybe(Words::text),
        owner: if words.flag() { Owner::Frontend } else { Owner::Other },
        note: words.maybe(Words::text),
        frontend: words.maybe(frontend),
        service: words.maybe(judged),
        clients: Vec::new(),
    }
}

fn endpoint(words: &mut Words<'_>) -> explanation::BackendView {
    explanation::BackendView {
        endpoint: words.address(),
        in_cluster: words.flag(),
        in_local: words.flag(),
        serving: words.flag(),
        on_this_node: words.flag(),
        reason: words.text(),
    }
}

fn judged(words: &mut Words<'_>) -> explanation::ServiceView {
    explanation::ServiceView {
        namespace: words.text(),
        name: words.text(),
        port: words.text(),
        id: words.number(),
        affinity_seconds: words.number(),
        source_ranges: words.some(Words::text),
        client_in_source_ranges: words.maybe(Words::flag),
        agent_answered: words.flag(),
        backends: words.some(endpoint),
    }
}

fn pod(words: &mut Words<'_>) -> PodView {
    PodView {
        namespace: words.text(),
        name: words.text(),
        node: words.maybe(Words::text),
        host_network: words.flag(),
        opted_out: words.maybe(Words::flag),
    }
}

/// Names and numbers from bytes; empty names and zeros once the bytes are used up.
struct Words<'a>(Box<dyn Iterator<Item = &'a [u8]> + 'a>);

impl<'a> Words<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self(Box::new(data.split(|byte| *byte == 0xff)))
    }

    fn text(&mut self) -> String {
        String::from_utf8_lossy(self.0.next().unwrap_or_default()).into_owned()
    }

    fn large(&mut self) -> u64 {
        let part = self.0.next().unwrap_or_default();
        part.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn number(&mut self) -> u32 {
        // Lower half.
        (self.large() & u64::from(u32::MAX)) as u32
    }

    fn flag(&mut self) -> bool {
        self.large() & 1 == 1
    }

    fn address(&mut self) -> SocketAddr {
        let number = self.large();
        let ip = match number & 1 {
            0 => IpAddr::from(self.number().to_be_bytes()),
            _ => IpAddr::from(Ipv6Addr::from(u128::from(number) << 64 | u128::from(self.large()))),
        };
        SocketAddr::new(ip, (number >> 1 & 0xffff) as u16)
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.flag().then(|| make(self))
    }

    fn some<T>(&mut self, make: impl Fn(&mut Self) -> T) -> Vec<T> {
        let count = self.large() & 3;
        (0..count).map(|_| make(self)).collect()
    }

    fn map<T>(&mut self, make: impl Fn(&mut Self) -> T) -> BTreeMap<String, T> {
        self.some(|words| (words.text(), make(words))).into_iter().collect()
    }
}
