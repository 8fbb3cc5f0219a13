//! Lists that are streamed or come in pages, and invalid objects in them.

use std::time::Duration;

use proxy_tests::apiserver::{ApiServer, Cut, Request, Resource, Streams, Verb};
use tokio::time::Instant;

use super::{WATCHED, Watched, servers, service, until, wait_for_watches};

/// Returns the requests for lists of a resource, pages included.
fn lists(server: &ApiServer, resource: Resource) -> Vec<Request> {
    let requests = server.requests().into_iter();
    requests
        .filter(|request| request.resource == resource && (request.is_list() || request.verb == Verb::List))
        .collect()
}

/// Makes the agent list everything again.
async fn list_again(server: &ApiServer) {
    wait_for_watches(server).await;
    server.forget_requests();
    server.compact();
    server.cut_watches(Cut::Clean);
    until("listed", || WATCHED.iter().all(|resource| server.lists(*resource) > 0)).await;
    wait_for_watches(server).await;
}

#[tokio::test]
async fn lists_are_streamed_and_as_new_as_the_storage() {
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    let mut watched = Watched::synced(&server).await;
    for _ in 0..2 {
        for resource in WATCHED {
            let lists = lists(&server, resource);
            let [list] = &lists[..] else { panic!("{lists:?}") };
            assert_eq!(list.verb, Verb::Watch);
            assert!(list.query.ends_with("&resourceVersion="), "no version is the newest one: {list:?}");
            // The watch goes on where the list ends.
            assert_eq!((server.open_watches(resource), server.count(Verb::List, resource)), (1, 0));
        }
        list_again(&server).await;
    }
    server.apply(service("s", 81)).unwrap();
    watched.until_services(&["s:81"]).await;
    assert_eq!(watched.problems, []);
}

#[tokio::test]
async fn a_server_without_streams_is_asked_for_them_once() {
    for (streams, least) in [(Streams::Refused, 0), (Streams::Ignored, 5)] {
        let server = ApiServer::start().unwrap();
        server.offer_streams(streams);
        server.apply(service("s", 80)).unwrap();
        let began = Instant::now();
        let mut watched = Watched::synced(&server).await;
        let took = began.elapsed();
        assert!(took > Duration::from_secs(least) && took < Duration::from_secs(least + 3), "{took:?}");
        assert_eq!(watched.services(), ["s:80"]);
        for resource in WATCHED {
            let verbs: Vec<Verb> = lists(&server, resource).iter().map(|list| list.verb).collect();
            assert_eq!(verbs, [Verb::Watch, Verb::List], "{resource}");
        }
        // Neither this server nor its successors are asked for streams again. Objects that were deleted silently
        // leave with the next list.
        server.offer_streams(Streams::Offered);
        wait_for_watches(&server).await;
        server.apply_silently(service("t", 80)).unwrap();
        server.delete_silently(Resource::Services, "a", "s");
        list_again(&server).await;
        for resource in WATCHED {
            assert!(lists(&server, resource).iter().all(|list| list.verb == Verb::List), "{resource}");
        }
        watched.until_services(&["t:80"]).await;
        assert_eq!((watched.synced, watched.problems.len()), (1, 0));
    }
}

#[tokio::test]
async fn a_list_whose_end_never_comes_among_changes() {
    let server = ApiServer::start().unwrap();
    server.offer_streams(Streams::Ignored);
    let mut watched = Watched::start(&server).await;
    let began = Instant::now();
    let mut ports = 1..;
    while watched.synced == 0 {
        assert!(began.elapsed() < Duration::from_secs(40), "not synced");
        server.apply(service("s", ports.next().unwrap())).unwrap();
        watched.settle().await;
    }
    assert!(began.elapsed() > Duration::from_secs(20), "something is new all the time");
    server.apply(service("s", 80)).unwrap();
    watched.until_services(&["s:80"]).await;
}

#[tokio::test]
async fn a_list_that_is_never_answered() {
    let server = ApiServer::start().unwrap();
    server.offer_streams(Streams::Stuck);
    server.apply(service("s", 80)).unwrap();
    let mut watched = Watched::start(&server).await;
    tokio::time::sleep(Duration::from_secs(44)).await;
    assert_eq!(server.count(Verb::List, Resource::Services), 0);
    watched.until("synced", |watched| watched.synced == 1).await;
    assert_eq!(watched.services(), ["s:80"]);
}

