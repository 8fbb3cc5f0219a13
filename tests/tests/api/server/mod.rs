//! The test API server, seen through the client library that the agent uses.

#![allow(clippy::unwrap_used, clippy::panic, reason = "test code outside of test functions")]

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, VersionMatch, WatchEvent, WatchParams};
use kube::core::ObjectMeta;
use kube::runtime::events::{Event as Note, EventType, Recorder, Reporter};
use kube::runtime::watcher::{self, Config, Event, InitialListStrategy, watcher};
use kube::{Client, Resource as _, ResourceExt as _};
use proxy_tests::apiserver::{ApiServer, Cut, Resource, Verb, client};
use serde_json::{Value, json};

mod faults;

type Watcher = Pin<Box<dyn Stream<Item = watcher::Result<Event<Service>>> + Send>>;

const PATIENCE: Duration = Duration::from_secs(20);

fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "namespace": "shop", "name": name },
        "spec": { "clusterIP": cluster_ip, "ports": [{ "port": 80, "protocol": "TCP" }] },
    })
}

fn node(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } })
}

/// Returns Services in alphabetical order.
fn services(count: usize) -> impl Iterator<Item = Value> {
    (0..count).map(|i| service(&format!("s{i:05}"), &format!("10.96.{}.{}", i / 250, i % 250 + 1)))
}

async fn connect(server: &ApiServer) -> Client {
    client::connect(&server.kubeconfig()).await.unwrap()
}

async fn watch(server: &ApiServer, config: Config) -> Watcher {
    Box::pin(watcher(Api::<Service>::all(connect(server).await), config))
}

/// Returns the next event of a watcher, in short; errors by their status code (0 if they have none).
async fn next(watcher: &mut Watcher) -> String {
    let item = tokio::time::timeout(PATIENCE, watcher.next()).await.expect("the watcher is stuck").unwrap();
    match item {
        Ok(Event::Init) => "init".to_owned(),
        Ok(Event::InitApply(s)) => format!("init {}", cluster_ip(s)),
        Ok(Event::InitDone) => "done".to_owned(),
        Ok(Event::Apply(s)) => format!("apply {}", cluster_ip(s)),
        Ok(Event::Delete(s)) => format!("delete {}", cluster_ip(s)),
        Err(
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            | watcher::Error::WatchError(status),
        ) => format!("error {}", status.code),
        Err(_) => "error 0".to_owned(),
    }
}

fn cluster_ip(s: Service) -> String {
    format!("{} {}", s.name_any(), s.spec.unwrap().cluster_ip.unwrap())
}

async fn expect(watcher: &mut Watcher, want: &[&str]) {
    for want in want {
        assert_eq!(next(watcher).await, *want);
    }
}

/// Checks that no event comes for 200 ms.
async fn expect_silence(watcher: &mut Watcher) {
    if let Ok(item) = tokio::time::timeout(Duration::from_millis(200), watcher.next()).await {
        panic!("unexpected: {item:?}");
    }
}

/// Polls the watcher, which must not have an event, until `condition` holds.
async fn silent_until(watcher: &mut Watcher, condition: impl Fn() -> bool) {
    let mut holds = pin!(until(condition));
    tokio::select! {
        biased;
        () = &mut holds => {}
        item = watcher.next() => panic!("unexpected: {item:?}"),
    }
}

async fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "the condition does not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for the event `want`, after nothing but failures to connect.
async fn retry_until(watcher: &mut Watcher, want: &str) {
    let start = Instant::now();
    loop {
        let said = next(watcher).await;
        if said == want {
            return;
        }
        assert_eq!(said, "error 0");
        assert!(start.elapsed() < PATIENCE, "the watcher does not recover");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns a watcher that has delivered its initial list and is watching.
async fn watching(server: &ApiServer, config: Config, initial: &[&str]) -> Watcher {
    let mut watcher = watch(server, config).await;
    expect(&mut watcher, &["init"]).await;
    expect(&mut watcher, initial).await;
    expect(&mut watcher, &["done"]).await;
    silent_until(&mut watcher, || server.open_watches(Resource::Services) == 1).await;
    watcher
}

async fn failure_code<T: std::fmt::Debug>(call: impl Future<Output = kube::Result<T>>) -> u16 {
    match call.await {
        Err(kube::Error::Api(status)) => status.code,
        other => panic!("not a failure of the API: {other:?}"),
    }
}

#[tokio::test]
async fn a_watcher_sees_what_happens() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    for initial_list_strategy in [InitialListStrategy::ListWatch, InitialListStrategy::StreamingList] {
        let config = Config { initial_list_strategy, ..Config::default() };
        let mut watcher = watching(&server, config, &["init a 10.96.0.1"]).await;
        server.apply(service("b", "10.96.0.2")).unwrap();
        server.apply(service("b", "10.96.0.3")).unwrap();
        // The object is unchanged, so no event is sent.
        server.apply(service("b", "10.96.0.3")).unwrap();
        assert!(server.delete(&service("b", "")).unwrap());
        assert!(!server.delete(&service("b", "")).unwrap());
        assert!(server.touch(Resource::Services, "shop", "a").unwrap());
        let want = ["apply b 10.96.0.2", "apply b 10.96.0.3", "delete b 10.96.0.3", "apply a 10.96.0.1"];
        expect(&mut watcher, &want).await;
        expect_silence(&mut watcher).await;
        drop(watcher);
        until(|| server.open_watches(Resource::Services) == 0).await;
    }
    assert_eq!(server.count(Verb::List, Resource::Services), 1);
    assert_eq!(server.count(Verb::Watch, Resource::Services), 2);
}

#[tokio::test]
async fn pages_show_the_state_of_the_first_one() {
    let server = ApiServer::start().unwrap();
    server.apply_all(services(25)).unwrap();
    let revision = server.revision();
    let api = Api::<Service>::all(connect(&server).await);
    let first = api.list(&ListParams::default().limit(10)).await.unwrap();
    assert_eq!(first.items.len(), 10);
    assert_eq!(first.metadata.remaining_item_count, Some(15));

    server.delete(&service("s00024", "")).unwrap();
    server.apply(service("s00015", "10.96.9.9")).unwrap();
    server.apply(service("s00011x", "10.96.9.8")).unwrap();
    let mut rest = Vec::new();
    let mut token = first.metadata.continue_.clone();
    while let Some(from) = token {
        let page = api.list(&ListParams::default().limit(10).continue_token(&from)).await.unwrap();
        assert_eq!(page.metadata.resource_version, Some(revision.to_string()));
        rest.extend(page.items.iter().map(|s| (s.name_any(), s.spec.clone().unwrap().cluster_ip.unwrap())));
        token = page.metadata.continue_;
    }
    let want: Vec<_> = services(25)
        .skip(10)
        .map(|s| {
            (
                s["metadata"]["name"].as_str().unwrap().to_owned(),
                s["spec"]["clusterIP"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    assert_eq!(rest, want);

    let token = first.metadata.continue_.unwrap();
    server.compact();
    assert_eq!(failure_code(api.list(&ListParams::default().limit(10).continue_token(&token))).await, 410);
}

#[tokio::test]
async fn a_watcher_pages_and_catches_up() {
    let server = ApiServer::start().unwrap();
    server.apply_all(services(5)).unwrap();
    server.hold_further_pages(Resource::Services);
    let mut watcher = watch(&server, Config::default().page_size(2)).await;
    expect(&mut watcher, &["init", "init s00000 10.96.0.1", "init s00001 10.96.0.2"]).await;
    silent_until(&mut watcher, || server.count(Verb::List, Resource::Services) == 2).await;
    server.delete_named(Resource::Services, "shop", "s00000");
    server.delete_named(Resource::Services, "shop", "s00004");
    expect_silence(&mut watcher).await;
    server.release_list(Resource::Services);
    let rest = ["init s00002 10.96.0.3", "init s00003 10.96.0.4", "init s00004 10.96.0.5", "done"];
    expect(&mut watcher, &rest).await;
    expect(&mut watcher, &["delete s00000 10.96.0.1", "delete s00004 10.96.0.5"]).await;
    assert_eq!(server.count(Verb::List, Resource::Services), 3);
}

#[tokio::test]
async fn versions_of_lists() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let old = server.revision();
    server.apply(service("b", "10.96.0.2")).unwrap();
    let api = Api::<Service>::all(connect(&server).await);
    let count = async |params| api.list(&params).await.unwrap().items.len();
    assert_eq!(count(ListParams::default().match_any()).await, 2);
    assert_eq!(count(at(old, Some(VersionMatch::Exact))).await, 1);
    assert_eq!(count(at(old, Some(VersionMatch::NotOlderThan))).await, 2);
    assert_eq!(count(at(old, None)).await, 2);
    assert_eq!(count(at(old, None).limit(10)).await, 1);
    let future = server.revision() + 1;
    server.forget_requests();
    let mut config = kube::Config::new(server.url().parse().unwrap());
    config.default_retry = false;
    let impatient = Api::<Service>::all(Client::try_from(config).unwrap());
    assert_eq!(failure_code(impatient.list(&at(future, Some(VersionMatch::NotOlderThan)))).await, 504);
    assert_eq!(server.count(Verb::List, Resource::Services), 1);
    server.compact();
    assert_eq!(failure_code(api.list(&at(old, Some(VersionMatch::Exact)))).await, 410);
}

fn at(version: u64, version_match: Option<VersionMatch>) -> ListParams {
    ListParams { resource_version: Some(version.to_string()), version_match, ..ListParams::default() }
}

#[tokio::test]
async fn a_selector_turns_changes_into_additions_and_deletions() {
    let server = ApiServer::start().unwrap();
    server.apply(labelled("other")).unwrap();
    server.apply(service("b", "None")).unwrap();
    let config = Config::default().labels("!proxy").fields("spec.clusterIP!=None");
    let mut watcher = watching(&server, config, &[]).await;
    server.apply(service("a", "10.96.0.1")).unwrap();
    server.apply(service("a", "10.96.0.2")).unwrap();
    server.apply(labelled("other")).unwrap();
    server.apply(labelled("another")).unwrap();
    server.apply(service("b", "10.96.0.3")).unwrap();
    server.apply(service("b", "None")).unwrap();
    let want = [
        "apply a 10.96.0.1",
        "apply a 10.96.0.2",
        "delete a 10.96.0.2",
        "apply b 10.96.0.3",
        "delete b 10.96.0.3",
    ];
    expect(&mut watcher, &want).await;
    expect_silence(&mut watcher).await;

    // The types of the events, and the deletion at the revision of the change.
    let api = Api::<Service>::all(connect(&server).await);
    let from = server.revision();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let gone_at = server.apply(labelled("other")).unwrap();
    let params = WatchParams::default().labels("!proxy");
    let mut events = pin!(api.watch(&params, &from.to_string()).await.unwrap());
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Added(s))) if s.name_any() == "a"));
    let Some(Ok(WatchEvent::Deleted(gone))) = events.next().await else { panic!("not a deletion") };
    assert_eq!(gone.resource_version(), Some(gone_at.to_string()));
    assert_eq!(gone.labels().len(), 0, "as it last matched");

    let nodes = Api::<Node>::all(connect(&server).await);
    server.apply_all([node("one"), node("two")]).unwrap();
    let one = nodes.list(&ListParams::default().fields("metadata.name=one")).await.unwrap();
    assert_eq!(one.iter().map(|n| n.name_any()).collect::<Vec<_>>(), ["one"]);
    assert_eq!(failure_code(nodes.list(&ListParams::default().fields("spec.podCIDR=x"))).await, 400);
    assert_eq!(failure_code(nodes.list(&ListParams::default().labels("a in"))).await, 400);
}

