//! `lab-pod hold`.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::time::Instant;

use anyhow::{Result, bail};
use proxy_tests::lab::{Attempt, Line, Proto};

use crate::connect::{ask, datagram_socket, greeting, line, stream};
use crate::sock::{Failure, Target};
use crate::{print, redis};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
}

/// Opens the connection and reports it, then answers each line of standard input with a report.
pub(crate) fn run(args: &Args) -> Result<()> {
    let target = &args.target;
    let start = Instant::now();
    let mut attempt = Attempt::default();
    match target.proto {
        Proto::Tcp | Proto::Mptcp | Proto::Sctp => match stream(target, target.deadline(), &mut attempt) {
            Ok(stream) => {
                let mut reader = BufReader::new(&stream);
                let greeted = greeting(&mut reader, target.deadline(), &mut attempt);
                opened(greeted, attempt, start)?;
                talk(start, |text, attempt| say(&mut reader, text, target, attempt))
            }
            Err(failure) => opened(Err(failure), attempt, start),
        },
        Proto::Redis => match stream(target, target.deadline(), &mut attempt) {
            Ok(stream) => {
                let mut reader = BufReader::new(&stream);
                opened(Ok(()), attempt, start)?;
                talk(start, |text, attempt| {
                    attempt.peername = stream.peer_addr().ok();
                    attempt.text = Some(redis::ask(&mut reader, text, target.deadline())?);
                    Ok(())
                })
            }
            Err(failure) => opened(Err(failure), attempt, start),
        },
        Proto::Udp | Proto::UdpUnconnected => match datagram_socket(target, target.deadline()) {
            Ok(socket) => {
                attempt.peername = socket.peer_addr().ok();
                attempt.local = socket.local_addr().ok();
                opened(Ok(()), attempt, start)?;
                talk(start, |text, attempt| send(&socket, text, target, attempt))
            }
            Err(failure) => opened(Err(failure), attempt, start),
        },
        Proto::Http | Proto::Ping => bail!("{:?} has no connection to hold", target.proto),
    }
}

fn opened(result: Result<(), Failure>, attempt: Attempt, start: Instant) -> Result<()> {
    report(result, attempt, start, start)
}

/// Reads lines, passes each to `exchange` and reports the result.
fn talk(start: Instant, mut exchange: impl FnMut(&str, &mut Attempt) -> Result<(), Failure>) -> Result<()> {
    for text in io::stdin().lock().lines() {
        let began = Instant::now();
        let mut attempt = Attempt::default();
        let result = exchange(&text?, &mut attempt);
        report(result, attempt, start, began)?;
    }
    Ok(())
}

fn report(result: Result<(), Failure>, mut attempt: Attempt, start: Instant, began: Instant) -> Result<()> {
    attempt.ok = true;
    if let Err(failure) = result {
        failure.report(&mut attempt);
    }
    attempt.at_us = (began - start).as_micros() as u64;
    attempt.elapsed_us = began.elapsed().as_micros() as u64;
    print(&Line::Attempt(attempt))
}

fn say(
    reader: &mut BufReader<&TcpStream>,
    text: &str,
    target: &Target,
    attempt: &mut Attempt,
) -> Result<(), Failure> {
    attempt.peername = reader.get_ref().peer_addr().ok();
    let sent = { *reader.get_ref() }.write_all(format!("{text}\n").as_bytes());
    sent.map_err(|error| Failure::new("send", &error))?;
    attempt.text = Some(line(reader, target.deadline())?);
    Ok(())
}

fn send(socket: &UdpSocket, text: &str, target: &Target, attempt: &mut Attempt) -> Result<(), Failure> {
    attempt.peername = socket.peer_addr().ok();
    ask(socket, target, text, target.deadline(), attempt)?;
    attempt.text = Some(text.to_owned());
    Ok(())
}
