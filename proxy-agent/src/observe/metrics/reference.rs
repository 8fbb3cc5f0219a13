//! Tables of `docs/metrics.md`, made from what a scrape prints.
//!
//! `VIPR_UPDATE_DOCS=1 cargo test -p proxy-agent --lib metrics_md` writes them anew; without the variable the test
//! checks that the file is current.

use std::collections::{BTreeMap, BTreeSet};

use super::labels::Stage;
use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
const BEGIN: &str = "<!-- generated from here -->";
const END: &str = "<!-- to here -->";

/// Returns metrics in which everything has been counted once.
fn example() -> Metrics {
    use proxy_common::abi::Counter;
    let metrics = Metrics::new(Readers {
        verdicts: Box::new(|| Ok(Counter::ALL.map(|counter| (counter.name(), 1)).to_vec())),
        maps: Box::new(|| Ok(vec![MapUsage { map: "NAME", entries: Some(1), capacity: 2 }])),
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
    requests::example("HOST");
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

/// Returns the metrics of a text, by the names that samples of counters and infos have.
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

/// Returns one table for each prefix.
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

/// Returns a label, with its values where they are few and the same everywhere.
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

/// Metrics of kube-proxy 1.36 on Linux, except Go's own, whose names begin with `go_`.
const KUBE_PROXY: [&str; 46] = [
    "disabled_metrics_total",
    "hidden_metrics_total",
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "kubeproxy_network_programming_duration_seconds",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "kubeproxy_sync_full_proxy_rules_duration_seconds",
    "kubeproxy_sync_partial_proxy_rules_duration_seconds",
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_iptables_last",
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
    "kubeproxy_sync_proxy_rules_iptables_total",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "kubernetes_build_info",
    "kubernetes_feature_enabled",
    "kubernetes_healthcheck",
    "kubernetes_healthchecks_total",
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
    "process_virtual_memory_max_bytes",
    "registered_metrics_total",
    "rest_client_exec_plugin_call_total",
    "rest_client_exec_plugin_certificate_rotation_age",
    "rest_client_exec_plugin_ttl_seconds",
    "rest_client_rate_limiter_duration_seconds",
    "rest_client_request_duration_seconds",
    "rest_client_request_retries_total",
    "rest_client_request_size_bytes",
    "rest_client_requests_total",
    "rest_client_response_size_bytes",
];
/// Metrics that the dashboard "Proxy" of kubernetes-mixin (August 2026) asks for.
const DASHBOARD: [&str; 7] = [
    "go_goroutines",
    "kubeproxy_network_programming_duration_seconds",
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "rest_client_request_duration_seconds",
    "rest_client_requests_total",
];

/// Returns the metrics that Vipr does not have according to the file; `*` stands for any end.
fn said_to_be_missing(text: &str) -> BTreeSet<&str> {
    let (_, section) = text.split_once("## What kube-proxy has and Vipr does not").expect("the section");
    let quoted = section.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains('_') && !name.contains([' ', '{', '-', '/'])).collect()
}

fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |prefix| name.starts_with(prefix))
}

#[test]
fn metrics_md_tells_of_each_metric_of_kube_proxy_whether_it_is_there() {
    let file = std::fs::read_to_string(FILE).unwrap();
    let example = example();
    let there = described(&(example.text() + &example.slis()));
    let missing = said_to_be_missing(&file);
    for name in KUBE_PROXY.into_iter().chain(DASHBOARD) {
        let is_missing = missing.iter().any(|pattern| matches(pattern, name));
        assert_ne!(there.contains_key(name), is_missing, "{name}");
    }
    for pattern in missing {
        assert!(!there.keys().any(|name| matches(pattern, name)), "{pattern} is there");
        assert!(KUBE_PROXY.iter().chain(&DASHBOARD).any(|name| matches(pattern, name)), "{pattern}: unknown");
    }
}

/// kubernetes-mixin's alert KubeVersionMismatch counts the versions among all series of this name, of every job except
/// the cluster's DNS. Vipr's version is not one of Kubernetes.
#[test]
fn no_version_of_kubernetes_is_claimed() {
    assert!(!example().text().contains("kubernetes_build"));
}

/// Checks the requirements of both text formats.
#[test]
fn metrics_md_has_names_and_sentences_of_the_right_form() {
    let text = example().text();
    for (name, metric) in described(&text) {
        assert!(!name.contains(|c: char| !matches!(c, 'a'..='z' | '0'..='9' | '_')), "{name}");
        assert!(metric.help.ends_with('.') && !metric.help.ends_with(".."), "{name}: {}", metric.help);
        // Each of these characters would need an escape.
        assert!(!metric.help.contains(['"', '\\', '|']), "{name}: {}", metric.help);
        if metric.kind == "histogram" {
            assert!(
                text.contains(&format!("\n{name}_bucket{{le=\"+Inf\","))
                    && text.contains(&format!("\n{name}_sum{{"))
            );
        }
    }
}
