//! Credentials that change, and proxies and TLS between the agent and the server.

use std::sync::{Arc, Mutex};

use proxy_tests::apiserver::client::kubeconfig;
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy, copy_bidirectional, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::*;

/// Certificates of an authority: its own, and a client's with its key.
struct Authority {
    pem: String,
    client: [String; 2],
    acceptor: TlsAcceptor,
}

impl Authority {
    fn new() -> Self {
        let (key, mut params) = (KeyPair::generate().unwrap(), certified(&[]));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let own = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let mut roots = RootCertStore::empty();
        roots.add(own.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
        let (server, key) = Self::signed(&["127.0.0.1"], &issuer);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![server.der().clone()], key)
            .unwrap();
        let (client, key) = Self::signed(&["client"], &issuer);
        Self {
            pem: own.pem(),
            client: [client.pem(), key.serialize_pem()],
            acceptor: TlsAcceptor::from(Arc::new(config)),
        }
    }

    fn signed(names: &[&str], issuer: &Issuer<'_, KeyPair>) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (certified(names).signed_by(&key, issuer).unwrap(), key)
    }

    /// Writes the authority's certificate, and the client's with its key.
    fn write(&self, folder: &std::path::Path) {
        std::fs::write(folder.join("ca"), &self.pem).unwrap();
        for (name, text) in ["certificate", "key"].into_iter().zip(&self.client) {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }
}

impl Authority {
    /// Returns a server's certificate that is signed by itself, without a client.
    fn self_signed(is_ca: IsCa) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.is_ca = is_ca;
        let own = params.self_signed(&key).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![own.der().clone()], key)
                .unwrap();
        Self { pem: own.pem(), client: Default::default(), acceptor: TlsAcceptor::from(Arc::new(config)) }
    }
}

fn certified(names: &[&str]) -> CertificateParams {
    CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
}

/// Returns a source configured by a kubeconfig with this server and authority.
fn watched(folder: &TempDir, port: u16, authority: &str) -> Watched {
    let folder = folder.path();
    std::fs::write(folder.join("ca"), authority).unwrap();
    let cluster = format!("https://127.0.0.1:{port}\n    certificate-authority: ca");
    std::fs::write(folder.join("kubeconfig"), kubeconfig(&cluster, None)).unwrap();
    Watched::of(Server::configured(Some(&folder.join("kubeconfig")), None).unwrap())
}

#[tokio::test]
async fn a_server_that_has_signed_its_own_certificate() {
    let server = ApiServer::start().unwrap();
    let (own, authority) = (
        Authority::self_signed(IsCa::ExplicitNoCa),
        Authority::self_signed(IsCa::Ca(BasicConstraints::Unconstrained)),
    );
    let front = Front::of(&server, &own).await;
    let folders = [(); 3].map(|()| TempDir::new().unwrap());
    let mut known = watched(&folders[0], front.port, &own.pem);
    known.until("synced", |watched| watched.synced == 1).await;

    let mut stranger = watched(&folders[1], front.port, &authority.pem);
    stranger.until("a reason", said("certificate is not of the authority that is in use")).await;
    front.change(&authority);
    let mut refused = watched(&folders[2], front.port, &authority.pem);
    refused.until("a reason", said("give it one with basicConstraints CA:FALSE")).await;
}

fn said(wanted: &'static str) -> impl Fn(&Watched) -> bool {
    move |watched: &Watched| watched.problems.iter().any(|problem| problem.reason.contains(wanted))
}

/// Alert of a server that has only a key of the curve P-521.
#[tokio::test]
async fn a_server_with_a_key_of_an_unknown_kind() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // A record of TLS 1.2: alert, fatal, handshake_failure (RFC 5246, 7.2).
            stream.write_all(&[21, 3, 3, 0, 2, 2, 40]).await.unwrap();
            // Drains the stream first: a reset would overtake the alert.
            tokio::spawn(async move { copy(&mut stream, &mut sink()).await });
        }
    });
    let folder = TempDir::new().unwrap();
    let mut watched = watched(&folder, port, &Authority::new().pem);
    let said =
        |watched: &Watched| watched.problems.iter().any(|problem| problem.reason.contains("P-521 is not"));
    watched.until("a reason", said).await;
}

/// TLS in front of a server that has none, with the certificates that are in force. Connections end when they change.
struct Front {
    port: u16,
    acceptor: Arc<Mutex<TlsAcceptor>>,
    connections: Arc<Mutex<JoinSet<()>>>,
}

impl Front {
    async fn of(server: &ApiServer, authority: &Authority) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = Arc::new(Mutex::new(authority.acceptor.clone()));
        let connections = Arc::new(Mutex::new(JoinSet::new()));
        let (current, running, to) = (Arc::clone(&acceptor), Arc::clone(&connections), authority_of(server));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, to) = (current.lock().unwrap().clone(), to.clone());
                running.lock().unwrap().spawn(async move {
                    if let (Ok(mut outer), Ok(mut inner)) =
                        (acceptor.accept(stream).await, TcpStream::connect(to).await)
                    {
                        // The way in which it ends does not matter.
                        let _ = copy_bidirectional(&mut outer, &mut inner).await;
                    }
                });
            }
        });
        Self { port, acceptor, connections }
    }

    fn change(&self, authority: &Authority) {
        *self.acceptor.lock().unwrap() = authority.acceptor.clone();
        *self.connections.lock().unwrap() = JoinSet::new();
    }
}

