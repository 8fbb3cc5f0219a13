//! kube-proxy's configuration as kube-proxy reads it: its flags and its file.
//!
//! ```text
//! command line ─> flags ─┐
//!                        ├─> KubeProxyConfiguration ─> with_defaults() ─> validate() ─> crate::config
//! --config FILE ─> file ─┘
//! ```
//! With a file, kube-proxy ignores its flags, except the flags that [`crate::config::Raw::load`] takes. Nothing here
//! looks at the host.

pub mod duration;

pub mod configuration;

pub mod file;

pub mod flags;

pub mod accepted;

pub mod fields;

pub mod validate;

pub mod watch;

pub use configuration::KubeProxyConfiguration;
pub use duration::GoDuration;
pub use file::{ConfigFile, FileError};
pub use flags::Flags;
pub use validate::{Invalid, validate};

#[cfg(test)]
mod tests;
