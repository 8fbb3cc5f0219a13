//! `Status` objects, by which the API reports failures.

use axum::body::Body;
use hyper::{Response, StatusCode, header};
use serde_json::{Value, json};

use super::object::Key;
use super::resource::Resource;

/// A failure as the API reports it.
#[derive(Clone, Debug)]
pub(super) struct Status {
    code: u16,
    reason: &'static str,
    message: String,
    details: Value,
}

impl Status {
    pub(super) fn new(code: u16, message: impl Into<String>) -> Self {
        let reason = match code {
            400 => "BadRequest",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "NotFound",
            405 => "MethodNotAllowed",
            409 => "Conflict",
            410 => "Expired",
            415 => "UnsupportedMediaType",
            422 => "Invalid",
            429 => "TooManyRequests",
            503 => "ServiceUnavailable",
            504 => "Timeout",
            _ => "InternalError",
        };
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    pub(super) fn not_found(resource: Resource, key: &Key) -> Self {
        Self {
            details: json!({ "name": key.name, "group": resource.group(), "kind": resource.plural() }),
            ..Self::new(404, format!("{resource} \"{}\" not found", key.name))
        }
    }

    pub(super) fn already_exists(resource: Resource, key: &Key) -> Self {
        Self {
            reason: "AlreadyExists",
            details: json!({ "name": key.name, "group": resource.group(), "kind": resource.plural() }),
            ..Self::new(409, format!("{resource} \"{}\" already exists", key.name))
        }
    }

    pub(super) fn conflict(resource: Resource, key: &Key) -> Self {
        Self::new(
            409,
            format!(
                "Operation cannot be fulfilled on {resource} \"{}\": the object has been modified; please apply \
                 your changes to the latest version and try again",
                key.name
            ),
        )
    }

    pub(super) fn too_old(asked: u64, oldest: u64) -> Self {
        Self::new(410, format!("too old resource version: {asked} ({oldest})"))
    }

    pub(super) fn too_large(asked: u64, newest: u64) -> Self {
        Self {
            details: json!({
                "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }],
                "retryAfterSeconds": 1,
            }),
            ..Self::new(504, format!("Timeout: Too large resource version: {asked}, current: {newest}"))
        }
    }

    /// Adds a request to wait for `seconds` before the next try.
    pub(super) fn with_retry_after(self, seconds: u32) -> Self {
        Self { details: json!({ "retryAfterSeconds": seconds }), ..self }
    }

    pub(super) fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if !self.details.is_null() {
            value["details"] = self.details.clone();
        }
        value
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_value().to_string()));
        *response.status_mut() = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.details["retryAfterSeconds"].as_u64() {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from(seconds));
        }
        response
    }
}
