//! The agent's watch of the Kubernetes API, against a server that misbehaves on request: forms of lists, requests to
//! a server that does not answer, and the part of a namespace that is kept.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its steps included")]

mod credentials;
mod lists;
mod pace;
mod tenants;

use std::time::Duration;

use proxy_agent::config::opt_out::{ANNOTATION, Rules};
use proxy_agent::reconcile::cluster::Cluster;
use proxy_agent::reconcile::desired::Budgets;
use proxy_agent::sources::api;
use proxy_agent::sources::api::Server;
use proxy_agent::sources::{Problem, SourceError, Update};
use proxy_tests::apiserver::{ApiServer, Cut, Resource, Streams, Verb};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc::{Receiver, channel, error::TryRecvError};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// Time longer than a few retries.
const SOON: Duration = Duration::from_secs(20);
/// Time in which an unwanted event would have happened.
const A_WHILE: Duration = Duration::from_millis(500);

const WATCHED: [Resource; 4] =
    [Resource::Services, Resource::EndpointSlices, Resource::Nodes, Resource::ServiceCidrs];

/// Returns a server of each kind: one that streams lists, and one that has them in pages only.
fn servers() -> [ApiServer; 2] {
    [Streams::Offered, Streams::Refused].map(|streams| {
        let server = ApiServer::start().unwrap();
        server.offer_streams(streams);
        server
    })
}

/// A source and its messages so far.
struct Watched {
    source: JoinHandle<()>,
    updates: Receiver<Update>,
    cluster: Cluster,
    problems: Vec<Problem>,
    synced: usize,
    messages: usize,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.source.abort();
    }
}

impl Watched {
    async fn start(server: &ApiServer) -> Self {
        let folder = TempDir::new().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig).unwrap();
        Self::of(Server::configured(Some(&kubeconfig), None).unwrap())
    }

    fn of(api: Server) -> Self {
        Self::with_opt_out(api, Rules::default())
    }

    fn with_opt_out(api: Server, opt_out: Rules) -> Self {
        Self::with(api, opt_out, Budgets::default())
    }

    fn with(api: Server, opt_out: Rules, budgets: Budgets) -> Self {
        let (sender, updates) = channel(64);
        let source = tokio::spawn(async move { api::run(api, "n1", &opt_out, budgets, sender).await });
        let (cluster, problems) = Default::default();
        Self { source, updates, cluster, problems, synced: 0, messages: 0 }
    }

    async fn synced(server: &ApiServer) -> Self {
        let mut watched = Self::start(server).await;
        watched.until("synced", |watched| watched.synced == 1).await;
        watched
    }

    fn take(&mut self, update: Update) {
        self.messages += 1;
        match update {
            Update::Synced => self.synced += 1,
            Update::Problems(problems) => self.problems = problems,
            Update::Changes(changes) => {
                assert!(!changes.is_empty());
                for change in changes {
                    self.cluster.apply(change);
                }
            }
        }
    }

    /// Takes messages in until `done` holds.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !done(self) {
            match timeout(deadline - Instant::now(), self.updates.recv()).await {
                Ok(update) => self.take(update.expect("the source has ended")),
                Err(_elapsed) => panic!("not {what}: {:?}, {:?}", self.services(), self.problems),
            }
        }
    }

    async fn until_services(&mut self, want: &[&str]) {
        self.until(&format!("{want:?}"), |watched| watched.services() == want).await;
    }

    /// Takes in the messages of a while.
    async fn settle(&mut self) {
        tokio::time::sleep(A_WHILE).await;
        loop {
            match self.updates.try_recv() {
                Ok(update) => self.take(update),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => panic!("the source has ended"),
            }
        }
    }

    /// Returns `name:port` of each Service.
    fn services(&self) -> Vec<String> {
        let services = self.cluster.services();
        services.map(|service| format!("{}:{}", service.key.name, service.ports[0].port)).collect()
    }

    /// Returns the names of a Service's slices.
    fn slices(&self, service: &str) -> Vec<String> {
        let key = proxy_agent::reconcile::cluster::ObjectKey::new("a", service);
        self.cluster.slices(&key).map(|slice| slice.key.name.to_string()).collect()
    }

    fn service_cidrs(&self) -> Vec<String> {
        self.cluster.service_cidrs().map(|cidr| cidr.to_string()).collect()
    }
}

fn service(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "a", "name": name },
        "spec": { "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{ "port": port }] },
    })
}

fn slice(name: &str, service: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "namespace": "a", "name": name, "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "ports": [{ "name": "", "port": 8080 }],
        "endpoints": [{ "addresses": ["10.64.1.11"], "nodeName": "n1" }],
    })
}

fn node(name: &str, zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": zone } },
    })
}

