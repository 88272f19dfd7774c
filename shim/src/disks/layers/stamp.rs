//! What an image is recognized by, so that no other file is taken for it: neither one that was cut short, written to or
//! copied, nor one that was never finished.
//!
//! A stamp is written when the image is complete and on the host's disk. Whatever changes the image's file afterwards
//! changes its ctime, which no program can set.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest stamp, bytes: a path is its only long part.
const MAX: u64 = 16 * 1024;

/// The stamp of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// The image's size.
    pub bytes: u64,
    inode: u64,
    /// The image's ctime: seconds and nanoseconds.
    changed: (i64, i64),
    /// The digest of the image's bytes.
    pub(super) sha256: String,
    /// The layer from which it was made, for operators.
    pub layer: PathBuf,
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata, sha256: String, layer: PathBuf) -> Self {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Self { bytes: metadata.len(), inode: metadata.ino(), changed, sha256, layer }
    }

    /// Whether a file is the image, unchanged.
    pub(super) fn fits(&self, metadata: &Metadata) -> bool {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        metadata.is_file() && (metadata.len(), metadata.ino(), changed) == (self.bytes, self.inode, self.changed)
    }

    /// Reads a stamp.
    ///
    /// # Errors
    /// When the file cannot be read, or is none.
    pub(super) fn read(file: &File) -> io::Result<Self> {
        let mut text = Vec::new();
        file.take(MAX).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}
