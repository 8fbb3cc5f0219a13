//! `lab-pod connect`.

use std::io::{self, BufRead as _, BufReader};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_tests::lab::{Attempt, Line, Proto, Summary};
use rustix::net::connect;
use rustix::net::sockopt::Timeout;

use crate::sock::{Failure, Target, limit};
use crate::{http, icmp, print, redis};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Number of attempts.
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Continue until standard input is closed, instead of a number of attempts.
    #[arg(long, conflicts_with = "count")]
    until_eof: bool,
    /// Pause after each attempt.
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
    /// Number of UDP datagrams sent by one socket before the next is opened.
    #[arg(long, default_value_t = 1)]
    per_socket: usize,
    /// TCP: end each attempt when the server has closed the connection, too.
    #[arg(long)]
    to_the_end: bool,
    /// UDP: each attempt connects the same socket to the target and then to this address, and ends when this address
    /// answers.
    #[arg(long)]
    then: Option<SocketAddr>,
}

/// Time after which a request is sent again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Pauses of a socket between its second connect() and its request, attempt by attempt.
const RESTS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(5), Duration::from_millis(120)];

/// Makes the attempts and prints each, then the summary.
pub(crate) fn run(args: &Args) -> Result<()> {
    static END: AtomicBool = AtomicBool::new(false);
    if args.until_eof {
        thread::spawn(|| {
            // A read error ends the loop as well.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            END.store(true, Ordering::Relaxed);
        });
    }
    let start = Instant::now();
    let mut summary = Summary::default();
    let mut socket = None;
    let mut number = 0;
    while if args.until_eof { !END.load(Ordering::Relaxed) } else { number < args.count } {
        if number % args.per_socket.max(1) == 0 {
            socket = None;
        }
        let began = Instant::now();
        let mut attempt = Attempt { at_us: micros(began - start), ..Attempt::default() };
        let result = match args.then {
            Some(then) => again(&args.target, then, number, &mut socket, &mut attempt),
            None => one(args, number, &mut socket, &mut attempt),
        };
        if let Err(failure) = result {
            failure.report(&mut attempt);
        }
        if args.then.is_none() {
            attempt.elapsed_us = micros(began.elapsed());
        }
        summary.add(&attempt);
        print(&Line::Attempt(attempt))?;
        number += 1;
        if args.pace_ms > 0 {
            thread::sleep(Duration::from_millis(args.pace_ms));
        }
    }
    print(&Line::Summary(summary))
}

/// Makes one attempt. `kept` is the UDP socket of the attempt before, if it is to be used again.
fn one(
    Args { target, to_the_end, .. }: &Args,
    number: usize,
    kept: &mut Option<UdpSocket>,
    attempt: &mut Attempt,
) -> Result<(), Failure> {
    let deadline = target.deadline();
    match target.proto {
        Proto::Tcp | Proto::Mptcp | Proto::Sctp => {
            let stream = stream(target, deadline, attempt)?;
            let mut reader = BufReader::new(&stream);
            greeting(&mut reader, deadline, attempt)?;
            if *to_the_end {
                close(&stream, &mut reader, deadline).map_err(|error| Failure::new("close", &error))?;
            }
        }
        Proto::Http => {
            let stream = stream(target, deadline, attempt)?;
            let answer =
                limit(&stream, Timeout::Recv, deadline).and_then(|()| http::request(&stream, target.target));
            let (server, peer, endpoint) = answer.map_err(|error| Failure::new("recv", &error))?;
            (attempt.server, attempt.peer, attempt.endpoint) = (Some(server), Some(peer), Some(endpoint));
        }
        Proto::Redis => {
            let stream = stream(target, deadline, attempt)?;
            attempt.text = Some(redis::ask(&mut BufReader::new(&stream), "PING", deadline)?);
        }
        Proto::Udp | Proto::UdpUnconnected => {
            let socket = match kept {
                Some(socket) => socket,
                None => kept.insert(datagram_socket(target, deadline)?),
            };
            attempt.peername = socket.peer_addr().ok();
            ask(socket, target, &format!("{}-{number}", std::process::id()), deadline, attempt)?;
        }
        Proto::Ping => {
            let socket = target.open()?;
            target.connect(&socket, deadline)?;
            icmp::ping(&socket, target.address().is_ipv6(), number as u16, deadline)?;
        }
    }
    attempt.ok = true;
    Ok(())
}

fn close(stream: &TcpStream, reader: &mut BufReader<&TcpStream>, deadline: Instant) -> io::Result<u64> {
    stream.shutdown(Shutdown::Write)?;
    limit(stream, Timeout::Recv, deadline)?;
    io::copy(reader, &mut io::sink())
}

