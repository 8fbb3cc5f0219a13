//! The part of HTTP/1.1 that a greeting needs.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

/// Longest request or answer that is read, in bytes.
const LIMIT: u64 = 64 * 1024;

/// Answers requests on one connection until the client closes it or asks for it to be closed.
pub(crate) fn serve(stream: &TcpStream, name: &str, peer: SocketAddr, local: SocketAddr) -> io::Result<()> {
    let body = format!("You've hit {name}\npeer {peer}\nlocal {local}\n");
    let mut reader = BufReader::new(stream);
    while let Some(last) = read_request(&mut reader)? {
        let connection = if last { "close" } else { "keep-alive" };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            body.len()
        );
        { stream }.write_all((head + &body).as_bytes())?;
        if last {
            break;
        }
    }
    Ok(())
}

/// Reads one request with its body. Returns `None` at the end of the connection; else whether the request is the last
/// one.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<bool>> {
    let mut reader = reader.take(LIMIT);
    let (mut last, mut length, mut lines) = (false, 0, 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        lines += 1;
        last |= line == "connection: close" || (lines == 1 && line.ends_with("http/1.0"));
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    io::copy(&mut reader.take(length), &mut io::sink())?;
    Ok(Some(last))
}

/// Makes one request and returns the name of the server, the client address that it saw, and its own address.
pub(crate) fn request(
    mut stream: impl Read + Write,
    host: SocketAddr,
) -> io::Result<(String, SocketAddr, SocketAddr)> {
    write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(LIMIT).read_to_string(&mut answer)?;
    parse(&answer).ok_or_else(|| match answer.is_empty() {
        true => io::ErrorKind::UnexpectedEof.into(),
        false => io::Error::other(format!("unexpected answer {answer:?}")),
    })
}

fn field<'a>(answer: &'a str, prefix: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix(prefix))
}

fn parse(answer: &str) -> Option<(String, SocketAddr, SocketAddr)> {
    Some((
        field(answer, "You've hit ")?.to_owned(),
        field(answer, "peer ")?.parse().ok()?,
        field(answer, "local ")?.parse().ok()?,
    ))
}
