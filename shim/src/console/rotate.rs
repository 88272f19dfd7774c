//! Writes a log and rotates it. A guest may write without end; rotation bounds the disk space.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Size at which a file is rotated, bytes.
pub(super) const ROTATE: u64 = 4 * 1024 * 1024;
/// Number of older files kept; `.1` is the newest.
pub(super) const KEPT: u32 = 3;

/// An open log file with rotation.
#[derive(Debug)]
pub(super) struct Rotating {
    path: PathBuf,
    file: File,
    size: u64,
    /// Size at which it is rotated, bytes.
    rotate: u64,
    /// Number of older files kept.
    kept: u32,
}

impl Rotating {
    /// Opens the file at `path` for appending. Creates it with mode 0600.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, ROTATE, KEPT)
    }

    /// Opens a file that is rotated at another size, with another number of older files.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn open_with(path: &Path, rotate: u64, kept: u32) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, rotate, kept })
    }

    /// Appends bytes, all to the same file.
    ///
    /// # Errors
    /// When the write or the rotation fails.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size >= self.rotate {
            for number in (1..self.kept).rev() {
                match std::fs::rename(older(&self.path, number), older(&self.path, number + 1)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            std::fs::rename(&self.path, older(&self.path, 1))?;
            *self = Self::open_with(&self.path, self.rotate, self.kept)?;
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// The path of an older file; `number` counts from 1, the newest.
pub(super) fn older(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_the_newest_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Rotating::open(&path).unwrap();
        let whole = ROTATE as usize;
        for part in b'a'..=b'f' {
            log.append(&vec![part; whole]).unwrap();
        }
        let first = |path: PathBuf| std::fs::read(path).ok().map(|bytes| (bytes[0], bytes.len()));
        assert_eq!(first(path.clone()), Some((b'f', whole)));
        let kept: Vec<_> = (1..=KEPT + 1).map(|number| first(older(&path, number))).collect();
        assert_eq!(kept, [Some((b'e', whole)), Some((b'd', whole)), Some((b'c', whole)), None]);
        // A new process counts the bytes that are already in the file.
        drop(log);
        Rotating::open(&path).unwrap().append(b"g").unwrap();
        assert_eq!(first(path), Some((b'g', 1)));
    }
}
