//! Watches the configuration file for changes. On a change the agent ends, as kube-proxy does, and is started again
//! with the new file.

use std::io;
use std::path::Path;

use futures::StreamExt as _;
use inotify::{EventMask, Inotify, WatchMask};

use super::file::ConfigFile;
use crate::host::named_file;

/// Returns when `file` has been written to or renamed, or when its path leads to other contents than those that were
/// read. A removal is not a change: there is nothing to start again with.
///
/// The file itself is watched, so that a write is noticed wherever links lead. Its directory is watched, too, because
/// whole files and the links of a mounted ConfigMap are replaced there.
///
/// # Errors
///
/// The kernel gives no inotify instance or watch.
pub(crate) async fn changed(file: &ConfigFile) -> io::Result<()> {
    let mut events = Inotify::init()?.into_event_stream(vec![0; 4096])?;
    let directory = match file.path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let swaps = WatchMask::MOVE | WatchMask::CREATE | WatchMask::ONLYDIR;
    events.watches().add(directory, swaps)?;
    let mut watched = None;
    loop {
        // This also watches a file that has replaced the watched one.
        let writes = WatchMask::CLOSE_WRITE | WatchMask::MOVE_SELF;
        watched = events.watches().add(&file.path, writes).ok().or(watched);
        match named_file::read(&file.path) {
            Ok(content) if content != file.content => return Ok(()),
            Ok(_) | Err(_) => {}
        }
        match events.next().await {
            Some(Ok(event)) => {
                let changes = EventMask::CLOSE_WRITE | EventMask::MOVE_SELF;
                if Some(&event.wd) == watched.as_ref() && event.mask.intersects(changes) {
                    return Ok(());
                }
            }
            Some(Err(error)) => return Err(error),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    /// Checks whether the effect of `act` on a directory counts as a change of `config.conf` in it.
    fn check(dir: &Path, counts: bool, act: impl FnOnce()) {
        let file = ConfigFile::read(&dir.join("config.conf")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let watch = changed(&file);
            tokio::pin!(watch);
            // One round, so that the watches exist.
            assert!(tokio::time::timeout(Duration::from_millis(20), &mut watch).await.is_err());
            act();
            let patience = if counts { Duration::from_secs(10) } else { Duration::from_millis(300) };
            let ended = tokio::time::timeout(patience, watch).await;
            assert_eq!(ended.map(Result::unwrap).is_ok(), counts);
        });
    }

    #[test]
    fn p244_a_file_that_is_written_renamed_or_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let write = |content: &str| fs::write(at("config.conf"), content).unwrap();
        write("a");
        check(dir.path(), true, || write("b"));
        check(dir.path(), true, || write("b"));
        check(dir.path(), true, || {
            fs::write(at("new"), "c").unwrap();
            fs::rename(at("new"), at("config.conf")).unwrap();
        });
        check(dir.path(), true, || fs::rename(at("config.conf"), at("old")).unwrap());
        write("d");
        check(dir.path(), true, || {
            fs::remove_file(at("config.conf")).unwrap();
            write("e");
        });
        check(dir.path(), false, || {
            fs::write(at("other.conf"), "x").unwrap();
            fs::remove_file(at("config.conf")).unwrap();
        });
    }

    #[test]
    fn p244_a_config_map_that_is_swapped() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let version = |name: &str, content: &str| {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("config.conf"), content).unwrap();
            symlink(name, at("..data_tmp")).unwrap();
            fs::rename(at("..data_tmp"), at("..data")).unwrap();
        };
        version("..1", "a");
        symlink("..data/config.conf", at("config.conf")).unwrap();
        check(dir.path(), false, || version("..2", "a"));
        check(dir.path(), true, || version("..3", "b"));
        // Links may lead anywhere.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("file"), "a").unwrap();
        fs::remove_file(at("config.conf")).unwrap();
        symlink(elsewhere.path().join("file"), at("config.conf")).unwrap();
        check(dir.path(), true, || fs::write(elsewhere.path().join("file"), "b").unwrap());
    }
}
