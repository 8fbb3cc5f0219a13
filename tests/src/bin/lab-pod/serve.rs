//! `lab-pod serve`.
//!
//! TCP and SCTP: on connect the server sends `NAME PEER LOCAL`, then echoes lines until the client closes. UDP: it
//! answers `NAME PEER LOCAL PAYLOAD`. HTTP: see [`crate::http`]; Redis: see [`crate::redis`].

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::thread;

use anyhow::{Context as _, Result, bail};
use proxy_tests::lab::Line;
use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name to answer with.
    #[arg(long)]
    name: String,
    /// Listeners: KIND=ADDRESS:PORT, with KIND one of tcp, sctp, http, redis, udp, echo (TCP, raw), sink (TCP,
    /// discards), udp-echo (raw).
    #[arg(required = true)]
    listeners: Vec<Listener>,
}

#[derive(Clone, Debug)]
struct Listener {
    kind: Kind,
    address: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp,
    Sctp,
    Http,
    Redis,
    Udp,
    Echo,
    Sink,
    UdpEcho,
}

impl FromStr for Listener {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, address) = text.split_once('=').context("expected KIND=ADDRESS:PORT")?;
        let kind = match kind {
            "tcp" => Kind::Tcp,
            "sctp" => Kind::Sctp,
            "http" => Kind::Http,
            "redis" => Kind::Redis,
            "udp" => Kind::Udp,
            "echo" => Kind::Echo,
            "sink" => Kind::Sink,
            "udp-echo" => Kind::UdpEcho,
            _ => bail!("unknown kind {kind:?}"),
        };
        Ok(Self { kind, address: address.parse().context("expected ADDRESS:PORT")? })
    }
}

/// Starts every listener, reports that it is listening, and serves until the process is killed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut threads = Vec::new();
    for listener in &args.listeners {
        threads.push(listener.start(&args.name).with_context(|| format!("cannot serve {listener:?}"))?);
    }
    crate::print(&Line::Ready)?;
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(())
}

impl Listener {
    /// Binds a listener, and serves it on a thread.
    fn start(&self, name: &str) -> io::Result<thread::JoinHandle<io::Result<()>>> {
        let name = name.to_owned();
        let kind = self.kind;
        Ok(match kind {
            Kind::Udp | Kind::UdpEcho => {
                let socket = UdpSocket::bind(self.address)?;
                let name = matches!(kind, Kind::Udp).then_some(name);
                thread::spawn(move || serve_datagrams(&socket, name.as_deref()))
            }
            Kind::Sctp => {
                let listener = listen_sctp(self.address)?;
                thread::spawn(move || serve_streams(&listener, kind, &name))
            }
            Kind::Tcp | Kind::Http | Kind::Redis | Kind::Echo | Kind::Sink => {
                let listener = TcpListener::bind(self.address)?;
                thread::spawn(move || serve_streams(&listener, kind, &name))
            }
        })
    }
}

fn listen_sctp(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::SCTP))?;
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, 128)?;
    // accept, read and write are the same for every stream protocol.
    Ok(socket.into())
}

fn serve_streams(listener: &TcpListener, kind: Kind, name: &str) -> io::Result<()> {
    thread::scope(|scope| {
        loop {
            match listener.accept() {
                // A client that breaks off does not affect the others.
                Ok((stream, peer)) => _ = scope.spawn(move || serve_stream(&stream, peer, kind, name)),
                // The client was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    })
}

fn serve_stream(mut stream: &TcpStream, peer: SocketAddr, kind: Kind, name: &str) -> io::Result<()> {
    let (peer, local) = (canonical(peer), canonical(stream.local_addr()?));
    match kind {
        Kind::Http => return crate::http::serve(stream, name, peer, local),
        Kind::Redis => return crate::redis::serve(stream),
        Kind::Echo => _ = io::copy(&mut { stream }, &mut stream)?,
        Kind::Sink => _ = io::copy(&mut stream, &mut io::sink())?,
        Kind::Tcp | Kind::Sctp | Kind::Udp | Kind::UdpEcho => {
            stream.write_all(format!("{name} {peer} {local}\n").as_bytes())?;
            let mut line = String::new();
            let mut reader = BufReader::new(stream);
            while reader.read_line(&mut line)? > 0 {
                stream.write_all(line.as_bytes())?;
                line.clear();
            }
        }
    }
    Ok(())
}

/// Answers datagrams; with the payload alone if `name` is `None`.
fn serve_datagrams(socket: &UdpSocket, name: Option<&str>) -> io::Result<()> {
    let local = canonical(socket.local_addr()?);
    let mut buffer = vec![0; 65536];
    loop {
        // An error here belongs to an earlier answer, whose client is gone.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let payload = &buffer[..length];
        // An error here is ignored for the same reason.
        let _ = match name {
            Some(name) => {
                let head = format!("{name} {} {local} ", canonical(peer));
                socket.send_to(&[head.as_bytes(), payload].concat(), peer)
            }
            None => socket.send_to(payload, peer),
        };
    }
}

/// Returns an IPv4 address as IPv4, also on an AF_INET6 socket.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
