//! Frequency of requests to a server that is away, fails or refuses everybody.

use std::time::Duration;

use proxy_agent::sources::api::Server;
use proxy_tests::apiserver::{ApiServer, Cut, Resource, Verb};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};

use super::{SOON, WATCHED, Watched, service, wait_for_watches};

/// Time during which the servers are unwilling.
const TIME: Duration = Duration::from_secs(12);
/// Excess of a pause over the time drawn for it, on a busy machine.
const SLACK: Duration = Duration::from_millis(700);

/// Checks that the pauses after the first, second, … failure are at random from the upper half of 0.8 s, 1.6 s, …
fn assert_paced(times: &[std::time::Instant], asked_for: Duration, what: &str) {
    let pauses: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((3..=5).contains(&pauses.len()), "{what}: {pauses:?}");
    for (pause, power) in pauses.iter().zip(0..) {
        let span = Duration::from_millis(800) * 2_u32.pow(power);
        let drawn = pause.saturating_sub(asked_for);
        assert!(*pause >= asked_for + span / 2 && drawn <= span + SLACK, "{what}: {power}: {pauses:?}");
    }
}

async fn is_asked_less_and_less(what: &str, asked_for: u32, unwilling: impl Fn(&ApiServer)) {
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    unwilling(&server);
    let mut watched = Watched::start(&server).await;
    sleep(TIME).await;
    let requests = server.requests();
    let mut firsts = Vec::new();
    for resource in WATCHED {
        let of_it = requests.iter().filter(|request| request.resource == resource);
        let times: Vec<_> = of_it.map(|request| request.at).collect();
        assert_paced(&times, Duration::from_secs(asked_for.into()), &format!("{what}, {resource}"));
        firsts.push(times[1] - times[0]);
    }
    firsts.sort();
    assert!(firsts[3] - firsts[0] > Duration::from_millis(1), "{what}: in step: {firsts:?}");
    // The problem is reported at once, and is over as soon as the server is found willing, after one more pause at
    // most.
    watched.until("reported", |watched| watched.problems.len() == WATCHED.len()).await;
    server.stop_failing();
    watched.until("synced", |watched| watched.synced == 1 && watched.problems.is_empty()).await;
}

#[tokio::test]
async fn an_unwilling_server_is_asked_less_and_less() {
    let fails = |code: u16| move |server: &ApiServer| server.fail(None, None, code, usize::MAX);
    let asks = |code: u16| move |server: &ApiServer| server.fail_and_ask_for(1, code, usize::MAX);
    // In parallel, because waiting takes the time.
    tokio::join!(
        is_asked_less_and_less("500", 0, fails(500)),
        is_asked_less_and_less("429", 0, fails(429)),
        is_asked_less_and_less("503", 0, fails(503)),
        is_asked_less_and_less("429 with Retry-After", 1, asks(429)),
        is_asked_less_and_less("503 with Retry-After", 1, asks(503)),
    );
}

#[tokio::test]
async fn a_server_that_is_away_is_looked_for_less_and_less() {
    // A listener that accepts the connections and drops them.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let watched = Watched::of(Server::configured(None, Some(&url.parse().unwrap())).unwrap());
    let end = Instant::now() + TIME;
    let mut taken = 0;
    while let Ok(connection) = timeout(end - Instant::now(), listener.accept()).await {
        drop(connection.unwrap());
        taken += 1;
    }
    assert!((4 * 4..=4 * 6).contains(&taken), "{taken} connections for four resources");
    assert_eq!(watched.synced, 0);
}

#[tokio::test]
async fn watches_that_end_at_once_are_not_asked_for_all_the_time() {
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    let mut watched = Watched::synced(&server).await;
    wait_for_watches(&server).await;
    server.end_watches_at_once(true);
    server.cut_watches(Cut::Clean);
    server.forget_requests();
    sleep(TIME).await;
    for resource in WATCHED {
        let count = server.count(Verb::Watch, resource);
        assert!((3..=6).contains(&count), "{resource}: {count}");
        assert_eq!(server.lists(resource), 0);
    }
    server.end_watches_at_once(false);
    server.apply(service("s", 81)).unwrap();
    watched.until_services(&["s:81"]).await;
}

#[tokio::test]
async fn sources_that_lose_their_server_together_list_at_times_of_their_own() {
    const SOURCES: usize = 12;
    let server = ApiServer::start().unwrap();
    server.apply(service("s", 80)).unwrap();
    let folder = TempDir::new().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig).unwrap();
    let mut sources = Vec::new();
    for _ in 0..SOURCES {
        let mut watched = Watched::of(Server::configured(Some(&kubeconfig), None).unwrap());
        watched.until("synced", |watched| watched.synced == 1).await;
        sources.push(watched);
    }
    // A new server, which knows nothing of the versions of the old one.
    server.forget_requests();
    server.compact();
    server.cut_watches(Cut::Broken);
    let deadline = Instant::now() + SOON;
    while server.lists(Resource::EndpointSlices) < SOURCES {
        assert!(Instant::now() < deadline, "{} lists", server.lists(Resource::EndpointSlices));
        sleep(Duration::from_millis(5)).await;
    }
    let lists =
        server.requests().into_iter().filter(|r| r.resource == Resource::EndpointSlices && r.is_list());
    let mut times: Vec<_> = lists.map(|request| request.at).collect();
    times.sort();
    let spread = times[SOURCES - 1] - times[0];
    assert!(spread > Duration::from_millis(150), "all within {spread:?}");
}
