//! Reads the bytes of a manifest, whatever its name leads to.
//!
//! A name can lead to a file that blocks on opening (a pipe), that never ends (`trace_pipe`) or ends only after
//! terabytes (`/proc/kcore`), that claims to be regular but blocks on reading (`/proc/kmsg`), or to a file system that
//! does not answer. None of these affects other files: the type of an opened file is checked before it is read, bytes
//! and time are limited, and a read that does not return is left to a thread of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// Maximum size of a file, bytes.
pub(super) const FILE_MAX: u64 = 64 << 20;
/// Maximum duration of reading a file: an honest file of maximum size comes from a slow disk in this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time for which a file that took longer is not read again.
const REST: Duration = Duration::from_secs(30);

/// Reason why nothing of a file can be used.
#[derive(Debug, Error)]
pub(super) enum FileError {
    #[error("cannot be read: {0}")]
    Io(#[source] io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("is larger than {FILE_MAX} bytes, the limit for one file; split it")]
    TooLarge,
    #[error("has no end: it waits for more")]
    Endless,
    #[error("takes too long to be read; it is tried again later")]
    Slow,
    #[error("document {document}: {message}")]
    Syntax { document: usize, message: String },
}

impl FileError {
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads files, and remembers those whose reading took too long.
#[derive(Debug, Default)]
pub(super) struct Bytes {
    slow: BTreeMap<PathBuf, Slow>,
}

#[derive(Debug)]
struct Slow {
    reader: JoinHandle<()>,
    again_at: Instant,
}

impl Bytes {
    /// Returns the content of a file.
    ///
    /// # Errors
    /// The file cannot be read, has no end, or takes too long.
    pub(super) fn read(&mut self, path: &Path) -> Result<Vec<u8>, FileError> {
        self.read_with(path, PATIENCE, read_all)
    }

    fn read_with(
        &mut self,
        path: &Path,
        patience: Duration,
        read: impl FnOnce(&Path, Instant) -> Result<Vec<u8>, FileError> + Send + 'static,
    ) -> Result<Vec<u8>, FileError> {
        if let Some(slow) = self.slow.get(path) {
            if !slow.reader.is_finished() || Instant::now() < slow.again_at {
                return Err(FileError::Slow);
            }
            self.slow.remove(path);
        }
        let (sender, receiver) = mpsc::channel();
        let (owned, until) = (path.to_owned(), Instant::now() + patience);
        let reader = std::thread::Builder::new()
            .name("manifest".to_owned())
            .spawn(move || {
                // The receiver may have stopped waiting.
                let _ = sender.send(read(&owned, until));
            })
            .map_err(FileError::Io)?;
        // The reader checks the time itself between pieces, so the wait is a little longer.
        let result = receiver.recv_timeout(patience + patience / 4).unwrap_or(Err(FileError::Slow));
        if matches!(result, Err(FileError::Slow)) {
            self.slow.insert(path.to_owned(), Slow { reader, again_at: Instant::now() + REST });
        }
        result
    }
}

/// Reads a file to its end, or until the limit of bytes or time is reached.
///
/// # Errors
/// [`FileError`].
pub(super) fn read_all(path: &Path, until: Instant) -> Result<Vec<u8>, FileError> {
    // Opening a device can have side effects, so the type is checked without opening it.
    let metadata = std::fs::metadata(path).map_err(FileError::Io)?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile);
    }
    // The name may lead to something else by now; opening with NONBLOCK does not wait for anybody.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    read_open(&mut File::from(opened.map_err(|errno| FileError::Io(errno.into()))?), until)
}

