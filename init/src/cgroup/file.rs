//! Reads the files of a cgroup.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Reads a file of a group. None when the kernel does not have it or does not fill it (PSI that is switched off).
pub(super) fn read(group: &Path, file: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(group.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("read {file}: {error}"))),
    }
}

/// The number after `key` in a flat keyed file (one key and number per line); 0 if the key is missing.
pub(super) fn number(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

/// Whether a group no longer exists: ENOENT by its name, ENODEV through a file that was still open.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

pub(super) fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })
}
