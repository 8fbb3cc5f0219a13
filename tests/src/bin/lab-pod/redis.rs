//! The part of Redis that a client with a long connection needs: PING, SET, GET, over RESP 2
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>). A process is one database.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rustix::net::sockopt::Timeout;

use crate::sock::{Failure, limit};

/// The longest command, word or reply that is read, in bytes.
const LIMIT: usize = 64 * 1024;

static DATABASE: Mutex<BTreeMap<Vec<u8>, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// Answers commands on one connection until the client closes it.
pub(crate) fn serve(stream: &TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(words) = read_command(&mut reader)? {
        let reply = execute(&words);
        { stream }.write_all(&reply)?;
    }
    Ok(())
}

fn execute(words: &[Vec<u8>]) -> Vec<u8> {
    let mut database = DATABASE.lock().unwrap_or_else(PoisonError::into_inner);
    let name = words.first().map(|name| name.to_ascii_uppercase()).unwrap_or_default();
    match (name.as_slice(), words.get(1..).unwrap_or_default()) {
        (b"PING", []) => b"+PONG\r\n".to_vec(),
        (b"PING", [text]) => bulk(text),
        (b"SET", [key, value]) => {
            database.insert(key.clone(), value.clone());
            b"+OK\r\n".to_vec()
        }
        (b"GET", [key]) => database.get(key).map_or_else(|| b"$-1\r\n".to_vec(), |value| bulk(value)),
        (b"PING" | b"SET" | b"GET", _) => b"-ERR wrong number of arguments\r\n".to_vec(),
        _ => b"-ERR unknown command\r\n".to_vec(),
    }
}

fn bulk(text: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", text.len()).as_bytes(), text, b"\r\n"].concat()
}

/// Reads an array of bulk strings, or words on a line; returns `None` at the end of the connection.
fn read_command(reader: &mut impl BufRead) -> io::Result<Option<Vec<Vec<u8>>>> {
    let Some(line) = read_line(reader)? else { return Ok(None) };
    let Some(count) = line.strip_prefix('*') else {
        return Ok(Some(line.split_whitespace().map(|word| word.as_bytes().to_vec()).collect()));
    };
    let mut words = Vec::new();
    for _ in 0..number(count)?.unwrap_or(0) {
        let head = read_line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let length = head.strip_prefix('$').map(number).transpose()?.flatten();
        words.push(read_bulk(reader, length.ok_or_else(|| malformed(&head))?)?);
    }
    Ok(Some(words))
}

/// Sends a command, words separated by spaces, and returns the reply as text: `(nil)` for none, `ERR ...` for an
/// error.
pub(crate) fn ask(
    reader: &mut BufReader<&TcpStream>,
    command: &str,
    deadline: Instant,
) -> Result<String, Failure> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let mut request = format!("*{}\r\n", words.len()).into_bytes();
    words.iter().for_each(|word| request.extend(bulk(word.as_bytes())));
    { *reader.get_ref() }.write_all(&request).map_err(|error| Failure::new("send", &error))?;
    limit(reader.get_ref(), Timeout::Recv, deadline)
        .and_then(|()| read_reply(reader))
        .map_err(|error| Failure::new("recv", &error))
}

fn read_reply(reader: &mut impl BufRead) -> io::Result<String> {
    let line = read_line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut kind = line.chars();
    match (kind.next(), kind.as_str()) {
        (Some('+' | '-' | ':'), text) => Ok(text.to_owned()),
        (Some('$'), length) => match number(length)? {
            Some(length) => Ok(String::from_utf8_lossy(&read_bulk(reader, length)?).into_owned()),
            None => Ok("(nil)".to_owned()),
        },
        _ => Err(malformed(&line)),
    }
}

/// Reads a line without its line break; returns `None` at the end of the connection.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    reader.take(LIMIT as u64).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(line.trim_end().to_owned()))
}

fn read_bulk(reader: &mut impl BufRead, length: usize) -> io::Result<Vec<u8>> {
    let mut text = vec![0; length + 2];
    reader.read_exact(&mut text)?;
    text.truncate(length);
    Ok(text)
}

/// Parses a length; -1 means none.
fn number(text: &str) -> io::Result<Option<usize>> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(None),
        Ok(number) => {
            let length = usize::try_from(number).ok().filter(|length| *length <= LIMIT);
            length.map(Some).ok_or_else(|| malformed(text))
        }
        Err(_) => Err(malformed(text)),
    }
}

fn malformed(text: &str) -> io::Error {
    io::Error::other(format!("not RESP: {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_replies() {
        let set = [b"SET".to_vec(), b"k".to_vec(), b"a b".to_vec()];
        assert_eq!(words(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\na b\r\n").as_deref(), Some(&set[..]));
        assert_eq!(words(b"PING\r\n"), Some(vec![b"PING".to_vec()]));
        assert_eq!(words(b""), None);
        assert!(read_command(&mut &b"*1\r\n$9\r\nshort\r\n"[..]).is_err());

        assert_eq!((reply(&set), get(b"k"), get(b"other")), ("OK".into(), "a b".into(), "(nil)".into()));
        assert_eq!(reply(&[b"ping".to_vec()]), "PONG");
        assert!(reply(&[b"FLUSHALL".to_vec()]).starts_with("ERR"));
    }

    fn words(text: &[u8]) -> Option<Vec<Vec<u8>>> {
        read_command(&mut &*text).unwrap()
    }

    fn reply(words: &[Vec<u8>]) -> String {
        read_reply(&mut execute(words).as_slice()).unwrap()
    }

    fn get(key: &[u8]) -> String {
        reply(&[b"GET".to_vec(), key.to_vec()])
    }
}
