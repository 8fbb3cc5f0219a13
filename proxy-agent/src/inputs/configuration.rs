//! kube-proxy's configuration file.

use std::path::Path;
use std::sync::LazyLock;

use crate::config::args::RunArgs;
use crate::config::{Config, Raw};

use super::files::{directory, write};
use super::node::{host, run_args};

/// Arguments without flags, parsed once: parsing takes longer than everything else.
static ARGS: LazyLock<RunArgs> = LazyLock::new(|| run_args(&[]));

/// Reads `data` as the file of `--config`. If the file is valid, checks that the file of `--write-config-to` means the
/// same.
///
/// # Panics
/// If the written file is read differently, or is refused.
pub fn configuration(data: &[u8]) {
    let directory = directory();
    let (given, written) = (directory.path().join("given"), directory.path().join("written"));
    write(&given, data);
    let Ok(config) = read(&given) else { return };
    let text = config.effective.to_yaml().expect("it can be written");
    write(&written, text.as_bytes());
    match read(&written) {
        Ok(again) => {
            assert_eq!(again.effective, config.effective, "{text}");
            assert_eq!(again.healthz, config.healthz, "{text}");
            assert_eq!(again.metrics, config.metrics, "{text}");
            assert!(
                !again.notes.iter().any(|note| note.starts_with("--config")),
                "{:?}: {text}",
                again.notes
            );
        }
        Err(error) => unreachable!("{error}: {text}"),
    }
}

/// Returns the agent's configuration from a file, or its error message.
fn read(path: &Path) -> Result<Config, String> {
    let mut args = ARGS.clone();
    args.kube_proxy.config = Some(path.to_owned());
    let config = Raw::load(&args)
        .map_err(|error| error.to_string())
        .and_then(|raw| Config::resolve(&args, raw, &host()).map_err(|error| error.to_string()));
    config.inspect_err(|error| assert!(!error.is_empty()))
}
