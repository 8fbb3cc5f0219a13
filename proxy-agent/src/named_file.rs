//! Files that flags and kubeconfigs name: whatever the name leads to, reading it ends.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// The largest file that is read, bytes: a bundle of certificates has some hundred KiB.
const MOST: u64 = 16 << 20;

/// What is in the file.
///
/// # Errors
/// It cannot be read, or is larger than 16 MiB, as what has no end is.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more shows that there is more.
    let read = File::open(path)?.take(MOST + 1).read_to_end(&mut bytes)?;
    if read as u64 > MOST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "has more than 16 MiB, or no end"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_an_error() {
        assert_eq!(read(Path::new("/dev/zero")).unwrap_err().to_string(), "has more than 16 MiB, or no end");
        assert_eq!(read(Path::new("/dev/null")).unwrap(), b"");
        let file = tempfile::NamedTempFile::new().unwrap();
        for (size, fits) in [(MOST, true), (MOST + 1, false)] {
            file.as_file().set_len(size).unwrap();
            assert_eq!(read(file.path()).is_ok(), fits, "{size}");
        }
    }
}