fn labelled(label: &str) -> Value {
    let mut service = service("a", "10.96.0.1");
    service["metadata"]["labels"] = json!({ "proxy": label });
    service
}

#[tokio::test]
async fn bookmarks_move_a_watch_on() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let mut watcher = watching(&server, Config::default(), &["init a 10.96.0.1"]).await;
    server.apply(node("one")).unwrap();
    let revision = server.revision();
    server.send_bookmarks();
    expect_silence(&mut watcher).await;
    server.cut_watches(Cut::Clean);
    silent_until(&mut watcher, || server.count(Verb::Watch, Resource::Services) == 2).await;
    let requests = server.requests();
    let resumed = requests.iter().rfind(|request| request.verb == Verb::Watch).unwrap();
    assert!(resumed.query.ends_with(&format!("resourceVersion={revision}")), "{}", resumed.query);
}

#[tokio::test]
async fn a_watch_ends_in_time_with_a_bookmark() {
    let server = ApiServer::start().unwrap();
    let api = Api::<Service>::all(connect(&server).await);
    let start = Instant::now();
    let mut events = pin!(api.watch(&WatchParams::default().timeout(1), "0").await.unwrap());
    server.apply(service("a", "10.96.0.1")).unwrap();
    server.apply(node("one")).unwrap();
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Added(_)))));
    let Some(Ok(WatchEvent::Bookmark(bookmark))) = events.next().await else { panic!("no bookmark") };
    assert_eq!(bookmark.metadata.resource_version, server.revision().to_string());
    assert!(events.next().await.is_none());
    assert!(start.elapsed() >= Duration::from_secs(1));
    let mut quiet = WatchParams::default().timeout(1);
    quiet.bookmarks = false;
    let mut events = pin!(api.watch(&quiet, &server.revision().to_string()).await.unwrap());
    server.send_bookmarks();
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn what_is_too_old_is_gone() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let mut watcher = watching(&server, Config::default(), &["init a 10.96.0.1"]).await;
    server.compact();
    expect_silence(&mut watcher).await;
    server.delete(&service("a", "")).unwrap();
    expect(&mut watcher, &["delete a 10.96.0.1"]).await;
    server.compact();
    server.apply(service("b", "10.96.0.2")).unwrap();
    server.cut_watches(Cut::Broken);
    // Whether the event or the cut comes first, no event is missed: the watch that resumes is up to date or expired.
    let mut seen = vec![next(&mut watcher).await];
    while !seen.last().unwrap().ends_with("b 10.96.0.2") {
        seen.push(next(&mut watcher).await);
    }
    let expired = ["error 410", "init", "init b 10.96.0.2"];
    assert!(seen == ["apply b 10.96.0.2"] || seen.ends_with(&expired.map(str::to_owned)), "{seen:?}");
    drop(watcher);

    let mut watcher = watching(&server, Config::default(), &["init b 10.96.0.2"]).await;
    server.compact();
    server.cut_watches(Cut::Clean);
    expect(&mut watcher, &["error 410", "init", "init b 10.96.0.2", "done"]).await;
    silent_until(&mut watcher, || server.open_watches(Resource::Services) == 1).await;
    server.fail_watches(410);
    expect(&mut watcher, &["error 410", "init", "init b 10.96.0.2", "done"]).await;

    let api = Api::<Service>::all(connect(&server).await);
    let mut events = pin!(api.watch(&WatchParams::default(), "1").await.unwrap());
    assert!(matches!(events.next().await, Some(Ok(WatchEvent::Error(status))) if status.code == 410));
    server.expire_watches_by_http(true);
    assert_eq!(failure_code(async { api.watch(&WatchParams::default(), "1").await.map(drop) }).await, 410);
}

