//! Reads kubeconfigs as client-go does.
//!
//! The crate kube parses the text, but differs from client-go for a server without a scheme, wrapped data, tokens with
//! a newline, and `NO_PROXY`. kube also panics if a file ends in the middle of a UTF-16 character, and at a token with
//! an end of line in it. All of these are handled here.

use std::io;
use std::path::{Path, PathBuf};

use axum::http::uri::InvalidUri;
use axum::http::{HeaderValue, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper_util::client::proxy::matcher::Matcher;
use kube::Config;
use kube::config::{AuthInfo, Cluster, Kubeconfig, KubeconfigError};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};
use thiserror::Error;

use crate::host::named_file;
use crate::sources::text::in_utf8;

/// Defect of a kubeconfig, or of the proxy in the environment.
#[derive(Debug, Error)]
pub enum Wrong {
    /// No context is selected.
    #[error("current-context is not set")]
    NoContext,
    /// A field names an entry that does not exist.
    #[error("{field} names {name:?}, which is not in {list}")]
    Missing {
        /// The field with the name.
        field: String,
        /// The name.
        name: String,
        /// List that should have the entry.
        list: &'static str,
    },
    /// A field cannot be used.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: String,
        /// Reason why the field cannot be used.
        reason: String,
    },
}

/// Reads a kubeconfig. Paths in it are relative to its directory.
///
/// # Errors
/// The file cannot be read, or is no kubeconfig.
pub(crate) fn read(path: &Path) -> Result<Kubeconfig, KubeconfigError> {
    let failed = |error| KubeconfigError::ReadConfig(error, path.to_owned());
    let bytes = named_file::read(path).map_err(failed)?;
    let text = in_utf8(&bytes);
    let text =
        str::from_utf8(&text).map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
    let mut kubeconfig = Kubeconfig::from_yaml(text)?;
    for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
        put_beside(path, &mut cluster.certificate_authority);
    }
    for user in kubeconfig.auth_infos.iter_mut().filter_map(|named| named.auth_info.as_mut()) {
        for file in [&mut user.client_certificate, &mut user.client_key, &mut user.token_file] {
            put_beside(path, file);
        }
        // A command without a slash is looked up in PATH.
        let exec = user.exec.as_mut();
        if let Some(exec) = exec.filter(|exec| exec.command.as_ref().is_some_and(|name| name.contains('/'))) {
            put_beside(path, &mut exec.command);
        }
    }
    Ok(kubeconfig)
}

/// Resolves the path of a file against the directory of the kubeconfig that names it.
fn put_beside(kubeconfig: &Path, file: &mut Option<String>) {
    let beside = file.as_deref().filter(|name| !name.is_empty()).map(|name| kubeconfig.with_file_name(name));
    if let Some(path) = beside.as_deref().and_then(Path::to_str) {
        *file = Some(path.to_owned());
    }
}

