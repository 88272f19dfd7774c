//! Copies output from a process's pipe or terminal to its stream.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_protos::STDIO_CHUNK;
use husk_protos::stdio::OutputChunk;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use ttrpc::r#async::ServerStreamSender;

use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};
use crate::fd::watch_fd;

/// More than the output that a terminal buffers: 8 KiB (pty_common_install) and 4 KiB (N_TTY_BUF_SIZE). The amount in
/// the first buffer cannot be queried.
const TERMINAL_BUFFERS: usize = 64 * 1024;

/// Where output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputSource {
    /// The read end of a pipe.
    Pipe,
    /// The master of a terminal.
    Terminal,
}

/// How [`pump`] ended.
pub(super) enum OutputEnd {
    /// The last writer has closed the pipe, and all output was sent.
    Finished,
    /// Sending or reading failed. The pipe may contain more output.
    Broken(OwnedFd, CallError),
}

/// The stream's exit mark, which reports that the process has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExitMark {
    /// The process runs.
    NotDue,
    /// The process has exited. The mark follows this many bytes of a pipe, or at most this many of a terminal.
    After(usize),
    Sent,
}

/// Sends output until the end of the pipe. The exit mark follows the bytes that were in the pipe at the exit: a process
/// that inherited the pipe can neither delay the mark nor insert output before it.
pub(super) async fn pump(
    fd: OwnedFd,
    source: OutputSource,
    exited: watch::Receiver<bool>,
    stream: &ServerStreamSender<OutputChunk>,
    disconnect: &mut Disconnect,
) -> OutputEnd {
    let pipe = match watch_fd(fd, Interest::READABLE) {
        Ok(pipe) => pipe,
        Err(error) => {
            let (fd, error) = error.into_parts();
            return OutputEnd::Broken(fd, CallError::internal("watch a pipe", &error));
        }
    };
    let mut pump = Pump { pipe, source, exited, stream, disconnect, mark: ExitMark::NotDue };
    match pump.run().await {
        Ok(()) => OutputEnd::Finished,
        Err(error) => OutputEnd::Broken(pump.pipe.into_inner(), error),
    }
}

struct Pump<'a> {
    pipe: AsyncFd<OwnedFd>,
    source: OutputSource,
    exited: watch::Receiver<bool>,
    stream: &'a ServerStreamSender<OutputChunk>,
    disconnect: &'a mut Disconnect,
    mark: ExitMark,
}

impl Pump<'_> {
    async fn run(&mut self) -> Result<(), CallError> {
        loop {
            self.advance_mark().await?;
            // Empty while waiting: an idle stream holds no memory.
            let mut chunk = OutputChunk::new();
            let Some(read) = self.read(&mut chunk.data).await? else { continue };
            match read {
                Ok(0) => return Ok(()),
                // EIO: no process has the terminal open any more, and all output was read (drivers/tty/n_tty.c).
                Err(error) if self.is_terminal() && error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Ok(read) => {
                    chunk.data.truncate(read);
                    self.send(&chunk).await?;
                    if let ExitMark::After(left) = &mut self.mark {
                        *left -= read;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.mark = ExitMark::After(0),
                Err(error) => return Err(CallError::internal("read a pipe", &error)),
            }
        }
    }

    /// Notices the process's exit, and sends the exit mark when it is due.
    async fn advance_mark(&mut self) -> Result<(), CallError> {
        if self.mark == ExitMark::NotDue && *self.exited.borrow() {
            let left = if self.is_terminal() { Ok(TERMINAL_BUFFERS) } else { buffered(&self.pipe) };
            self.mark =
                ExitMark::After(left.map_err(|e| CallError::internal("query the size of a pipe's content", &e))?);
        }
        if self.mark == ExitMark::After(0) {
            self.send(&OutputChunk { exited: true, ..Default::default() }).await?;
            self.mark = ExitMark::Sent;
        }
        Ok(())
    }

    /// Waits for output and reads it. None when there is nothing to read yet and [`Self::advance_mark`] has to run
    /// first.
    async fn read(&mut self, data: &mut Vec<u8>) -> Result<Option<io::Result<usize>>, CallError> {
        let terminal = self.is_terminal();
        let Self { pipe, exited, disconnect, mark, .. } = self;
        let size = if let ExitMark::After(left) = mark { STDIO_CHUNK.min(*left) } else { STDIO_CHUNK };
        if terminal && matches!(mark, ExitMark::After(_)) {
            // Bypass the runtime's readiness: the terminal returns EAGAIN only after all output has passed its buffers
            // (n_tty_read).
            data.resize(size, 0);
            return Ok(Some(read(pipe, data)));
        }
        let mut ready = tokio::select! {
            biased;
            () = disconnect.wait() => return Err(CallError::new(FailureKind::Aborted, "the connection ended")),
            ready = pipe.readable() => ready.map_err(|e| CallError::internal("wait for a pipe", &e))?,
            // An error means that the process's record is gone. No exit will follow; only the end of the pipe.
            Ok(()) = exited.changed(), if *mark == ExitMark::NotDue => return Ok(None),
        };
        data.resize(size, 0);
        Ok(ready.try_io(|pipe| read(pipe, data)).ok())
    }

    async fn send(&self, chunk: &OutputChunk) -> Result<(), CallError> {
        self.stream.send(chunk).await.map_err(|e| CallError::internal("send output", &e))
    }

    fn is_terminal(&self) -> bool {
        self.source == OutputSource::Terminal
    }
}

fn read(pipe: &AsyncFd<OwnedFd>, data: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(pipe.get_ref(), data)?)
}

/// Number of bytes in the pipe (FIONREAD, pipe(7)).
fn buffered(pipe: &AsyncFd<OwnedFd>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to a variable that outlives the call.
    let done = unsafe { libc::ioctl(pipe.get_ref().as_raw_fd(), libc::FIONREAD as _, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}
