//! The agent's small HTTP servers, which survive a taken port and clients that are slow, silent or many.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::config::servers::OnBindFailure;

mod listen;

mod room;

mod thread;

pub(crate) use room::{Room, Seat};
pub(crate) use thread::ServerThread;

/// Reason why a server does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// The address cannot be bound.
    #[error("cannot listen on {address} for {server}: {source}")]
    Bind {
        /// Name of the server.
        server: &'static str,
        /// Address to listen on.
        address: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
}

impl HttpError {
    /// Returns the name of the server.
    pub(crate) fn server(&self) -> &'static str {
        match self {
            Self::Bind { server, .. } => server,
        }
    }
}

/// Limits of what clients may take. A connection costs a file descriptor, and some of the servers are open to the
/// world.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Places for simultaneous connections. Servers may share them.
    pub(crate) room: Room,
    /// Time limit for the head of the request. A connection carries one request.
    pub(crate) silence: Duration,
    /// Time limit for a connection, which then ends after the answer that it owes.
    pub(crate) lifetime: Duration,
}

impl Default for Limits {
    /// Returns limits with a room of their own.
    fn default() -> Self {
        Self { room: Room::new(256), silence: Duration::from_secs(5), lifetime: Duration::from_secs(60) }
    }
}

/// Largest head of a request, in bytes: with each piece that arrives, all pieces so far are read again.
const HEAD_MAX: usize = 8_192;

/// Time that an ending connection may take for its last answer.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves `router` on `address` until the future is dropped. `server` is its name in logs and errors.
///
/// # Errors
///
/// When binding fails and [`OnBindFailure::Fail`] is asked for.
pub(crate) async fn serve(
    server: &'static str,
    address: SocketAddr,
    router: Router,
    on_failure: OnBindFailure,
) -> Result<(), HttpError> {
    let listeners = loop {
        match (listen::listen(address), on_failure) {
            (Ok(listeners), _) => break listeners,
            (Err(source), OnBindFailure::Fail) => return Err(HttpError::Bind { server, address, source }),
            (Err(error), OnBindFailure::Retry(pause)) => {
                tracing::error!(server, %address, %error, retry_in = ?pause, "cannot listen");
                sleep(pause).await;
            }
        }
    };
    tracing::info!(server, %address, "listening");
    // Each listener has its own task, so that they take turns.
    let (mut servers, limits) = (JoinSet::new(), Limits::default());
    for listener in listeners {
        servers.spawn(serve_on(listener, router.clone(), limits.clone(), std::future::pending()));
    }
    while servers.join_next().await.is_some() {}
    Ok(())
}

/// Serves the clients of `listener` until `stop` is ready. Then the listener closes, and open connections end after the
/// answer that they owe.
pub(crate) async fn serve_on(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: impl Future<Output = ()>,
) {
    // Every connection notices when this is dropped at the end.
    let (_open, end) = watch::channel(());
    let port = listener.local_addr().map_or(0, |address| address.port());
    let next = async || {
        match listener.accept().await {
            Ok((stream, from)) => Some((stream, limits.room.enter(port, from.ip()))),
            Err(error) => {
                tracing::debug!(%error, "a connection cannot be taken");
                // Without free descriptors the next attempt would fail at once, too.
                sleep(Duration::from_millis(100)).await;
                None
            }
        }
    };
    tokio::pin!(stop);
    loop {
        let connected = tokio::select! {
            connected = next() => connected,
            () = &mut stop => return,
        };
        if let Some((stream, seat)) = connected {
            tokio::spawn(converse(stream, router.clone(), limits.clone(), end.clone(), seat));
        }
    }
}

async fn converse(
    stream: TcpStream,
    router: Router,
    limits: Limits,
    mut end: watch::Receiver<()>,
    mut seat: Seat,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.silence)
        .keep_alive(false)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    tokio::select! {
        // A client that breaks off or sends an invalid request harms only itself.
        _ = connection.as_mut() => return,
        // The place was given to another connection.
        _ = &mut seat.gone => return,
        _ = end.changed() => {}
        () = sleep(limits.lifetime) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(FAREWELL, connection).await;
}

#[cfg(test)]
pub(crate) mod testing {
    //! Requests over loopback, as text.

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    /// An answer, taken apart.
    #[derive(Debug)]
    pub(crate) struct Response {
        pub(crate) status: u16,
        /// Status line and headers, lower case.
        pub(crate) head: String,
        pub(crate) body: String,
    }

    /// Sends one request on a connection of its own.
    pub(crate) async fn request(address: SocketAddr, method: &str, path: &str) -> io::Result<Response> {
        request_with(address, method, path, &[]).await
    }

