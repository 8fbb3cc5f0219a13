//! kube-proxy's configuration file.

use std::path::Path;
use std::sync::LazyLock;

use proxy_agent::config::args::RunArgs;
use proxy_agent::config::{Config, Raw};

use super::node::{host, run_args};
use super::{directory, write};

/// A command line is taken apart once: that takes longer than all else.
static ARGS: LazyLock<RunArgs> = LazyLock::new(|| run_args(&[]));

/// `data` as the file of `--config`: if it is good, what `--write-config-to` makes of it means the same.
///
/// # Panics
/// If what is written is read as something else, or is refused.
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

/// What the agent makes of a file, or what it says about it, in a sentence.
fn read(path: &Path) -> Result<Config, String> {
    let mut args = ARGS.clone();
    args.kube_proxy.config = Some(path.to_owned());
    let config = Raw::load(&args)
        .map_err(|error| error.to_string())
        .and_then(|raw| Config::resolve(&args, raw, &host()).map_err(|error| error.to_string()));
    config.inspect_err(|error| assert!(!error.is_empty()))
}