#[tokio::test]
async fn writes_through_a_client() {
    let server = ApiServer::start().unwrap();
    let kube = connect(&server).await;
    client::apply(&kube, &balanced("192.0.2.1")).await.unwrap();
    client::apply(&kube, &balanced("192.0.2.2")).await.unwrap();
    let stored = server.get(Resource::Services, "shop", "a").unwrap();
    assert_eq!(stored["status"]["loadBalancer"]["ingress"][0]["ip"], "192.0.2.2");
    assert_eq!(stored["spec"], balanced("")["spec"]);
    assert!(stored["metadata"]["uid"].is_string() && stored["metadata"]["creationTimestamp"].is_string());
    client::apply(&kube, &node("one")).await.unwrap();
    assert!(client::delete(&kube, &node("one")).await.unwrap());
    assert!(!client::delete(&kube, &node("one")).await.unwrap());

    let api = Api::<Service>::namespaced(kube, "shop");
    let old = api.get("a").await.unwrap();
    let params = PostParams::default();
    assert_eq!(
        failure_code(api.create(&params, &Service { metadata: name("a"), ..Service::default() })).await,
        409
    );
    let unchanged = api.replace("a", &params, &old).await.unwrap();
    assert_eq!(unchanged.resource_version(), old.resource_version());
    let patch = json!({ "spec": { "clusterIP": "10.96.0.2" }, "status": null });
    let patched = api.patch("a", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!(patched.spec.unwrap().cluster_ip.as_deref(), Some("10.96.0.2"));
    assert_eq!(patched.status, old.status, "a write to the object leaves the status alone");
    assert_eq!(patched.metadata.uid, old.metadata.uid);
    assert_eq!(failure_code(api.replace("a", &params, &old)).await, 409);
    let status =
        json!({ "spec": { "clusterIP": "10.96.0.9" }, "status": { "loadBalancer": { "ingress": null } } });
    let patched = api.patch_status("a", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    assert_eq!(patched.spec.unwrap().cluster_ip.as_deref(), Some("10.96.0.2"));
    assert_eq!(patched.status.unwrap().load_balancer.unwrap().ingress, None);
    let applied = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "b" }, "spec": {} });
    api.patch("b", &PatchParams::apply("test"), &Patch::Apply(&applied)).await.unwrap();
    assert_eq!(failure_code(api.get("c")).await, 404);
    assert_eq!(
        failure_code(api.replace("c", &params, &Service { metadata: name("c"), ..Service::default() })).await,
        404
    );
    let names: BTreeSet<_> =
        api.list(&ListParams::default()).await.unwrap().iter().map(|s| s.name_any()).collect();
    assert_eq!(names, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    assert_eq!(server.list(Resource::Services).len(), 2);
    assert_eq!(server.delete_all(Resource::Services), 2);
}

