//! What is kept while a layer is applied, and what is reported of it.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::record::Record;

/// Longest description of a failure, bytes.
pub(super) const MESSAGE_MAX: usize = 512;
/// How many files with several names are remembered. Further ones become a file for each name.
pub(super) const LINKS_MAX: usize = 1 << 16;

/// What was applied, and what was not.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) failed: u64,
    pub(crate) failure: String,
    pub(crate) rejected: u64,
    pub(crate) rejection: String,
}

/// Files that have several names.
#[derive(Debug, Default)]
pub(super) struct Links(pub(super) HashMap<u64, Link>);

#[derive(Debug)]
pub(super) struct Link {
    /// Relative to the filesystem's root.
    pub(super) path: PathBuf,
    /// How many names have not been seen.
    pub(super) left: u64,
}

pub(super) struct Copier {
    /// The filesystem's root.
    pub(super) root: OwnedFd,
    /// What is being applied, relative to the root.
    pub(super) path: PathBuf,
    /// The places of files that have several names.
    pub(super) links: Links,
    pub(super) buffer: Vec<u8>,
    pub(super) report: Report,
    /// Where new files are noted, if another copy may have to remove them.
    pub(super) record: Option<Record>,
}

impl Copier {
    pub(super) fn new(root: OwnedFd, record: Option<Record>) -> Self {
        let (path, buffer) = (PathBuf::new(), Vec::new());
        Self { root, path, links: Links::default(), buffer, report: Report::default(), record }
    }

    /// Notes that the copy creates, or has created, the current entry.
    pub(super) fn created(&mut self) -> io::Result<()> {
        let path = self.path.as_os_str().as_encoded_bytes();
        self.record.as_mut().map_or(Ok(()), |record| record.note(path))
    }

    /// Notes that the current entry is not, or not completely applied.
    ///
    /// # Errors
    /// The error itself, if it concerns every other entry too.
    pub(super) fn note(&mut self, error: io::Error) -> io::Result<()> {
        if is_final(&error) {
            return Err(error);
        }
        self.report.failed += 1;
        if self.report.failure.is_empty() {
            self.report.failure = shortened(format!("/{}: {error}", self.path.display()));
        }
        Ok(())
    }

    /// Notes that the current entry lacks an extended attribute.
    pub(super) fn rejected(&mut self, name: &CStr, error: &io::Error) {
        self.report.rejected += 1;
        if self.report.rejection.is_empty() {
            let name = name.to_string_lossy();
            self.report.rejection = shortened(format!("{name} of /{}: {error}", self.path.display()));
        }
    }
}

/// Whether an error concerns every other file too.
fn is_final(error: &io::Error) -> bool {
    let all = [Errno::ENOSPC, Errno::EDQUOT, Errno::EROFS, Errno::EIO, Errno::ENOTCONN, Errno::ENOMEM, Errno::ENFILE];
    error.raw_os_error().is_some_and(|number| all.contains(&Errno::from_raw(number)))
}

pub(super) fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MESSAGE_MAX));
    text
}
