//! Many connections from one place, on one thread: each sends a message again and again, and receives it back.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::lab::Place;

/// Default pause between an answer and the next request.
const PAUSE: Duration = Duration::from_millis(500);
/// Time without an answer after which a connection counts as broken: by then many retransmissions are lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time after which a datagram is sent again.
const RESEND: Duration = Duration::from_secs(1);
/// Number of connections that are opened at the same time: less than a listener's backlog.
const OPENING: usize = 64;

/// Transport of a crowd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One TCP connection each.
    Tcp,
    /// One connected UDP socket each.
    Udp,
}

/// Connections that carry data until they are dropped. A TCP connection then ends by a reset.
#[derive(Debug)]
pub struct Crowd {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    way: Way,
    pause: Duration,
    end: Notify,
    members: Vec<Member>,
}

/// One connection.
#[derive(Debug, Default)]
struct Member {
    rounds: AtomicU64,
    slowest_us: AtomicU64,
    broken: Mutex<Option<String>>,
}

/// State of a crowd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Connections that still carry data.
    pub alive: usize,
    /// Number of connections that have failed, by error.
    pub broken: BTreeMap<String, usize>,
    /// Smallest number of answers that a living connection has received.
    pub fewest: u64,
    /// Number of answers of all connections.
    pub answers: u64,
    /// Longest time to an answer.
    pub slowest: Duration,
}

impl Crowd {
    /// Opens `count` connections from `place`; returns when each has received its first answer or has failed.
    ///
    /// # Errors
    /// If the place cannot be entered. A connection that fails is not an error; see [`Crowd::outcome`].
    pub fn open(place: &Place, target: SocketAddr, way: Way, count: usize) -> Result<Self> {
        Self::with_pause(place, target, way, count, PAUSE)
    }

    /// Does the same as [`Crowd::open`], with `pause` after each answer.
    ///
    /// # Errors
    /// As [`Crowd::open`].
    pub fn with_pause(
        place: &Place,
        target: SocketAddr,
        way: Way,
        count: usize,
        pause: Duration,
    ) -> Result<Self> {
        let members = (0..count).map(|_| Member::default()).collect();
        let shared = Arc::new(Shared { target, way, pause, end: Notify::new(), members });
        let (place, ours) = (place.clone(), Arc::clone(&shared));
        let thread = thread::spawn(move || place.net().enter(|| run(&ours))?);
        let crowd = Self { shared, thread: Some(thread) };
        crowd.wait(&vec![1; count], 1)?;
        Ok(crowd)
    }

    /// Waits until every connection that is not broken has received one more answer, and `more` further answers to
    /// requests sent after the call.
    ///
    /// # Errors
    /// If the crowd has ended.
    pub fn go_on(&self, more: u64) -> Result<()> {
        let wanted: Vec<u64> = self.shared.members.iter().map(|member| member.rounds() + 1 + more).collect();
        self.wait(&wanted, 1 + more)
    }

    fn wait(&self, wanted: &[u64], answers: u64) -> Result<()> {
        // Each round ends with an answer or with the connection; the first may be a request from before.
        let deadline = Instant::now() + (PATIENCE + self.shared.pause) * u32::try_from(1 + answers)?;
        let members = &self.shared.members;
        while members
            .iter()
            .zip(wanted)
            .any(|(member, wanted)| member.rounds() < *wanted && !member.is_broken())
        {
            ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "the crowd has ended");
            ensure!(Instant::now() < deadline, "the crowd stands still: {:?}", self.outcome());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Returns the current state of the crowd.
    pub fn outcome(&self) -> Outcome {
        let mut outcome = Outcome {
            alive: 0,
            broken: BTreeMap::new(),
            fewest: u64::MAX,
            answers: 0,
            slowest: Duration::ZERO,
        };
        for member in &self.shared.members {
            outcome.answers += member.rounds();
            let slowest = Duration::from_micros(member.slowest_us.load(Ordering::Relaxed));
            outcome.slowest = outcome.slowest.max(slowest);
            if let Some(why) = member.broken().clone() {
                *outcome.broken.entry(why).or_default() += 1;
            } else {
                outcome.alive += 1;
                outcome.fewest = outcome.fewest.min(member.rounds());
            }
        }
        outcome
    }

    /// Ends all connections.
    ///
    /// # Errors
    /// If the crowd's thread failed.
    pub fn end(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        self.shared.end.notify_one();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_panic)) => bail!("the crowd's thread has panicked"),
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // The error is dropped here: [`Crowd::end`] returns it.
        let _ = self.stop();
    }
}

impl Member {
    fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    fn broken(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_broken(&self) -> bool {
        self.broken().is_some()
    }
}

/// Runs all connections until the end of the crowd.
fn run(shared: &Arc<Shared>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let doors = Arc::new(Semaphore::new(OPENING));
        let mut tasks = JoinSet::new();
        for number in 0..shared.members.len() {
            let (shared, doors) = (Arc::clone(shared), Arc::clone(&doors));
            tasks.spawn(async move {
                if let Err(error) = talk(&shared, number, &doors).await {
                    *shared.members[number].broken() = Some(error.to_string());
                }
            });
        }
        // Dropping the set ends its tasks.
        shared.end.notified().await;
    });
    Ok(())
}

/// Runs one connection until it fails.
async fn talk(shared: &Shared, number: usize, doors: &Semaphore) -> io::Result<()> {
    let member = &shared.members[number];
    let door = doors.acquire().await.map_err(io::Error::other)?;
    let mut line = within(Line::open(shared.target, shared.way)).await?;
    let mut door = Some(door);
    let mut round = 0_u64;
    loop {
        let mut words = [0; 16];
        words[..8].copy_from_slice(&(number as u64).to_be_bytes());
        words[8..].copy_from_slice(&round.to_be_bytes());
        let start = Instant::now();
        within(line.ask(&words)).await?;
        member.slowest_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        member.rounds.fetch_add(1, Ordering::Relaxed);
        drop(door.take());
        sleep(shared.pause).await;
        round += 1;
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, work).await.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?
}

enum Line {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Line {
    async fn open(target: SocketAddr, way: Way) -> io::Result<Self> {
        Ok(match way {
            Way::Tcp => {
                let stream = TcpStream::connect(target).await?;
                stream.set_nodelay(true)?;
                stream.set_zero_linger()?;
                Self::Tcp(stream)
            }
            Way::Udp => {
                let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
                let socket = UdpSocket::bind(any).await?;
                socket.connect(target).await?;
                Self::Udp(socket)
            }
        })
    }

    /// Sends `words` and waits for them to come back.
    async fn ask(&mut self, words: &[u8; 16]) -> io::Result<()> {
        let mut heard = [0; 16];
        match self {
            Self::Tcp(stream) => {
                stream.write_all(words).await?;
                stream.read_exact(&mut heard).await?;
            }
            Self::Udp(socket) => loop {
                socket.send(words).await?;
                match timeout(RESEND, socket.recv(&mut heard)).await {
                    // The answer to a datagram that was sent twice may arrive twice.
                    Ok(Ok(_)) if heard != *words => {}
                    Ok(result) => return result.map(drop),
                    Err(_elapsed) => {}
                }
            },
        }
        if heard == *words { Ok(()) } else { Err(io::Error::other("another answer")) }
    }
}
