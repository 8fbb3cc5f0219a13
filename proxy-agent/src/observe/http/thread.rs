//! A thread for servers, which answer at once even while the agent's own thread is busy.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A thread with a runtime, which ends with all of its tasks when this is dropped.
#[derive(Debug)]
pub(crate) struct ServerThread {
    handle: Handle,
    _stop: oneshot::Sender<()>,
}

impl ServerThread {
    /// Starts the thread. `name` is what `ps -L` shows.
    ///
    /// # Errors
    ///
    /// The kernel's error: no more threads, or no more files.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Nothing is ever sent on this channel.
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { handle, _stop: stop })
    }

    /// Returns the handle that spawns tasks on the thread.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn tasks_run_beside_this_thread_and_end_with_it() {
        let thread = ServerThread::start("servers").unwrap();
        let (done, told) = std::sync::mpsc::channel();
        thread.handle().spawn(async move { done.send(std::thread::current().name().map(str::to_owned)) });
        let name = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(name.as_deref(), Some("servers"));
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        thread.handle().spawn(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        drop(thread);
        let disconnected = std::sync::mpsc::RecvTimeoutError::Disconnected;
        assert_eq!(ended.recv_timeout(Duration::from_secs(10)), Err(disconnected));
    }
}
