use proxy_common::abi::BackendId;
use serde_json::{Value, json};

use super::*;
use crate::reconcile::cluster::Cluster;
use crate::reconcile::desired::{Context, desired_service};
use crate::sources::convert::Converter;
use crate::sources::objects;

/// A cluster and its telemetry, with nothing in between.
struct World {
    cluster: Cluster,
    metrics: Arc<Metrics>,
    telemetry: Telemetry,
}

impl World {
    fn new() -> Self {
        let metrics = Arc::new(Metrics::new(Readers::default()));
        let telemetry = Telemetry::new(Arc::clone(&metrics), Family::ALL.to_vec());
        Self { cluster: Cluster::default(), metrics, telemetry }
    }

    fn take(&mut self, change: Change) -> Scope {
        let arrival = Arrival::of(&change);
        let scope = self.cluster.apply(change);
        self.telemetry.arrived(arrival, scope, false);
        scope
    }

    /// Runs a sync that writes nothing.
    fn sync(&mut self, ok: bool) {
        self.telemetry.sync_begins(false);
        for key in self.cluster.take_dirty() {
            let desired = self
                .cluster
                .service(&key)
                .map(|service| desired_service(service, self.cluster.slices(&key), &Context::default()));
            self.telemetry.desired(&key, desired.as_ref());
        }
        self.telemetry.sync_ended(ok);
    }

    /// Returns the value of a sample; 0 if there is none.
    fn sample(&self, name: &str) -> f64 {
        let text = self.metrics.text();
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or_default()
    }

