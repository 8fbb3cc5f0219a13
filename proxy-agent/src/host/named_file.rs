//! Files named by flags and kubeconfigs: no more than a bound is read, however large the file is.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Size of the largest file that is read, in bytes: a bundle of certificates has some hundred KiB.
const MOST: u64 = 16 << 20;

/// Returns the contents of the file.
///
/// # Errors
/// The file cannot be read, is larger than 16 MiB, or has no end.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    bounded(File::open(path)?)
}

/// Returns what the file has now, and waits for nobody: a pipe whose writer has written nothing is empty. For a file that
/// is read again and again, on a thread that others need.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_now(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    bounded(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

fn bounded(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than the bound shows that the file is larger.
    match file.take(MOST + 1).read_to_end(&mut bytes) {
        // The writer of a pipe has not closed it yet. What has come so far is in `bytes`.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        read => drop(read?),
    }
    if bytes.len() as u64 > MOST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "has more than 16 MiB, or no end"));
    }
    Ok(bytes)
}

/// Checks that the file can be read, without taking data from its later reader. A pipe is not read, because its data
/// comes only once.
///
/// # Errors
/// As [`read`].
pub(crate) fn check(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.file_type().is_fifo() { Ok(()) } else { read(path).map(drop) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_has_no_end_is_an_error() {
        assert_eq!(read(Path::new("/dev/zero")).unwrap_err().to_string(), "has more than 16 MiB, or no end");
        assert_eq!(read(Path::new("/dev/null")).unwrap(), b"");
        // `check` does not read from a pipe, which would then be empty for its later reader.
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR).unwrap();
        assert!(check(&pipe).is_ok() && check(Path::new("/dev/zero")).is_err());
        // Nobody has opened this pipe for writing; then somebody has, and does not close it.
        assert_eq!(read_now(&pipe).unwrap(), b"");
        fs::set_permissions(&pipe, fs::Permissions::from_mode(0o600)).unwrap();
        let mut writer = File::options().read(true).write(true).open(&pipe).unwrap();
        assert_eq!(read_now(&pipe).unwrap(), b"");
        writer.write_all(b"token").unwrap();
        assert_eq!(read_now(&pipe).unwrap(), b"token");
        assert!(read_now(Path::new("/dev/zero")).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        for (size, fits) in [(MOST, true), (MOST + 1, false)] {
            file.as_file().set_len(size).unwrap();
            assert_eq!(read(file.path()).is_ok(), fits, "{size}");
        }
    }
}