/// Returns objects that are not valid Services. The first two have the given name.
fn nonsense(name: &str) -> [String; 5] {
    let named = |rest: &str| format!(r#"{{"metadata":{{"namespace":"a","name":"{name}"}},{rest}}}"#);
    [
        named(r#""spec":{"ports":"none"}"#),
        named(r#""spec":{"clusterIP":"10.96.0.99","ports":[{"port":"http"}]}"#),
        r#"{"metadata":{"labels":7},"spec":{}}"#.to_owned(),
        r#"{"spec":{"clusterIP":"10.96.0.99","clusterIPs":["10.96.0.99"],"ports":[{"port":80}]}}"#.to_owned(),
        "[7]".to_owned(),
    ]
}

fn told(watched: &Watched) -> Vec<String> {
    watched.problems.iter().map(|problem| format!("{}: {}", problem.object, problem.reason)).collect()
}

#[tokio::test]
async fn nonsense_in_a_list_costs_itself() {
    for server in servers() {
        server.apply_all([service("s", 80), service("t", 80)]).unwrap();
        for object in nonsense("u") {
            server.add_nonsense(Resource::Services, &object);
        }
        server.add_nonsense(Resource::EndpointSlices, "{}");
        let mut watched = Watched::synced(&server).await;
        assert_eq!(watched.services(), ["s:80", "t:80"]);
        let unnamed = "EndpointSlice without a name: metadata.namespace is missing; it is ignored";
        watched.until("problems", |watched| watched.problems.len() == 3).await;
        let told_of =
            |beginning: &str| told(&watched).iter().filter(|told| told.starts_with(beginning)).count();
        assert_eq!(told_of(unnamed), 1, "{:?}", told(&watched));
        assert_eq!(told_of("Service without a name: "), 1, "{:?}", told(&watched));
        let reason = "spec.ports[0].port: invalid type: string \"http\", expected a JSON number";
        assert_eq!(told_of(&format!("Service a/u: {reason}")), 1, "{:?}", told(&watched));
        // The state known of an object stays while the object is invalid, also through a list.
        server.remove_nonsense(Resource::Services);
        wait_for_watches(&server).await;
        server.add_nonsense(Resource::Services, &nonsense("t")[1]);
        watched.settle().await;
        server.delete_silently(Resource::Services, "a", "t");
        server.delete_silently(Resource::Services, "a", "s");
        list_again(&server).await;
        watched.until_services(&["t:80"]).await;
        server.remove_nonsense(Resource::Services);
        list_again(&server).await;
        watched.until_services(&[]).await;
        watched.until("mended", |watched| watched.problems.len() == 1).await;
        assert_eq!((watched.synced, told(&watched)), (1, vec![unnamed.to_owned()]));
    }
}

#[tokio::test]
async fn nonsense_on_a_watch_costs_a_list_at_most() {
    let server = ApiServer::start().unwrap();
    server.apply_all([service("s", 80), service("t", 80)]).unwrap();
    let mut watched = Watched::synced(&server).await;
    wait_for_watches(&server).await;
    for object in nonsense("s") {
        server.add_nonsense(Resource::Services, &object);
        server.remove_nonsense(Resource::Services);
    }
    server.apply(service("t", 81)).unwrap();
    watched.until_services(&["s:80", "t:81"]).await;
    assert_eq!(server.lists(Resource::Services), 1, "everything was told that can be understood");

    // The line may have been any event, so one was missed.
    for line in ["nonsense", r#"{"type":"ADDED"}"#, r#"{"type":"UNHEARD OF","object":{}}"#] {
        wait_for_watches(&server).await;
        let lists = server.lists(Resource::Services);
        server.delete_silently(Resource::Services, "a", "t");
        server.send_line(Resource::Services, line);
        watched.until_services(&["s:80"]).await;
        assert_eq!(server.lists(Resource::Services), lists + 1, "{line}");
        server.apply(service("t", 82)).unwrap();
        watched.until_services(&["s:80", "t:82"]).await;
    }
}
