//! Echo requests by ping sockets: the kernel fills in checksum and identifier, and strips the IP header of answers.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::net::sockopt::Timeout;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::sock::{Failure, limit};

/// Sends one echo request on the connected ping socket and waits for its reply.
pub(crate) fn ping(socket: &OwnedFd, v6: bool, sequence: u16, deadline: Instant) -> Result<(), Failure> {
    let (request_type, reply_type) = if v6 { (128, 129) } else { (8, 0) };
    let [high, low] = sequence.to_be_bytes();
    let request = [request_type, 0, 0, 0, 0, 0, high, low];
    send(socket, &request, SendFlags::empty()).map_err(|error| Failure::new("send", &error.into()))?;
    wait(socket, reply_type, [high, low], deadline).map_err(|error| Failure::new("recv", &error))
}

fn wait(socket: &OwnedFd, reply_type: u8, number: [u8; 2], deadline: Instant) -> io::Result<()> {
    loop {
        limit(socket, Timeout::Recv, deadline)?;
        let mut answer = [0; 64];
        let (length, _) = recv(socket, &mut answer, RecvFlags::empty())?;
        if length >= 8 && answer[0] == reply_type && answer[6..8] == number {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}
