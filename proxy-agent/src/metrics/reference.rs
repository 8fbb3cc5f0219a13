//! `docs/metrics.md`: its tables come from what a scrape prints.
//!
//! `VIPR_UPDATE_DOCS=1 cargo test -p proxy-agent --lib metrics_md` writes them anew; without the variable the test says
//! whether the file is current.

use std::collections::{BTreeMap, BTreeSet};

use super::labels::Stage;
use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
const BEGIN: &str = "<!-- generated from here -->";
const END: &str = "<!-- to here -->";

/// Metrics in which everything has been counted once.
fn example() -> Metrics {
    use proxy_common::abi::Counter;
    let map = |map| MapUsage { map, entries: Some(1), capacity: 2 };
    let metrics = Metrics::new(Readers {
        verdicts: Box::new(|| Ok(Counter::ALL.map(|counter| (counter.name(), 1)).to_vec())),
        maps: Box::new(move || Ok(vec![map("NAME")])),
    });
    for full in [true, false] {
        let sync = SyncResult { full, ok: true, took: Duration::ZERO };
        metrics.synced(&Family::ALL, sync);
    }
    for stage in Stage::ALL {
        metrics.stage(stage, Duration::ZERO);
    }
    for family in Family::ALL {
        metrics.sync_queued(family);
        metrics.network_programmed(family, Duration::ZERO);
        for policy in PolicyKind::ALL {
            metrics.no_local_endpoints(policy, family, 0);
        }
    }
    metrics.drifted(["NAME"].into_iter());
    metrics.map_operations(&BTreeMap::from([("NAME", 1)]));
    metrics.swept(&Family::ALL, Duration::ZERO, &Report::default());
    metrics.feature("NAME", "STAGE", true);
    requests::count("HOST", "GET", None, Duration::ZERO);
    metrics.pinged();
    for probe in [Probe::Healthz, Probe::Livez, Probe::Readyz] {
        [200, 503].into_iter().for_each(|code| metrics.probed(probe, code));
    }
    metrics
}

/// A metric as its samples show it.
#[derive(Debug, Default)]
struct Described {
    kind: String,
    help: String,
    /// Values by label.
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// By the names that samples of counters and infos have.
fn described(text: &str) -> BTreeMap<String, Described> {
    let mut all: BTreeMap<String, Described> = BTreeMap::new();
    let (mut name, mut help) = (String::new(), String::new());
    for line in text.lines() {
        if let Some((_, text)) = line.strip_prefix("# HELP ").and_then(|text| text.split_once(' ')) {
            text.clone_into(&mut help);
        } else if let Some((family, kind)) =
            line.strip_prefix("# TYPE ").and_then(|text| text.split_once(' '))
        {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            name = format!("{family}{suffix}");
            all.insert(
                name.clone(),
                Described { kind: kind.to_owned(), help: help.clone(), ..Described::default() },
            );
        } else if let Some((sample, rest)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            assert!(sample.starts_with(&name), "{line} belongs to {name}");
            let labels = rest.rsplit_once('}').unwrap().0;
            let of_metric = &mut all.get_mut(&name).unwrap().labels;
            for (label, value) in labels.split(',').filter_map(|label| label.split_once('=')) {
                if label != "le" {
                    of_metric.entry(label.to_owned()).or_default().insert(value.trim_matches('"').to_owned());
                }
            }
        }
    }
    all
}

/// One table for each prefix.
fn tables() -> String {
    let example = example();
    let (all, slis) = (described(&example.text()), described(&example.slis()));
    let mut out = String::new();
    for (title, prefixes, all) in [
        ("kube-proxy's names", &["kubeproxy_"][..], &all),
        ("Vipr's own", &["vipr_"], &all),
        ("Of every component", &["kubernetes_", "process_", "rest_client_"], &all),
        ("Of every component, at /metrics/slis", &["kubernetes_"], &slis),
    ] {
        out += &format!("\n## {title}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n");
        for (name, metric) in
            all.iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        {
            let labels: Vec<String> =
                metric.labels.iter().map(|(label, values)| shown(label, values)).collect();
            let labels = if labels.is_empty() { "–".to_owned() } else { labels.join("; ") };
            out += &format!("| `{name}` | {} | {labels} | {} |\n", metric.kind, metric.help);
        }
    }
    out + "\n"
}

/// A label, with its values where they are few and the same everywhere.
fn shown(label: &str, values: &BTreeSet<String>) -> String {
    let named: Vec<&str> = values.iter().map(String::as_str).collect();
    match label {
        "host" | "method" | "verb" => format!("`{label}`"),
        _ if [["<error>"], ["NAME"], ["STAGE"]].iter().any(|made_up| named == made_up) => {
            format!("`{label}`")
        }
        "map" | "version" | "git_version" | "major" | "minor" => format!("`{label}`"),
        "verdict" => format!("`{label}` ([below](#verdicts))"),
        _ => format!("`{label}`: {}", named.join(", ")),
    }
}

#[test]
fn metrics_md_is_current() {
    let before = std::fs::read_to_string(FILE).unwrap();
    let (head, rest) = before.split_once(BEGIN).expect("where the tables begin");
    let (_, tail) = rest.split_once(END).expect("where the tables end");
    let after = format!("{head}{BEGIN}\n{}{END}{tail}", tables());
    if std::env::var_os("VIPR_UPDATE_DOCS").is_some() {
        std::fs::write(FILE, &after).unwrap();
    } else {
        assert!(
            before == after,
            "docs/metrics.md is not current: VIPR_UPDATE_DOCS=1 cargo test -p proxy-agent --lib metrics_md"
        );
    }
}

#[test]
fn metrics_md_tells_every_verdict() {
    let text = std::fs::read_to_string(FILE).unwrap();
    let rows: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    for counter in proxy_common::abi::Counter::ALL {
        assert!(rows.contains(&counter.name()), "{}", counter.name());
    }
}

/// What both text formats need.
#[test]
fn metrics_md_has_names_and_sentences_of_the_right_form() {
    let text = example().text();
    for (name, metric) in described(&text) {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(name.chars().all(legal), "{name}");
        assert!(metric.help.ends_with('.') && !metric.help.ends_with(".."), "{name}: {}", metric.help);
        // Each would need an escape.
        assert!(!metric.help.contains(['"', '\\', '|']), "{name}: {}", metric.help);
        if metric.kind == "histogram" {
            assert!(
                text.contains(&format!("\n{name}_bucket{{le=\"+Inf\","))
                    && text.contains(&format!("\n{name}_sum{{"))
            );
        }
    }
}
