//! Output files, written at their end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// An output file.
#[derive(Debug)]
pub(crate) struct OutputFile {
    file: Arc<File>,
    /// The last write failed.
    failing: bool,
}

impl OutputFile {
    pub(super) fn new(file: File) -> Self {
        Self { file: Arc::new(file), failing: false }
    }

    /// Appends `data`. A failure loses it; the first of several in a row is logged.
    pub(super) async fn append(&mut self, data: Vec<u8>) {
        let file = self.file.clone();
        // On a thread: writing to a file can block, and epoll does not support files.
        let written = tokio::task::spawn_blocking(move || (&*file).write_all(&data)).await;
        match written.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => {
                tracing::error!(%error, "failed to write to the file: output is lost");
                self.failing = true;
            }
            Err(_) => {}
        }
    }
}

/// Opens the file at `path` for appending. If `create` is set, creates it if it does not exist.
pub(super) fn open(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().append(true).create(create).mode(0o644).open(path)
}

/// Creates the directories above `path`.
pub(super) fn create_parents(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}