/// Returns the client configuration for the current context of a kubeconfig. Certificates are read; no command is run.
///
/// # Errors
/// [`Wrong`] names the field.
pub(crate) fn config(kubeconfig: &Kubeconfig) -> Result<Config, Wrong> {
    let missing = |field: String, name: &str, list| Wrong::Missing { field, name: name.to_owned(), list };
    let current = kubeconfig.current_context.as_deref().filter(|name| !name.is_empty());
    let current = current.ok_or(Wrong::NoContext)?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == current);
    let context = context.and_then(|context| context.context.as_ref());
    let context = context.ok_or_else(|| missing("current-context".to_owned(), current, "contexts"))?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster);
    let cluster = cluster.and_then(|cluster| cluster.cluster.as_ref()).ok_or_else(|| {
        missing(format!("contexts[{current}].context.cluster"), &context.cluster, "clusters")
    })?;
    let user = context.user.as_deref().filter(|user| !user.is_empty());
    let named = user.and_then(|name| kubeconfig.auth_infos.iter().find(|user| user.name == name));
    if let (Some(user), None) = (user, named) {
        tracing::warn!(
            "contexts[{current}].context.user names {user:?}, which is not in users: going on without credentials"
        );
    }
    let mut auth_info = credentials(named.and_then(|user| user.auth_info.clone()).unwrap_or_default());
    if let Some(exec) = auth_info.exec.as_mut().filter(|exec| exec.provide_cluster_info) {
        let told = cluster.try_into().map_err(|error: KubeconfigError| Wrong::Field {
            field: format!("clusters[{}].cluster", context.cluster),
            reason: error.to_string(),
        });
        exec.cluster = Some(told?);
    }
    let wrong = |field: &str, reason: String| Wrong::Field {
        field: format!("clusters[{}].cluster.{field}", context.cluster),
        reason,
    };
    let server = server(cluster, &auth_info).map_err(|reason| wrong("server", reason))?;
    let mut config = Config::new(server);
    (config.root_cert, config.root_cert_file) =
        authority(cluster).map_err(|(field, reason)| wrong(field, reason))?;
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or(false);
    config.tls_server_name = cluster.tls_server_name.clone().filter(|name| !name.is_empty());
    config.disable_compression = cluster.disable_compression.unwrap_or(false);
    if let Some(namespace) = context.namespace.as_ref().filter(|namespace| !namespace.is_empty()) {
        config.default_namespace.clone_from(namespace);
    }
    if let Some(proxy) = given(&cluster.proxy_url) {
        // The URL may contain a password, so the error does not quote it.
        let proxy: Result<Uri, InvalidUri> = proxy.trim().parse();
        config.proxy_url = Some(proxy.map_err(|error| wrong("proxy-url", format!("is no URL: {error}")))?);
    }
    if auth_info.token.as_ref().is_some_and(|token| HeaderValue::try_from(token.expose_secret()).is_err()) {
        let field = format!("users[{}].user.token", user.unwrap_or_default());
        let reason = "has characters in it that no token may have, such as an end of line".to_owned();
        return Err(Wrong::Field { field, reason });
    }
    // The client reads these files again without a limit, so their size is checked here.
    for (field, file, data) in [
        ("client-certificate", &auth_info.client_certificate, auth_info.client_certificate_data.is_some()),
        ("client-key", &auth_info.client_key, auth_info.client_key_data.is_some()),
    ] {
        if let Some(path) = given(file).filter(|_| !data) {
            named_file::check(Path::new(path)).map_err(|error| Wrong::Field {
                field: format!("users[{}].user.{field}", user.unwrap_or_default()),
                reason: format!("{path}: {error}"),
            })?;
        }
    }
    config.auth_info = auth_info;
    Ok(config)
}

/// Returns the proxy for a server from the environment: `HTTPS_PROXY` or `HTTP_PROXY`, unless `NO_PROXY` excludes the
/// server. As in Go, `localhost` and loopback addresses are never behind a proxy.
pub(super) fn proxy(server: &Uri, env: impl Fn(&str) -> Option<String>) -> Result<Option<Uri>, Wrong> {
    let names = if server.scheme_str() == Some("https") {
        ["HTTPS_PROXY", "https_proxy"]
    } else {
        ["HTTP_PROXY", "http_proxy"]
    };
    let Some((name, value)) = first_of(names, &env) else { return Ok(None) };
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    let is_loopback = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let no = first_of(["NO_PROXY", "no_proxy"], &env).map_or(String::new(), |(_, value)| value);
    let none = no.split(',').any(|pattern| pattern.trim() == "*");
    let port = server.port_u16().unwrap_or(if server.scheme_str() == Some("https") { 443 } else { 80 });
    let no: Vec<&str> = no.split(',').filter_map(|pattern| without_port(pattern.trim(), port)).collect();
    let others = Matcher::builder().all("http://proxy").no(no.join(",")).build();
    if none || is_loopback || host.eq_ignore_ascii_case("localhost") || others.intercept(server).is_none() {
        return Ok(None);
    }
    let with_scheme = if value.contains("://") { value } else { format!("http://{value}") };
    let proxy: Result<Uri, InvalidUri> = with_scheme.trim().parse();
    // The URL may contain a password, so the error does not quote it.
    proxy.map(Some).map_err(|error| Wrong::Field {
        field: format!("the environment variable {name}"),
        reason: format!("is no URL: {error}"),
    })
}

