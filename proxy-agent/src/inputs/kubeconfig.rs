//! Kubeconfigs.

use crate::sources::api;
use crate::sources::api::Server;
use kube::config::AuthInfo;

use super::files::{directory, write};

/// Reads `data` as a kubeconfig, checks the server's address, and makes a client. Nothing is sent, no other file is
/// read, and no program is run.
///
/// # Panics
/// If a server address is accepted that is not one.
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
    // A client without certificates of its own loads all of the system's, which takes long.
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

/// Returns whether a client of this user would run a program or read a file.
fn user_reaches_out(user: &AuthInfo) -> bool {
    let files = [&user.client_certificate, &user.client_key, &user.token_file];
    user.exec.is_some() || user.auth_provider.is_some() || files.into_iter().any(Option::is_some)
}