fn read_open(file: &mut File, until: Instant) -> Result<Vec<u8>, FileError> {
    let metadata = file.metadata().map_err(FileError::Io)?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile);
    }
    if metadata.len() > FILE_MAX {
        return Err(FileError::TooLarge);
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let mut piece = vec![0; 64 << 10];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(bytes),
            Ok(len) => bytes.extend(piece.get(..len).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(FileError::Endless),
            Err(error) => return Err(FileError::Io(error)),
        }
        if bytes.len() as u64 > FILE_MAX {
            return Err(FileError::TooLarge);
        }
        if Instant::now() >= until {
            return Err(FileError::Slow);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    /// Reads a path, which must take less than a second.
    fn read(path: &Path) -> Result<usize, String> {
        let start = Instant::now();
        let result = Bytes::default().read(path).map(|bytes| bytes.len()).map_err(|error| error.to_string());
        assert!(start.elapsed() < Duration::from_secs(1), "{} took {:?}", path.display(), start.elapsed());
        result
    }

    fn pipe(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    #[test]
    fn files_and_links_to_them_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("plain.yaml"), "kind: Service\n").unwrap();
        std::fs::write(at("empty.yaml"), "").unwrap();
        // Links as in a mounted ConfigMap.
        std::fs::create_dir(at("..2026")).unwrap();
        std::fs::write(at("..2026/mounted.yaml"), "kind: Service\n").unwrap();
        symlink("..2026", at("..data")).unwrap();
        symlink("..data/mounted.yaml", at("mounted.yaml")).unwrap();
        assert_eq!(read(&at("plain.yaml")), Ok(14));
        assert_eq!(read(&at("empty.yaml")), Ok(0));
        assert_eq!(read(&at("mounted.yaml")), Ok(14));
        // A file of the kernel, which has no size but an end.
        assert!(read(Path::new("/proc/self/status")).unwrap() > 100);
        assert!(read(&at("missing.yaml")).unwrap_err().starts_with("cannot be read: No such file"));
    }

    #[test]
    fn what_has_no_end_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        pipe(&at("pipe.yaml"));
        symlink("/dev/zero", at("zero.yaml")).unwrap();
        for name in ["pipe.yaml", "zero.yaml"] {
            assert_eq!(read(&at(name)), Err("is not a regular file".to_owned()), "{name}");
        }
        let sparse = File::create(at("sparse.yaml")).unwrap();
        sparse.set_len(10 << 30).unwrap();
        assert!(read(&at("sparse.yaml")).unwrap_err().contains("the limit for one file"));
        // These files claim to be regular. The present content of the kernel's log may come first.
        for endless in
            ["/proc/kmsg", "/sys/kernel/tracing/trace_pipe", "/sys/kernel/debug/tracing/trace_pipe"]
        {
            if std::fs::metadata(endless).is_ok_and(|metadata| metadata.is_file())
                && File::open(endless).is_ok()
            {
                assert!(read(Path::new(endless)).unwrap_err().contains("no end"), "{endless}");
            }
        }
    }

    /// The name led to a file when it was checked, and leads to a pipe when it is opened.
    #[test]
    fn a_pipe_in_the_place_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe.yaml");
        pipe(&path);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let mut opened = File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
        let result = read_open(&mut opened, Instant::now() + PATIENCE);
        assert!(matches!(result, Err(FileError::NotAFile)), "{result:?}");
    }

    #[test]
    fn what_does_not_come_back_has_one_thread_and_nobody_else_waits() {
        let mut bytes = Bytes::default();
        let (stuck, patience) = (Path::new("stuck.yaml"), Duration::from_millis(40));
        let (release, released) = mpsc::channel::<()>();
        let result = bytes.read_with(stuck, patience, move |_, _| {
            let _ = released.recv();
            Ok(Vec::new())
        });
        assert!(matches!(result, Err(FileError::Slow)), "{result:?}");
        for _ in 0..100 {
            let result = bytes.read_with(stuck, patience, |_, _| panic!("a second thread"));
            assert!(matches!(result, Err(FileError::Slow)), "{result:?}");
        }
        let other = bytes.read_with(Path::new("other.yaml"), patience, |_, _| Ok(vec![1]));
        assert_eq!(other.unwrap(), [1]);
        // After the reader has returned, the file may be read again, after a rest.
        drop(release);
        while !bytes.slow[stuck].reader.is_finished() {
            std::thread::yield_now();
        }
        assert!(matches!(bytes.read_with(stuck, patience, |_, _| Ok(vec![2])), Err(FileError::Slow)));
        bytes.slow.get_mut(stuck).unwrap().again_at = Instant::now();
        assert_eq!(bytes.read_with(stuck, patience, |_, _| Ok(vec![2])).unwrap(), [2]);
        assert!(bytes.slow.is_empty());
    }
}