/// Returns the first of two variables that has a value, with the value.
fn first_of(
    names: [&'static str; 2],
    env: impl Fn(&str) -> Option<String>,
) -> Option<(&'static str, String)> {
    names.into_iter().find_map(|name| Some((name, env(name).filter(|value| !value.is_empty())?)))
}

/// Returns a pattern of `NO_PROXY` without its port and its `*`; `None` if the pattern is for another port.
fn without_port(pattern: &str, port: u16) -> Option<&str> {
    let pattern = match pattern.rsplit_once(':') {
        Some((host, digits)) if !host.contains(':') || host.ends_with(']') => match digits.parse::<u16>() {
            Ok(of) if of == port => host.trim_matches(['[', ']']),
            Ok(_) => return None,
            Err(_) => pattern,
        },
        _ => pattern,
    };
    Some(pattern.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(pattern))
}

/// Returns the URL of the server. A server without a scheme gets HTTPS if certificates or credentials are configured,
/// so that nobody else can read them, and HTTP otherwise.
fn server(cluster: &Cluster, user: &AuthInfo) -> Result<Uri, String> {
    let text = cluster.server.as_deref().unwrap_or_default().trim();
    if text.is_empty() {
        return Err("is missing".to_owned());
    }
    let fields = [
        &cluster.certificate_authority,
        &cluster.certificate_authority_data,
        &cluster.tls_server_name,
        &user.client_certificate,
        &user.client_certificate_data,
        &user.token_file,
    ];
    let secure = cluster.insecure_skip_tls_verify == Some(true)
        || user.token.is_some()
        || user.password.is_some()
        || user.exec.is_some()
        || fields.into_iter().any(|field| given(field).is_some());
    let scheme = match text.contains("://") {
        true => "",
        false if secure => "https://",
        false => "http://",
    };
    let uri: Uri =
        format!("{scheme}{text}").parse().map_err(|error| format!("{text:?} is no URL: {error}"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(_)) => Ok(uri),
        _ => Err(format!("{text:?} is no URL of http or https")),
    }
}

type Authority = (Option<Vec<Vec<u8>>>, Option<PathBuf>);

/// Returns the trusted certificates, and the file to read them from again.
fn authority(cluster: &Cluster) -> Result<Authority, (&'static str, String)> {
    let (field, pem, file) = if let Some(data) = given(&cluster.certificate_authority_data) {
        let field = "certificate-authority-data";
        (field, STANDARD.decode(unwrapped(data)).map_err(|error| (field, error.to_string()))?, None)
    } else if let Some(path) = given(&cluster.certificate_authority) {
        let field = "certificate-authority";
        let pem = named_file::read(Path::new(path)).map_err(|error| (field, format!("{path}: {error}")))?;
        (field, pem, Some(PathBuf::from(path)))
    } else {
        return Ok((None, None));
    };
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(&pem).map(|certificate| certificate.map(|der| der.to_vec())).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => {
            Err((field, "there is no certificate in it".to_owned()))
        }
        Ok(certificates) => Ok((Some(certificates), file)),
        Err(error) => Err((field, error.to_string())),
    }
}

/// Normalizes credentials: removes white space around tokens and within data, and drops empty tokens and file names.
fn credentials(mut auth: AuthInfo) -> AuthInfo {
    let token = auth.token.map(|token| SecretString::from(token.expose_secret().trim()));
    auth.token = token.filter(|token| !token.expose_secret().is_empty());
    auth.token_file = auth.token_file.filter(|path| !path.is_empty());
    auth.client_key_data = auth.client_key_data.map(|data| unwrapped(data.expose_secret()).into());
    auth.client_certificate_data = auth.client_certificate_data.as_deref().map(unwrapped);
    auth
}

fn given(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|value| !value.is_empty())
}

fn unwrapped(data: &str) -> String {
    data.split_ascii_whitespace().collect()
}

