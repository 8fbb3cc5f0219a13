//! A real etcd and kube-apiserver, from the binaries that the kubebuilder project packs for tests.
//!
//! `KUBEBUILDER_ASSETS` names the folder with both binaries. Nothing else of Kubernetes runs: no controllers, no
//! scheduler, no kubelets, so the test itself writes EndpointSlices and Nodes.

use std::env;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use hyper::Request;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime;

use super::client;

/// Time limit for etcd and kube-apiserver to become ready, on a slow machine.
const START_TIME: Duration = Duration::from_secs(120);
/// Bytes before the point in a DER SubjectPublicKeyInfo of a P-256 key (RFC 5480).
const SPKI_P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// A running etcd and kube-apiserver. Dropping it kills both and removes their data.
pub struct ControlPlane {
    url: String,
    token: String,
    // Declared before etcd, so that kube-apiserver is dropped first.
    _apiserver: Process,
    _etcd: Process,
    _folder: TempDir,
}

impl ControlPlane {
    /// Returns the folder that `KUBEBUILDER_ASSETS` names, if both binaries are in it.
    pub fn assets() -> Option<PathBuf> {
        let folder = PathBuf::from(env::var_os("KUBEBUILDER_ASSETS")?);
        ["etcd", "kube-apiserver"].iter().all(|name| folder.join(name).is_file()).then_some(folder)
    }

    /// Starts both binaries of `assets`, with `service_cidrs` (comma-separated, at most one of each family) as the
    /// range of clusterIPs, and waits until they are ready.
    ///
    /// # Errors
    /// If one of them does not start; the error ends with its last log lines.
    pub fn start(assets: &Path, service_cidrs: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("control-plane-").tempdir()?;
        let token = random_token()?;
        let etcd_url = format!("http://127.0.0.1:{}", free_port()?);
        let mut etcd = Process::start(
            &assets.join("etcd"),
            folder.path(),
            &[
                format!("--data-dir={}", folder.path().join("etcd").display()),
                format!("--listen-client-urls={etcd_url}"),
                format!("--advertise-client-urls={etcd_url}"),
                "--listen-peer-urls=http://127.0.0.1:0".to_owned(),
                "--unsafe-no-fsync=true".to_owned(),
            ],
        )?;
        wait(&mut etcd, &client::kubeconfig(&etcd_url, None), "/health")?;

        let port = free_port()?;
        let url = format!("https://127.0.0.1:{port}");
        let [private, public] = service_account_keys()?;
        let signing_key = folder.path().join("service-account.key");
        fs::write(&signing_key, private)?;
        let public_key = folder.path().join("service-account.pub");
        fs::write(&public_key, public)?;
        let tokens = folder.path().join("tokens.csv");
        fs::write(&tokens, format!("{token},test,test,system:masters\n"))?;
        let mut apiserver = Process::start(
            &assets.join("kube-apiserver"),
            folder.path(),
            &[
                format!("--etcd-servers={etcd_url}"),
                format!("--cert-dir={}", folder.path().join("certificates").display()),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                // A loopback address may not be an endpoint of the Service `kubernetes`.
                "--endpoint-reconciler-type=none".to_owned(),
                format!("--secure-port={port}"),
                format!("--service-cluster-ip-range={service_cidrs}"),
                format!("--token-auth-file={}", tokens.display()),
                "--authorization-mode=RBAC".to_owned(),
                "--allow-privileged=true".to_owned(),
                // No controller would create the ServiceAccounts that the plugin requires.
                "--disable-admission-plugins=ServiceAccount".to_owned(),
                format!("--service-account-issuer={url}/"),
                format!("--service-account-key-file={}", public_key.display()),
                format!("--service-account-signing-key-file={}", signing_key.display()),
            ],
        )?;
        wait(&mut apiserver, &client::kubeconfig(&url, Some(&token)), "/readyz")?;
        Ok(Self { url, token, _apiserver: apiserver, _etcd: etcd, _folder: folder })
    }

    /// Returns the URL of kube-apiserver, without a trailing slash.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns a kubeconfig with all rights.
    pub fn kubeconfig(&self) -> String {
        client::kubeconfig(&self.url, Some(&self.token))
    }

