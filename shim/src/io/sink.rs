//! Where output is written to: a fifo, a file, a logging program's pipe, or nowhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::Error;

/// An open destination.
#[derive(Debug)]
pub enum Sink {
    /// Thrown away.
    Nowhere,
    /// A fifo, or a program's pipe. It takes as much as fits; the rest waits.
    Pipe(pipe::Sender),
    /// A file.
    File {
        /// Opened for appending.
        file: Arc<File>,
        /// The last write has failed.
        failing: bool,
    },
}

impl Sink {
    /// Opens what containerd's client has made at `path`.
    ///
    /// A fifo is opened for reading too: opening does not wait for a reader then, a reader may go and another come, and none of it ends the
    /// process's output. The reader sees the end when the copy has ended.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(field: &'static str, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { field, path: path.to_owned(), source };
        if fs::metadata(path).map_err(failed)?.file_type().is_fifo() {
            return Ok(Self::Pipe(pipe::OpenOptions::new().read_write(true).open_sender(path).map_err(failed)?));
        }
        let file = OpenOptions::new().append(true).open(path).map_err(failed)?;
        Ok(Self::File { file: Arc::new(file), failing: false })
    }

    /// Opens the file at `path`, and makes it and the folders that it lies in if they are not there, as runc's shim does.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn append(field: &'static str, path: &Path) -> Result<Self, Error> {
        let open = || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            OpenOptions::new().append(true).create(true).mode(0o644).open(path)
        };
        let file = open().map_err(|source| Error::Open { field, path: path.to_owned(), source })?;
        Ok(Self::File { file: Arc::new(file), failing: false })
    }

    /// Writes all of `data`; `moved` is called whenever some of it has gone. What a place does not take is lost, and the log says so: the
    /// process must not stand still because of it.
    pub async fn write(&mut self, mut data: Vec<u8>, moved: impl Fn()) {
        match self {
            Self::Nowhere => moved(),
            Self::Pipe(pipe) => {
                let mut rest = data.as_slice();
                while !rest.is_empty() {
                    match pipe.write(rest).await {
                        Ok(written) => {
                            rest = &rest[written..];
                            moved();
                        }
                        Err(error) => {
                            tracing::error!(%error, "output is lost from here on: nobody takes it any more");
                            *self = Self::Nowhere;
                            return;
                        }
                    }
                }
            }
            Self::File { file, failing } => {
                let to = file.clone();
                // A file can be slow, and is never ready or not: on a thread for it.
                let written = tokio::task::spawn_blocking(move || (&*to).write_all(&data).map(|()| data.clear())).await;
                match written.unwrap_or_else(|error| Err(io::Error::other(error))) {
                    Ok(()) => *failing = false,
                    Err(error) if !*failing => {
                        tracing::error!(%error, "output is lost: it cannot be written");
                        *failing = true;
                    }
                    Err(_) => {}
                }
                moved();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[tokio::test]
    async fn a_file_is_appended_to_and_made_with_its_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/log");
        for _ in 0..2 {
            let mut sink = Sink::append("stdout", &path).unwrap();
            sink.write(b"line\n".to_vec(), || {}).await;
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\n");
        // By its bare path it has to be there.
        Sink::open("stdout", &path).unwrap().write(b"end".to_vec(), || {}).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\nend");
        let missing = Sink::open("stdout", &folder.path().join("missing")).unwrap_err().to_string();
        assert!(missing.starts_with("stdout: open /") && missing.contains("No such file"), "{missing}");
    }

    #[tokio::test]
    async fn a_pipe_without_readers_loses_output_but_does_not_stop() {
        let (mut read, write) = nix::unistd::pipe().map(|(read, write)| (File::from(read), write)).unwrap();
        let mut sink = Sink::Pipe(pipe::Sender::from_owned_fd(write).unwrap());
        sink.write(b"first".to_vec(), || {}).await;
        let mut got = [0; 5];
        read.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"first");
        drop(read);
        for _ in 0..3 {
            sink.write(vec![0; 200_000], || {}).await;
        }
        assert!(matches!(sink, Sink::Nowhere));
    }
}
