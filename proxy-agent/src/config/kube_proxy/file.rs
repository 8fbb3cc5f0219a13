//! The configuration file: strict where that helps its author, lenient where kube-proxy is.

use std::path::{Path, PathBuf};

use serde_json::Value;
use serde_saphyr::{DuplicateKeyPolicy, Error as YamlError};

use super::configuration::{API_VERSION, KIND, KubeProxyConfiguration};
use crate::host::named_file;

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("--config {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the kernel.
        source: std::io::Error,
    },
    /// The file is not YAML (nor JSON, which is YAML).
    #[error("--config {path}: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The error and its position.
        reason: String,
    },
    /// The file has another `apiVersion` or `kind`.
    #[error("--config {path}: `{field}` is `{value}`, must be `{must}`")]
    Kind {
        /// The file.
        path: PathBuf,
        /// `apiVersion` or `kind`.
        field: &'static str,
        /// Value of the field.
        value: String,
        /// Required value.
        must: &'static str,
    },
    /// A field has a value of another type.
    #[error("--config {path}: {field}: {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Message about the expected type.
        reason: String,
    },
}

/// A file as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFile {
    /// Path of the file.
    pub(crate) path: PathBuf,
    /// All bytes of the file.
    pub(crate) content: Vec<u8>,
}

/// Maximal number of YAML nodes that aliases may expand to: a hundred times the number in the largest file with every
/// field.
const ALIAS_NODES_MAX: usize = 10_000;

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`FileError::Read`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        match named_file::read(path) {
            Ok(content) => Ok(Self { path: path.to_owned(), content }),
            Err(source) => Err(FileError::Read { path: path.to_owned(), source }),
        }
    }

    /// Decodes the file. Also returns sentences about ignored parts: unknown fields, and all but the last of fields
    /// that are given twice.
    ///
    /// # Errors
    ///
    /// [`FileError`] names the file and the field.
    pub fn decode(&self) -> Result<(KubeProxyConfiguration, Vec<String>), FileError> {
        let mut ignored = Vec::new();
        let strict = self.yaml(DuplicateKeyPolicy::Error);
        let twice = strict.as_ref().err().map(YamlError::without_snippet);
        let mut value = if let Some(YamlError::DuplicateMappingKey { key, location }) = twice {
            let key = key.as_deref().unwrap_or("?");
            ignored.push(format!("`{key}` is given again in line {}: the last one counts", location.line()));
            self.yaml(DuplicateKeyPolicy::LastWins)
        } else {
            strict
        }
        .map_err(|error| FileError::Syntax {
            path: self.path.clone(),
            reason: error.without_snippet().to_string(),
        })?;
        tidy(&mut value);
        for (field, must) in [("apiVersion", API_VERSION), ("kind", KIND)] {
            let value = value.get(field).and_then(Value::as_str).unwrap_or_default();
            if value != must {
                return Err(FileError::Kind {
                    path: self.path.clone(),
                    field,
                    value: value.to_owned(),
                    must,
                });
            }
        }
        let mut track = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
        let decoded = serde_ignored::deserialize(deserializer, |field| {
            ignored.push(format!("there is no field `{field}`"))
        });
        let mut configuration: KubeProxyConfiguration = decoded.map_err(|error| FileError::Field {
            path: self.path.clone(),
            field: track.path().to_string(),
            reason: error.to_string(),
        })?;
        configuration.forget_zeros();
        Ok((configuration, ignored))
    }

    fn yaml(&self, duplicate_keys: DuplicateKeyPolicy) -> Result<Value, YamlError> {
        let options = serde_saphyr::options! {
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: ALIAS_NODES_MAX },
            duplicate_keys: duplicate_keys,
            with_snippet: false,
        };
        // As in kube-proxy, only the first document counts.
        let mut text = self.content.as_slice();
        serde_saphyr::read_with_options(&mut text, options).next().unwrap_or(Ok(Value::Null))
    }
}

/// Removes null fields, which count as not given, and turns whole numbers such as `14.0` into integers.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(tidy);
        }
        Value::Number(number) => {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "what is not whole or too large differs afterwards"
            )]
            if let Some(float) = number.as_f64().filter(|_| number.is_f64())
                && (float as i64) as f64 == float
            {
                *value = Value::from(float as i64);
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) => {}
    }
}
