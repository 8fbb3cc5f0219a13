//! Budgets of a namespace: if it has more objects than its budget, the oldest are passed on.

use proxy_agent::config::opt_out::Rules;
use proxy_agent::reconcile::desired::{Budget, Budgets};
use proxy_agent::sources::api::Server;
use proxy_tests::apiserver::{ApiServer, Cut, Resource, Verb};
use serde_json::Value;

use super::{Watched, servers, service, slice};

/// Room for two Services of one port and one address, and for two slices of one port and one endpoint.
const BUDGETS: Budgets = {
    let budget = Budget { frontends: 6, endpoints: 6, source_ranges: 1 };
    Budgets { service: budget, namespace: budget }
};

async fn watched(server: &ApiServer) -> Watched {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig).unwrap();
    let api = Server::configured(Some(&kubeconfig), None).unwrap();
    let mut watched = Watched::with(api, Rules::default(), BUDGETS);
    watched.until("synced", |watched| watched.synced == 1).await;
    watched
}

/// Returns an object that was made in this second.
fn made(mut object: Value, second: u8) -> Value {
    object["metadata"]["creationTimestamp"] = format!("2026-01-01T00:00:{second:02}Z").into();
    object
}

fn refused(watched: &Watched) -> Vec<&str> {
    watched.problems.iter().map(|problem| &*problem.object).collect()
}

#[tokio::test]
async fn the_oldest_objects_of_a_namespace_are_passed_on_and_the_next_ones_fetched_when_there_is_room() {
    for server in servers() {
        // The order of the names is the reverse of the order by age.
        for (name, port, second) in [("z", 1, 1), ("y", 2, 2), ("x", 3, 3), ("w", 4, 4)] {
            server.apply(made(service(name, port), second)).unwrap();
        }
        for (name, second) in [("c", 1), ("b", 2), ("a", 3)] {
            server.apply(made(slice(name, "z"), second)).unwrap();
        }
        let mut watched = watched(&server).await;
        assert_eq!(watched.services(), ["y:2", "z:1"]);
        assert_eq!(watched.slices("z"), ["b", "c"]);
        assert_eq!(refused(&watched), ["Service a/x", "Service a/w", "EndpointSlice a/a"]);

        // A refused object changes, and is later fetched as it is then.
        server.apply(made(service("x", 33), 3)).unwrap();
        watched.settle().await;
        server.forget_requests();
        assert!(server.delete_named(Resource::Services, "a", "z"));
        watched.until_services(&["x:33", "y:2"]).await;
        let fetched = server.requests().into_iter().filter(|request| request.verb == Verb::List);
        let fetched: Vec<String> = fetched.map(|request| request.query).collect();
        assert!(fetched.len() == 1 && fetched[0].contains("metadata.name%3Dx"), "{fetched:?}");
        watched.until("told", |watched| refused(watched) == ["Service a/w", "EndpointSlice a/a"]).await;

        // A younger object takes nobody's place, not even in a new list.
        server.apply(made(service("a", 5), 5)).unwrap();
        server.compact();
        server.cut_watches(Cut::Clean);
        watched.settle().await;
        assert_eq!(watched.services(), ["x:33", "y:2"]);
        // An object that is deleted while it is refused never appears.
        assert!(server.delete_named(Resource::Services, "a", "w"));
        assert!(server.delete_named(Resource::Services, "a", "x"));
        watched.until_services(&["a:5", "y:2"]).await;
    }
}

#[tokio::test]
async fn a_server_that_is_not_well_is_asked_again() {
    let server = ApiServer::start().unwrap();
    for (name, port, second) in [("z", 1, 1), ("y", 2, 2), ("x", 3, 3)] {
        server.apply(made(service(name, port), second)).unwrap();
    }
    let mut watched = watched(&server).await;
    server.fail(Some(Verb::List), Some(Resource::Services), 500, 2);
    assert!(server.delete_named(Resource::Services, "a", "z"));
    watched.until_services(&["x:3", "y:2"]).await;
}
