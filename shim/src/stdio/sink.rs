//! Where output is written to: a fifo, a file, a logging program's pipe, or nowhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::stdio::Error;

/// How long opening a destination may take; the start of its process waits for it.
const OPEN_WAIT: Duration = Duration::from_secs(10);

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
    pub async fn open(field: &'static str, path: &Path) -> Result<Self, Error> {
        Self::opened(field, path, false).await
    }

    /// Opens the file at `path`, and makes it and the folders that it lies in if they are not there, as runc's shim does. A fifo is one here too.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub async fn append(field: &'static str, path: &Path) -> Result<Self, Error> {
        Self::opened(field, path, true).await
    }

    async fn opened(field: &'static str, path: &Path, make: bool) -> Result<Self, Error> {
        let failed = |source| Error::Open { field, path: path.to_owned(), source };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("it takes longer than {OPEN_WAIT:?}"));
        let to = path.to_owned();
        // Any path can hang, as one on a file system whose server is gone: on a thread for it, which is left behind then.
        let opening = tokio::task::spawn_blocking(move || open(&to, make));
        let opened = timeout(OPEN_WAIT, opening).await.map_err(late).map_err(failed)?;
        let (file, is_fifo) = opened.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed)?;
        if is_fifo {
            return Ok(Self::Pipe(pipe::Sender::from_file(file).map_err(failed)?));
        }
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

/// Opens a destination, and says whether it is a fifo. May hang.
fn open(path: &Path, make: bool) -> io::Result<(File, bool)> {
    if let Some(folder) = path.parent().filter(|_| make) {
        fs::create_dir_all(folder)?;
    }
    let is_fifo = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type().is_fifo(),
        Err(error) if make && error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let mut options = OpenOptions::new();
    if is_fifo {
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    } else {
        options.append(true).create(make).mode(0o644);
    }
    Ok((options.open(path)?, is_fifo))
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
            let mut sink = Sink::append("stdout", &path).await.unwrap();
            sink.write(b"line\n".to_vec(), || {}).await;
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\n");
        // By its bare path it has to be there.
        Sink::open("stdout", &path).await.unwrap().write(b"end".to_vec(), || {}).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\nend");
        let missing = Sink::open("stdout", &folder.path().join("missing")).await.unwrap_err().to_string();
        assert!(missing.starts_with("stdout: open /") && missing.contains("No such file"), "{missing}");
    }

    #[tokio::test]
    async fn a_fifo_in_the_place_of_a_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut sink = Sink::append("stdout", &path).await.unwrap();
        assert!(matches!(sink, Sink::Pipe(_)), "{sink:?}");
        sink.write(b"before its reader".to_vec(), || {}).await;
        let mut reader = File::open(&path).unwrap();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before its reader");
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