    fn no_local(&self, policy: &str, family: &str) -> f64 {
        self.sample(&format!(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{{traffic_policy=\"{policy}\",ip_family=\"{family}\"}}"
        ))
    }
}

fn service(name: &str, spec: &Value) -> Change {
    annotated(name, spec, &Value::Null)
}

fn annotated(name: &str, spec: &Value, annotations: &Value) -> Change {
    let mut object = json!({
        "metadata": {"namespace": "a", "name": name, "annotations": annotations},
        "spec": {
            "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ipFamilies": ["IPv4"],
            "ports": [{"name": "web", "port": 80}],
        },
    });
    for (field, value) in spec.as_object().unwrap() {
        object["spec"][field] = value.clone();
    }
    let object: objects::Service = serde_json::from_value(object).unwrap();
    Change::Service(Converter::new("n1").service(&object).unwrap().unwrap())
}

/// Returns a slice of `service` with one endpoint on `node`.
fn slice(service: &str, node: &str, trigger_time: Option<&str>) -> Change {
    let object = json!({
        "metadata": {
            "namespace": "a", "name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service},
            "annotations": trigger_time.map(|time| json!({"endpoints.kubernetes.io/last-change-trigger-time": time})),
        },
        "addressType": "IPv4", "ports": [{"name": "web", "port": 8080}],
        "endpoints": [{"addresses": ["10.64.1.11"], "nodeName": node}],
    });
    let object: objects::EndpointSlice = serde_json::from_value(object).unwrap();
    Change::Slice(Converter::new("n1").slice(&object).unwrap().unwrap())
}

#[test]
fn p217_local_policies_whose_endpoints_are_elsewhere() {
    let mut world = World::new();
    let local = json!({"internalTrafficPolicy": "Local"});
    world.take(service("s", &local));
    world.take(slice("s", "n2", None));
    world.take(service("t", &local));
    world.sync(true);
    assert_eq!(world.no_local("internal", "IPv4"), 1.0);
    assert_eq!(world.no_local("external", "IPv4"), 0.0);
    assert_eq!(world.no_local("internal", "IPv6"), 0.0);

    // Traffic from outside has a policy of its own, if there is any such traffic.
    world.take(service(
        "u",
        &json!({"externalTrafficPolicy": "Local", "type": "NodePort", "ports": [
        {"name": "web", "port": 80, "nodePort": 31080}, {"name": "adm", "port": 81, "nodePort": 31081}]}),
    ));
    world.take(slice("u", "n2", None));
    world.sync(true);
    assert_eq!((world.no_local("internal", "IPv4"), world.no_local("external", "IPv4")), (1.0, 1.0));
    world.take(service("u", &json!({"externalTrafficPolicy": "Local"})));
    world.take(slice("s", "n1", None));
    world.sync(true);
    assert_eq!((world.no_local("internal", "IPv4"), world.no_local("external", "IPv4")), (0.0, 0.0));
    world.take(slice("s", "n2", None));
    world.sync(true);
    assert_eq!(world.no_local("internal", "IPv4"), 1.0);
    world.take(Change::ServiceGone(ObjectKey::new("a", "s")));
    world.sync(true);
    assert_eq!(world.no_local("internal", "IPv4"), 0.0);
}

#[test]
fn p214_a_service_that_comes_and_goes_between_two_syncs() {
    let mut world = World::new();
    assert_eq!(world.take(service("s", &json!({}))), Scope::Service);
    assert_eq!(world.take(Change::ServiceGone(ObjectKey::new("a", "s"))), Scope::Service);
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_service_changes_pending"), 2.0);
    let dirty = world.cluster.take_dirty();
    let wanted =
        dirty.into_iter().map(|key| (key.clone(), world.cluster.service(&key).map(|_| unreachable!())));
    let capacity = crate::reconcile::store::Capacity {
        frontends: 8,
        services: 8,
        slots: 8,
        backends: 8,
        source_ranges: 8,
    };
    let mut model = crate::reconcile::model::Model::new(capacity);
    let plan = crate::reconcile::plan::plan(&mut model, &wanted.collect(), false);
    assert_eq!(plan.ops, []);
}

#[test]
fn p215_p216_what_changes_nothing_asks_for_no_sync() {
    let mut world = World::new();
    let time = Some("2026-01-01T00:00:00Z");
    world.take(service("s", &json!({})));
    world.take(slice("s", "n1", time));
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_endpoint_changes_pending"), 1.0);
    world.sync(true);
    let queued = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"}";
    let before = world.sample(queued);
    assert!(before > 0.0);

    // Annotations of a Service are not kept.
    assert_eq!(world.take(annotated("s", &json!({}), &json!({"note": "read by people"}))), Scope::Nothing);
    assert_eq!(world.take(slice("s", "n1", time)), Scope::Nothing);
    assert_eq!(world.sample(queued), before);
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_service_changes_total"), 2.0);
    world.sync(true);
    assert_eq!(world.sample("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}"), 1.0);
}

#[test]
fn p218_p219_changes_that_carry_a_time() {
    let mut world = World::new();
    let count = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
    let sum = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"}";
    let since = k8s_openapi::jiff::Timestamp::now() - Duration::from_secs(2);
    world.take(slice("s", "n1", Some(&since.to_string())));
    // The change does not count before it is programmed.
    world.sync(false);
    assert_eq!(world.sample(count), 0.0);
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_endpoint_changes_pending"), 1.0);
    world.sync(true);
    assert_eq!(world.sample(count), 1.0);
    assert!((2.0..10.0).contains(&world.sample(sum)), "{}", world.sample(sum));
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_endpoint_changes_pending"), 0.0);

    world.take(slice("s", "n2", None));
    world.take(Change::SliceGone(ObjectKey::new("a", "s-1")));
    world.sync(true);
    assert_eq!(world.sample(count), 1.0);
    assert_eq!(world.sample("kubeproxy_sync_proxy_rules_endpoint_changes_total"), 3.0);
}

fn slow(_: &[Op]) -> Result<(), ()> {
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}

/// Returns the number of times that a stage was measured, and their sum.
fn stage(world: &World, stage: &str) -> [f64; 2] {
    ["count", "sum"]
        .map(|part| world.sample(&format!("vipr_programming_duration_seconds_{part}{{stage=\"{stage}\"}}")))
}

#[test]
fn stages_and_operations_of_a_sync() {
    let mut world = World::new();
    world.take(service("s", &json!({})));
    let began = Instant::now();
    world.telemetry.sync_begins(true);
    let ops = [Op::NodeFlags(1), Op::NodeFlags(0), Op::Slots(1, vec![BackendId(1)])];
    world.telemetry.writing(&ops, slow).unwrap();
    world.telemetry.sync_ended(true);
    let took = began.elapsed().as_secs_f64();
    let [[waits, _], [plans, plan], [writes, write]] =
        ["wait", "plan", "write"].map(|name| stage(&world, name));
    assert_eq!((waits, plans, writes), (1.0, 1.0, 1.0));
    assert!(write >= 0.02 && plan + write <= took, "{plan} {write} {took}");
    assert_eq!(world.sample("vipr_map_operations_total{map=\"NODE\"}"), 2.0);
    assert_eq!(world.sample("vipr_map_operations_total{map=\"SLOTS\"}"), 1.0);
    // No change waited for the next sync.
    world.sync(true);
    assert_eq!(stage(&world, "wait")[0], 1.0);
    assert_eq!(
        world.sample("kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}"),
        1.0
    );
}
