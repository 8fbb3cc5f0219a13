//! The token of a ServiceAccount, which kubelet replaces every hour: its file is read for each request.
//!
//! kube's own layer keeps a token for a minute by the wall clock. Where that is set back, as on machines that have just
//! started, the minute lasts for hours, and the token is refused long before.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::Request;
use axum::http::header::{AUTHORIZATION, HeaderValue};
use tower::{Layer, Service};

/// The layer that adds the token, if there is one.
#[derive(Clone, Debug)]
pub(super) struct TokenFile(pub(super) Option<Arc<PathBuf>>);

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
        // A request without a token is refused by the server, and that is what people are told.
        if let Some(token) = self.file.read() {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        self.inner.call(request)
    }
}

impl TokenFile {
    fn read(&self) -> Option<HeaderValue> {
        let token = std::fs::read_to_string(&**self.0.as_ref()?).ok()?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}