fn service_cidr(cidr: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" }, "spec": { "cidrs": [cidr] },
    })
}

/// Waits until `done` holds, without blocking: the source runs on this thread, too.
async fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "not {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_for_watches(server: &ApiServer) {
    until("watching", || WATCHED.iter().all(|resource| server.open_watches(*resource) == 1)).await;
}

#[tokio::test]
async fn everything_is_listed_then_watched() {
    let server = ApiServer::start().unwrap();
    let mut other = service("other", 1);
    other["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "other" });
    let mut headless = service("headless", 1);
    headless["spec"]["clusterIP"] = json!("None");
    server.apply_all([service("s", 80), other, headless, slice("s-1", "s")]).unwrap();
    server.apply_all([node("n1", "za"), node("n2", "zb"), service_cidr("10.96.0.0/16")]).unwrap();

    let mut watched = Watched::synced(&server).await;
    assert_eq!(watched.services(), ["s:80"]);
    assert_eq!(watched.service_cidrs(), ["10.96.0.0/16"]);
    assert_eq!(watched.cluster.node().zone.as_deref(), Some("za"));
    let key = proxy_agent::reconcile::cluster::ObjectKey::new("a", "s");
    assert!(watched.cluster.slices(&key).all(|slice| slice.endpoints[0].local));
    assert_eq!(watched.cluster.slices(&key).count(), 1);

    wait_for_watches(&server).await;
    server
        .apply_all([service("s", 81), service("t", 82), node("n1", "zc"), service_cidr("10.97.0.0/16")])
        .unwrap();
    server.delete(&slice("s-1", "s")).unwrap();
    watched.until_services(&["s:81", "t:82"]).await;
    watched.until("zone", |watched| watched.cluster.node().zone.as_deref() == Some("zc")).await;
    watched.until("CIDR", |watched| watched.service_cidrs() == ["10.97.0.0/16"]).await;
    watched.until("slice gone", |watched| watched.cluster.slices(&key).count() == 0).await;
    server.delete(&service("t", 82)).unwrap();
    watched.until_services(&["s:81"]).await;
    // A Service that another proxy takes over is removed; a Service that is given back returns.
    let mut taken = service("s", 81);
    taken["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "" });
    server.apply(taken).unwrap();
    watched.until_services(&[]).await;
    server.apply(service("s", 83)).unwrap();
    watched.until_services(&["s:83"]).await;
    // The deletion of this Node's object changes nothing.
    server.delete(&node("n1", "zc")).unwrap();
    watched.settle().await;
    assert_eq!(watched.cluster.node().zone.as_deref(), Some("zc"));
    assert_eq!((watched.synced, watched.problems.len()), (1, 0));
}

#[tokio::test]
async fn p054_p055_p056_p057_slices_that_are_for_a_proxy() {
    let server = ApiServer::start().unwrap();
    let of_s = slice("s-1", "s");
    let mut names = slice("s-2", "s");
    names["addressType"] = "FQDN".into();
    names["endpoints"] = json!([{ "addresses": ["db.example"] }]);
    let mut nobodys = slice("x-1", "s");
    nobodys["metadata"]["labels"] = json!({});
    // The slices come before the Service.
    server.apply_all([of_s.clone(), names, nobodys]).unwrap();
    let mut watched = Watched::synced(&server).await;
    server.apply(service("s", 80)).unwrap();
    watched.until_services(&["s:80"]).await;
    assert_eq!(watched.slices("s"), ["s-1"]);

    wait_for_watches(&server).await;
    let mut headless = of_s.clone();
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
    server.apply(headless).unwrap();
    watched.until("headless", |watched| watched.slices("s").is_empty()).await;
    server.apply(of_s).unwrap();
    watched.until("for a proxy again", |watched| watched.slices("s") == ["s-1"]).await;
    assert_eq!(watched.problems, []);
}

#[tokio::test]
async fn p210_p211_nothing_is_synced_before_every_list_is_complete() {
    for (resource, server) in
        WATCHED.into_iter().flat_map(|resource| servers().map(|server| (resource, server)))
    {
        server.apply(service("s", 80)).unwrap();
        server.hold_list(resource);
        let mut watched = Watched::start(&server).await;
        watched.settle().await;
        assert_eq!(watched.synced, 0, "{resource}");
        server.release_list(resource);
        watched.until("synced", |watched| watched.synced == 1).await;
        assert_eq!(watched.services(), ["s:80"]);
    }
}

#[tokio::test]
async fn large_lists_come_in_batches() {
    for (server, pages) in servers().into_iter().zip([0, 12]) {
        for i in 0..1200 {
            server.apply(service(&format!("s{i:04}"), 80)).unwrap();
        }
        server.hold_further_pages(Resource::Services);
        let mut watched = Watched::start(&server).await;
        watched.until("beginning", |watched| watched.services().len() == 100).await;
        watched.settle().await;
        assert_eq!((watched.synced, watched.services().len()), (0, 100));
        server.release_list(Resource::Services);
        watched.until("synced", |watched| watched.synced == 1).await;
        assert_eq!(watched.services().len(), 1200);
        assert_eq!(server.count(Verb::List, Resource::Services), pages);
        assert!(watched.messages < 100, "{}", watched.messages);
    }
}

#[tokio::test]
async fn what_a_new_list_lacks_is_gone_but_only_at_its_end() {
    for (by_http, server) in
        [false, true].into_iter().flat_map(|by_http| servers().map(|server| (by_http, server)))
    {
        for i in 0..600 {
            server.apply(service(&format!("s{i:04}"), 80)).unwrap();
        }
        server.expire_watches_by_http(by_http);
        let mut watched = Watched::synced(&server).await;
        wait_for_watches(&server).await;
        // The watches end. While there is no watch, one object is deleted and history is forgotten: 410.
        server.hold_further_pages(Resource::Services);
        server.delete_silently(Resource::Services, "a", "s0000");
        server.apply_silently(service("s0001", 81)).unwrap();
        server.compact();
        server.cut_watches(Cut::Clean);
        watched.until("relisted", |watched| watched.services()[1] == "s0001:81").await;
        watched.settle().await;
        assert_eq!(watched.services()[0], "s0000:80", "gone before the list was complete");
        server.release_list(Resource::Services);
        watched.until("pruned", |watched| watched.services()[0] == "s0001:81").await;
        assert_eq!((watched.services().len(), watched.synced), (599, 1));
        assert_eq!(watched.problems, []);
    }
}

#[tokio::test]
async fn a_failed_list_prunes_nothing() {
    for server in servers() {
        for i in 0..600 {
            server.apply(service(&format!("s{i:04}"), 80)).unwrap();
        }
        let mut watched = Watched::synced(&server).await;
        wait_for_watches(&server).await;
        server.hold_further_pages(Resource::Services);
        server.delete_silently(Resource::Services, "a", "s0599");
        server.compact();
        server.forget_requests();
        server.cut_watches(Cut::Broken);
        // The new list breaks off after its beginning.
        until("a list", || server.lists(Resource::Services) == 1).await;
        watched.settle().await;
        server.fail(None, Some(Resource::Services), 500, 1);
        server.cut_connections();
        watched.until("reported", |watched| !watched.problems.is_empty()).await;
        watched.settle().await;
        assert_eq!(watched.services().len(), 600);
        server.release_list(Resource::Services);
        watched.until("pruned", |watched| watched.services().len() == 599).await;
        watched.until("no problem", |watched| watched.problems.is_empty()).await;
    }
}

#[tokio::test]
async fn broken_watches_lose_nothing() {
    for (cut, server) in [Cut::Clean, Cut::Broken, Cut::WithinNextEvent]
        .into_iter()
        .flat_map(|cut| servers().map(|server| (cut, server)))
    {
        server.apply(service("s", 80)).unwrap();
        let mut watched = Watched::synced(&server).await;
        let lists = server.lists(Resource::Services);
        for port in 81..84 {
            wait_for_watches(&server).await;
            server.cut_watches(cut);
            server.apply(service("s", port)).unwrap();
            watched.until_services(&[&format!("s:{port}")]).await;
            if cut == Cut::WithinNextEvent {
                break;
            }
        }
        assert_eq!(server.lists(Resource::Services), lists, "{cut:?} needs no new list");
    }
}

#[tokio::test]
async fn a_server_that_is_away_costs_nothing() {
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    let mut watched = Watched::synced(&server).await;
    wait_for_watches(&server).await;
    server.go_away();
    watched.settle().await;
    assert_eq!(watched.services(), ["s:80"]);
    server.apply(service("s", 81)).unwrap();
    server.come_back();
    watched.until_services(&["s:81"]).await;
    assert_eq!(watched.synced, 1);
}

#[tokio::test]
async fn a_server_that_is_away_at_the_start_is_waited_for() {
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    server.go_away();
    let mut watched = Watched::start(&server).await;
    let names_the_server =
        |problem: &Problem| problem.object.contains(&server.url()) && problem.reason.contains("onnect");
    watched.until("all reported", |watched| watched.problems.len() == 4).await;
    assert!(watched.problems.iter().all(names_the_server), "{:?}", watched.problems);
    assert_eq!(watched.synced, 0);
    server.come_back();
    watched.until("synced", |watched| watched.synced == 1).await;
    assert_eq!((watched.services(), watched.problems.len()), (vec!["s:80".to_owned()], 0));
}

#[tokio::test]
async fn forbidden_says_which_rule_is_missing() {
    let server = ApiServer::start().unwrap();
    server.apply(slice("s-1", "s")).unwrap();
    server.fail(None, Some(Resource::EndpointSlices), 403, 1000);
    let mut watched = Watched::start(&server).await;
    watched.until("reported", |watched| !watched.problems.is_empty()).await;
    let [problem] = &watched.problems[..] else { panic!("{:?}", watched.problems) };
    assert!(problem.object.ends_with(", endpointslices"), "{problem:?}");
    assert!(
        problem.reason.contains("discovery.k8s.io") && problem.reason.contains("ClusterRole"),
        "{problem:?}"
    );
    watched.settle().await;
    assert_eq!(watched.synced, 0);
    server.stop_failing();
    watched.until("synced", |watched| watched.synced == 1).await;
    assert_eq!(watched.problems, []);
}

#[tokio::test]
async fn service_cidrs_are_optional() {
    for status in [404, 403] {
        let server = ApiServer::start().unwrap();
        server.apply_all([service("s", 80), service_cidr("10.96.0.0/16")]).unwrap();
        server.fail(None, Some(Resource::ServiceCidrs), status, 1000);
        let mut watched = Watched::synced(&server).await;
        assert_eq!((watched.services(), watched.service_cidrs()), (vec!["s:80".to_owned()], vec![]));
        tokio::time::sleep(2 * A_WHILE).await;
        // A server that does not know ServiceCIDRs is not asked again soon; permission may be given at any moment.
        assert_eq!(watched.problems.len(), usize::from(status == 403));
        if status == 404 {
            tokio::time::sleep(4 * A_WHILE).await;
            assert_eq!(server.lists(Resource::ServiceCidrs), 1);
        } else {
            server.stop_failing();
            watched.until("allowed", |watched| watched.service_cidrs() == ["10.96.0.0/16"]).await;
            watched.until("no problem", |watched| watched.problems.is_empty()).await;
        }
        assert_eq!(watched.synced, 1);
    }
}

#[tokio::test]
async fn pods_are_watched_only_if_they_may_opt_out() {
    let server = ApiServer::start().unwrap();
    server
        .apply_all([pod("out", "n1", "off"), pod("in", "n1", "on"), pod("elsewhere", "n2", "off")])
        .unwrap();
    let mut watched = Watched::synced(&server).await;
    watched.settle().await;
    assert_eq!(server.lists(Resource::Pods) + server.open_watches(Resource::Pods), 0);

    let rules = Rules::parse(&["annotation".to_owned()]).unwrap();
    let names =
        |watched: &Watched| watched.cluster.pods().map(|pod| pod.key.name.to_string()).collect::<Vec<_>>();
    let mut watched = Watched::with_opt_out(api(&server).await, rules.clone());
    watched.until("synced", |watched| watched.synced == 1).await;
    assert_eq!(names(&watched), ["out"]);
    server.apply(pod("in", "n1", "off")).unwrap();
    watched.until("two", |watched| names(watched) == ["in", "out"]).await;
    server.apply(pod("out", "n1", "on")).unwrap();
    server.delete_named(Resource::Pods, "a", "in");
    watched.until("none", |watched| names(watched).is_empty()).await;
    let requests: Vec<_> =
        server.requests().into_iter().filter(|request| request.resource == Resource::Pods).collect();
    assert!(
        !requests.is_empty() && requests.iter().all(|request| request.query.contains("spec.nodeName")),
        "{requests:?}"
    );

    // An agent that may not read Pods works without them.
    server.fail(None, Some(Resource::Pods), 403, usize::MAX);
    let mut watched = Watched::with_opt_out(api(&server).await, rules);
    watched.until("synced", |watched| watched.synced == 1 && !watched.problems.is_empty()).await;
    let problem = &watched.problems[0];
    assert!(problem.object.ends_with(", pods") && problem.reason.contains("--socket-opt-out"), "{problem:?}");
}

async fn api(server: &ApiServer) -> Server {
    let folder = TempDir::new().unwrap();
    server.write_kubeconfig(&folder.path().join("kubeconfig")).unwrap();
    Server::configured(Some(&folder.path().join("kubeconfig")), None).unwrap()
}

fn pod(name: &str, node: &str, value: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "spec": { "nodeName": node },
        "metadata": { "namespace": "a", "name": name, "uid": name, "annotations": { ANNOTATION: value } },
    })
}

#[tokio::test]
async fn ends_with_its_receiver() {
    let server = ApiServer::start().unwrap();
    let mut watched = Watched::synced(&server).await;
    watched.updates.close();
    timeout(SOON, &mut watched.source).await.unwrap().unwrap();
}
