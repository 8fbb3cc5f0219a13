//! The server side: one process with a thread per listener and connection.

use std::io::{self, Read, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context as _, Result};
use clap::Args;

use super::wire::Listener;
use crate::cpu;

/// Number of connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Arguments of the server.
#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    /// CPU to run on.
    #[arg(long)]
    pub(crate) cpu: usize,
    /// Address to listen on.
    #[arg(long)]
    pub(crate) address: IpAddr,
    /// First port; each listener has a port of its own.
    #[arg(long)]
    pub(crate) port: u16,
}

/// Listens, prints `ready`, and serves until standard input ends.
///
/// # Errors
/// If a port is not available.
pub(crate) fn server(args: &ServerArgs) -> Result<()> {
    cpu::pin(args.cpu)?;
    for listener in Listener::ALL {
        let address = SocketAddr::new(args.address, listener.port(args.port));
        serve(listener, address).with_context(|| format!("{listener:?} on {address}"))?;
    }
    println!("ready");
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn serve(listener: Listener, address: SocketAddr) -> io::Result<()> {
    match listener {
        Listener::Echo => tcp(address, echo, true),
        Listener::AnswerAndClose => tcp(address, |stream| answer(&stream), false),
        Listener::AnswerAndWait => tcp(
            address,
            |stream| {
                answer(&stream)?;
                read_to_end(stream, &mut [0; 16])
            },
            false,
        ),
        Listener::Sink => tcp(address, sink, true),
        Listener::Accept => tcp(address, |stream| read_to_end(stream, &mut [0; 16]), false),
        Listener::UdpEcho => {
            let socket = UdpSocket::bind(address)?;
            thread::spawn(move || {
                let mut buffer = [0; 2048];
                loop {
                    if let Ok((len, peer)) = socket.recv_from(&mut buffer) {
                        // The client notices a lost answer.
                        let _ = socket.send_to(&buffer[..len], peer);
                    }
                }
            });
            Ok(())
        }
        Listener::UdpHole => {
            let socket = UdpSocket::bind(address)?;
            thread::spawn(move || {
                let _open = socket;
                loop {
                    thread::park();
                }
            });
            Ok(())
        }
    }
}

fn tcp(address: SocketAddr, serve: fn(TcpStream) -> io::Result<()>, threads: bool) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    // The client may be faster than the server accepts: no connection must have to wait for a second SYN.
    rustix::net::listen(&listener, BACKLOG)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that has gone does not affect the others.
            if threads {
                thread::spawn(move || drop(serve(stream)));
            } else {
                drop(serve(stream));
            }
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 2048];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            len => stream.write_all(&buffer[..len])?,
        }
    }
}

/// Reads a byte and answers it. If the server closes then, the client's port numbers are free at once.
fn answer(mut stream: &TcpStream) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}

fn sink(stream: TcpStream) -> io::Result<()> {
    read_to_end(stream, &mut vec![0; 256 << 10])
}

fn read_to_end(mut stream: impl Read, buffer: &mut [u8]) -> io::Result<()> {
    while stream.read(buffer)? > 0 {}
    Ok(())
}
