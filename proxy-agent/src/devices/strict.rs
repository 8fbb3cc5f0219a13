//! Devices whose `rp_filter` drops requests of clients to pods, because rules let the replies of these pods leave by
//! another device. (A packet that has passed the filter is answered by the device that it came in by.)

use std::collections::BTreeMap;
use std::fs;

use proxy_common::abi::IfIndex;
use proxy_common::datapath::edge::Role;

use super::choice::Choices;
use super::snapshot::Snapshot;

/// Value of `rp_filter` with which a packet has to come by the device that leads back to its source (RFC 3704 §2.2).
const STRICT: u32 = 1;

/// Returns the problems to report, by device.
pub(super) fn problems(snapshot: &Snapshot, choices: &Choices) -> BTreeMap<String, String> {
    let by_rules = routed_elsewhere(snapshot, choices);
    by_rules
        .into_iter()
        .filter(|(name, _)| is_strict(name))
        .map(|(name, by)| (name.to_owned(), problem(name, by)))
        .collect()
}

fn problem(name: &str, by: &str) -> String {
    format!(
        "`rp_filter` is strict (1), and rules route what some sources send by {by}: what clients send to pods among these \
        by {name} is dropped by the kernel, before any Service proxy can help. Loosen it: \
        `sysctl -w net/ipv4/conf/{name}/rp_filter=2`"
    )
}

/// Returns external devices whose replies are in part routed by another external device, by rules; with the name of
/// that device.
fn routed_elsewhere<'a>(snapshot: &'a Snapshot, choices: &'a Choices) -> BTreeMap<&'a str, &'a str> {
    let external = || choices.iter().filter(|(_, choice)| choice.role == Role::External);
    let leads = |table: u32, device: IfIndex| {
        snapshot.routes_of(device).any(|route| route.table == table && route.destination.matches_all())
    };
    let mut found = BTreeMap::new();
    for &table in &snapshot.tables_by_source {
        for (&device, choice) in external().filter(|&(&device, _)| !leads(table, device)) {
            if let Some((_, other)) = external().find(|&(&other, _)| other != device && leads(table, other)) {
                found.entry(choice.name.as_str()).or_insert(other.name.as_str());
            }
        }
    }
    found
}

/// Returns whether the kernel filters strictly on a device: the larger one of its own value and that of all devices
/// counts.
fn is_strict(name: &str) -> bool {
    let values = ["all", name].map(|of| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{of}/rp_filter"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    });
    values.into_iter().max() == Some(STRICT)
}