/// Returns the certificate and key files that a configuration names; their content may change.
pub(super) fn files(config: &Config) -> impl Iterator<Item = PathBuf> {
    let auth = &config.auth_info;
    let named = [&auth.client_certificate, &auth.client_key].into_iter().flatten().map(PathBuf::from);
    named.chain(config.root_cert_file.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        config(&Kubeconfig::from_yaml(text).unwrap()).map_err(|error| error.to_string())
    }

    /// Returns the configuration from a kubeconfig with this cluster and this user.
    fn with(cluster: &str, user: &str) -> Result<Config, String> {
        read(&format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {cluster}}}]\nusers: [{{name: u, user: {user}}}]\n"
        ))
    }

    #[test]
    fn servers_as_they_are_written() {
        for (cluster, url) in [
            ("{server: '10.0.0.1:8080'}", "http://10.0.0.1:8080/"),
            ("{server: ' api.example '}", "http://api.example/"),
            ("{server: '[fd00::1]:6443', insecure-skip-tls-verify: true}", "https://[fd00::1]:6443/"),
            ("{server: 'https://10.0.0.1:6443', insecure-skip-tls-verify: true}", "https://10.0.0.1:6443/"),
        ] {
            assert_eq!(with(cluster, "{}").unwrap().cluster_url.to_string(), url);
        }
        for (cluster, problem) in [
            ("{}", "server: is missing"),
            ("{server: ''}", "server: is missing"),
            ("{server: 'ftp://a'}", "server: \"ftp://a\" is no URL of http or https"),
            ("{server: 'https://a b'}", "server: \"https://a b\" is no URL"),
            ("{server: a, certificate-authority-data: '?'}", "certificate-authority-data: "),
            ("{server: a, certificate-authority-data: YQ==}", "certificate-authority-data: there is no cert"),
            ("{server: a, certificate-authority: /none}", "certificate-authority: /none: No such file"),
            (
                "{server: a, certificate-authority: /dev/zero}",
                "certificate-authority: /dev/zero: has more than 16",
            ),
            ("{server: a, proxy-url: 'a b'}", "proxy-url: is no URL: "),
        ] {
            let error = with(cluster, "{}").map(|config| config.cluster_url).unwrap_err();
            assert!(error.starts_with(&format!("clusters[k].cluster.{problem}")), "{cluster}: {error}");
        }
    }

    #[test]
    fn files_are_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let (path, here) = (directory.path().join("kubeconfig"), directory.path().display());
        let text = "clusters: [{name: k, cluster: {certificate-authority: ca/a}}]\nusers: \
                    [{name: u, user: {client-certificate: /b, client-key: ../c, tokenFile: ''}}, \
                    {name: v, user: {exec: {command: d}}}, {name: w, user: {exec: {command: ./e}}}]\n";
        let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        // The last content ends in the middle of a UTF-16 character.
        for content in
            [text.as_bytes(), &[b"\xff\xfe", &*utf16].concat(), &[b"\xff\xfe", &*utf16, b"\n"].concat()]
        {
            std::fs::write(&path, content).unwrap();
            let read = super::read(&path).unwrap();
            let authority = read.clusters[0].cluster.clone().unwrap().certificate_authority;
            assert_eq!(authority.unwrap(), format!("{here}/ca/a"));
            let users = read.auth_infos.into_iter().map(|user| user.auth_info.unwrap()).collect::<Vec<_>>();
            assert_eq!(users[0].client_certificate.as_deref(), Some("/b"));
            assert_eq!(
                (&users[0].client_key, &users[0].token_file),
                (&Some(format!("{here}/../c")), &Some(String::new()))
            );
            let commands = [1, 2].map(|number| users[number].exec.clone().unwrap().command.unwrap());
            assert_eq!(commands, ["d".to_owned(), format!("{here}/./e")]);
        }
        std::fs::write(&path, b"current-context: \xe9\n").unwrap();
        assert!(super::read(&path).is_err());
    }

    #[test]
    fn names_that_lead_nowhere() {
        let context = "current-context: c\n".to_owned();
        let contexts = context.clone() + "contexts: [{name: c, context: {cluster: k, user: u}}]\n";
        let clusters = contexts.clone() + "clusters: [{name: k, cluster: {server: a}}]\n";
        for (text, problem) in [
            ("", "current-context is not set"),
            (&context, "current-context names \"c\", which is not in contexts"),
            (&contexts, "contexts[c].context.cluster names \"k\", which is not in clusters"),
        ] {
            assert_eq!(read(text).map(|config| config.cluster_url).unwrap_err(), problem, "{text}");
        }
        // As in client-go, the result has no credentials; the log says so.
        for users in ["", "users: [{name: u}]\n"] {
            assert!(read(&(clusters.clone() + users)).unwrap().auth_info.token.is_none());
        }
    }

    #[test]
    fn tokens_as_they_are_written() {
        assert_eq!(token("{token: \"abc\\n\"}"), (Some("abc".to_owned()), None));
        assert_eq!(token("{token: '', tokenFile: ''}"), (None, None));
        let error = with("{server: a}", "{token: \"a\\nb\"}").map(|config| config.cluster_url).unwrap_err();
        assert!(error.starts_with("users[u].user.token: has characters in it"), "{error}");
        for (user, problem) in [
            ("{client-certificate: /none}", "client-certificate: /none: No such file"),
            ("{client-key: /dev/zero}", "client-key: /dev/zero: has more than 16 MiB, or no end"),
        ] {
            let error = with("{server: a}", user).map(|config| config.cluster_url).unwrap_err();
            assert!(error.starts_with(&format!("users[u].user.{problem}")), "{user}: {error}");
        }
        // Data takes precedence over a file.
        assert!(with("{server: a}", "{client-key-data: YQ==, client-key: /none}").is_ok());
        // Credentials are not sent in plain text because of a scheme that is only guessed.
        for user in [
            "{token: abc}",
            "{tokenFile: /t}",
            "{client-certificate-data: YQ==}",
            "{username: u, password: p}",
        ] {
            assert_eq!(with("{server: a}", user).unwrap().cluster_url.scheme_str(), Some("https"), "{user}");
        }
        let exec =
            "{exec: {command: c, apiVersion: client.authentication.k8s.io/v1, provideClusterInfo: true}}";
        let told = with("{server: 'https://a'}", exec).unwrap().auth_info.exec.unwrap().cluster;
        assert_eq!(told.unwrap().server.as_deref(), Some("https://a"));
    }

    fn token(user: &str) -> (Option<String>, Option<String>) {
        let auth = with("{server: a}", user).unwrap().auth_info;
        (auth.token.map(|token| token.expose_secret().to_owned()), auth.token_file)
    }

    #[test]
    fn proxies_of_the_environment() {
        for (server, variables, want) in [
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy:3128", "http://proxy:3128/"),
            ("https://10.0.0.1:6443", "https_proxy=proxy:3128", "http://proxy:3128/"),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://u:p%40@proxy", "http://u:p%40@proxy/"),
            ("https://10.0.0.1:6443", "HTTP_PROXY=http://proxy", ""),
            ("http://10.0.0.1:8080", "HTTP_PROXY=http://proxy", "http://proxy/"),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy NO_PROXY=10.0.0.0/8,", ""),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy no_proxy=,10.0.0.2,10.0.0.1", ""),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy NO_PROXY=*", ""),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy NO_PROXY=10.0.1.0/24,.svc", "http://proxy/"),
            ("https://api.example.org", "HTTPS_PROXY=http://proxy NO_PROXY=.example.org", ""),
            ("https://kubernetes.default.svc", "HTTPS_PROXY=http://proxy NO_PROXY=localhost,.svc", ""),
            ("https://a.example.org:6443", "HTTPS_PROXY=http://proxy NO_PROXY=*.example.org", ""),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy NO_PROXY=10.0.0.1:6443", ""),
            ("https://10.0.0.1:6443", "HTTPS_PROXY=http://proxy NO_PROXY=10.0.0.1:443", "http://proxy/"),
            ("https://api.example", "HTTPS_PROXY=http://proxy NO_PROXY=api.example:443", ""),
            ("https://[fd00::1]:6443", "HTTPS_PROXY=http://proxy NO_PROXY=[fd00::1]:6443", ""),
            ("https://[fd00::1]:6443", "HTTPS_PROXY=http://proxy NO_PROXY=fd00::/16", ""),
            ("https://127.0.0.1:6443", "HTTPS_PROXY=http://proxy", ""),
            ("https://[::1]:6443", "HTTPS_PROXY=http://proxy", ""),
            ("https://localhost:6443", "HTTPS_PROXY=http://proxy", ""),
        ] {
            let found = proxy(&server.parse().unwrap(), |name| {
                variables
                    .split(' ')
                    .find_map(|variable| Some(variable.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
            })
            .unwrap();
            assert_eq!(found.map_or(String::new(), |uri| uri.to_string()), want, "{server} {variables}");
        }
        let error = proxy(&"https://a".parse().unwrap(), |name| {
            (name == "HTTPS_PROXY").then(|| "http://u:secret@ b".to_owned())
        })
        .unwrap_err()
        .to_string();
        assert!(error.starts_with("the environment variable HTTPS_PROXY: is no URL"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
