//! Faults on demand: cut connections, refused requests, events held back, doubled and lost.

use super::*;

#[tokio::test]
async fn cut_connections_lose_nothing() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let mut watcher = watching(&server, Config::default(), &["init a 10.96.0.1"]).await;
    let cuts: [&dyn Fn(); 4] = [
        &|| server.cut_watches(Cut::Clean),
        &|| server.cut_watches(Cut::Broken),
        &|| server.cut_watches(Cut::WithinNextEvent),
        &|| server.cut_connections(),
    ];
    for (i, cut) in cuts.into_iter().enumerate() {
        let watches = server.count(Verb::Watch, Resource::Services);
        cut();
        server.apply(service("a", &format!("10.96.1.{i}"))).unwrap();
        retry_until(&mut watcher, &format!("apply a 10.96.1.{i}")).await;
        assert_eq!(server.count(Verb::Watch, Resource::Services), watches + 1, "cut {i}");
        silent_until(&mut watcher, || server.open_watches(Resource::Services) == 1).await;
    }
    assert_eq!(server.count(Verb::List, Resource::Services), 1);
}

#[tokio::test]
async fn an_event_is_cut_within_a_chunk() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let server = ApiServer::start().unwrap();
    let mut stream = tokio::net::TcpStream::connect(server.address()).await.unwrap();
    stream.write_all(b"GET /api/v1/services?watch=1 HTTP/1.1\r\nHost: test\r\n\r\n").await.unwrap();
    until(|| server.open_watches(Resource::Services) == 1).await;
    server.cut_watches(Cut::WithinNextEvent);
    server.apply(service("a", "10.96.0.1")).unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let (size, chunk) = body.split_once("\r\n").unwrap();
    assert!(chunk.starts_with(r#"{"type":"ADDED","#), "{chunk}");
    assert!(chunk.len() < usize::from_str_radix(size, 16).unwrap(), "{size}: {chunk}");
}

#[tokio::test]
async fn away_and_back_on_the_same_port() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    let mut watcher = watching(&server, Config::default(), &["init a 10.96.0.1"]).await;
    for round in 0..3 {
        server.go_away();
        let refused = std::net::TcpStream::connect(server.address()).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        server.apply(service("a", &format!("10.96.2.{round}"))).unwrap();
        assert_eq!(next(&mut watcher).await, "error 0");
        if round == 2 {
            server.go_away_for(Duration::from_millis(300));
        } else {
            server.come_back();
        }
        retry_until(&mut watcher, &format!("apply a 10.96.2.{round}")).await;
    }
    assert_eq!(server.count(Verb::List, Resource::Services), 1);
}

#[tokio::test]
async fn requests_fail_as_often_as_asked() {
    let server = ApiServer::start().unwrap();
    server.fail(Some(Verb::List), Some(Resource::Services), 500, 2);
    server.fail(Some(Verb::Get), None, 503, 1);
    let mut watcher = watch(&server, Config::default()).await;
    expect(&mut watcher, &["init", "error 500", "init", "error 500", "init", "done"]).await;
    silent_until(&mut watcher, || server.open_watches(Resource::Services) == 1).await;
    server.fail(Some(Verb::Watch), None, 403, 1);
    server.cut_watches(Cut::Clean);
    server.apply(service("a", "10.96.0.1")).unwrap();
    expect(&mut watcher, &["error 403", "apply a 10.96.0.1"]).await;

    // kube retries errors that the server says are temporary.
    let api = Api::<Service>::namespaced(connect(&server).await, "shop");
    assert_eq!(api.get("a").await.unwrap().name_any(), "a");
    assert_eq!(server.count(Verb::Get, Resource::Services), 2);
    server.fail(None, None, 500, 1000);
    assert_eq!(failure_code(api.get("a")).await, 500);
    server.stop_failing();
    assert_eq!(failure_code(api.get("b")).await, 404);
    server.delay_requests(Duration::from_millis(100));
    let start = Instant::now();
    api.get("a").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn lists_and_events_are_held_back() {
    let server = ApiServer::start().unwrap();
    server.apply(service("a", "10.96.0.1")).unwrap();
    for initial_list_strategy in [InitialListStrategy::ListWatch, InitialListStrategy::StreamingList] {
        server.hold_list(Resource::Services);
        let mut watcher = watch(&server, Config { initial_list_strategy, ..Config::default() }).await;
        let first = tokio::time::timeout(Duration::from_millis(200), watcher.next()).await;
        if let Ok(first) = first {
            assert!(matches!(first, Some(Ok(Event::Init))), "{first:?}");
            expect_silence(&mut watcher).await;
            server.release_list(Resource::Services);
        } else {
            server.release_list(Resource::Services);
            expect(&mut watcher, &["init"]).await;
        }
        expect(&mut watcher, &["init a 10.96.0.1", "done"]).await;
    }

    let mut watcher = watching(&server, Config::default(), &["init a 10.96.0.1"]).await;
    server.hold_events(Resource::Services);
    server.apply(service("b", "10.96.0.2")).unwrap();
    server.apply(service("b", "10.96.0.3")).unwrap();
    server.send_bookmarks();
    expect_silence(&mut watcher).await;
    // A bookmark must not have covered the events that were held.
    server.cut_watches(Cut::Clean);
    silent_until(&mut watcher, || server.open_watches(Resource::Services) == 1).await;
    server.release_events(Resource::Services);
    expect(&mut watcher, &["apply b 10.96.0.2", "apply b 10.96.0.3"]).await;
    server.delete(&service("b", "")).unwrap();
    expect(&mut watcher, &["delete b 10.96.0.3"]).await;
}

#[tokio::test]
async fn events_are_doubled_shuffled_and_lost() {
    let server = ApiServer::start().unwrap();
    let mut watcher = watching(&server, Config::default(), &[]).await;
    server.duplicate_events(Resource::Services, 1);
    server.apply_all([service("a", "10.96.0.1"), service("b", "10.96.0.2")]).unwrap();
    expect(&mut watcher, &["apply a 10.96.0.1", "apply a 10.96.0.1", "apply b 10.96.0.2"]).await;
    server.reorder_events(Resource::Services, 3);
    server.apply_all([service("a", "10.96.0.3"), service("b", "10.96.0.4")]).unwrap();
    expect_silence(&mut watcher).await;
    server.delete(&service("a", "")).unwrap();
    expect(&mut watcher, &["delete a 10.96.0.3", "apply b 10.96.0.4", "apply a 10.96.0.3"]).await;

    // Keeps the watch from resuming in the middle of the shuffled events.
    server.send_bookmarks();
    server.apply_silently(service("c", "10.96.0.5")).unwrap();
    assert!(server.delete_silently(Resource::Services, "shop", "b"));
    server.cut_watches(Cut::Clean);
    expect_silence(&mut watcher).await;
    server.compact();
    server.cut_watches(Cut::Clean);
    expect(&mut watcher, &["error 410", "init", "init c 10.96.0.5", "done"]).await;
}
