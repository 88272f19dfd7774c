//! An open output: a fifo, a file, a logging program's pipe, or nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::stdio::error::StdioError;
use crate::stdio::fifo;
use crate::stdio::file::{self, OutputFile};

/// Time limit for opening an output. The start of the process waits for it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// An open output.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Discards everything.
    Nowhere,
    /// A fifo or a logging program's pipe. Writers wait while it is full.
    Pipe(pipe::Sender),
    /// A file.
    File(OutputFile),
}

impl Sink {
    /// Opens the fifo or file at `path`, which containerd's client created.
    ///
    /// # Errors
    /// [`StdioError::Open`].
    pub(super) async fn open(field: &'static str, path: &Path) -> Result<Self, StdioError> {
        Self::open_within_timeout(field, path, false).await
    }

    /// Opens the file at `path`. Creates it and its directories if they do not exist, as runc's shim does. A fifo at
    /// `path` works as in [`Sink::open`].
    ///
    /// # Errors
    /// [`StdioError::Open`].
    pub(super) async fn append(field: &'static str, path: &Path) -> Result<Self, StdioError> {
        Self::open_within_timeout(field, path, true).await
    }

    async fn open_within_timeout(field: &'static str, path: &Path, create: bool) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Open { field, path: path.to_owned(), source };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no result within {OPEN_TIMEOUT:?}"));
        let target = path.to_owned();
        // On a thread, which is abandoned after the timeout: an open can block forever, for example on a network
        // filesystem whose server is gone.
        let opening = tokio::task::spawn_blocking(move || open(&target, create));
        let opened = timeout(OPEN_TIMEOUT, opening).await.map_err(late).map_err(failed)?;
        let (file, is_fifo) = opened.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed)?;
        if is_fifo {
            return Ok(Self::Pipe(pipe::Sender::from_file(file).map_err(failed)?));
        }
        Ok(Self::File(OutputFile::new(file)))
    }

    /// Writes all of `data` and calls `progressed` with the number of bytes whenever some were written.
    ///
    /// A failed write is logged and its data is lost: output errors must not stall the process.
    pub(super) async fn write(&mut self, data: Vec<u8>, progressed: impl Fn(usize)) {
        match self {
            Self::Nowhere => progressed(data.len()),
            Self::Pipe(pipe) => {
                if let Err(error) = fifo::write_all(pipe, &data, progressed).await {
                    self.lose(&error);
                }
            }
            Self::File(file) => {
                let length = data.len();
                file.append(data).await;
                progressed(length);
            }
        }
    }

    /// Writes what can be written without waiting, and returns its length.
    pub(super) fn write_now(&mut self, data: &[u8]) -> usize {
        match self {
            Self::Nowhere => data.len(),
            Self::Pipe(pipe) => match pipe.try_write(data) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => {
                    self.lose(&error);
                    data.len()
                }
            },
            // Writing to a file can block.
            Self::File(_) => 0,
        }
    }

    fn lose(&mut self, error: &io::Error) {
        tracing::error!(%error, "failed to write to the pipe: all further output is lost");
        *self = Self::Nowhere;
    }
}

/// Opens the output at `path` and returns whether it is a fifo. May block.
fn open(path: &Path, create: bool) -> io::Result<(File, bool)> {
    if create {
        file::create_parents(path)?;
    }
    let is_fifo = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type().is_fifo(),
        Err(error) if create && error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let file = if is_fifo { fifo::open_output(path) } else { file::open(path, create) };
    Ok((file?, is_fifo))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use husk_protos::chain::Chain;

    use super::*;

    #[tokio::test]
    async fn a_file_is_created_with_its_directories_and_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/log");
        for _ in 0..2 {
            let mut sink = Sink::append("stdout", &path).await.unwrap();
            sink.write(b"line\n".to_vec(), |_| {}).await;
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\n");
        // A bare path must exist.
        Sink::open("stdout", &path).await.unwrap().write(b"end".to_vec(), |_| {}).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "line\nline\nend");
        let error = Sink::open("stdout", &folder.path().join("missing")).await.unwrap_err();
        let missing = Chain(&error).to_string();
        assert!(missing.starts_with("stdout: open /") && missing.contains("No such file"), "{missing}");
    }

    #[tokio::test]
    async fn a_fifo_in_place_of_a_file_needs_no_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut sink = Sink::append("stdout", &path).await.unwrap();
        assert!(matches!(sink, Sink::Pipe(_)), "{sink:?}");
        sink.write(b"before its reader".to_vec(), |_| {}).await;
        let mut reader = File::open(&path).unwrap();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before its reader");
    }

    #[tokio::test]
    async fn a_pipe_without_readers_loses_output_but_does_not_block() {
        let (mut read, write) = nix::unistd::pipe().map(|(read, write)| (File::from(read), write)).unwrap();
        let mut sink = Sink::Pipe(pipe::Sender::from_owned_fd(write).unwrap());
        sink.write(b"first".to_vec(), |_| {}).await;
        let mut received = [0; 5];
        read.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"first");
        drop(read);
        for _ in 0..3 {
            sink.write(vec![0; 200_000], |_| {}).await;
        }
        assert!(matches!(sink, Sink::Nowhere));
    }
}
