//! API client that reads its certificates again when their files change, because certificates are renewed while the
//! agent runs.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kube::Client;
use kube::client::Body;

use crate::bpf::chain;
use crate::sources::error::SourceError;

/// Time after which unusable credentials are tried again, even if the files have not changed.
const RETRY: Duration = Duration::from_secs(10);

/// A client, and the files that it was made from.
pub(super) type Made = (Client, Vec<PathBuf>);
type Make = Box<dyn Fn() -> Result<Made, SourceError> + Send>;

/// Fingerprint of a file's content: inode, size and modification time; `None` without such a file.
type Stamp = Option<(u64, u64, SystemTime)>;

struct Current {
    make: Make,
    client: Client,
    files: Vec<PathBuf>,
    /// Stamps of the files, taken before the last attempt to make a client.
    stamps: Vec<Stamp>,
    retry_at: Option<Instant>,
}

/// Returns a client that is made anew when its files have changed; `files` are the present ones. Requests under way
/// continue with the client that they began with.
pub(super) fn client(files: &[PathBuf], make: Make) -> Result<Client, SourceError> {
    let stamps = stamps(files);
    let (client, files) = make()?;
    let namespace = client.default_namespace().to_owned();
    let current = Arc::new(Mutex::new(Current { make, client, files, stamps, retry_at: None }));
    let service = tower::service_fn(move |request: axum::http::Request<Body>| {
        let client = current.lock().unwrap_or_else(PoisonError::into_inner).newest();
        async move { client.send(request).await }
    });
    Ok(Client::new(service, namespace))
}

impl Current {
    fn newest(&mut self) -> Client {
        let (now, stamps) = (Instant::now(), stamps(&self.files));
        if stamps != self.stamps || self.retry_at.is_some_and(|at| at <= now) {
            self.stamps = stamps;
            match (self.make)() {
                Ok((client, files)) => {
                    tracing::info!("the credentials for the API server have changed");
                    if files != self.files {
                        self.stamps = self::stamps(&files);
                    }
                    (self.client, self.files, self.retry_at) = (client, files, None);
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(
                        error,
                        "the credentials for the API server have changed and cannot be used; the old ones are"
                    );
                    self.retry_at = Some(now + RETRY);
                }
            }
        }
        self.client.clone()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files
        .iter()
        .map(|path| {
            let file = std::fs::metadata(path).ok()?;
            Some((file.ino(), file.len(), file.modified().ok()?))
        })
        .collect()
}