    /// Does the same with these headers.
    pub(crate) async fn request_with(
        address: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> io::Result<Response> {
        let mut stream = TcpStream::connect(address).await?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").expect("a whole HTTP answer");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        Ok(Response { status, head: head.to_lowercase(), body: body.to_owned() })
    }

    /// Serves `router` on a free port of loopback while `test` runs with the address.
    pub(crate) fn with_server<F: Future<Output = ()>>(router: Router, test: impl FnOnce(SocketAddr) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::select! {
                () = serve_on(listener, router, Limits::default(), std::future::pending()) => panic!("it ended"),
                () = test(address) => {}
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn a_taken_port_is_tried_again() {
        block_on(async {
            let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = taken.local_addr().unwrap();
            let router = Router::new().route("/", get(|| async { "here" }));

            let failed = serve("test", address, router.clone(), OnBindFailure::Fail).await.unwrap_err();
            assert!(matches!(failed, HttpError::Bind { .. }), "{failed}");
            assert!(failed.to_string().contains(&address.to_string()), "{failed}");

            let pause = Duration::from_millis(20);
            let server = tokio::spawn(serve("test", address, router, OnBindFailure::Retry(pause)));
            sleep(3 * pause).await;
            assert!(!server.is_finished());
            drop(taken);
            let answered = async {
                loop {
                    match testing::request(address, "GET", "/").await {
                        Ok(response) => break response,
                        Err(_) => sleep(pause).await,
                    }
                }
            };
            let response = timeout(Duration::from_secs(10), answered).await.unwrap();
            assert_eq!((response.status, &*response.body), (200, "here"));
            server.abort();
        });
    }

    /// Serves on a free port with these limits while `test` runs; `test` may end the server.
    fn limited<F: Future<Output = ()>>(
        limits: Limits,
        test: impl FnOnce(SocketAddr, tokio::sync::oneshot::Sender<()>) -> F,
    ) {
        block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let slow = get(|| async {
                sleep(Duration::from_millis(100)).await;
                "here"
            });
            let (stop, stopped) = tokio::sync::oneshot::channel();
            let stopped = async {
                if stopped.await.is_err() {
                    std::future::pending().await
                }
            };
            let server = tokio::spawn(serve_on(listener, Router::new().route("/", slow), limits, stopped));
            timeout(Duration::from_secs(20), test(address, stop)).await.expect("in time");
            server.abort();
        });
    }

    /// Reads until the other side ends the connection.
    async fn rest(stream: &mut TcpStream) -> String {
        use tokio::io::AsyncReadExt as _;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[test]
    fn the_silent_do_not_keep_others_out() {
        for (places, silence) in [(3, Duration::from_secs(3600)), (100, Duration::from_millis(200))] {
            let limits = Limits { room: Room::new(places), silence, ..Limits::default() };
            limited(limits, |address, _stop| async move {
                let mut silent = Vec::new();
                for _ in 0..6 {
                    silent.push(TcpStream::connect(address).await.unwrap());
                }
                let answer = testing::request(address, "GET", "/").await.unwrap();
                assert_eq!(answer.body, "here");
                // One place is for the client that is answered. The last silent clients stay until it is their turn, or
                // the time is up.
                let stay = if silence > Duration::from_secs(60) { places - 1 } else { 0 };
                for mut stream in silent.drain(..6 - stay) {
                    assert_eq!(rest(&mut stream).await, "");
                }
            });
        }
    }

    #[test]
    fn servers_share_a_room() {
        let limits = Limits { room: Room::new(1), ..Limits::default() };
        limited(limits.clone(), |first, _stop| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let second = listener.local_addr().unwrap();
            let router = Router::new().route("/", get(|| async { "here" }));
            let server = tokio::spawn(serve_on(listener, router, limits, std::future::pending()));
            for address in [first, second, first, second] {
                assert_eq!(testing::request(address, "GET", "/").await.unwrap().body, "here");
            }
            server.abort();
        });
    }

    #[test]
    fn connections_end_with_the_answer_that_they_owe() {
        use tokio::io::AsyncWriteExt as _;
        let request = b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n";
        // Connections end by age.
        let limits = Limits { lifetime: Duration::from_millis(50), ..Limits::default() };
        limited(limits, |address, _stop| async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request).await.unwrap();
            assert!(rest(&mut stream).await.ends_with("here"));
        });
        // Connections end with the server.
        limited(Limits::default(), |address, stop| async move {
            let mut idle = TcpStream::connect(address).await.unwrap();
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request).await.unwrap();
            sleep(Duration::from_millis(20)).await;
            stop.send(()).unwrap();
            assert!(rest(&mut stream).await.ends_with("here"));
            assert_eq!(rest(&mut idle).await, "");
            let refused = TcpStream::connect(address).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        });
    }
}
