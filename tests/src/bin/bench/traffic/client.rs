//! The client side: one process that runs the jobs of standard input and answers on standard output.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, connect, sendto, socket_with};

use super::wire::{Answer, Call, Job, Workload};
use crate::cpu;

/// Time after which an answer counts as lost (UDP), or as an error (TCP).
const UDP_PATIENCE: Duration = Duration::from_millis(100);
const TCP_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of one write of a stream.
const CHUNK: usize = 64 << 10;

/// Arguments of the client.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// CPU to run on.
    #[arg(long)]
    pub(crate) cpu: usize,
}

/// Does one job per line of standard input.
///
/// # Errors
/// If a line is no job, or the answer cannot be written.
pub(crate) fn client(args: &ClientArgs) -> Result<()> {
    cpu::pin(args.cpu)?;
    let mut kept = BTreeMap::new();
    for line in io::stdin().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Job::Run { workload, server, warm_up_us, measure_us } => {
                let warm_up = Duration::from_micros(warm_up_us);
                run(&mut kept, workload, server, warm_up, Duration::from_micros(measure_us))
            }
            Job::Time { call, server, calls } => time(call, server, calls),
        };
        let answer = answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        io::stdout().write_all(text.as_bytes())?;
    }
    Ok(())
}

/// Sockets that outlive a job.
enum Kept {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

fn run(
    kept: &mut BTreeMap<(Workload, SocketAddr), Kept>,
    workload: Workload,
    server: SocketAddr,
    warm_up: Duration,
    measure: Duration,
) -> Result<Answer> {
    let socket = match workload {
        Workload::TcpCrr | Workload::TcpCrrClient => None,
        Workload::TcpRr | Workload::TcpStream | Workload::UdpRr | Workload::UdpUnconnectedRr => {
            Some(match kept.entry((workload, server)) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(open(workload, server)?),
            })
        }
    };
    let mut buffer = vec![0x2a; CHUNK];
    let mut lost = 0;
    let mut once: Box<dyn FnMut() -> io::Result<u64> + '_> = match (workload, socket) {
        (Workload::TcpStream, Some(Kept::Tcp(stream))) => Box::new(|| Ok(stream.write(&buffer)? as u64)),
        (_, Some(Kept::Tcp(stream))) => Box::new(|| {
            stream.write_all(&buffer[..1])?;
            stream.read_exact(&mut buffer[..1])?;
            Ok(1)
        }),
        (Workload::UdpRr, Some(Kept::Udp(socket))) => Box::new(|| {
            socket.send(&buffer[..1])?;
            answered(socket.recv(&mut buffer).map(|_| ()), &mut lost)
        }),
        (_, Some(Kept::Udp(socket))) => Box::new(|| {
            socket.send_to(&buffer[..1], server)?;
            let from = socket.recv_from(&mut buffer).and_then(|(_, from)| {
                // The application must see the address that it asked.
                if from == server { Ok(()) } else { Err(io::Error::other(format!("answer from {from}"))) }
            });
            answered(from, &mut lost)
        }),
        (_, None) => Box::new(|| connect_request_close(workload, server).map(|()| 1)),
    };
    let begin = Instant::now();
    while begin.elapsed() < warm_up {
        once()?;
    }
    let begin = Instant::now();
    let mut operations = 0;
    let elapsed = loop {
        operations += once()?;
        let elapsed = begin.elapsed();
        if elapsed >= measure {
            break elapsed;
        }
    };
    drop(once);
    let nanos = u64::try_from(elapsed.as_nanos())?;
    Ok(Answer::Ran { operations, nanos, lost })
}

fn open(workload: Workload, server: SocketAddr) -> io::Result<Kept> {
    match workload {
        Workload::TcpCrr | Workload::TcpCrrClient | Workload::TcpRr | Workload::TcpStream => {
            let stream = TcpStream::connect_timeout(&server, TCP_PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TCP_PATIENCE))?;
            stream.set_write_timeout(Some(TCP_PATIENCE))?;
            Ok(Kept::Tcp(stream))
        }
        Workload::UdpRr | Workload::UdpUnconnectedRr => {
            let any: SocketAddr = match server {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(UDP_PATIENCE))?;
            if workload == Workload::UdpRr {
                socket.connect(server)?;
            }
            Ok(Kept::Udp(socket))
        }
    }
}

fn answered(result: io::Result<()>, lost: &mut u64) -> io::Result<u64> {
    match result {
        Ok(()) => Ok(1),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            *lost += 1;
            Ok(0)
        }
        Err(error) => Err(error),
    }
}

fn connect_request_close(workload: Workload, server: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(server)?;
    let mut byte = [0x2a];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    if workload == Workload::TcpCrrClient {
        return Ok(());
    }
    match stream.read(&mut byte)? {
        0 => Ok(()),
        _ => Err(io::Error::other("the server says more than it should")),
    }
}

fn time(call: Call, server: SocketAddr, calls: u32) -> Result<Answer> {
    let lasting = if call == Call::NextSend { Some(fresh(call, server)?) } else { None };
    if let Some(socket) = &lasting {
        sendto(socket, b"*", SendFlags::empty(), &server)?;
    }
    let mut nanos = Vec::with_capacity(calls as usize);
    for _ in 0..calls {
        let took = match (call, &lasting) {
            (Call::UdpConnect | Call::TcpConnect, _) => {
                let socket = fresh(call, server)?;
                let begin = Instant::now();
                connect(&socket, &server)?;
                begin.elapsed()
            }
            (Call::FirstSend | Call::NextSend, Some(socket)) => timed_send(socket, server)?,
            (Call::FirstSend | Call::NextSend, None) => timed_send(&fresh(call, server)?, server)?,
        };
        nanos.push(u32::try_from(took.as_nanos())?);
        if call == Call::TcpConnect {
            // The server may share this CPU, and needs time to accept the connections.
            std::thread::yield_now();
        }
    }
    Ok(Answer::Timed { nanos })
}

fn timed_send(socket: &OwnedFd, server: SocketAddr) -> Result<Duration> {
    let begin = Instant::now();
    sendto(socket, b"*", SendFlags::empty(), &server)?;
    Ok(begin.elapsed())
}

fn fresh(call: Call, server: SocketAddr) -> Result<OwnedFd> {
    let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match call {
        Call::TcpConnect => SocketType::STREAM,
        Call::UdpConnect | Call::FirstSend | Call::NextSend => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if call == Call::TcpConnect {
        // Closing resets the connection: no port stays in TIME_WAIT.
        set_socket_linger(&socket, Some(Duration::ZERO))?;
    }
    Ok(socket)
}