    /// Writes [`Self::kubeconfig`] to a file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        fs::write(path, self.kubeconfig()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Creates or replaces an object, then its status if it has one.
    ///
    /// # Errors
    /// If the object is of no known kind, or the server refuses it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        block_on(async || client::apply(&client::connect(&self.kubeconfig()).await?, object).await)
    }

    /// Does [`Self::apply`] for many objects, over one connection.
    ///
    /// # Errors
    /// As [`Self::apply`]; the objects before the faulty one are then applied.
    pub fn apply_all(&self, objects: &[Value]) -> Result<()> {
        block_on(async || {
            let client = client::connect(&self.kubeconfig()).await?;
            for object in objects {
                client::apply(&client, object).await?;
            }
            Ok(())
        })
    }

    /// Deletes the object with the kind, namespace and name of `object`; returns whether it existed.
    ///
    /// # Errors
    /// If the object is of no known kind, or the server refuses.
    pub fn delete(&self, object: &Value) -> Result<bool> {
        block_on(async || client::delete(&client::connect(&self.kubeconfig()).await?, object).await)
    }
}

struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    fn start(binary: &Path, folder: &Path, arguments: &[String]) -> Result<Self> {
        let name = binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = folder.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let child = Command::new(binary)
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Self { child, name, log })
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Waits until a GET of `path` succeeds.
fn wait(process: &mut Process, kubeconfig: &str, path: &str) -> Result<()> {
    let deadline = Instant::now() + START_TIME;
    loop {
        let answer: Result<String> = block_on(async || {
            let client = client::connect(kubeconfig).await?;
            let request = client.request_text(Request::get(path).body(Vec::new())?);
            Ok(tokio::time::timeout(Duration::from_secs(5), request).await??)
        });
        let Err(problem) = answer else { return Ok(()) };
        if let Some(status) = process.child.try_wait()? {
            bail!("{} ended with {status}; its last words:\n{}", process.name, process.last_words());
        }
        if Instant::now() > deadline {
            let words = process.last_words();
            return Err(problem.context(format!("{} is not ready; its last words:\n{words}", process.name)));
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Runs `work` to its end, also when the caller is itself within a runtime.
fn block_on<T: Send>(work: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        scope.spawn(|| runtime::Builder::new_current_thread().enable_all().build()?.block_on(work())).join()
    })
    .map_err(|_panic| anyhow!("the client panicked"))?
}

/// Returns a port of 127.0.0.1 that was free a moment ago.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_unspecified| anyhow!("no random numbers"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns a P-256 key pair in PEM: the private key, then the public one.
fn service_account_keys() -> Result<[String; 2]> {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let private = EcdsaKeyPair::generate_pkcs8(algorithm, &random)
        .map_err(|_unspecified| anyhow!("cannot make a service-account key"))?;
    let pair = EcdsaKeyPair::from_pkcs8(algorithm, private.as_ref(), &random)
        .map_err(|rejected| anyhow!("cannot read back the service-account key: {rejected}"))?;
    let public = [SPKI_P256, pair.public_key().as_ref()].concat();
    Ok([
        pem::encode(&pem::Pem::new("PRIVATE KEY", private.as_ref())),
        pem::encode(&pem::Pem::new("PUBLIC KEY", public)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_key_has_the_length_that_its_head_says() {
        let [private, public] = service_account_keys().unwrap();
        assert_eq!(pem::parse(private).unwrap().tag(), "PRIVATE KEY");
        let public = pem::parse(public).unwrap();
        assert_eq!((public.tag(), public.contents().len()), ("PUBLIC KEY", 2 + 0x59));
    }

    #[test]
    #[ignore = "needs KUBEBUILDER_ASSETS"]
    fn a_service_that_was_applied_is_served() {
        let assets = ControlPlane::assets().expect("KUBEBUILDER_ASSETS names etcd and kube-apiserver");
        let control_plane = ControlPlane::start(&assets, "10.96.0.0/16,fd00:96::/112").unwrap();
        let service = serde_json::json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "namespace": "shop", "name": "cart" },
            "spec": { "clusterIP": "10.96.7.7", "ports": [{ "port": 80, "protocol": "TCP" }] },
            "status": { "loadBalancer": {} },
        });
        control_plane.apply(&service).unwrap();
        control_plane.apply(&service).unwrap();
        assert!(control_plane.delete(&service).unwrap());
        assert!(!control_plane.delete(&service).unwrap());
    }
}
