//! The client's ends of the fifos of a process's standard streams, as containerd's clients hold them.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_protos::streams::PIPE_SIZE;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// Creates a fifo at `path`.
pub fn make(path: &Path) -> Result<()> {
    mkfifo(path, Mode::from_bits_truncate(0o600)).with_context(|| format!("mkfifo {}", path.display()))
}

/// The reading end of a fifo.
pub struct Reader {
    path: PathBuf,
    file: File,
}

impl Reader {
    /// Creates the fifo and opens it, before there is a writer.
    pub fn make(path: &Path) -> Result<Self> {
        make(path)?;
        Self::open(path)
    }

    /// Opens an existing fifo.
    pub fn open(path: &Path) -> Result<Self> {
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        Ok(Self { path: path.to_path_buf(), file: open.with_context(|| format!("open {}", path.display()))? })
    }

    /// Returns the bytes now in the fifo, without waiting for more.
    pub fn available(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match (&self.file).read_to_end(&mut bytes) {
            Err(e) if e.kind() != ErrorKind::WouldBlock => Err(e).context("read fifo"),
            _ => Ok(bytes),
        }
    }

    /// Waits for bytes and returns up to `most` of them; empty at the end of the stream.
    pub fn read(&mut self, most: usize, deadline: Duration) -> Result<Vec<u8>> {
        let started = Instant::now();
        let mut bytes = vec![0; most];
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // A fifo without a first writer is neither readable nor hung up: pipe(7), poll(2).
            if poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
                bail!("no data in {} within {deadline:?}", self.path.display());
            }
            match self.file.read(&mut bytes) {
                Ok(length) => {
                    bytes.truncate(length);
                    return Ok(bytes);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("read fifo"),
            }
        }
    }

    /// Reads up to and including `needle` and returns everything read.
    pub fn read_until(&mut self, needle: &str, deadline: Duration) -> Result<String> {
        let started = Instant::now();
        let mut all = Vec::new();
        while !all.ends_with(needle.as_bytes()) {
            let left = deadline.saturating_sub(started.elapsed());
            // Byte by byte: what follows belongs to the next read.
            let byte = self.read(1, left).with_context(|| format!("after {:?}", String::from_utf8_lossy(&all)))?;
            if byte.is_empty() {
                bail!("the stream has ended after {:?}, without {needle:?}", String::from_utf8_lossy(&all));
            }
            all.extend(byte);
        }
        Ok(String::from_utf8_lossy(&all).into_owned())
    }

    /// Reads until the last writer has closed the fifo.
    pub fn read_to_end(&mut self, deadline: Duration) -> Result<Vec<u8>> {
        let started = Instant::now();
        let mut all = Vec::new();
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            let bytes = self.read(64 * 1024, left).with_context(|| format!("after {} bytes", all.len()))?;
            if bytes.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(&bytes);
        }
    }
}

/// Fills a fifo that another process holds open, so that writers block until it is read.
pub fn fill(path: &Path) -> Result<()> {
    let mut fifo = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // Otherwise the shim would give it more room.
    fcntl(&fifo, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE as i32)).context("F_SETPIPE_SZ")?;
    // Byte by byte at the end: a fifo accepts a small write completely or not at all, pipe(7).
    for size in [4096, 1] {
        loop {
            match fifo.write(&vec![b'-'; size]) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e).with_context(|| format!("fill {}", path.display())),
            }
        }
    }
    Ok(())
}

/// Creates a fifo and opens it for writing, before there is a reader.
pub fn writer(path: &Path) -> Result<File> {
    make(path)?;
    // Opening a fifo only for writing would block until it has a reader: fifo(7).
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}
