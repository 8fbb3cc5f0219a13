//! Token of a ServiceAccount. kubelet replaces the token file every hour, so the file is read for each request.
//!
//! kube's own layer keeps a token for a minute by the wall clock. If the clock is set back, as on machines that have
//! just started, that minute lasts for hours, and the server refuses the old token long before its end.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::Request;
use axum::http::header::{AUTHORIZATION, HeaderValue};
use secrecy::{ExposeSecret as _, SecretString};
use tower::{Layer, Service};

use crate::host::named_file;

/// Layer that adds the token, if there is one.
#[derive(Clone, Debug)]
pub(super) struct TokenFile {
    /// File with the token.
    pub(super) file: Option<Arc<PathBuf>>,
    /// Token to use while the file has none.
    pub(super) instead: Option<SecretString>,
}

impl<S> Layer<S> for TokenFile {
    type Service = WithToken<S>;

    fn layer(&self, inner: S) -> WithToken<S> {
        WithToken { inner, file: self.clone() }
    }
}

/// A service whose requests have the token.
#[derive(Clone, Debug)]
pub(super) struct WithToken<S> {
    inner: S,
    file: TokenFile,
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for WithToken<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        // The server refuses a request without a token, and that answer is reported.
        if let Some(token) = self.file.read() {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        self.inner.call(request)
    }
}

impl TokenFile {
    fn read(&self) -> Option<HeaderValue> {
        let token = named_file::read_now(self.file.as_ref()?).unwrap_or_default();
        let token = String::from_utf8(token).unwrap_or_default();
        let token = match (token.trim(), &self.instead) {
            ("", Some(instead)) => instead.expose_secret(),
            ("", None) => return None,
            (token, _) => token,
        };
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_while_the_file_has_none() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        for (content, alone, beside) in [("", None, "Bearer b"), ("a\n", Some("Bearer a"), "Bearer a")] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(read(&path, None).as_ref().map(|value| value.to_str().unwrap()), alone);
            assert_eq!(read(&path, Some("b")).unwrap(), beside);
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path, Some("b")).unwrap(), "Bearer b");
    }

    fn read(path: &std::path::Path, instead: Option<&str>) -> Option<HeaderValue> {
        let file = Some(Arc::new(path.to_path_buf()));
        TokenFile { file, instead: instead.map(Into::into) }.read()
    }
}
