//! kube-proxy's configuration as kube-proxy reads it: its flags and its file.
//!
//! ```text
//! command line ─> flags ─┐
//!                        ├─> KubeProxyConfiguration ─> with_defaults() ─> validate() ─> crate::config
//! --config FILE ─> file ─┘
//! ```
//! With a file, kube-proxy ignores its flags, except the flags that [`crate::config::Raw::load`] takes. Nothing here
//! looks at the host.

pub(crate) mod duration;

pub(crate) mod configuration;

pub(crate) mod file;

pub(crate) mod flags;

pub(crate) mod accepted;

pub(crate) mod fields;

pub(crate) mod validate;

pub(crate) mod watch;

pub(crate) use configuration::KubeProxyConfiguration;
pub use file::ConfigFile;
pub(crate) use file::FileError;
pub(crate) use flags::Flags;
pub(crate) use validate::{Invalid, validate};

#[cfg(test)]
mod tests;