fn balanced(ip: &str) -> Value {
    let mut service = service("a", "10.96.0.1");
    service["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": ip }] } });
    service
}

fn name(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

#[tokio::test]
async fn events_are_recorded() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let kube = connect(&server).await;
    let regarding = Api::<Service>::namespaced(kube.clone(), "shop").get("a").await.unwrap().object_ref(&());
    let recorder = Recorder::new(kube, Reporter { controller: "vipr".into(), instance: None });
    for _ in 0..2 {
        let note = Note {
            type_: EventType::Warning,
            reason: "Refused".into(),
            note: Some("the map is full".into()),
            action: "Program".into(),
            secondary: None,
        };
        recorder.publish(&note, &regarding).await.unwrap();
    }
    let [event] = server.recorded_events().try_into().unwrap();
    assert_eq!((&event["reason"], &event["regarding"]["name"]), (&json!("Refused"), &json!("a")));
    assert_eq!(event["series"]["count"], 2, "the second one was a PATCH");
    assert_eq!(server.count(Verb::Patch, Resource::Events), 1);
}

#[tokio::test]
async fn a_large_cluster_is_listed_and_discovered() {
    let server = ApiServer::start().unwrap();
    server.apply_all(services(10_000)).unwrap();
    let kube = connect(&server).await;
    let all = Api::<Service>::all(kube.clone());
    assert_eq!(all.list(&ListParams::default()).await.unwrap().items.len(), 10_000);
    let mut watcher = watch(&server, Config::default().page_size(500)).await;
    let mut delivered = 0;
    while next(&mut watcher).await != "done" {
        delivered += 1;
    }
    assert_eq!(delivered, 10_001);
    assert_eq!(server.count(Verb::List, Resource::Services), 21);
    assert_eq!(kube.apiserver_version().await.unwrap().major, "1");
    let slices = kube.list_api_group_resources("discovery.k8s.io/v1").await.unwrap();
    assert_eq!(slices.resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["endpointslices"]);
    assert_eq!(kube.list_api_groups().await.unwrap().groups.len(), 3);
}

#[test]
fn a_listener_is_handed_in() {
    let Err(refused) = ApiServer::start_on(some_port()) else { panic!("it could not come back on its port") };
    assert!(refused.to_string().contains("explicit port"), "{refused}");

    let address = some_port().local_addr().unwrap();
    let server = ApiServer::start_on(std::net::TcpListener::bind(address).unwrap()).unwrap();
    assert_eq!(server.address(), address);
    server.go_away();
    server.come_back();
    std::net::TcpStream::connect(address).unwrap();
}

fn some_port() -> std::net::TcpListener {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap()
}

#[test]
fn a_test_without_a_runtime_can_wait() {
    let server = ApiServer::start().unwrap();
    let waiting = server.wait_for_watches(Resource::Services, 1, Duration::from_millis(20));
    assert!(waiting.unwrap_err().to_string().starts_with("0 watches of services instead of 1"));
    server.wait_for_watches(Resource::Services, 0, PATIENCE).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kubeconfig");
    server.write_kubeconfig(&file).unwrap();
    assert!(std::fs::read_to_string(file).unwrap().contains(&server.url()));
    let address = server.address();
    drop(server);
    assert!(std::net::TcpStream::connect(address).is_err());
}
