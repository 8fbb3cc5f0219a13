//! Kubeconfigs.

use kube::config::AuthInfo;
use proxy_agent::sources::api;
use proxy_agent::sources::api::Server;

use super::{directory, write};

/// `data` as a kubeconfig: what it says of the server and of the way to it, and a client with that. Nothing is sent, no other file
/// is read, and nothing is run.
///
/// # Panics
/// If what is taken for a server's address is none.
pub fn kubeconfig(data: &[u8]) {
    let directory = directory();
    let path = directory.path().join("kubeconfig");
    write(&path, data);
    let mut kubeconfig = match api::kubeconfig::read(&path) {
        Ok(kubeconfig) => kubeconfig,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let mut reaches_out = false;
    for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
        reaches_out |= cluster.certificate_authority.take().is_some();
    }
    reaches_out |=
        kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()).any(user_reaches_out);
    let config = match api::kubeconfig::config(&kubeconfig) {
        Ok(config) => config,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(matches!(config.cluster_url.scheme_str(), Some("http" | "https")), "{:?}", config.cluster_url);
    assert!(config.cluster_url.host().is_some(), "{:?}", config.cluster_url);
    // Without certificates of its own a client loads all of the system's, which takes long.
    if reaches_out || config.root_cert.is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _inside = runtime.enter();
    match Server::configured(Some(&path), None) {
        Ok(server) => assert_eq!(server.url, config.cluster_url.to_string()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Whether a client of this user would run something, or read a file.
fn user_reaches_out(user: &AuthInfo) -> bool {
    let files = [&user.client_certificate, &user.client_key, &user.token_file];
    user.exec.is_some() || user.auth_provider.is_some() || files.into_iter().any(Option::is_some)
}
