//! The thread that accepts and serves connections.

use std::convert::Infallible;
use std::future;
use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Result, bail};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::net::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Shared;
use super::http;

/// Number of connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Command of the handle to the thread, with a sender that reports its completion.
pub(super) enum Command {
    Away(Option<Duration>, mpsc::Sender<()>),
    Back(mpsc::Sender<()>),
    CutConnections(mpsc::Sender<()>),
    Stop,
}

/// Prepares the thread, so that the caller gets the errors.
pub(super) fn prepare(
    shared: Arc<Shared>,
    listener: TcpListener,
    commands: UnboundedReceiver<Command>,
) -> Result<impl FnOnce() + Send + 'static> {
    listener.set_nonblocking(true)?;
    // Goes away and comes back once, as a check: the kernel would take back a port of its own choice meanwhile.
    let address = listener.local_addr()?;
    rustix::net::shutdown(&listener, Shutdown::Read)?;
    rustix::net::listen(&listener, BACKLOG)?;
    if listener.local_addr()? != address {
        bail!("the API server's listener on {address} was bound to port 0: bind it to an explicit port");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(move || {
        let server = Server { shared, listener, commands, connections: JoinSet::new() };
        if let Err(error) = runtime.block_on(server.run()) {
            tracing::error!(%error, "the test API server stopped");
        }
    })
}

struct Server {
    shared: Arc<Shared>,
    listener: TcpListener,
    commands: UnboundedReceiver<Command>,
    connections: JoinSet<()>,
}

impl Server {
    async fn run(mut self) -> io::Result<()> {
        let mut acceptor = Some(self.listen()?);
        let mut back_at = None;
        loop {
            tokio::select! {
                stream = accept(acceptor.as_ref()) => self.serve(stream),
                Some(_ended) = self.connections.join_next() => {}
                () = reached(back_at) => {
                    acceptor = Some(self.listen()?);
                    back_at = None;
                }
                command = self.commands.recv() => match command {
                    Some(Command::Away(time, done)) => {
                        back_at = time.map(|time| Instant::now() + time);
                        // The socket keeps its port and refuses connections until it listens again.
                        if acceptor.take().is_some() {
                            rustix::net::shutdown(&self.listener, Shutdown::Read)?;
                        }
                        self.connections.shutdown().await;
                        let _caller_gone = done.send(());
                    }
                    Some(Command::Back(done)) => {
                        if acceptor.is_none() {
                            acceptor = Some(self.listen()?);
                        }
                        back_at = None;
                        let _caller_gone = done.send(());
                    }
                    Some(Command::CutConnections(done)) => {
                        self.connections.shutdown().await;
                        let _caller_gone = done.send(());
                    }
                    Some(Command::Stop) | None => return Ok(()),
                },
            }
        }
    }

    /// Returns a new acceptor each time: the old one would remember that the socket was shut down.
    fn listen(&self) -> io::Result<tokio::net::TcpListener> {
        rustix::net::listen(&self.listener, BACKLOG)?;
        tokio::net::TcpListener::from_std(self.listener.try_clone()?)
    }

    fn serve(&mut self, stream: TcpStream) {
        let shared = Arc::clone(&self.shared);
        self.connections.spawn(async move {
            let _latency_only = stream.set_nodelay(true);
            let break_write = Arc::new(AtomicBool::new(false));
            let wire = Wire { stream, break_write: Arc::clone(&break_write), broken: false };
            let service = service_fn(move |request| {
                let (shared, break_write) = (Arc::clone(&shared), Arc::clone(&break_write));
                async move { Ok::<_, Infallible>(http::handle(shared, break_write, request).await) }
            });
            if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(wire), service).await {
                tracing::debug!(%error, "connection of the test API server ended");
            }
        });
    }
}

async fn accept(acceptor: Option<&tokio::net::TcpListener>) -> TcpStream {
    let Some(acceptor) = acceptor else { return future::pending().await };
    loop {
        match acceptor.accept().await {
            Ok((stream, _peer)) => return stream,
            // Out of descriptors, or the peer has left again: the server goes on.
            Err(error) => {
                tracing::warn!(%error, "the test API server cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn reached(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => future::pending().await,
    }
}

/// A connection that can be told to break in the middle of its next write.
struct Wire {
    stream: TcpStream,
    break_write: Arc<AtomicBool>,
    broken: bool,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

// Not vectored, so that half of a write ends within an HTTP chunk, not between its head and its content.
impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if !self.break_write.load(Ordering::Relaxed) {
            return Pin::new(&mut self.stream).poll_write(cx, buf);
        }
        if self.broken {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let (half, _lost) = buf.split_at(buf.len() / 2);
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, half))?;
        self.broken = true;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