/// Connects the UDP socket to the target, then to `then`, and sends requests until `then` has answered. A socket that
/// has been destroyed fails, and the next attempt uses a new one.
fn again(
    target: &Target,
    then: SocketAddr,
    number: usize,
    kept: &mut Option<UdpSocket>,
    attempt: &mut Attempt,
) -> Result<(), Failure> {
    let deadline = target.deadline();
    let socket = match kept.take() {
        Some(socket) => socket,
        None => target.open()?.into(),
    };
    let connect = |to| connect(&socket, &to).map_err(|error| Failure::new("connect", &error.into()));
    connect(target.address())?;
    thread::sleep(Duration::from_millis(number as u64 * 7 % 40));
    connect(then)?;
    let connected = Instant::now();
    thread::sleep(RESTS[number % RESTS.len()]);
    loop {
        let soon = deadline.min(Instant::now() + ASK_AGAIN);
        let asked = ask(&socket, target, &format!("{}-{number}", std::process::id()), soon, attempt);
        attempt.elapsed_us = micros(connected.elapsed());
        match asked {
            Ok(()) if attempt.endpoint == Some(then) => {
                attempt.ok = true;
                *kept = Some(socket);
                return Ok(());
            }
            Err(failure) if failure.is_of_destroyed() => return Err(failure),
            Ok(()) | Err(_) if Instant::now() < deadline => {}
            Ok(()) | Err(_) => return Err(Failure::new("peer", &io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Opens a connected stream.
pub(crate) fn stream(
    target: &Target,
    deadline: Instant,
    attempt: &mut Attempt,
) -> Result<TcpStream, Failure> {
    let socket = target.open()?;
    target.connect(&socket, deadline)?;
    let stream = TcpStream::from(socket);
    attempt.peername = stream.peer_addr().ok();
    attempt.local = stream.local_addr().ok();
    Ok(stream)
}

/// Opens a UDP socket, connected if the protocol says so.
pub(crate) fn datagram_socket(target: &Target, deadline: Instant) -> Result<UdpSocket, Failure> {
    let socket = target.open()?;
    if target.proto == Proto::Udp {
        target.connect(&socket, deadline)?;
    }
    Ok(socket.into())
}

/// Reads the greeting of a stream server.
pub(crate) fn greeting(
    reader: &mut BufReader<&TcpStream>,
    deadline: Instant,
    attempt: &mut Attempt,
) -> Result<(), Failure> {
    let line = line(reader, deadline)?;
    identify(&line, attempt).map_err(|error| Failure::new("recv", &error))
}

/// Reads one line of a stream.
pub(crate) fn line(reader: &mut BufReader<&TcpStream>, deadline: Instant) -> Result<String, Failure> {
    read(reader, deadline).map_err(|error| Failure::new("recv", &error))
}

fn read(reader: &mut BufReader<&TcpStream>, deadline: Instant) -> io::Result<String> {
    let mut line = String::new();
    limit(reader.get_ref(), Timeout::Recv, deadline)?;
    reader.read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

/// Sends `payload` as a datagram and waits for the answer to it; answers to earlier datagrams are ignored.
pub(crate) fn ask(
    socket: &UdpSocket,
    target: &Target,
    payload: &str,
    deadline: Instant,
    attempt: &mut Attempt,
) -> Result<(), Failure> {
    let sent = if target.proto == Proto::UdpUnconnected {
        socket.send_to(payload.as_bytes(), target.address())
    } else {
        socket.send(payload.as_bytes())
    };
    attempt.local = socket.local_addr().ok();
    sent.map_err(|error| Failure::new("send", &error))?;
    let mut receive = || loop {
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        limit(socket, Timeout::Recv, deadline)?;
        let mut buffer = [0; 2048];
        let (length, from) = socket.recv_from(&mut buffer)?;
        let answer = String::from_utf8_lossy(&buffer[..length]);
        if answer.splitn(4, ' ').nth(3) == Some(payload) {
            attempt.from = Some(from);
            return identify(&answer, attempt);
        }
    };
    receive().map_err(|error| Failure::new("recv", &error))
}

/// Parses the leading `NAME PEER LOCAL` of an answer into `attempt`.
fn identify(text: &str, attempt: &mut Attempt) -> io::Result<()> {
    let (server, peer, endpoint) =
        parse(text).ok_or_else(|| io::Error::other(format!("unexpected answer {text:?}")))?;
    (attempt.server, attempt.peer, attempt.endpoint) = (Some(server.to_owned()), Some(peer), Some(endpoint));
    Ok(())
}

fn parse(text: &str) -> Option<(&str, SocketAddr, SocketAddr)> {
    let mut words = text.split(' ');
    Some((words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