fn authority_of(server: &ApiServer) -> String {
    server.url().trim_start_matches("http://").trim_end_matches('/').to_owned()
}

#[tokio::test]
async fn renewed_certificates_are_used_at_once() {
    let (server, first, second) = (ApiServer::start().unwrap(), Authority::new(), Authority::new());
    let front = Front::of(&server, &first).await;
    let folder = TempDir::new().unwrap();
    first.write(folder.path());
    // Without a scheme, it is https: the kubeconfig has certificates.
    let cluster = format!("127.0.0.1:{}\n    certificate-authority: ca", front.port);
    let text = kubeconfig(&cluster, None)
        .replace("user: {}", "user: { client-certificate: certificate, client-key: key }");
    std::fs::write(folder.path().join("kubeconfig"), text).unwrap();
    let mut watched = Watched::of(Server::configured(Some(&folder.path().join("kubeconfig")), None).unwrap());
    watched.until("synced", |watched| watched.synced == 1).await;

    front.change(&second);
    server.compact();
    server.apply(service("s", 80)).unwrap();
    // A key that cannot be used is ignored, and does no harm.
    std::fs::write(folder.path().join("key"), "half of a").unwrap();
    watched.settle().await;
    assert!(watched.cluster.service(&proxy_agent::reconcile::cluster::ObjectKey::new("a", "s")).is_none());
    second.write(folder.path());
    watched.until_services(&["s:80"]).await;
    watched.until("nothing is wrong", |watched| watched.problems.is_empty()).await;
}

/// Through the proxy of `proxy-url`.
#[tokio::test]
async fn through_a_proxy() {
    let server = ApiServer::start().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let told = Arc::clone(&told);
            tokio::spawn(async move {
                let (mut client, mut request) = (BufReader::new(stream), String::new());
                while client.read_line(&mut request).await.is_ok_and(|read| read > 2) {}
                let to = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let mut server = TcpStream::connect(&to).await.unwrap();
                told.lock().unwrap().push(request.lines().next().unwrap_or_default().to_owned());
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("kubeconfig");
    let cluster = format!("{}\n    proxy-url: http://{proxy}", server.url());
    std::fs::write(&path, kubeconfig(&cluster, None)).unwrap();
    let mut watched = Watched::of(Server::configured(Some(&path), None).unwrap());
    watched.until("synced", |watched| watched.synced == 1).await;
    let asked = asked.lock().unwrap().clone();
    assert!(!asked.is_empty());
    assert!(
        asked.iter().all(|line| *line == format!("CONNECT {} HTTP/1.1", authority_of(&server))),
        "{asked:?}"
    );
}

#[tokio::test]
async fn configurations_that_cannot_work_are_refused() {
    let folder = TempDir::new().unwrap();
    let broken = folder.path().join("broken");
    std::fs::write(&broken, "clusters: 7").unwrap();
    for path in [folder.path().join("none"), broken] {
        let Err(error) = Server::configured(Some(&path), None) else {
            panic!("{} was accepted", path.display())
        };
        assert!(matches!(error, SourceError::Kubeconfig { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    // The tests do not run in a pod.
    let Err(error) = Server::configured(None, None) else { panic!("there is no ServiceAccount") };
    assert!(matches!(error, SourceError::InCluster { .. }), "{error}");
}

#[tokio::test]
async fn another_server_than_the_kubeconfigs() {
    let server = ApiServer::start().unwrap();
    let master = server.url().parse().unwrap();
    let folder = TempDir::new().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, proxy_tests::apiserver::client::kubeconfig("http://127.0.0.1:1", None))
        .unwrap();
    for kubeconfig in [Some(kubeconfig.as_path()), None] {
        let api = Server::configured(kubeconfig, Some(&master)).unwrap();
        assert_eq!(api.url.trim_end_matches('/'), server.url());
        let mut watched = Watched::of(api);
        watched.until("synced", |watched| watched.synced == 1).await;
    }
}

/// kubelet replaces the file long before the old token is refused. A clock that was set back must not matter.
#[tokio::test]
async fn a_new_token_is_used_at_once() {
    let server = ApiServer::start().unwrap();
    let all = json!({ "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"] });
    let rules = [serde_json::from_value(all).unwrap()];
    server.restrict("first", &rules);
    let folder = TempDir::new().unwrap();
    let [kubeconfig, token] = ["kubeconfig", "token"].map(|name| folder.path().join(name));
    let text = proxy_tests::apiserver::client::kubeconfig(&server.url(), None);
    let user = format!("{{ tokenFile: {} }}", token.display());
    assert_eq!(text.matches("user: {}").count(), 1, "{text}");
    std::fs::write(&kubeconfig, text.replace("user: {}", &format!("user: {user}"))).unwrap();
    std::fs::write(&token, "first\n").unwrap();
    let mut watched = Watched::of(Server::configured(Some(&kubeconfig), None).unwrap());
    watched.until("synced", |watched| watched.synced == 1).await;

    std::fs::write(&token, "second\n").unwrap();
    server.restrict("second", &rules);
    server.compact();
    server.cut_watches(Cut::Clean);
    server.apply(service("s", 80)).unwrap();
    watched.until_services(&["s:80"]).await;
    assert_eq!(watched.problems, []);
}
