//! The metrics server, and the two text formats that it speaks.
//!
//! A client that asks for OpenMetrics (`Accept: application/openmetrics-text`) gets that format
//! (<https://prometheus.io/docs/specs/om/open_metrics_spec/>). Every other client gets the older Prometheus format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>). The formats differ in the description of a metric,
//! not in its samples.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, VARY};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};

use super::Metrics;
use crate::config::kube_proxy::KubeProxyConfiguration;
use crate::config::{EXTERNAL_IPS_GATE, Gate, allows_external_ips};

/// Content-Type of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Content-Type of the older format.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns the router of `/metrics` and of what kube-proxy serves beside it: `/metrics/slis`, `/healthz`, `/proxyMode`
/// and `/configz`, which shows the configuration with all defaults.
pub(crate) fn router(metrics: Arc<Metrics>, configuration: &KubeProxyConfiguration) -> Router {
    let Gate { name, stage } = EXTERNAL_IPS_GATE;
    metrics.feature(name, stage, allows_external_ips(configuration));
    let (readings, slis) = (Readings::default(), Readings::default());
    let configz = Json(serde_json::json!({ "kubeproxy.config.k8s.io": configuration }));
    Router::new()
        .route("/metrics", get(|state, headers| scrape(state, headers, readings, Metrics::text)))
        .route("/metrics/slis", get(|state, headers| scrape(state, headers, slis, Metrics::slis)))
        .route("/healthz", get(ping))
        .route("/proxyMode", get(|| async { "ebpf" }))
        .route("/configz", get(|| async { configz }))
        .with_state(metrics)
}

async fn ping(State(metrics): State<Arc<Metrics>>) -> &'static str {
    metrics.pinged();
    "ok"
}

async fn scrape(
    State(metrics): State<Arc<Metrics>>,
    headers: HeaderMap,
    readings: Readings,
    what: fn(&Metrics) -> String,
) -> impl IntoResponse {
    let accepted: Vec<&str> =
        headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    // The reading has a task of its own: if the client leaves in between, the next one does not make it begin anew.
    let reading = tokio::spawn(async move { readings.text(move || what(&metrics)).await });
    let text = reading.await.unwrap_or_default();
    let (content_type, body) = if prefers_open_metrics(&accepted.join(",")) {
        (OPEN_METRICS, text.to_string())
    } else {
        (PROMETHEUS, prometheus(&text))
    };
    ([(CONTENT_TYPE, content_type), (VARY, "Accept")], body)
}

/// Readings for clients. A reading looks at every map, and some servers are open to many. A client that asks while
/// another one waits gets the same answer, and readings take half of one CPU at most. Cheap to clone.
#[derive(Clone, Debug, Default)]
struct Readings(Arc<tokio::sync::Mutex<Option<Reading>>>);

/// The last reading.
#[derive(Debug)]
struct Reading {
    began: Instant,
    ended: Instant,
    text: Arc<str>,
}

impl Readings {
    /// Returns the result of `read`, or that of another client's reading that began after this call.
    async fn text(&self, read: impl FnOnce() -> String + Send + 'static) -> Arc<str> {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        if let Some(last) = &*last {
            if last.began >= asked {
                return Arc::clone(&last.text);
            }
            let rest = last.ended - last.began;
            tokio::time::sleep_until((last.ended + rest).into()).await;
        }
        let began = Instant::now();
        // The reading blocks, so it runs beside the other servers of this thread.
        let text: Arc<str> = tokio::task::spawn_blocking(read).await.unwrap_or_default().into();
        *last = Some(Reading { began, ended: Instant::now(), text: Arc::clone(&text) });
        text
    }
}

