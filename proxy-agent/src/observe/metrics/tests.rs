use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proxy_common::abi::maps;

use super::serve::router;
use super::*;
use crate::config::kube_proxy::KubeProxyConfiguration;
use crate::observe::http::testing::{request, request_with, with_server};

/// Returns the result of a sync of everything.
fn sync(milliseconds: u64, ok: bool) -> SyncResult {
    SyncResult { full: true, ok, took: Duration::from_millis(milliseconds) }
}

/// Returns the samples of `metrics` whose names start with `prefix`, in order.
fn samples(metrics: &Metrics, prefix: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        metrics.text().lines().filter(|line| line.starts_with(prefix)).map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Checks the samples, except the durations, which have too many lines.
fn check(metrics: &Metrics, prefix: &str, want: &[&str]) {
    let mut got = samples(metrics, prefix);
    got.retain(|line| !line.starts_with("vipr_programming_duration_seconds"));
    assert_eq!(got, want, "{prefix}");
}

#[test]
fn names_types_and_labels_are_kube_proxys() {
    let metrics = Metrics::new(Readers::default());
    (0..3).for_each(|_| metrics.endpoint_change());
    (0..5).for_each(|_| metrics.service_change());
    metrics.pending(2, 4);
    metrics.no_local_endpoints(PolicyKind::Internal, Family::V4, 1);
    metrics.no_local_endpoints(PolicyKind::External, Family::V6, 0);
    metrics.probed(Probe::Healthz, 503);
    metrics.probed(Probe::Readyz, 503);
    check(
        &metrics,
        "kubeproxy_",
        &[
            "kubeproxy_proxy_healthz_total{code=\"200\"} 0",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 0",
            "kubeproxy_proxy_livez_total{code=\"503\"} 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 3",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\",ip_family=\"IPv6\"} 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\",ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_pending 4",
            "kubeproxy_sync_proxy_rules_service_changes_total 5",
        ],
    );
    let types = samples(&metrics, "# TYPE");
    for want in [
        "# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge",
        "# TYPE kubeproxy_sync_proxy_rules_endpoint_changes counter",
        "# TYPE kubeproxy_sync_proxy_rules_endpoint_changes_pending gauge",
    ] {
        assert!(types.iter().any(|line| line == want), "{want} in {types:?}");
    }
}

#[test]
fn a_failed_sync_has_a_duration_but_no_timestamp() {
    let metrics = Metrics::new(Readers::default());
    metrics.synced(&[Family::V6], sync(3, false));
    check(&metrics, "kubeproxy_sync_proxy_rules_last_timestamp_seconds", &[]);
    check(
        &metrics,
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        &["kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1"],
    );
    check(&metrics, "vipr_sync_failures", &["vipr_sync_failures_total 1"]);
    let before = now();
    metrics.synced(&[Family::V6], sync(3, true));
    metrics.sync_queued(Family::V4);
    for name in ["last_timestamp", "last_queued_timestamp"] {
        let [line] = &samples(&metrics, &format!("kubeproxy_sync_proxy_rules_{name}_seconds"))[..] else {
            panic!("one sample of {name}");
        };
        let value: f64 = line.split_once(' ').unwrap().1.parse().unwrap();
        assert!((before..=now()).contains(&value), "{line}");
    }
}

#[test]
fn syncs_are_full_or_partial() {
    let metrics = Metrics::new(Readers::default());
    metrics.synced(&Family::ALL, sync(1, true));
    metrics.synced(&Family::ALL, SyncResult { full: false, ..sync(1, true) });
    metrics.synced(&Family::ALL, SyncResult { full: false, ..sync(1, false) });
    for (kind, want) in [("", 3), ("full_", 1), ("partial_", 2)] {
        let name = format!("kubeproxy_sync_{kind}proxy_rules_duration_seconds_count");
        let want = Family::ALL.map(|family| format!("{name}{{ip_family=\"{family}\"}} {want}"));
        check(&metrics, &name, &want.each_ref().map(String::as_str));
    }
}

#[test]
fn sweeps_count_by_family() {
    let metrics = Metrics::new(Readers::default());
    for (led, destroyed, by_family) in [(0, 2, [2, 0]), (1, 1, [1, 1])] {
        let report = Report { led, destroyed, by_family, ..Report::default() };
        metrics.swept(&Family::ALL, Duration::from_millis(1), &report);
    }
    check(
        &metrics,
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
        &[
            "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 3",
            "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 1",
        ],
    );
    check(&metrics, "vipr_sockets_destroyed", &["vipr_sockets_destroyed_total 3"]);
    check(&metrics, "vipr_sockets_led", &["vipr_sockets_led_total 1"]);
    let count = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv6\"}";
    check(&metrics, count, &[&format!("{count} 2")]);
}

/// Returns the value of a metric of this process.
fn of_process(metrics: &Metrics, name: &str) -> f64 {
    let [line] = &samples(metrics, &format!("process_{name} "))[..] else { panic!("one {name}") };
    line.split_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn this_process_is_measured() {
    let metrics = Metrics::new(Readers::default());
    let before = of_process(&metrics, "cpu_seconds_total");
    assert!(before > 0.0);
    let mut work = 0_u64;
    while of_process(&metrics, "cpu_seconds_total") < before + 0.01 {
        work = (0..1000).fold(work, u64::wrapping_add);
    }
    assert!((now() - of_process(&metrics, "start_time_seconds")) < 60.0);
    let (memory, space) =
        (of_process(&metrics, "resident_memory_bytes"), of_process(&metrics, "virtual_memory_bytes"));
    assert!(memory > 1e6 && memory < space, "{memory} {space}");
    let open = of_process(&metrics, "open_fds");
    assert!((3.0..of_process(&metrics, "max_fds")).contains(&open), "{open}");
    let files: Vec<_> = (0..50).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    // Other tests open and close files beside this one.
    assert!(of_process(&metrics, "open_fds") > open + 20.0, "{files:?}");
}

/// Returns the buckets of a histogram of IPv4, as `LIMIT:COUNT`.
fn buckets(metrics: &Metrics, name: &str) -> Vec<String> {
    let text = metrics.text();
    let prefix = format!("kubeproxy_{name}_bucket{{le=\"");
    text.lines()
        .filter_map(|line| line.strip_prefix(&prefix)?.split_once("\",ip_family=\"IPv4\"} "))
        .map(|(le, count)| format!("{le}:{count}"))
        .collect()
}

#[test]
fn buckets_are_kube_proxys() {
    let metrics = Metrics::new(Readers::default());
    metrics.synced(&[Family::V4], sync(2, true));
    metrics.network_programmed(Family::V4, Duration::from_secs(61));
    let sync = buckets(&metrics, "sync_proxy_rules_duration_seconds");
    assert_eq!(sync.len(), 16, "{sync:?}");
    assert_eq!(sync[..3], ["0.001:0", "0.002:1", "0.004:1"]);
    assert_eq!(sync[14..], ["16.384:1", "+Inf:1"]);
    let programming = buckets(&metrics, "network_programming_duration_seconds");
    assert_eq!(programming.len(), 2 + 59 + 12 + 7 + 1, "{programming:?}");
    assert_eq!(programming[..4], ["0.25:0", "0.5:0", "1:0", "2:0"]);
    assert_eq!(programming[60..64], ["59:0", "60:0", "65:1", "70:1"]);
    assert_eq!(
        programming[72..],
        ["115:1", "120:1", "150:1", "180:1", "210:1", "240:1", "270:1", "300:1", "+Inf:1"]
    );
}

#[test]
fn maps_are_read_at_each_scrape() {
    let connected = Arc::new(AtomicU64::new(7));
    let broken = Arc::new(AtomicBool::new(false));
    let readers = Readers {
        verdicts: {
            let (connected, broken) = (Arc::clone(&connected), Arc::clone(&broken));
            Box::new(move || {
                if broken.load(Ordering::Relaxed) {
                    return Err("no such map".into());
                }
                Ok(vec![("connected", connected.load(Ordering::Relaxed)), ("datagram", 0)])
            })
        },
        maps: Box::new(|| {
            Ok(vec![
                MapUsage { map: maps::FRONTENDS, entries: Some(12), capacity: 1024 },
                MapUsage { map: maps::STREAMS, entries: None, capacity: 65536 },
            ])
        }),
    };
    let metrics = Metrics::new(readers);
    metrics.map_operations(&BTreeMap::from([(maps::FRONTENDS, 3)]));
    metrics.map_operations(&BTreeMap::from([(maps::FRONTENDS, 2)]));
    metrics.event(EventFate::Written);
    metrics.flows_collected(3);
    metrics.problems(1);
    let version = env!("CARGO_PKG_VERSION");
    let build = format!("vipr_build_info{{version=\"{version}\"}} 1");
    check(
        &metrics,
        "vipr_",
        &[
            &*build,
            "vipr_events_total{result=\"dropped\"} 0",
            "vipr_events_total{result=\"failed\"} 0",
            "vipr_events_total{result=\"written\"} 1",
            "vipr_flows_collected_total 3",
            "vipr_map_capacity{map=\"FRONTENDS\"} 1024",
            "vipr_map_capacity{map=\"STREAMS\"} 65536",
            "vipr_map_entries{map=\"FRONTENDS\"} 12",
            "vipr_map_operations_total{map=\"FRONTENDS\"} 5",
            "vipr_problems 1",
            "vipr_scrape_errors_total{source=\"maps\"} 0",
            "vipr_scrape_errors_total{source=\"verdicts\"} 0",
            "vipr_sockets_destroyed_total 0",
            "vipr_sockets_led_total 0",
            "vipr_streams_freed_total 0",
            "vipr_sync_failures_total 0",
            "vipr_verdicts_total{verdict=\"connected\"} 7",
            "vipr_verdicts_total{verdict=\"datagram\"} 0",
        ],
    );
    connected.store(8, Ordering::Relaxed);
    assert_eq!(samples(&metrics, "vipr_verdicts_total")[0], "vipr_verdicts_total{verdict=\"connected\"} 8");
    // A map that cannot be read costs its own metrics and is counted; the rest is served.
    broken.store(true, Ordering::Relaxed);
    check(&metrics, "vipr_verdicts_total", &[]);
    assert_eq!(
        samples(&metrics, "vipr_scrape_errors_total")[1],
        "vipr_scrape_errors_total{source=\"verdicts\"} 1"
    );
}

#[test]
fn served_over_http() {
    let metrics = Arc::new(Metrics::new(Readers::default()));
    metrics.synced(&[Family::V4], sync(1, true));
    let configuration = KubeProxyConfiguration::default().with_defaults();
    with_server(router(Arc::clone(&metrics), &configuration), |address| async move {
        for (accept, content_type, ends) in [
            (
                "application/openmetrics-text",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                true,
            ),
            ("text/plain", "text/plain; version=0.0.4; charset=utf-8", false),
        ] {
            let scraped = request_with(address, "GET", "/metrics", &[("Accept", accept)]).await.unwrap();
            assert_eq!(scraped.status, 200);
            assert!(
                scraped.head.contains(&format!("\r\ncontent-type: {content_type}\r\n")),
                "{}",
                scraped.head
            );
            assert_eq!(scraped.body.ends_with("# EOF\n"), ends, "{}", scraped.body);
            let sample = "\nkubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1\n";
            assert!(scraped.body.contains(sample), "{}", scraped.body);
        }
        let scraped = request(address, "GET", "/metrics").await.unwrap();
        assert!(scraped.body.contains("\n# TYPE vipr_problems gauge\n"), "{}", scraped.body);
        assert!(scraped.body.contains("\n# TYPE vipr_sync_failures_total counter\n"), "{}", scraped.body);
        for (path, want) in [("/healthz", "ok"), ("/proxyMode", "ebpf")] {
            let response = request(address, "GET", path).await.unwrap();
            assert_eq!((response.status, &*response.body), (200, want), "{path}");
        }
        let configz = request(address, "GET", "/configz").await.unwrap();
        assert!(configz.head.contains("\r\ncontent-type: application/json\r\n"), "{}", configz.head);
        let shown: serde_json::Value = serde_json::from_str(&configz.body).unwrap();
        let shown: KubeProxyConfiguration =
            serde_json::from_value(shown["kubeproxy.config.k8s.io"].clone()).unwrap();
        assert_eq!(shown, KubeProxyConfiguration::default().with_defaults());
    });
}
