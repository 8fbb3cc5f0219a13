//! The agent's small HTTP servers: bind addresses as users write them, and serving that survives a taken port.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;

/// Pause between attempts to bind.
pub const BIND_RETRY: Duration = Duration::from_secs(5);

/// What to do when the address cannot be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBindFailure {
    /// Log and try again after this time, for ever.
    Retry(Duration),
    /// Return the error (`bindAddressHardFail`).
    Fail,
}

/// Why a server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address cannot be bound.
    #[error("cannot listen on {address} for {server}: {source}")]
    Bind {
        /// Which server.
        server: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The server ended.
    #[error("the {server} server on {address} ended: {source}")]
    Serve {
        /// Which server.
        server: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

impl HttpError {
    /// Which server it is about.
    pub fn server(&self) -> &'static str {
        match self {
            Self::Bind { server, .. } | Self::Serve { server, .. } => server,
        }
    }
}

/// Not the address of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be IP:port, an IP address, or empty (which switches the server off)")]
pub struct NotAnAddress;

/// A bind address: `IP:port`, or an IP alone, which gets `default_port`. Empty is `None`: no server.
///
/// # Errors
///
/// [`NotAnAddress`]; port 0 counts as no port.
pub fn bind_address(value: &str, default_port: u16) -> Result<Option<SocketAddr>, NotAnAddress> {
    if value.is_empty() {
        return Ok(None);
    }
    let bare = || {
        let ip = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(value);
        Some(SocketAddr::new(ip.parse::<IpAddr>().ok()?, default_port))
    };
    match value.parse::<SocketAddr>().ok().or_else(bare) {
        Some(address) if address.port() != 0 => Ok(Some(address)),
        _ => Err(NotAnAddress),
    }
}

/// Serves `router` on `address` until the future is dropped. `server` is its name in logs and errors.
///
/// # Errors
///
/// When binding fails and [`OnBindFailure::Fail`] is asked for, or when serving ends.
pub async fn serve(
    server: &'static str,
    address: SocketAddr,
    router: Router,
    on_failure: OnBindFailure,
) -> Result<(), HttpError> {
    let listener = loop {
        match (TcpListener::bind(address).await, on_failure) {
            (Ok(listener), _) => break listener,
            (Err(source), OnBindFailure::Fail) => return Err(HttpError::Bind { server, address, source }),
            (Err(error), OnBindFailure::Retry(pause)) => {
                tracing::error!(server, %address, %error, retry_in = ?pause, "cannot listen");
                tokio::time::sleep(pause).await;
            }
        }
    };
    tracing::info!(server, %address, "listening");
    axum::serve(listener, router).await.map_err(|source| HttpError::Serve { server, address, source })
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

    /// One request on a connection of its own.
    pub(crate) async fn request(address: SocketAddr, method: &str, path: &str) -> io::Result<Response> {
        request_with(address, method, path, &[]).await
    }

    /// The same with these headers.
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

    /// Serves `router` on a free port of loopback while `test` runs, which gets the address.
    pub(crate) fn with_server<F: Future<Output = ()>>(router: Router, test: impl FnOnce(SocketAddr) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::select! {
                ended = axum::serve(listener, router).into_future() => panic!("{ended:?}"),
                () = test(address) => {}
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    #[test]
    fn bind_addresses() {
        for (value, want) in [
            ("", None),
            ("0.0.0.0:10256", Some("0.0.0.0:10256")),
            ("192.0.2.10", Some("192.0.2.10:1234")),
            ("::", Some("[::]:1234")),
            ("[::1]", Some("[::1]:1234")),
            ("[::1]:99", Some("[::1]:99")),
        ] {
            let got = bind_address(value, 1234).unwrap();
            assert_eq!(got, want.map(|want| want.parse().unwrap()), "{value}");
        }
        for value in ["localhost:80", "10256", "0.0.0.0:0", "0.0.0.0:65536", "[::1", " "] {
            assert_eq!(bind_address(value, 1234), Err(NotAnAddress), "{value}");
        }
    }

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
            tokio::time::sleep(3 * pause).await;
            assert!(!server.is_finished());
            drop(taken);
            let answered = async {
                loop {
                    match testing::request(address, "GET", "/").await {
                        Ok(response) => break response,
                        Err(_) => tokio::time::sleep(pause).await,
                    }
                }
            };
            let response = tokio::time::timeout(Duration::from_secs(10), answered).await.unwrap();
            assert_eq!((response.status, &*response.body), (200, "here"));
            server.abort();
        });
    }
}