/// Returns whether a client with this `Accept` header wants OpenMetrics 1.0 at least as much as plain text.
fn prefers_open_metrics(accept: &str) -> bool {
    let (mut open_metrics, mut plain) = (0.0, 0.0);
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let parameters = parts.filter_map(|parameter| parameter.split_once('='));
        let parameter = |name: &str| {
            parameters
                .clone()
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim_matches('"'))
        };
        let weight = parameter("q").map_or(Some(1.0), |q| q.parse::<f64>().ok()).unwrap_or(0.0);
        let is_known_version = parameter("version").is_none_or(|version| version == "1.0.0");
        if media_type.eq_ignore_ascii_case("application/openmetrics-text") && is_known_version {
            open_metrics = weight.max(open_metrics);
        } else if media_type.eq_ignore_ascii_case("text/plain") {
            plain = weight.max(plain);
        }
    }
    open_metrics > 0.0 && open_metrics >= plain
}

/// Converts OpenMetrics text into the older format. There a counter is described by the name of its samples, an info is
/// a gauge, and neither units nor an end are marked.
fn prometheus(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let mut help = "";
    for line in open_metrics.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.split_once(' ').map_or("", |(_name, text)| text);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|text| text.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                other => ("", other),
            };
            out += &format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            out += line;
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::task::JoinHandle;

    use super::*;

    /// Asks for a reading, which takes a while and counts the readings before it.
    fn ask(readings: &Readings, count: &Arc<AtomicUsize>) -> JoinHandle<usize> {
        let (readings, count) = (readings.clone(), Arc::clone(count));
        tokio::spawn(async move {
            let reading = readings.text(move || {
                std::thread::sleep(Duration::from_millis(20));
                count.fetch_add(1, Ordering::Relaxed).to_string()
            });
            reading.await.parse().unwrap()
        })
    }

    #[tokio::test]
    async fn a_crowd_is_answered_by_few_readings_none_older_than_its_question() {
        let readings = Readings::default();
        let count = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 {
            let before = count.load(Ordering::Relaxed);
            for answer in (0..100).map(|_| ask(&readings, &count)).collect::<Vec<_>>() {
                assert!(answer.await.unwrap() >= before);
            }
            assert!(count.load(Ordering::Relaxed) <= before + 2);
        }
    }

    #[test]
    fn formats_by_accept() {
        for (accept, want) in [
            ("", false),
            ("*/*", false),
            ("text/plain", false),
            ("text/html,application/xhtml+xml,*/*;q=0.8", false),
            ("application/openmetrics-text", true),
            ("application/openmetrics-text; version=1.0.0; charset=utf-8", true),
            ("Application/OpenMetrics-Text;version=\"1.0.0\"", true),
            ("application/openmetrics-text;version=0.0.1", false),
            ("application/openmetrics-text;q=0", false),
            ("application/openmetrics-text;q=nonsense", false),
            ("application/openmetrics-text;q=0.4, text/plain;q=0.5", false),
            // Headers of Prometheus 2 and 3.
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                true,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                 application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                true,
            ),
        ] {
            assert_eq!(prefers_open_metrics(accept), want, "{accept}");
        }
    }

    #[test]
    fn descriptions_of_the_older_format() {
        let given = "# HELP a Some.\n# TYPE a counter\n# UNIT a seconds\na_total{x=\"# TYPE\"} 1\n# HELP b Other.\n\
                     # TYPE b info\nb_info{v=\"1\"} 1\n# HELP c_total Gauge.\n# TYPE c_total gauge\nc_total 2\n\
                     # HELP d Hist.\n# TYPE d histogram\nd_sum 0.5\nd_bucket{le=\"+Inf\"} 1\n# EOF\n";
        let want = "# HELP a_total Some.\n# TYPE a_total counter\na_total{x=\"# TYPE\"} 1\n# HELP b_info Other.\n\
                    # TYPE b_info gauge\nb_info{v=\"1\"} 1\n# HELP c_total Gauge.\n# TYPE c_total gauge\nc_total 2\n\
                    # HELP d Hist.\n# TYPE d histogram\nd_sum 0.5\nd_bucket{le=\"+Inf\"} 1\n";
        assert_eq!(prometheus(given), want);
    }
}
