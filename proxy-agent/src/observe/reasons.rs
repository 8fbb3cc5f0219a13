//! Facts about a Service's endpoints that only the agent knows: the reasons why an endpoint is not in a set, and the
//! endpoints that the maps do not hold.
//!
//! A running agent answers on a UNIX socket beside its state file, which only root can connect to. A question is a
//! line, `NAMESPACE/NAME`. The answer is JSON, [`PortReasons`] for each port and family, and then the end of the
//! stream.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::reconcile::cluster::{ObjectKey, Service, Slice};
use crate::reconcile::desired::{Context, PortKey, Standing, desired_service, standings};

/// One port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortReasons {
    /// Port name; empty when unnamed.
    pub(crate) port: String,
    /// IP protocol number.
    pub(crate) proto: u8,
    /// `IPv4` or `IPv6`.
    pub(crate) family: String,
    /// All endpoints, including those that no client gets.
    pub(crate) endpoints: Vec<EndpointReasons>,
}

/// An endpoint, and the reasons why sets do not contain it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EndpointReasons {
    /// Address and port.
    pub(crate) endpoint: SocketAddr,
    /// Condition `serving`.
    pub(crate) serving: bool,
    /// Whether it is on this node.
    pub(crate) on_this_node: bool,
    /// Reason why it is not in the cluster set; none if it is.
    pub(crate) not_in_cluster: Option<String>,
    /// Reason why it is not in the local set; none if it is.
    pub(crate) not_in_local: Option<String>,
}

impl PortReasons {
    /// Returns whether this is about the port `key`.
    pub(crate) fn is_of(&self, key: &PortKey) -> bool {
        *self.port == *key.port_name && self.proto == key.proto && self.family == key.family.to_string()
    }
}

impl From<&Standing> for EndpointReasons {
    fn from(standing: &Standing) -> Self {
        Self {
            endpoint: SocketAddr::new(standing.addr.to_ip(), standing.port),
            serving: standing.serving,
            on_this_node: standing.on_this_node,
            not_in_cluster: standing.cluster.err().map(|why| why.words().to_owned()),
            not_in_local: standing.local.err().map(|why| why.words().to_owned()),
        }
    }
}

/// Returns the answer about a Service.
pub(crate) fn of_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    context: &Context,
) -> Vec<PortReasons> {
    let desired = desired_service(service, slices.clone(), context);
    let standings = standings(&desired, slices, context);
    let reasons = desired.ports.iter().zip(&standings).map(|(port, standings)| PortReasons {
        port: port.key.port_name.to_string(),
        proto: port.key.proto,
        family: port.key.family.to_string(),
        endpoints: standings.iter().map(Into::into).collect(),
    });
    reasons.collect()
}

/// A question on its way to the task that has the objects.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Service that the question is about.
    pub(crate) service: ObjectKey,
    /// Channel for the answer, which is empty where there is no such Service.
    pub(crate) reply: oneshot::Sender<Vec<PortReasons>>,
}

/// Longest question in bytes: a name has up to 63 characters, and so has a namespace.
const QUESTION_MAX: u64 = 256;
/// Longest time that either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns the socket of the agent whose state file is `state_file`.
pub(crate) fn socket(state_file: &Path) -> PathBuf {
    state_file.with_extension("sock")
}

/// Answers on `path` until the receiver is gone. A failure is logged: only `explain` misses the answers.
pub(crate) async fn serve(path: PathBuf, asked: mpsc::Sender<Asked>) {
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the socket that `explain` asks at cannot be made");
            return;
        }
    };
    while let Ok((stream, _)) = listener.accept().await {
        let asked = asked.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, answer(stream, asked)).await {
                Ok(Ok(())) => {}
                failed => tracing::debug!(?failed, "a question was not answered"),
            }
        });
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    // Removes the socket of an agent that has gone: two agents do not run on one pin directory.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

async fn answer(stream: tokio::net::UnixStream, asked: mpsc::Sender<Asked>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(reader.take(QUESTION_MAX)).read_line(&mut line).await?;
    let Some((namespace, name)) = line.trim_end().split_once('/') else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let (reply, answer) = oneshot::channel();
    let question = Asked { service: ObjectKey::new(namespace, name), reply };
    asked.send(question).await.map_err(io::Error::other)?;
    let answer = answer.await.map_err(io::Error::other)?;
    writer.write_all(&serde_json::to_vec(&answer)?).await
}

/// Asks the agent whose socket is `path`.
///
/// # Errors
///
/// When no agent answers there.
pub(crate) fn ask(path: &Path, service: &ObjectKey) -> io::Result<Vec<PortReasons>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "{service}")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
